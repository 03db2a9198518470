"""vLLM's Llama 4 text model on V0 against `transformers`' on the same weights.

vLLM's own loader loads a tiny random checkpoint into its own model. Log-probabilities are compared
for whole prompts, for prompts computed in parts and for the single tokens thereafter. Plain torch
stands in for what has no kernel for CPUs, except for XFormers' prefix kernel, which Triton's
interpreter runs; all else is vLLM's. Up to a chunk stock must be right too: what fails past it is
the attention and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from . import batches, kernels, reference, tiny_llama4
from .expected import (
    BY_KEY,
    CHUNKS_IGNORED,
    LOGPROBS_ERROR,
    V0_CHUNKED,
    keyword_missing,
)
from .reference import CHUNK, MAX_LEN, Reference
from .releases import in_order, installed_release, span

RELEASE = installed_release()
TOLERANCE = 1e-4
"""float32 makes for 6e-6, attention over more than the chunk for 4."""
BLOCK = 16

pytestmark = [
    pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0"),
    pytest.mark.usefixtures("one_thread"),
]

chunks_ignored = pytest.mark.fail_to_pass(releases=in_order(CHUNKS_IGNORED), raises=LOGPROBS_ERROR)


@dataclass(kw_only=True)
class Request(batches.Request):
    """A sequence of the reference."""

    row: int


Piece = batches.Piece[Request]


@dataclass
class Engine:
    """Runs batches through a model and compares what it answers with the reference."""

    model: Any
    module: Any
    """The backend's."""
    config: Any
    reference: Reference
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        columns = -(-MAX_LEN // BLOCK)
        # Block 0 is nobody's. The order of the others is no request's.
        random = torch.Generator().manual_seed(0)
        order = torch.randperm(reference.SEQUENCES * columns, generator=random) + 1
        for row, blocks in enumerate(order.split(columns)):
            self.requests.append(Request(row=row, blocks=blocks.tolist()))
        for layer in self.attention_layers():
            sizes = self.backend.get_kv_cache_shape(
                len(order) + 1, BLOCK, layer.num_kv_heads, layer.head_size
            )
            # Full of what others left, which must not be looked at.
            layer.kv_cache = [30 * torch.randn(sizes, generator=random)]

    @property
    def backend(self) -> Any:
        name = self.module.__name__.rpartition(".")[2]
        return getattr(self.module, BY_KEY[f"v0-{name}"].backend)

    def attention_layers(self) -> list[Any]:
        from vllm.attention import Attention

        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        assert len(layers) == reference.LAYERS
        for layer in layers:
            assert type(layer.impl).__module__ == self.module.__name__
        return layers

    def log_probs(self, pieces: Sequence[Piece], metadata: Any) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        tokens = [self.reference.tokens[piece.sequence.row, piece.tokens] for piece in pieces]
        positions = [torch.arange(MAX_LEN)[piece.tokens] for piece in pieces]
        with torch.no_grad(), tiny_llama4.one_rank(), set_forward_context(metadata, self.config):
            hidden = self.model(torch.cat(tokens), torch.cat(positions))
            logits = self.model.compute_logits(hidden, None)
        return torch.log_softmax(logits, -1)

    def step(self, pieces: Sequence[Piece], tables: bool) -> None:
        metadata = batches.metadata(self.module, BLOCK, pieces, tables)
        answers = self.log_probs(pieces, metadata).split([piece.length for piece in pieces])
        for piece, answer in zip(pieces, answers, strict=True):
            expected = self.reference.log_probs[piece.sequence.row, piece.tokens]
            error = float((answer - expected).abs().max())
            where = f"after tokens {piece.sequence.computed} to {piece.end - 1}"
            assert error <= TOLERANCE, f"wrong log-probabilities {where}: off by {error}"
            piece.sequence.computed = piece.end

    def prefill(self, *lengths: int, tables: bool = False) -> None:
        """Compute so many tokens of the first requests."""
        requests = self.requests[: len(lengths)]
        pieces = [
            Piece(request, length, is_prefill=True)
            for request, length in zip(requests, lengths, strict=True)
        ]
        self.step(pieces, tables)

    def decode(self, steps: int, requests: int = 1) -> None:
        """Compute tokens one by one, of the first requests at a time."""
        for _ in range(steps):
            pieces = [Piece(request, 1, is_prefill=False) for request in self.requests[:requests]]
            self.step(pieces, tables=True)


NewEngine = Callable[[str], Engine]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def new_engine(checkpoint: Reference, monkeypatch: pytest.MonkeyPatch) -> NewEngine:
    """Return a function that gives the model on a backend, with weights and a KV cache."""
    from vllm.attention import layer
    from vllm.model_executor.layers.fused_moe import layer as moe_layer

    monkeypatch.setenv("VLLM_USE_V1", "0")
    tiny_llama4.register_in_process("Llama4ForCausalLM", "vllm.model_executor.models.llama4")
    # FlashAttention takes no float32, but what stands in for it does.
    choose = layer.get_attn_backend
    monkeypatch.setattr(
        layer,
        "get_attn_backend",
        lambda size, _, *args, **kwargs: choose(size, torch.bfloat16, *args, **kwargs),
    )
    monkeypatch.setattr(moe_layer, "fused_experts", kernels.fused_experts)
    # Looked up, but not called.
    monkeypatch.setattr(torch.ops._C, "silu_and_mul", None, raising=False)

    def new(backend: str) -> Engine:
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", backend.upper())
        module = kernels.stand_in(monkeypatch, backend)
        config = tiny_llama4.engine_config(checkpoint.folder, {"dtype": "bfloat16"})
        config.model_config.dtype = torch.float32
        config.cache_config.block_size = BLOCK
        return Engine(tiny_llama4.load(config), module, config, checkpoint)

    return new


@pytest.mark.fail_to_pass(
    releases=in_order(span("0.8.4", "0.10.0")), raises=r"assert None == \('llama4'"
)
def test_registered() -> None:
    """The class that is compared here serves such checkpoints, not Transformers'.

    That one's layers are all global. What is looked at is not what a test registers.
    """
    from vllm.model_executor.models.registry import _VLLM_MODELS

    assert _VLLM_MODELS.get("Llama4ForCausalLM") == ("llama4", "Llama4ForCausalLM")


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(
    ("prompt", "decodes"),
    [
        pytest.param(1, 2, id="one-token", marks=keyword_missing),
        pytest.param(CHUNK // 2, 4, id="below", marks=keyword_missing),
        pytest.param(CHUNK - 3, 3, id="decode-up-to-chunk", marks=keyword_missing),
        pytest.param(CHUNK, 0, id="chunk", marks=keyword_missing),
        pytest.param(CHUNK, 3, id="decode-past-chunk", marks=chunks_ignored),
        pytest.param(CHUNK + 1, 0, id="one-past", marks=chunks_ignored),
        pytest.param(CHUNK - 2, CHUNK + 5, id="decode-two-boundaries", marks=chunks_ignored),
        pytest.param(3 * CHUNK, 3, id="three-chunks", marks=chunks_ignored),
        pytest.param(4 * CHUNK - 5, 12, id="four-chunks", marks=chunks_ignored),
    ],
)
def test_prompt_and_decode(backend: str, prompt: int, decodes: int, new_engine: NewEngine) -> None:
    engine = new_engine(backend)
    engine.prefill(prompt)
    engine.decode(decodes)


@chunks_ignored
@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_batch(backend: str, new_engine: NewEngine) -> None:
    """A long and a short prompt, which cross boundaries at different times."""
    engine = new_engine(backend)
    engine.prefill(3 * CHUNK - 7, CHUNK - 3)
    engine.decode(10, requests=2)


@chunks_ignored
@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_chunked_prefill(backend: str, new_engine: NewEngine) -> None:
    """A prompt computed in parts, none of which ends with a chunk."""
    engine = new_engine(backend)
    for length in (CHUNK - 7, 2, CHUNK + 9):
        engine.prefill(length, tables=True)
    engine.decode(2)
