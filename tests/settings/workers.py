"""What a worker asks of the model under a setting, while it loads it: the release's own code."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from matrix import probe
from matrix.cells import Cell
from regress import third_party, tiny_llama4
from regress.releases import installed_release, span
from weights.probe import construct, leave_out_tokenizer

MODEL = "Llama4ForConditionalGeneration"


def refusal(folder: Path, cell: Cell, engine: str) -> Exception | None:
    """Return what a worker of an engine fails with, if it does; it is the same for every GPU."""
    ask = {"lora": lora, "speculative-eagle": eagle}.get(cell.setting.name if cell.setting else "")
    if ask is None:
        return None
    with probe.environment(cell), pytest.MonkeyPatch.context() as patch:
        config = probe.engine_config(folder, "llama4", cell)
        config.compilation_config.static_forward_context.clear()
        config.device_config.device = torch.device("cpu")
        with tiny_llama4.loading(config):
            try:
                ask(config, engine, patch)
            except Exception as error:
                if MODEL not in str(error):
                    # Not of the model, but of what stands in here for a worker.
                    raise
                return error
    return None


def lora(config: Any, engine: str, patch: pytest.MonkeyPatch) -> None:
    """Ask whether the model takes adapters."""
    bare = without_weights()
    if engine == "v1":
        mixin = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
        of_config: tuple[Any, ...] = (config,)
        if installed_release() not in span("0.11.0"):
            of_config = (config.model_config, config.scheduler_config, config.lora_config)
        mixin.LoRAModelRunnerMixin.load_lora_model(
            SimpleNamespace(), bare, *of_config, torch.device("cpu")
        )
        return
    module = importlib.import_module("vllm.worker.model_runner")
    patch.setattr(module, "get_model", lambda **_: bare)
    measured = contextlib.nullcontext(SimpleNamespace(consumed_memory=0))
    for profiler in ("DeviceMemoryProfiler", "MemorySnapshot"):
        patch.setattr(module, profiler, lambda *_: measured, raising=False)
    runner = SimpleNamespace(
        vllm_config=config,
        model_config=config.model_config,
        lora_config=config.lora_config,
        scheduler_config=config.scheduler_config,
        device=torch.device("cpu"),
    )
    module.GPUModelRunnerBase.load_model(runner)


def without_weights() -> Any:
    """Return the model, with no layer in it."""
    model = getattr(importlib.import_module("vllm.model_executor.models.mllama4"), MODEL)
    bare = model.__new__(model)
    torch.nn.Module.__init__(bare)
    return bare


def eagle(config: Any, engine: str, patch: pytest.MonkeyPatch) -> None:
    """Have EAGLE's head loaded beside the model, of which it takes parts."""
    if engine == "v0":
        eagle_of_v0(config)
        return
    # No kernel is called, but layers look for it.
    patch.setattr(torch.ops._C, "silu_and_mul", None, raising=False)
    leave_out_tokenizer()
    target = construct(config)
    module = third_party.import_untuned("vllm.v1.spec_decode.eagle")
    loader = SimpleNamespace(get_all_weights=lambda *_: [])
    patch.setattr(module, "get_model_loader", lambda *_: loader, raising=False)
    patch.setattr(module, "get_model", head, raising=False)
    # Only with the compiled extension can it be imported; it tags what torch.compile keeps.
    backends = SimpleNamespace(set_model_tag=lambda _: contextlib.nullcontext())
    patch.setitem(sys.modules, "vllm.compilation.backends", backends)
    module.EagleProposer.load_model(SimpleNamespace(vllm_config=config), target)


def eagle_of_v0(config: Any) -> None:
    """Have V0's worker share the model's `lm_head` with EAGLE's head."""
    assert config.speculative_config.draft_model_config.hf_config.model_type == "eagle"
    module = importlib.import_module("vllm.spec_decode.spec_decode_worker")
    ready = dict.fromkeys(("init_device", "load_model"), lambda: None)
    runner = SimpleNamespace(model=without_weights())
    scorer = SimpleNamespace(**ready, model_runner=SimpleNamespace(model_runner=runner))
    module.SpecDecodeWorker.init_device(
        SimpleNamespace(
            scorer_worker=scorer,
            proposer_worker=SimpleNamespace(**ready),
            _enable_lm_head_weight_load=True,
        )
    )


def head(*, vllm_config: Any, model_config: Any) -> Any:
    """Construct EAGLE's head without weights, as vLLM's loader does before it loads them."""
    utils = importlib.import_module("vllm.model_executor.model_loader.utils")
    return utils.initialize_model(vllm_config=vllm_config, model_config=model_config)
