"""A tiny Llama 4 checkpoint with random weights, and what `transformers` computes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import tiny_llama4
from .expected import QK_NORM_OF_ALL_HEADS
from .releases import installed_release

CHUNK = 32
MAX_LEN = 4 * CHUNK + 16
SEQUENCES = 2
HEAD_SIZE = 32

TEXT_CONFIG: dict[str, Any] = {
    **tiny_llama4.TEXT_CONFIG,
    "torch_dtype": "float32",
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": MAX_LEN,
    "attention_chunk_size": CHUNK,
    # Both kinds of feed-forward layer.
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    # Scout has it, Maverick has not.
    "use_qk_norm": installed_release() not in QK_NORM_OF_ALL_HEADS,
    # vLLM turns it on for contexts over 32768 tokens only, whatever a model's config says.
    "attn_temperature_tuning": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint and what it makes of some sequences of `MAX_LEN` tokens."""

    folder: Path
    tokens: torch.Tensor
    """[sequences, tokens]"""
    log_probs: torch.Tensor
    """[sequences, tokens, vocabulary]: for a token, those of the token after it."""


def randomize(model: Any, random: torch.Generator) -> None:
    """Give all weights values (`transformers` leaves those of experts uninitialized)."""
    for name, parameter in model.named_parameters():
        weight = parameter.data
        weight.normal_(0, 0.12, generator=random)
        if "norm" in name:
            weight.add_(1)
        elif "q_proj" in name or "k_proj" in name:
            # Sharper attention, so that it matters what is attended to.
            weight.mul_(2)


def visible(is_chunked: bool) -> torch.Tensor:
    """Return which keys (columns) a query (row) attends to, by definition."""
    queries, keys = torch.arange(MAX_LEN)[:, None], torch.arange(MAX_LEN)[None, :]
    causal = keys <= queries
    return causal & (keys // CHUNK == queries // CHUNK) if is_chunked else causal


def check_masks(model: Any) -> None:
    """Make each attention layer of `model` check that its mask is the one of the definition."""

    def check(module: Any, _: Any, arguments: dict[str, Any]) -> None:
        # Added to the scores, for each sequence or for all at once.
        mask = arguments["attention_mask"]
        is_chunked = bool(TEXT_CONFIG["no_rope_layers"][module.layer_idx])
        expected = visible(is_chunked).expand(SEQUENCES, 1, -1, -1)
        assert torch.equal((mask == 0).expand_as(expected), expected), "wrong mask in transformers"
        assert mask[mask != 0].max() < -1e30

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(check, with_kwargs=True)


def write(folder: Path) -> Reference:
    """Write the checkpoint to `folder` and compute the reference, in float32."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    random = torch.Generator().manual_seed(0)
    config = Llama4TextConfig(**TEXT_CONFIG, attn_implementation="eager")
    model = Llama4ForCausalLM(config).float().eval()
    randomize(model, random)
    model.save_pretrained(folder)
    check_masks(model)
    sizes = (SEQUENCES, MAX_LEN)
    tokens = torch.randint(TEXT_CONFIG["vocab_size"], sizes, generator=random)
    # All of a sequence at once: there is no cache, which could be at fault too.
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return Reference(folder, tokens, logits.log_softmax(-1))
