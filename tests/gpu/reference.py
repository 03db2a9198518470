"""What Transformers' Llama 4 says of the same weights, in fp32: the reference of these tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Prediction:
    """The model's view of one sequence, [length - 1]: entry i is about token i + 1."""

    logprobs: list[float]
    """Natural logarithm of the probability of each token, given those before it."""
    greedy: list[int]
    """The token that greedy decoding would have taken there."""


class Reference:
    """A checkpoint in Transformers, with eager attention and without a KV cache."""

    def __init__(self, folder: Path, multimodal: bool) -> None:
        from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

        cls: Any = Llama4ForConditionalGeneration if multimodal else Llama4ForCausalLM
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = cls.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        ).to(self.device)

    def predict(self, tokens: Sequence[int]) -> Prediction:
        """Score one sequence of token ids."""
        ids = torch.tensor([tokens], device=self.device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return Prediction(logprobs.tolist(), logits.argmax(-1).tolist())
