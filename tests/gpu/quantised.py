"""The tiny text model with experts of 4 bits, as AWQ packs them, and the same weights in full.

A reference that has the rounded weights tells a wrong kernel from what the format costs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import llama4_checkpoint

GROUP = 64
"""Inputs that share a scale and a zero point."""
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in which four bits of an int32, from the lowest on."""

EXACT = "exact"
"""The subfolder with the same weights unpacked, for Transformers."""

CONFIG = {
    "quant_method": "awq",
    "bits": BITS,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": ["self_attn", "router", "shared_expert", "lm_head"],
}
"""As published checkpoints: queries and keys stay, since vLLM does not reorder packed ones for its
rotary embedding."""


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack integers of 4 bits, [inputs, outputs], into int32, [inputs, outputs / 8]."""
    eights = values.to(torch.int64).unflatten(1, (-1, 8))[:, :, list(ORDER)]
    shifts = torch.arange(8) * BITS
    packed = (eights << shifts).sum(-1)
    # What needs the 32nd bit is a negative int32.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round a weight, [inputs, outputs].

    Returns:
        AWQ's tensors by name, and the rounded weight, [inputs, outputs], in float16.
    """
    groups = weight.float().unflatten(0, (-1, GROUP))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / (2**BITS - 1)).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, 2**BITS - 1)
    values = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 2**BITS - 1)
    rounded = ((values - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1).half()
    tensors = {
        "qweight": pack(values.flatten(0, 1)),
        "qzeros": pack(zeros),
        "scales": scales,
    }
    return {name: each.contiguous() for name, each in tensors.items()}, rounded


def write_awq(folder: Path) -> Path:
    """Write both checkpoints, the packed one into `folder`, and return it."""
    from safetensors.torch import load_file, save_file

    exact = folder / EXACT
    llama4_checkpoint.write(exact, multimodal=False)
    weights = load_file(exact / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            packed[name] = weight
            continue
        for number, expert in enumerate(weight):  # [experts, inputs, outputs]
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            parts = [quantise(part) for part in expert.chunk(len(names), dim=1)]
            for part, (tensors, _) in zip(names, parts, strict=True):
                base = f"{prefix}.experts.{number}.{part}"
                packed |= {f"{base}.{key}": tensor for key, tensor in tensors.items()}
            weights[name][number] = torch.cat([rounded for _, rounded in parts], dim=1)
    save_file(weights, exact / "model.safetensors", {"format": "pt"})
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    for file in exact.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((exact / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": CONFIG}, indent=1), "utf-8"
    )
    return folder
