"""Prompt log-probabilities: the V1 model runner of 0.8.3 and 0.8.4 takes the model's sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .expected import SAMPLER_ERROR, SAMPLER_IN_MODEL, SAMPLER_MISSING
from .releases import in_order, installed_release

SUBMODELS = (
    "Llama4VisionModel",
    "Llama4MultiModalProjector",
    "init_vllm_registered_model",
    "_initialize_model",
    "cached_tokenizer_from_config",
)
"""What the constructor makes beside itself, under the names it has in those releases."""


def submodel(*_: object, **__: object) -> Any:
    """Return a stand-in for any of them; `Llama4ForCausalLM` makes its sampler in the same way."""
    from vllm.model_executor.layers.sampler import get_sampler

    model = torch.nn.Module()
    model.sampler = get_sampler()
    model.make_empty_intermediate_tensors = None
    return model


@pytest.mark.skipif(
    installed_release() not in SAMPLER_IN_MODEL,
    reason="without Llama 4, or with a sampler that the model runner has of its own",
)
@pytest.mark.fail_to_pass(releases=in_order(SAMPLER_MISSING), raises=SAMPLER_ERROR)
def test_model_has_the_sampler_that_the_runner_uses(
    start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The multimodal model offers what `_get_prompt_logprobs_dict` calls."""
    from vllm.model_executor.models import mllama4

    config = start_engine({})
    for name in SUBMODELS:
        monkeypatch.setattr(mllama4, name, submodel, raising=False)
    model = mllama4.Llama4ForConditionalGeneration(vllm_config=config)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    logprobs = model.sampler.compute_logprobs(logits)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1))
