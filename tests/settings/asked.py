"""The settings that are asked, each alone, as the engine's arguments have them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matrix.cells import Setting
from regress import tiny_llama4
from regress.releases import installed_release, span

DRAFT, EAGLE = "draft", "eagle-head"
"""Folders of the models that propose tokens. Up to 0.8.4 the name tells that one is EAGLE's."""
PROPOSED = 2
"""Tokens that are proposed at once."""
BLOCKS = (8, 32, 64, 128)
"""Tokens of a block, as --block-size takes them, but for the default."""


def plain(arguments: Mapping[str, Any], _: Path) -> Mapping[str, Any]:
    """Return arguments that are the same in all releases."""
    return arguments


def speculative(model: str, folder: Path) -> Mapping[str, Any]:
    """Return speculative decoding by a model, or by n-grams."""
    if not model:
        how: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 4}
    else:
        how = {"model": str(folder / model)}
    if model == EAGLE:
        how["method"] = "eagle"
    return {"speculative_config": {**how, "num_speculative_tokens": PROPOSED}}


def connector(_: Path) -> Mapping[str, Any]:
    """Return a KV connector that needs no package of its own: V1's, where the release has them."""
    v1 = "vllm.distributed.kv_transfer.kv_connector.v1"
    name = "SharedStorageConnector" if importlib.util.find_spec(v1) else "PyNcclConnector"
    config = importlib.import_module("vllm.config").KVTransferConfig
    alone = {"kv_rank": 0, "kv_parallel_size": 2} if name == "PyNcclConnector" else {}
    return {"kv_transfer_config": config(kv_connector=name, kv_role="kv_both", **alone)}


def setting(name: str, arguments: Callable[[Path], Mapping[str, Any]] | None = None,
            **given: Any) -> Setting:  # fmt: skip
    """Return a setting by its arguments, or by what makes them."""
    return Setting(name, arguments or partial(plain, given))


SETTINGS = (
    setting("pipeline-parallel", pipeline_parallel_size=2),
    setting("tensor-parallel", tensor_parallel_size=2),
    setting("lora", enable_lora=True),
    setting("speculative-ngram", partial(speculative, "")),
    setting("speculative-draft", partial(speculative, DRAFT)),
    setting("speculative-eagle", partial(speculative, EAGLE)),
    setting("kv-connector", connector),
    setting("no-hybrid-kv-cache-manager", disable_hybrid_kv_cache_manager=True),
    setting("chunked-prefill-on", enable_chunked_prefill=True),
    setting("chunked-prefill-off", enable_chunked_prefill=False),
    setting("prefix-caching-on", enable_prefix_caching=True),
    setting("prefix-caching-off", enable_prefix_caching=False),
    *(setting(f"block-size-{size}", block_size=size) for size in BLOCKS),
    setting("cuda-graphs", enforce_eager=False),
)
"""The last one is what users get without `--enforce-eager`; cells are eager."""


def absent(one: Setting, folder: Path) -> bool:
    """Return whether the release has no such argument."""
    known = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    names = {field.name for field in dataclasses.fields(known)}
    return not one.arguments(folder).keys() <= names


LLAMA3 = {**tiny_llama4.LLAMA3_CONFIG, "head_dim": tiny_llama4.HEAD_SIZE}
HEAD = {
    **tiny_llama4.TEXT_CONFIG,
    "architectures": ["Llama4ForCausalLM"],
    "num_hidden_layers": 1,
    "no_rope_layers": [0],
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
    "yoco_global_kv_layer": None,
    "yoco_local_kv_layer": None,
}
"""Of EAGLE's head for Llama 4, which vLLM knows since 0.10.0; without experts, which 0.11.0 would
construct by the config of the model that it proposes tokens to."""


def write_models(folder: Path) -> None:
    """Write the models that propose tokens."""
    head = HEAD if installed_release() in span("0.10.0") else LLAMA3
    for name, config in ((DRAFT, LLAMA3), (EAGLE, head)):
        (folder / name).mkdir()
        tiny_llama4.write_config(folder / name, config)
