"""From engine arguments to a constructed Llama 4 layer, on the path the reports are about.

The engine's own code picks engine and backend for a made-up GPU; nothing in between is replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from . import fake_cuda, tiny_llama4
from .expected import BY_KEY, SCENARIOS, Scenario, unexpected_keyword
from .releases import LLAMA4, in_order, installed_release

RELEASE = installed_release()


def marks(scenario: Scenario) -> list[pytest.MarkDecorator]:
    """Return the marks for one scenario: what stock fails, or why it does not apply."""
    if RELEASE not in LLAMA4:
        return [pytest.mark.skip(reason=f"{RELEASE} has no Llama 4")]
    if scenario.outcome(RELEASE) is None:
        return [pytest.mark.skip(reason=f"{RELEASE} refuses this configuration or knows it not")]
    rejects = scenario.rejects
    if not rejects:
        return []
    classes = "|".join(sorted({unexpected_keyword(cls) for cls in rejects.values()}))
    return [pytest.mark.fail_to_pass(releases=in_order(frozenset(rejects)), raises=classes)]


@pytest.mark.parametrize("layer", tiny_llama4.LAYERS, ids=tiny_llama4.LAYERS.get)
@pytest.mark.parametrize(
    "scenario", [pytest.param(case, id=case.name, marks=marks(case)) for case in SCENARIOS]
)
def test_layer_constructs(
    scenario: Scenario,
    layer: int,
    start_engine: Callable[..., Any],
    stubs: Callable[[tuple[str, ...]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer is made, by the impl that this release chooses for the configuration."""
    stubs(scenario.stubs)
    monkeypatch.setattr(fake_cuda.Device, "capability", scenario.capability)
    outcome = scenario.outcome(RELEASE)
    assert isinstance(outcome, str)
    engine_args: dict[str, Any] = dict(scenario.engine_args)
    if RELEASE in scenario.within_chunk:
        # Up to there it does not matter what it lacks.
        engine_args["max_model_len"] = tiny_llama4.CHUNK
    config = start_engine(scenario.env, **engine_args)
    chosen = BY_KEY[outcome]
    made = tiny_llama4.attention_layer(config, layer)
    assert type(made.attn.impl) is getattr(importlib.import_module(chosen.module), chosen.cls)


def test_llama4_exists() -> None:
    """The releases whose tests are skipped for want of Llama 4 do lack it."""
    found = importlib.util.find_spec("vllm.model_executor.models.llama4") is not None
    assert found == (RELEASE in LLAMA4)
