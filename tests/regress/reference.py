"""A tiny Llama 4 checkpoint with random weights, and what `transformers` computes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llama4_checkpoint
from llama4_checkpoint import NO_ROPE_LAYERS, VOCAB

CHUNK = 32
MAX_LEN = 4 * CHUNK + 16
SEQUENCES = 2
LAYERS = len(NO_ROPE_LAYERS)


def text_config() -> Any:
    """Make a model that even the interpreter of kernels is done with soon."""
    return llama4_checkpoint.text_config(
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
        attention_chunk_size=CHUNK,
        # Both kinds of feed-forward layer.
        interleave_moe_layer_step=2,
        num_local_experts=4,
    )


@dataclass(frozen=True)
class Reference:
    """A checkpoint and what it makes of some sequences of `MAX_LEN` tokens."""

    folder: Path
    tokens: torch.Tensor
    """[sequences, tokens]"""
    log_probs: torch.Tensor
    """[sequences, tokens, vocabulary]: for a token, those of the token after it."""


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
        is_chunked = bool(NO_ROPE_LAYERS[module.layer_idx])
        expected = visible(is_chunked).expand(SEQUENCES, 1, -1, -1)
        assert torch.equal((mask == 0).expand_as(expected), expected), "wrong mask in transformers"
        assert mask[mask != 0].max() < -1e30

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(check, with_kwargs=True)


def write(folder: Path) -> Reference:
    """Write the checkpoint to `folder` and compute the reference, in float32."""
    from transformers import Llama4ForCausalLM

    torch.manual_seed(0)
    model = Llama4ForCausalLM(text_config()).float().eval()
    llama4_checkpoint.randomise(model)
    model.save_pretrained(folder)
    check_masks(model)
    tokens = torch.randint(VOCAB, (SEQUENCES, MAX_LEN))
    # All of a sequence at once: there is no cache, which could be at fault too.
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return Reference(folder, tokens, logits.log_softmax(-1))
