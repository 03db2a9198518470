"""What Transformers' Llama 4 says of the same weights, in fp32: the reference of these tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from .engine import picture

ATTENTION = "transformers.models.llama4.modeling_llama4.eager_attention_forward"


@dataclass(frozen=True)
class Prediction:
    """The model's view of one sequence, [length - 1]: entry i is about token i + 1."""

    logprobs: list[float]
    """Natural logarithm of the probability of each token, given those before it."""
    greedy: list[int]
    """The token that greedy decoding would have taken there."""


@dataclass(frozen=True)
class EightBits:
    """A KV cache of 8 bits, with scales of 1, and who reads it."""

    dtype: torch.dtype
    for_prompts: bool
    """Whether prompts attend to what the cache holds of them, as on V1, or to the keys and values
    themselves, as on V0."""
    of_queries: bool = False
    """Whether the kernel takes queries in 8 bits too."""

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of float16 values."""
        return tensor.half().to(self.dtype).to(tensor.dtype)

    @contextmanager
    def in_attention(self, prompt_len: int) -> Iterator[None]:
        """Let Transformers' eager attention read such a cache."""
        import transformers.models.llama4.modeling_llama4 as llama4

        forward: Any = llama4.eager_attention_forward
        first = 0 if self.for_prompts else prompt_len

        def attention(
            module: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any
        ) -> Any:
            queries = self.rounded(query) if self.of_queries else query
            rounded = self.rounded(key), self.rounded(value)
            output, weights = forward(module, queries, *rounded, *args, **more)
            if first:  # [sequences, queries, heads, head size]
                exact, _ = forward(module, query, key, value, *args, **more)
                output[:, :first] = exact[:, :first]
            return output, weights

        with patch(ATTENTION, attention):
            yield


class Reference:
    """A checkpoint in Transformers, with eager attention and without a KV cache."""

    def __init__(self, folder: Path, multimodal: bool) -> None:
        from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

        cls: Any = Llama4ForConditionalGeneration if multimodal else Llama4ForCausalLM
        self.folder = folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = cls.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        ).to(self.device)

    def pixels(self, side: int, number: int) -> torch.Tensor:
        """The image of prompt `number` as the vision model takes it, [tiles, 3, tile, tile]."""
        from transformers import AutoProcessor

        images = AutoProcessor.from_pretrained(self.folder).image_processor
        values: torch.Tensor = images(picture(side, number), return_tensors="pt")["pixel_values"]
        return values.float().to(self.device)

    def predict(
        self,
        tokens: Sequence[int],
        prompt_len: int = 0,
        cache: EightBits | None = None,
        image: tuple[int, int] | None = None,
    ) -> Prediction:
        """Score one sequence of token ids.

        `cache` is the format of the engine's, where that costs accuracy; `image` the side and the
        number of the image in it.
        """
        inputs = {"input_ids": torch.tensor([tokens], device=self.device)}
        if image:
            inputs["pixel_values"] = self.pixels(*image)
        with torch.inference_mode():
            if cache:
                with cache.in_attention(prompt_len):
                    logits = self.model(**inputs, use_cache=False).logits
            else:
                logits = self.model(**inputs, use_cache=False).logits
        logits = logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
        return Prediction(logprobs.tolist(), logits.argmax(-1).tolist())
