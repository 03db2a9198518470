"""How much memory Llama 4 takes: weights by format, and the KV cache by length.

Parameters are counted from the shapes of the released models, as their config.json has them. What
no shape tells, `RESERVE`, is an allowance, and was not measured.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

GIB = 2**30
#: What vLLM takes of a GPU's memory (`--gpu-memory-utilization`).
SHARE = 0.9
#: Allowed on each GPU for activations, CUDA graphs and buffers, bytes.
RESERVE = 4 * GIB
#: Tokens of a step (`--max-num-batched-tokens`), the most that any release takes by itself.
STEP = 8192

#: The engine, as `matrix.Outcome` has it.
Engine = Literal["v0", "v1"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vision(_Model):
    """The vision tower, the same in all released models."""

    hidden: int = 1408
    layers: int = 34
    intermediate: int = 5632
    patch: int = 14
    """Pixels of a patch's side."""
    patches: int = 576
    """Of a tile."""
    projected: int = 4096

    def parameters(self, text_hidden: int) -> int:
        """Parameters, with the projection into the text model's hidden states."""
        attention = 4 * (self.hidden + 1) * self.hidden
        mlp = 2 * self.hidden * self.intermediate + self.hidden + self.intermediate
        norms = 4 * self.hidden
        embeddings = (3 * self.patch**2 + self.patches + 2) * self.hidden
        adapter = (self.intermediate + self.projected) * self.projected
        return (
            self.layers * (attention + mlp + norms)
            + norms
            + embeddings
            + adapter
            + self.projected * text_hidden
        )


class Shape(_Model):
    """A released model, in the words of its config.json."""

    name: str
    experts: int
    """`num_local_experts`."""
    moe_every: int
    """`interleave_moe_layer_step`: the last of so many layers has experts."""
    layers: int = 48
    hidden: int = 5120
    intermediate: int = 8192
    """Of an expert, and of the shared expert."""
    intermediate_mlp: int = 16384
    """Of layers without experts."""
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 202048
    chunk: int = 8192
    global_every: int = 4
    """The last of so many layers attends to everything, without rotary embedding."""
    vision: Vision = Vision()

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers // self.moe_every

    @property
    def global_layers(self) -> int:
        """Layers that attend to everything."""
        return self.layers // self.global_every

    @property
    def routed(self) -> int:
        """Parameters of all experts but the shared ones."""
        return self.moe_layers * self.experts * self._expert

    @property
    def dense(self) -> int:
        """Parameters of the shared experts, and of the layers that have none."""
        mlps = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate_mlp
        return self.moe_layers * self._expert + mlps

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.routed + self.dense + self._kept

    @property
    def active(self) -> int:
        """Parameters of the text model that compute a token: one expert of a layer."""
        one = self.routed // self.experts
        return one + self.dense + self._kept - self.vision.parameters(self.hidden)

    @property
    def _expert(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def _kept(self) -> int:
        """Parameters that checkpoints leave as they are: attention, routers, embeddings, vision."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * width + 2 * kv_width)
        norms = (2 * self.layers + 1) * self.hidden
        routers = self.moe_layers * self.hidden * self.experts
        embeddings = 2 * self.vocabulary * self.hidden
        vision = self.vision.parameters(self.hidden)
        return self.layers * attention + norms + routers + embeddings + vision


SCOUT = Shape(name="Scout", experts=16, moe_every=1)
MAVERICK = Shape(name="Maverick", experts=128, moe_every=2)


class Format(_Model):
    """How a checkpoint holds the weights of its experts; the rest has the model's dtype."""

    name: str
    bits: float | None
    """Of a weight, with its share of scales and zero points; None: as the rest."""
    has_dense: bool = True
    """Whether shared experts and layers without experts are held so too."""

    def bytes(self, shape: Shape, dtype_bits: int = 16) -> int:
        """Of all weights, in a model whose dtype has so many bits."""
        if self.bits is None:
            return shape.parameters * dtype_bits // 8
        quantised = shape.routed + (shape.dense if self.has_dense else 0)
        kept = shape.parameters - quantised
        return round((quantised * self.bits + kept * dtype_bits) / 8)


UNQUANTISED = Format(name="unquantised", bits=None)
#: A scale of 16 bits for 128 weights; AWQ and GPTQ have a zero point of 4 bits beside it.
W4A16 = Format(name="w4a16", bits=4 + 16 / 128)
AWQ = Format(name="AWQ", bits=4 + (16 + 4) / 128)
GPTQ = Format(name="GPTQ", bits=4 + (16 + 4) / 128)
#: A scale for an output, which is next to nothing.
FP8 = Format(name="fp8", bits=8)
FP8_EXPERTS = Format(name="fp8 experts", bits=8, has_dense=False)


class Cache(_Model):
    """A KV cache."""

    bits: int
    """Of a number: 8 or 16, or 32 with `--dtype float32`."""
    drops: bool
    """Whether layers that attend within chunks keep no earlier ones (`drops_chunks`)."""

    def tokens(self, shape: Shape, length: int) -> int:
        """Keys and values that a sequence of `length` tokens has in all layers, in tokens.

        Layers that drop chunks hold the chunk, and the step that is computed.
        """
        local = min(length, shape.chunk + STEP) if self.drops else length
        layers = shape.global_layers
        return layers * length + (shape.layers - layers) * local

    def bytes(self, shape: Shape, length: int, gpus: int = 1) -> int:
        """On each of so many GPUs, bytes."""
        heads = -(-shape.kv_heads // gpus)
        return self.tokens(shape, length) * 2 * heads * shape.head_dim * self.bits // 8


def drops_chunks(release: str, engine: str) -> bool:
    """Whether an engine frees what layers that attend within chunks no longer see.

    Only the hybrid KV-cache manager does, on V1, and it is on by default in 0.10.0 alone: before,
    all layers have one kind of cache (vllm/v1/worker/gpu_model_runner.py, get_kv_cache_spec); from
    0.10.1 on VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1 has to ask for it (PR 21761).
    """
    return engine == "v1" and release == "0.10.0"


class Need(_Model):
    """What a GPU of several has to hold, bytes."""

    gpus: int
    """Over which tensor parallelism spreads it."""
    weights: int
    """On each."""
    cache: int
    """On each."""

    @property
    def bytes(self) -> int:
        """All that vLLM takes."""
        return self.weights + self.cache + RESERVE

    def fits(self, memory: int) -> bool:
        """Whether a GPU of `memory` bytes has room."""
        return self.bytes <= memory * SHARE


def tensor_parallel(shape: Shape) -> tuple[int, ...]:
    """Sizes that divide the heads, and the KV heads or are divided by them, on one host."""
    return tuple(
        size for size in range(1, 9) if shape.heads % size == 0 and shape.kv_heads % size == 0
    )


def need(shape: Shape, weights: int, cache: Cache, length: int, gpus: int) -> Need:
    """What each of `gpus` holds of `weights` bytes and a sequence of `length` tokens."""
    return Need(gpus=gpus, weights=-(-weights // gpus), cache=cache.bytes(shape, length, gpus))


def fewest(shape: Shape, weights: int, cache: Cache, length: int, memory: int) -> Need | None:
    """With the fewest GPUs of `memory` bytes that hold it; None if eight do not."""
    sizes = (need(shape, weights, cache, length, gpus) for gpus in tensor_parallel(shape))
    return next((one for one in sizes if one.fits(memory)), None)
