"""A checkpoint, as its config.json tells it: how its weights are held, and what else decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay.answers.weights import EXPERTS, FORMATS
from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError, said

CONFIG = "config.json"
#: Where ModelOpt writes what others have in config.json.
MODELOPT = "hf_quant_config.json"
#: The architectures of Llama 4: with images, and without.
MULTIMODAL, TEXT_ONLY = "Llama4ForConditionalGeneration", "Llama4ForCausalLM"
#: The sizes of groups that share a scale which kernels are made for.
_GROUPS = (32, 64, 128)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint; None where its config does not tell."""

    form: str
    """How its weights are held: of `weights.FORMATS`, or in its own words."""
    experts: int = EXPERTS
    dtype: str | None = None
    """Of the weights that are not quantised."""
    chunk: int | None = None
    """attention_chunk_size, tokens."""
    max_model_len: int | None = None
    """max_position_embeddings, tokens."""
    is_text_only: bool | None = None
    source: str = ""
    """The file that was read; empty if only the format was named."""

    def __str__(self) -> str:
        """In a sentence's words."""
        kind = {True: "text only, ", False: "with images, ", None: ""}[self.is_text_only]
        known = (
            ("experts", self.experts), ("dtype", self.dtype), ("attention_chunk_size", self.chunk),
            ("max_position_embeddings", self.max_model_len),
        )  # fmt: skip
        facts = ", ".join(f"{name} {value}" for name, value in known if value is not None)
        return f"{kind}{FORMATS.get(self.form, self.form)}, {facts}"


def find(text: str) -> Checkpoint:
    """The checkpoint in a folder or a config.json; or any of a format, by the format's name.

    Raises:
        OverlayError: there is none, it can't be read, or it is of another model.
    """
    path = Path(text)
    if text in FORMATS and not path.exists():
        return Checkpoint(text)
    return read(path)


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a config.json.

    Raises:
        OverlayError: there is none, it can't be read, or it is of another model.
    """
    file = path / CONFIG if path.is_dir() else path
    config = _object(file)
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise _no_checkpoint(file, "its text_config is no object")
    architectures = config.get("architectures") or text.get("architectures") or []
    kinds = (config.get("model_type"), text.get("model_type"))
    is_llama4 = {MULTIMODAL, TEXT_ONLY} & {str(one) for one in architectures} or any(
        str(kind).startswith("llama4") for kind in kinds
    )
    if not is_llama4:
        named = ", ".join(map(str, architectures)) or config.get("model_type") or "no model"
        raise OverlayError(
            f"{file} is not of Llama 4", f"it names {named}",
            "This overlay is about Llama 4; other models run as upstream has them", Exit.USAGE,
        )  # fmt: skip
    return Checkpoint(
        _form(_quantization(file, config, text)),
        _number(file, text, "num_local_experts") or EXPERTS,
        _dtype(config, text),
        _number(file, text, "attention_chunk_size"),
        _number(file, text, "max_position_embeddings"),
        MULTIMODAL not in architectures if architectures else None,
        str(file),
    )


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(plain_file.read(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_checkpoint(file, said(error)) from error
    if not isinstance(found, dict):
        raise _no_checkpoint(file, "it is no JSON object")
    return found


def _no_checkpoint(file: Path, why: str) -> OverlayError:
    return OverlayError(
        f"cannot read the checkpoint's {file}", why,
        f"Pass --checkpoint with its folder, its {CONFIG}, or a format: {', '.join(FORMATS)}",
        Exit.USAGE,
    )  # fmt: skip


def _number(file: Path, config: Json, name: str) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _no_checkpoint(file, f"{name} is {value!r}, which is no number above 0")
    return value


def _dtype(config: Json, text: Json) -> str | None:
    """The first of the names that transformers has had for it."""
    for name in ("dtype", "torch_dtype"):
        for place in (config, text):
            if isinstance(place.get(name), str):
                return str(place[name]).removeprefix("torch.")
    return None


def _quantization(file: Path, config: Json, text: Json) -> Json | None:
    """The config of its quantisation, which may be the text model's; None if there is none."""
    found = config.get("quantization_config") or text.get("quantization_config")
    found = found or config.get("compression_config")
    beside = file.parent / MODELOPT
    if not found and beside.is_file():
        found = {"quant_method": "modelopt", **_object(beside)}
    if found is not None and not isinstance(found, dict):
        raise _no_checkpoint(file, "its quantization_config is no object")
    return found


def _form(config: Json | None) -> str:
    """The format, of `FORMATS`, or one that is not among them in its own words."""
    if not config:
        return "none"
    method = str(config.get("quant_method", "")).casefold().replace("_", "-")
    forms = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "fbgemm-fp8": lambda _: "fbgemm-fp8",
        "modelopt": _modelopt,
        "bitsandbytes": _bitsandbytes,
    }
    found = forms[method](config) if method in forms else None
    if found and not _keeps_attention(config):
        return f"{found} with quantised attention"
    return found or _own_words(method or "quantised", config)


def _keeps_attention(config: Json) -> bool:
    """Whether attention is left as it is, as in published checkpoints."""
    lists = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules",
             "dynamic", "exclude_modules")  # fmt: skip
    places = [config, config.get("quantization")]
    kept = [
        str(name)
        for place in places
        if isinstance(place, dict)
        for key in lists
        if isinstance(place.get(key), (list, dict))
        for name in place[key]
    ]
    return any("attn" in name or "q_proj" in name for name in kept)


def _own_words(method: str, config: Json) -> str:
    """A format of which nothing is known here."""
    facts = ("bits", "group_size", "sym", "desc_act", "zero_point", "format", "quant_algo",
             "weight_block_size", "load_in_8bit")  # fmt: skip
    told = ", ".join(f"{name} {config[name]}" for name in facts if name in config)
    return f"{method} ({told})" if told else method


def _awq(config: Json) -> str | None:
    is_known = config.get("bits", config.get("w_bit")) == 4 and config.get("zero_point")
    return "awq" if is_known and config.get("group_size") in _GROUPS else None


def _gptq(config: Json) -> str | None:
    bits, group = config.get("bits"), config.get("group_size")
    if bits not in (4, 8) or group not in _GROUPS or not config.get("sym", True):
        return None
    if config.get("desc_act"):
        return "gptq-act-order" if bits == 4 else None
    return "gptq" if bits == 4 else "gptq-int8"


def _fp8(config: Json) -> str | None:
    block = config.get("weight_block_size")
    if block is not None:
        return "fp8-block" if list(block) == [128, 128] else None
    return {"dynamic": "fp8", "static": "fp8-static"}.get(config.get("activation_scheme", ""))


def _modelopt(config: Json) -> str | None:
    inner = config.get("quantization")
    algorithm = config.get("quant_algo") or (inner or {}).get("quant_algo")
    return "modelopt-fp8" if algorithm == "FP8" else None


def _bitsandbytes(config: Json) -> str | None:
    return "bitsandbytes" if config.get("load_in_4bit") else None


def _compressed(config: Json) -> str | None:
    """Of compressed-tensors: all groups have to be held alike."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None
    forms = {_group_form(group) for group in groups.values() if isinstance(group, dict)}
    return forms.pop() if len(forms) == 1 else None


def _group_form(group: Json) -> str | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not weights.get("symmetric", True):
        return None
    kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if not isinstance(inputs, dict):
        return _packed(weights, *kind)
    by_token = inputs.get("strategy") == "token" and bool(inputs.get("dynamic"))
    by_tensor = inputs.get("strategy") == "tensor" and not inputs.get("dynamic")
    if kind == ("float", 8, "channel") and by_token:
        return "w8a8-fp8"
    if kind == ("float", 8, "tensor") and by_tensor:
        return "w8a8-fp8-tensor"
    return "w8a8-int8" if kind == ("int", 8, "channel") and by_token else None


def _packed(weights: Json, kind: Any, bits: Any, strategy: Any) -> str | None:
    if (kind, bits, strategy) == ("int", 8, "channel"):
        return "w8a16"
    if (kind, bits, strategy) != ("int", 4, "group") or weights.get("group_size") not in _GROUPS:
        return None
    # "weight" and "static" leave the inputs in their order.
    return "w4a16-act-order" if weights.get("actorder") in ("group", "dynamic") else "w4a16"
