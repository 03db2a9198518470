"""What Transformers' Llama 4 says of the same weights, in fp32: the reference of these tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    """Whether the kernel takes queries in 8 bits too, and weighs values with such probabilities."""

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
            rounded = self.rounded(key), self.rounded(value)
            if self.of_queries:
                return self._with_rounded_weights(module, query, *rounded, *args, **more), None
            output, weights = forward(module, query, *rounded, *args, **more)
            if first:  # [sequences, queries, heads, head size]
                exact, _ = forward(module, query, key, value, *args, **more)
                output[:, :first] = exact[:, :first]
            return output, weights

        with patch(ATTENTION, attention):
            yield

    def _with_rounded_weights(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        *_args: Any,
        **_more: Any,
    ) -> torch.Tensor:
        """Attention of [sequences, heads, tokens, head size], to [sequences, tokens, heads, …].

        Weights are rounded before they are divided by their sum, as kernels do it.
        """
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        logits = self.rounded(query) @ key.transpose(2, 3) * scaling
        if mask is not None:
            logits = logits + mask[..., : key.shape[2]]
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        output = self.rounded(weights) @ value / weights.sum(-1, keepdim=True)
        return output.transpose(1, 2).contiguous()


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
        ids = torch.tensor([tokens], device=self.device)
        attention = cache.in_attention(prompt_len) if cache else nullcontext()
        with torch.inference_mode(), attention:
            if image:
                embeddings = self._with_image(ids, prompt_len, *image)
                logits = self.model(inputs_embeds=embeddings, use_cache=False).logits
            else:
                logits = self.model(input_ids=ids, use_cache=False).logits
        logits = logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return Prediction(logprobs.tolist(), logits.argmax(-1).tolist())

    def _with_image(
        self, ids: torch.Tensor, prompt_len: int, side: int, number: int
    ) -> torch.Tensor:
        """Embeddings of tokens, [1, tokens, hidden size], with those of the prompt's image.

        A model that generates the image's token means the word: it has no place there.
        """
        embeddings = self.model.get_input_embeddings()(ids).clone()
        pixels = self.pixels(side, number)
        features = self.model.vision_model(pixels).last_hidden_state.flatten(0, -2)
        places = (ids[0] == self.model.config.image_token_index).nonzero()[:, 0]
        places = places[places < prompt_len]
        embeddings[0, places] = self.model.multi_modal_projector(features)
        return embeddings
