"""A whole engine's log-probabilities and greedy tokens, against Transformers' in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llama4_checkpoint import CHUNK
from regress.expected import (
    CHUNKS_IGNORED,
    KEYWORD_MISSING_ERROR,
    V0_CHUNKED,
    keyword_missing,
)
from regress.releases import LLAMA4, in_order, installed_release, span

from .cases import (
    DEFAULTS,
    FLASH_CASES,
    MULTI_STEP,
    ON_HOPPER,
    SELECTED,
    SPECULATIVE,
    V1_CASES,
    WITHIN_CHUNK,
    XFORMERS_CASES,
    Case,
    Checkpoint,
)
from .engine import Answers
from .reference import EightBits, Reference

RELEASE = installed_release()
MULTI_STEP_RELEASES = span("0.8.3", "0.9.2")
SPECULATIVE_RELEASES = span("0.8.3", "0.9.2")
V1_COUNTS_CACHED = span("0.9.0")
"""V1 of releases before does not say how many tokens of a prompt it had."""

WRONG = r"wrong answers: |engine died: "

chunks_ignored = pytest.mark.fail_to_pass(
    # Stock 0.8.4 to 0.10.0 run Transformers' text model, which need not start everywhere.
    releases=in_order(CHUNKS_IGNORED),
    raises=f"{WRONG}|{KEYWORD_MISSING_ERROR}",
)

GetAnswers = Callable[[Case], Answers]
GetReference = Callable[[Checkpoint], Reference]
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

    def is_beyond(self, case: Case) -> bool:
        """Whether it is more than the case allows."""
        bound = case.bound
        past = bound.distance
        if bound.beyond_first is not None:
            past = min(past, self.within + bound.beyond_first)
        misses = self.generated - self.agreement
        return self.within > bound.distance or self.past > past or misses > bound.misses


def cache_of(about: Mapping[str, str]) -> EightBits | None:
    """How the engine that ran reads a KV cache of 8 bits, if its is one."""
    if not about["kv_cache_dtype"].startswith("fp8"):
        return None
    dtype = torch.float8_e5m2 if "e5m2" in about["kv_cache_dtype"] else torch.float8_e4m3fn
    if about["engine"] == "V0":
        return EightBits(dtype, for_prompts=False)
    of_queries = "flash_attn" in about["backend"] or (
        RELEASE in span("0.9.0") and "flashinfer" not in about["backend"]
    )
    return EightBits(dtype, for_prompts=True, of_queries=of_queries)


def measure(case: Case, answers: Answers, reference: Reference) -> Distance:
    """Compare token by token, given the engine's own tokens: one difference shifts no others."""
    within = past = 0.0
    agreement = generated = 0
    cache = cache_of(answers.about)
    for number, answer in enumerate(answers.answers):
        image = (case.image_side, number) if case.image_side else None
        expected = reference.predict(answer.tokens, answer.prompt_len, cache, image)
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
    """Run an engine and hold it to its bounds; what ran and was measured goes to the junit XML."""
    if RELEASE not in case.releases:
        pytest.skip(f"{RELEASE} does not have it, or not right on any GPU")
    found = answers(case)
    for name, value in found.about.items():
        record(f"about_{name}", value)
    distance = measure(case, found, reference(case.checkpoint))
    record("within_chunk", f"{distance.within:.3f}")
    record("past_chunk", f"{distance.past:.3f}")
    record("agreement", f"{distance.agreement} of {distance.generated}")
    assert not distance.is_beyond(case), f"wrong answers: {distance}, allowed {case.bound}"
    assert case.backend in found.backend
    assert " and " not in found.backend, "workers have different backends"
    if case.is_cached and (found.about["engine"] == "V0" or RELEASE in V1_COUNTS_CACHED):
        assert all(answer.cached_tokens for answer in found.answers), "the prefix cache was unused"
    if case.image_side:
        given = [len(prompt) for prompt in case.settings(Path()).prompts]
        read = [answer.prompt_len for answer in found.answers]
        assert all(map(int.__gt__, read, given)), "an image was left out"
    return found


def named(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def expected(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """The same, where stock's releases depend on the case."""
    parameters = []
    for case in cases:
        wrong = in_order(case.wrong_on_stock & case.releases)
        error = rf"{WRONG}|AttributeError: .*sampler"
        marks = [pytest.mark.fail_to_pass(releases=wrong, raises=error)] if wrong else []
        parameters.append(pytest.param(case, marks=marks, id=case.name))
    return pytest.mark.parametrize("case", parameters)


@chunks_ignored
@pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0")
@named([*XFORMERS_CASES, *FLASH_CASES])
def test_v0(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


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


@expected(DEFAULTS)
def test_default(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    """Nothing forced: what nearly everyone starts."""
    check(case, answers, reference, record_property)


@expected(V1_CASES)
def test_v1(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    check(case, answers, reference, record_property)


@pytest.mark.fail_to_pass(releases=in_order(LLAMA4), raises=WRONG)
@pytest.mark.skipif(RELEASE not in LLAMA4, reason=f"{RELEASE} has no Llama 4")
@named(SELECTED)
def test_selected(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    if not ON_HOPPER:
        pytest.skip("stock has this fault on Hopper alone")
    check(case, answers, reference, record_property)


def apart(one: Answers, other: Answers) -> float:
    """The largest difference of log-probability between two engines' answers.

    Each pair of texts is compared up to where it parts, by a tie that is broken otherwise.
    """
    differences = []
    for first, second in zip(one.answers, other.answers, strict=True):
        same = common_length(first.tokens, second.tokens) - first.first
        pairs = zip(first.logprobs[:same], second.logprobs[:same], strict=True)
        differences += [abs(a - b) for a, b in pairs]
    assert differences, "not one token is the same"
    return max(differences)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens from the start are the same."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


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
    distance = apart(eager, graphs)
    record_property("graphs_to_eager", f"{distance:.3f}")
    assert distance <= 0.1


COMPILED = {
    case.name.removesuffix("-graphs"): case
    for case in (*DEFAULTS, *V1_CASES)
    if case.name.endswith("-graphs")
}
EAGER_ONES = {
    case.name.removesuffix("-eager"): case
    for case in (*DEFAULTS, *V1_CASES)
    if case.name.endswith("-eager")
}


@expected([COMPILED[name] for name in COMPILED if name in EAGER_ONES])
def test_compiled_same_as_eager(
    case: Case, answers: GetAnswers, reference: GetReference, record_property: Record
) -> None:
    """Inductor, which fuses and reorders, and CUDA graphs change little: both are right."""
    other = EAGER_ONES[case.name.removesuffix("-graphs")]
    eager = check(other, answers, reference, lambda *_: None)
    compiled = check(case, answers, reference, lambda *_: None)
    distance = apart(eager, compiled)
    record_property("graphs_to_eager", f"{distance:.3f}")
    assert distance <= case.bound.distance
