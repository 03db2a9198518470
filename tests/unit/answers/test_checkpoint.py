"""What a checkpoint's config.json tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made_upstream import Ran, Upstream
from overlay.answers import checkpoint
from overlay.answers.checkpoint import Checkpoint
from overlay.base.errors import OverlayError
from weights.checkpoints import CONFIGS

from ..made_matrix import keep

Run = Callable[..., Ran]

TEXT = {
    "model_type": "llama4_text",
    "num_local_experts": 128,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 1048576,
    "torch_dtype": "bfloat16",
}
CONFIG = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": TEXT,
}


def write(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(("form", "quantization"), CONFIGS.items(), ids=str)
def test_formats(tmp_path: Path, form: str, quantization: dict[str, Any]) -> None:
    """Each that was run is known by the config with which it was."""
    config = {**CONFIG, "quantization_config": quantization} if quantization else CONFIG
    found = checkpoint.find(str(write(tmp_path, config)))
    assert found == Checkpoint(
        form, 128, "bfloat16", 8192, 1048576, False, str(tmp_path / "config.json")
    )


def test_text_only_and_nested(tmp_path: Path) -> None:
    config = {
        **TEXT,
        "architectures": ["Llama4ForCausalLM"],
        "dtype": "float16",
        "quantization_config": CONFIGS["awq"],
    }
    found = checkpoint.read(write(tmp_path, config) / "config.json")
    assert (found.form, found.is_text_only, found.dtype) == ("awq", True, "float16")
    nested = {**CONFIG, "text_config": {**TEXT, "quantization_config": CONFIGS["gptq"]}}
    assert checkpoint.read(write(tmp_path, nested)).form == "gptq"


def test_modelopt_writes_a_file_of_its_own(tmp_path: Path) -> None:
    inner = {"quant_algo": "FP8", "exclude_modules": ["*self_attn*", "*router*"]}
    found = {"producer": {"name": "modelopt"}, "quantization": inner}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(found), "utf-8")
    assert checkpoint.read(write(tmp_path, CONFIG)).form == "modelopt-fp8"


@pytest.mark.parametrize(
    ("quantization", "form"),
    [
        ({**CONFIGS["awq"], "bits": 8}, "awq (bits 8, group_size 128, zero_point True)"),
        ({**CONFIGS["gptq"], "sym": False}, "gptq ("),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (quant_algo NVFP4)"),
        ({"quant_method": "compressed-tensors", "format": "mixed"}, "compressed-tensors ("),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8 (weight_block_size"),
        ({"bits": 3}, "quantised (bits 3)"),
        ({**CONFIGS["awq"], "modules_to_not_convert": None}, "awq with quantised attention"),
        ({**CONFIGS["gptq"], "dynamic": {}}, "gptq with quantised attention"),
    ],
)
def test_others_keep_their_own_words(
    tmp_path: Path, quantization: dict[str, Any], form: str
) -> None:
    config = {**CONFIG, "quantization_config": quantization}
    assert checkpoint.read(write(tmp_path, config)).form.startswith(form)


def test_groups_that_differ_are_of_no_one_format(tmp_path: Path) -> None:
    groups = {
        "group_0": CONFIGS["w4a16"]["config_groups"]["group_0"],
        "group_1": CONFIGS["w8a8-fp8"]["config_groups"]["group_0"],
    }
    both = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["self_attn"]}
    found = checkpoint.read(write(tmp_path, {**CONFIG, "quantization_config": both}))
    assert found.form == "compressed-tensors"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ([], "it is no JSON object"),
        ({**CONFIG, "text_config": 1}, "its text_config is no object"),
        ({**CONFIG, "quantization_config": "awq"}, "its quantization_config is no object"),
        ({**CONFIG, "text_config": {**TEXT, "num_local_experts": "16"}}, "num_local_experts is"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({}, "it names no model"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path: Path, config: object, why: str) -> None:
    with pytest.raises(OverlayError, match=why):
        checkpoint.read(write(tmp_path, config))


def test_no_json_and_no_file(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    keep(upstream.root, "1.0")
    (tmp_path / "config.json").write_text("{", "utf-8")
    asked = ("explain", "--release", "1.0", "--gpu", "RTX A6000", "--checkpoint")
    for path in (tmp_path, tmp_path / "none", tmp_path / "config.json"):
        ran = run(*asked, str(path))
        assert ran.status == 2
        assert "cannot read the checkpoint's" in ran.err
        assert "Traceback" not in ran.err


def test_its_facts_count(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    """Where no option says otherwise, and it is said what was read."""
    keep(upstream.root, "1.0")
    text = {**TEXT, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    folder = str(write(tmp_path, {**CONFIG, "text_config": text}))
    asked = ("explain", "--release", "1.0", "--gpu", "T4", "--checkpoint", folder)
    said = " ".join(run(*asked).out.split())
    assert (
        f"Read {folder}/config.json: with images, unquantised, experts 128, dtype float16" in said
    )
    assert "dtype float16, max_model_len 4096, within the chunk of 8192" in said
    told = json.loads(run(*asked, "--chunk", "2048", "--dtype", "float32", "--json").out)
    settings = told["settings"]
    assert (settings["chunk"], settings["dtype"], settings["length"]) == (2048, "float32", "past")
    assert settings["weights"] == {
        "checkpoint": "none", "quantization": "", "experts": 128, "is_text_only": False
    }  # fmt: skip
