"""A whole engine's log-probabilities and greedy tokens, against Transformers' in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from llama4_checkpoint import CHUNK
from regress.expected import (
    CHUNKS_IGNORED,
    KEYWORD_MISSING_ERROR,
    V0_CHUNKED,
    keyword_missing,
)
from regress.releases import in_order, installed_release, span

from .cases import (
    FLASH_CASES,
    MULTI_STEP,
    SELECTED,
    SPECULATIVE,
    V1_CASES,
    WITHIN_CHUNK,
    XFORMERS_CASES,
    Case,
)
from .engine import Answers
from .reference import Reference

RELEASE = installed_release()
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MULTI_STEP_RELEASES = span("0.8.3", "0.9.2")
SPECULATIVE_RELEASES = span("0.8.3", "0.9.2")

WRONG = r"wrong answers: "

chunks_ignored = pytest.mark.fail_to_pass(
    # Stock 0.8.4 to 0.10.0 run Transformers' text model, which need not start everywhere.
    releases=in_order(CHUNKS_IGNORED),
    raises=f"{WRONG}|engine died: |{KEYWORD_MISSING_ERROR}",
)
sampler_missing = pytest.mark.fail_to_pass(releases=["0.8.3"], raises=r"AttributeError: .*sampler")

GetAnswers = Callable[[Case], Answers]
GetReference = Callable[[bool], Reference]
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Distance:
    """How far an engine's answers are from the reference."""

    within: float
    """Largest difference of log-probability among tokens of a first chunk."""
    past: float
    """The same among all the others."""
    agreement: int
    """Generated tokens that are the reference's greedy choice at that place."""
    generated: int


def measure(answers: Answers, reference: Reference) -> Distance:
    """Compare token by token, given the engine's own tokens: one difference shifts no others."""
    within = past = 0.0
    agreement = generated = 0
    for answer in answers.answers:
        expected = reference.predict(answer.tokens)
        for position, logprob in enumerate(answer.logprobs, answer.first):
            difference = abs(logprob - expected.logprobs[position - 1])
            # The token at `position` was predicted from the one before it.
            if position - 1 < CHUNK:
                within = max(within, difference)
            else:
                past = max(past, difference)
        greedy = expected.greedy[answer.prompt_len - 1 :]
        new = answer.tokens[answer.prompt_len :]
        agreement += sum(a == b for a, b in zip(new, greedy, strict=True))
        generated += len(new)
    return Distance(within, past, agreement, generated)


def check(case: Case, answers: GetAnswers, reference: GetReference, record: Record) -> Answers:
    """Run an engine and hold it to its bounds; what was measured goes to the junit XML."""
    if case.gpus > torch.cuda.device_count():
        pytest.skip(f"needs {case.gpus} GPUs")
    found = answers(case)
    distance = measure(found, reference(case.is_multimodal))
    record("within_chunk", f"{distance.within:.3f}")
    record("past_chunk", f"{distance.past:.3f}")
    record("agreement", f"{distance.agreement} of {distance.generated}")
    # With tensor parallelism, the engine's own process holds the first rank.
    assert case.backend in found.backend
    largest = max(distance.within, distance.past)
    wrong = largest > case.bound.distance or distance.agreement < case.bound.agreement
    assert not wrong, f"wrong answers: {distance}, allowed {case.bound}"
    return found


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@chunks_ignored
@pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0")
@named([*XFORMERS_CASES, *FLASH_CASES])
def test_v0(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    found = check(case, answers, reference, record_property)
    if case.is_cached:
        assert all(answer.cached_tokens for answer in found.answers), "the prefix cache was unused"


@chunks_ignored
@pytest.mark.skipif(RELEASE not in MULTI_STEP_RELEASES, reason=f"{RELEASE} has no multi-step")
@named(MULTI_STEP)
def test_multi_step(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


@chunks_ignored
@pytest.mark.skipif(
    RELEASE not in SPECULATIVE_RELEASES, reason=f"{RELEASE} has no speculative decoding on V0"
)
@named(SPECULATIVE)
def test_speculative(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


@keyword_missing
@pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0")
@named(WITHIN_CHUNK)
def test_within_chunk(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


@sampler_missing
@named(V1_CASES)
def test_v1(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


@pytest.mark.fail_to_pass(releases=in_order(V0_CHUNKED), raises=f"{WRONG}|engine died: ")
@pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 or no choice")
@pytest.mark.skipif(not ON_HOPPER, reason="stock has this fault on Hopper alone")
@named(SELECTED)
def test_selected(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    found = check(case, answers, reference, record_property)
    record_property("backend", found.backend)


@chunks_ignored
@pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0")
@pytest.mark.parametrize("backend", ["xformers", "flash_attn"])
@pytest.mark.parametrize("feature", ["", "text-", "chunked-prefill-"])
def test_graphs_same_as_eager(
    backend: str,
    feature: str,
    answers: GetAnswers,
    reference: GetReference,
    record_property: Record,
) -> None:
    """CUDA graphs change nothing: both are right, and next to each other."""
    cases = {case.name: case for case in (*XFORMERS_CASES, *FLASH_CASES)}
    eager = check(cases[f"{backend}-{feature}eager"], answers, reference, lambda *_: None)
    graphs = check(cases[f"{backend}-{feature}graphs"], answers, reference, lambda *_: None)
    pairs = zip(eager.answers, graphs.answers, strict=True)
    differences = [
        abs(a - b)
        for one, other in pairs
        # Where a tie is broken otherwise, what follows is another text.
        if one.tokens == other.tokens
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert differences, "no two texts are the same"
    record_property("graphs_to_eager", f"{max(differences):.3f}")
    assert max(differences) <= 0.1
