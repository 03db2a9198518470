"""Checkpoints of Llama 4, as their config.json tells them apart, and what `--quantization` takes.

Quantised are the experts and the shared expert, as published checkpoints have it, or the experts
alone, where that is the custom. Attention stays as it is: vLLM does not reorder packed queries and
keys for its rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GROUP = 128
"""Weights that share a scale, where groups of them do."""

WIDTH = 256
"""Of the hidden states and the experts: every kernel divides it, as it does Llama 4's widths."""
EXPERTS = (16, 128)
"""Of Scout and of Maverick: some releases choose by their number."""

_KEPT = ("self_attn", "router", "vision_model", "multi_modal_projector", "lm_head")
"""What is not quantised, by a part of its name."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_KEPT_LAYERS = (
    *(f"language_model.model.layers.0.self_attn.{name}" for name in _ATTENTION),
    "language_model.model.layers.0.feed_forward.router",
    "language_model.lm_head",
    *(f"vision_model.model.layers.0.self_attn.{name}" for name in _ATTENTION),
    *(f"vision_model.model.layers.0.mlp.{name}" for name in ("fc1", "fc2")),
    *(f"vision_model.vision_adapter.mlp.{name}" for name in ("fc1", "fc2")),
    "vision_model.patch_embedding.linear",
    "multi_modal_projector.linear_1",
)
"""The same, layer by layer, as compressed-tensors exports it and fp8 has it."""


def _gptq(bits: int, *, act_order: bool = False) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": act_order,
        "sym": True,
        "lm_head": False,
        "dynamic": {f"-:.*{name}": {} for name in _KEPT},
    }


def _compressed(
    form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(_KEPT_LAYERS),
        "kv_cache_scheme": None,
    }


def _numbers(kind: str, bits: int, strategy: str, **others: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "num_bits": bits,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
        **others,
    }


_TOKEN: dict[str, Any] = {"strategy": "token", "dynamic": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "none": {},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(_KEPT),
    },
    "gptq": _gptq(4),
    "gptq-int8": _gptq(8),
    "gptq-act-order": _gptq(4, act_order=True),
    "w4a16": _compressed("pack-quantized", _numbers("int", 4, "group", group_size=GROUP)),
    "w4a16-act-order": _compressed(
        "pack-quantized", _numbers("int", 4, "group", group_size=GROUP, actorder="group")
    ),
    "w8a16": _compressed("pack-quantized", _numbers("int", 8, "channel")),
    "w8a8-fp8": _compressed(
        "float-quantized", _numbers("float", 8, "channel"), _numbers("float", 8, **_TOKEN)
    ),
    "w8a8-fp8-tensor": _compressed(
        "float-quantized", _numbers("float", 8, "tensor"), _numbers("float", 8, "tensor")
    ),
    "w8a8-int8": _compressed(
        "int-quantized", _numbers("int", 8, "channel"), _numbers("int", 8, **_TOKEN)
    ),
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": list(_KEPT_LAYERS),
    },
    "fp8-static": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": list(_KEPT_LAYERS),
    },
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "ignored_layers": list(_KEPT_LAYERS),
    },
    "fbgemm-fp8": {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": list(_KEPT),
    },
    "modelopt-fp8": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "ignore": [f"*{name}*" for name in _KEPT],
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": None,
            "exclude_modules": [f"*{name}*" for name in _KEPT],
        },
    },
    "bitsandbytes": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": list(_KEPT),
    },
}
"""`quantization_config` by format. w4a16 and the like are compressed-tensors, by the bits of the
weights and the inputs; w8a8-fp8 has a scale an output and a token, as Meta's FP8 Maverick."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "none": ("", "fp8", "bitsandbytes", "experts_int8"),
    "awq": ("", "awq", "awq_marlin", "moe_wna16"),
    "gptq": ("", "gptq", "gptq_marlin", "moe_wna16"),
    "gptq-int8": ("", "gptq", "gptq_marlin", "moe_wna16"),
    "gptq-act-order": ("", "gptq", "gptq_marlin", "moe_wna16"),
}
"""What `--quantization` may be, beside the format's own name; empty: it is not given."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and the flag with which it is served."""

    checkpoint: str
    quantization: str
    """`--quantization`; empty if it is not given."""
    experts: int

    @property
    def folder(self) -> str:
        """Return the name of the checkpoint's folder."""
        return f"{self.checkpoint}-{self.experts}"

    @property
    def is_ordered(self) -> bool:
        """Return whether inputs were quantised in an order of their own."""
        return self.checkpoint.endswith("act-order")


def weights() -> Iterator[Weights]:
    """Return all that is looked at, unquantised weights first."""
    for checkpoint in CONFIGS:
        for option in OPTIONS.get(checkpoint, ("",)):
            for experts in EXPERTS:
                yield Weights(checkpoint, option, experts)
