"""A tiny Llama 4 with random weights that tells chunked local from global attention.

Hugging Face's own classes write it, so vLLM and Transformers load the same weights. The weights are
large enough, and the queries and keys pointed enough, for attention to decide what comes next: with
global in place of local attention, log-probabilities past the chunk move by about 10, and before it
not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHUNK = 64
"""`attention_chunk_size`, in tokens."""
VOCAB = 256
NO_ROPE_LAYERS = [1, 1, 1, 0]
"""Three layers with positions and chunks, then one with neither, as in the released models."""
DEEP: dict[str, Any] = {
    "num_hidden_layers": 2 * len(NO_ROPE_LAYERS),
    "no_rope_layers": 2 * NO_ROPE_LAYERS,
}
"""Changes of the config for twice the layers."""

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<|image|>", "<|image_start|>", "<|image_end|>",
            "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]  # fmt: skip


def text_config(**changes: Any) -> Any:
    """The `Llama4TextConfig`: 4 layers, 8 query and 2 KV heads of 64, 2 experts; or `changes`."""
    from transformers import Llama4TextConfig

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 256,
        "intermediate_size_mlp": 256,
        "num_hidden_layers": len(NO_ROPE_LAYERS),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 16 * CHUNK,
        "attention_chunk_size": CHUNK,
        "no_rope_layers": NO_ROPE_LAYERS,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "initializer_range": 0.12,
        "attn_temperature_tuning": False,
        "rope_scaling": None,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    return Llama4TextConfig(**{**values, **changes})


def _vision_config() -> Any:
    from transformers import Llama4VisionConfig

    return Llama4VisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projector_input_dim=64,
        projector_output_dim=64,
        vision_output_dim=64,
    )


def randomise(model: Any) -> None:
    """Fill what Hugging Face leaves empty, and make attention pointed.

    The experts of a layer are alike: where two of them are next to equally likely, rounding chooses
    one, and what follows would differ by as much as a wrong attention makes it.
    """
    for name, weight in model.named_parameters():
        if "experts." in name:
            weight.data.copy_(0.12 * torch.randn_like(weight[0]))
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.mul_(2)
        elif "multi_modal_projector" in name:
            # An image is worth as much as a word.
            weight.data.mul_(8)


def write(folder: Path, multimodal: bool, **changes: Any) -> Path:
    """Write config, weights, tokenizer and processor into `folder`, and return it.

    `multimodal` is the architecture that all releases know (`Llama4ForConditionalGeneration`); the
    text model alone (`Llama4ForCausalLM`) is what prefix caching works with on V0. `changes` are
    those of `text_config`.
    """
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration

    torch.manual_seed(0)
    model: Any
    if multimodal:
        config = Llama4Config(
            vision_config=_vision_config(),
            text_config=text_config(**changes),
            boi_token_index=5,
            eoi_token_index=6,
            image_token_index=7,
        )
        model = Llama4ForConditionalGeneration(config)
    else:
        model = Llama4ForCausalLM(text_config(**changes))
    randomise(model)
    model.to(torch.float16).save_pretrained(folder)
    _write_processor(folder)
    return folder


def tokenizer(vocab: int = VOCAB) -> Any:
    """A tokenizer of `vocab` words, one a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{number}" for number in range(vocab - len(_SPECIAL)))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=_SPECIAL[4:],
    )


def _write_processor(folder: Path) -> None:
    """The tokenizer, and the image processor that vLLM asks for at start-up."""
    from transformers import Llama4ImageProcessorFast, Llama4Processor

    Llama4Processor(
        image_processor=Llama4ImageProcessorFast(size={"height": 28, "width": 28}),
        tokenizer=tokenizer(),
        patch_size=14,
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
