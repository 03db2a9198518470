"""Probes of topics about the V1 engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .llama4 import (
    BLOCK,
    CHUNK,
    CHUNKED,
    HEAD_SIZE,
    HEADS,
    MAX_LEN,
    Backend,
    Builder,
    chunked_layer,
    engine_config,
)
from .tree import AbsentError, Loose, Probes, Tree, UnknownError, WrongError, demand
from .v0 import CUT, PROMPT, refuse_unless_accepted

PROBES = Probes()
BACKENDS = "vllm.v1.attention.backends."
UTILS = BACKENDS + "utils"


def cdiv(a: Any, b: Any) -> Any:
    """As vllm.utils has it."""
    return -(a // -b)


CDIV = {"vllm__utils__cdiv": cdiv, "vllm__utils__math_utils__cdiv": cdiv}


def require_backends_do_it(tree: Tree) -> None:
    """Nothing, if each V1 backend has to attend within chunks by itself.

    Raises:
        AbsentError: the layers or the runner do it for all of them.
    """
    if not chunked_layer(tree, True).get("use_irope"):
        raise AbsentError("V1 backends are not told of chunks any more: all get virtual batches")


class Whole(Exception):  # noqa: N818
    """The metadata of global attention is used."""


class Chunks(Exception):  # noqa: N818
    """The metadata of chunked local attention is used."""


@dataclass(frozen=True)
class Local:
    """Metadata that says when it is used."""

    local_attn_metadata: Any
    told: type[Exception]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else self.told


def demand_local(tree: Tree, module: str, cls: str) -> None:
    """Nothing, if the impl of a layer with chunks takes their metadata.

    Raises:
        WrongError: it takes that of global attention, or refuses `use_irope`.
    """
    require_backends_do_it(tree)
    unit = tree.unit(BACKENDS + module)
    made = unit.take(cls)
    refuse_unless_accepted(made.__init__, cls)
    backend = Loose(get_supported_head_sizes=lambda: [HEAD_SIZE])
    unit.set(
        is_quantized_kv_cache=lambda _: False,
        FlexAttentionBackend=backend,
        FlashInferBackend=backend,
    )
    impl = made(HEADS, HEAD_SIZE, 1.0, HEADS, None, None, "auto", use_irope=True)
    given = Local(Local(None, Chunks), Whole)
    any_ = Loose()
    try:
        impl.forward(any_, any_, any_, any_, any_, given, any_)
    except Chunks:
        return
    except Whole:
        raise WrongError(f"{cls} computes global attention in layers with chunks") from None
    raise UnknownError(f"{cls}.forward takes no metadata")


@PROBES.add
def local_attention_clip(tree: Tree) -> None:
    """A last chunk past the block table is cut where the table ends."""
    torch = tree.torch
    tree = tree.with_(**CDIV)
    modules = [one for one in (UTILS, f"{BACKENDS}flash_attn") if tree.path(one)]
    name = "make_local_attention_virtual_batches"
    unit = next((unit for one in modules if name in (unit := tree.unit(one))), None)
    if unit is None:
        raise UnknownError(f"there is no {name} where it is looked for")
    make = unit.take(name)
    ends, lens = (torch.tensor(one, dtype=torch.int32) for one in ([0, 6], [6]))
    table = torch.tensor([[5, 6, 7]], dtype=torch.int32)
    try:
        if "common_attn_metadata" in inspect.signature(make).parameters:
            common = Loose(query_start_loc_cpu=ends, query_start_loc=ends, seq_lens_cpu=lens,
                           block_table_tensor=table)  # fmt: skip
            unit.set(CommonAttentionMetadata=lambda **named: named)
            make(CHUNK, common, BLOCK)
        else:
            make(CHUNK, ends.numpy(), lens.numpy(), table, BLOCK)
    except IndexError as error:
        raise WrongError(f"the last chunk is looked up past the block table: {error}") from None


@PROBES.add
def v1_split_virtual_batches(tree: Tree) -> None:
    """A prefill of which chunks leave a single token is split like any other."""
    torch = tree.torch
    split = tree.unit(UTILS).take("split_decodes_and_prefills")
    ends = torch.tensor([0, 1, 5, 6], dtype=torch.int32)
    batch = Loose(max_query_len=4, num_reqs=3, num_actual_tokens=6, query_start_loc_cpu=ends,
                  query_start_loc=ends)  # fmt: skip
    try:
        found = tuple(split(batch))
    except AssertionError:
        raise WrongError("a prefill that is cut down to one token fails an assertion") from None
    demand(found == (1, 2, 1, 5), f"a decode and two parts of a prefill are split as {found}")


@PROBES.add
def v1_cpu_virtual_batches(tree: Tree) -> None:
    """The chunks of a prompt are all taken for prefills, and there is room for them."""
    module = f"{BACKENDS}cpu_attn"
    torch = tree.torch
    unit = tree.unit(module)
    unit.set(TorchSDPAMetadata=lambda **named: named, AttentionMetadataBuilder=MetadataBuilder)
    config = engine_config(tree)
    config.scheduler_config.max_num_seqs = 1
    made = unit.take("TorchSDPAMetadataBuilderV1")
    few = len(inspect.signature(made.__init__).parameters) == 4
    spec, device = SimpleNamespace(block_size=BLOCK), "cpu"
    builder = made(spec, config, device) if few else made(spec, [], config, device)
    requests = Loose(num_reqs=1, num_computed_tokens_cpu=[0], num_prompt_tokens=[PROMPT],
                     req_ids=["a"])  # fmt: skip
    builder.reorder_batch(requests, Loose(num_scheduled_tokens={"a": PROMPT}))
    ends = torch.tensor([0, 4, 8, 10], dtype=torch.int32)
    lens = torch.tensor(CUT, dtype=torch.int32)
    batch = Loose(num_reqs=3, max_query_len=4, seq_lens_cpu=lens, query_start_loc_cpu=ends,
                  num_actual_tokens=PROMPT, slot_mapping=torch.arange(PROMPT),
                  block_table_tensor=torch.zeros((3, 2)))  # fmt: skip
    try:
        found = builder.build(0, batch)["num_prefills"]
    except ValueError as error:
        raise WrongError(f"there is no room for the chunks of a prompt: {error}") from None
    demand(found == len(CUT), f"of the {len(CUT)} chunks of a prompt {found} are prefills")


class MetadataBuilder(Builder):
    """In place of the class that V1's metadata builders are derived from."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    def _init_reorder_batch_threshold(self, *_: Any, **__: Any) -> None:
        pass


@PROBES.add
def v1_flashinfer_buffers(tree: Tree) -> None:
    """FlashInfer's buffers have room for all chunks that a batch can be cut into."""
    tree = tree.with_(UTILS, **CDIV)
    unit = tree.unit(f"{BACKENDS}flashinfer")
    unit.set(
        cdiv=cdiv,
        AttentionMetadataBuilder=MetadataBuilder,
        infer_global_hyperparameters=lambda *_: Loose(),
        get_per_layer_parameters=lambda *_: Loose(),
        is_pin_memory_available=lambda: False,
        supports_trtllm_attention=lambda *_: (False, None),
        can_use_trtllm_attention=lambda *_: False,
        flashinfer_disable_q_quantization=lambda: True,
        FlashInferBackend=Loose(),
        vllm_is_batch_invariant=lambda: False,
        get_dcp_group=lambda: SimpleNamespace(world_size=1, rank_in_group=0),
    )
    config = engine_config(tree)
    config.compilation_config = Loose(cudagraph_mode=Loose(decode_mode=lambda: None))
    builder = unit.take("FlashInferMetadataBuilder")(local_spec(config), [], config, "cpu")
    demand_room(builder, config, "paged_kv_indptr", "paged_kv_indptr_cpu")


def demand_room(builder: Any, config: Any, *names: str) -> None:
    """Nothing, if a buffer of one more than sequences has room for the most chunks of a batch.

    Raises:
        UnknownError: the builder has no buffer of these names.
        WrongError: the first one that it has is too small.
    """
    room = next((len(vars(builder)[name]) - 1 for name in names if name in vars(builder)), None)
    if room is None:
        raise UnknownError(f"there is no {names[0]}")
    limits = config.scheduler_config
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    most = min(2 * seqs + (tokens - 2 * seqs) // CHUNK, seqs * MAX_LEN // CHUNK)
    demand(room >= most, f"there is room for {room} sequences, {seqs} make {most} chunks")


@PROBES.add
def v1_flash_attn_buffers(tree: Tree) -> None:
    """A schedule of FlashAttention has room for all chunks, or builders know that no graph reads
    it."""
    runner = tree.unit("vllm.v1.worker.gpu_model_runner").take("GPUModelRunner")
    if hasattr(runner, "_check_and_update_cudagraph_mode"):
        return  # called before builders are made, since upstream's #27427
    tree = tree.with_(UTILS, **CDIV)
    unit = tree.unit(f"{BACKENDS}flash_attn")
    unit.set(
        AttentionMetadataBuilder=MetadataBuilder,
        get_flash_attn_version=lambda: 3,
        is_flash_attn_varlen_func_available=lambda: False,
    )
    config = engine_config(tree)
    mode = Loose(has_full_cudagraphs=lambda: True)
    config.compilation_config = Loose(cudagraph_mode=mode, max_capture_size=BLOCK)
    builder = unit.take("FlashAttentionMetadataBuilder")(local_spec(config), [], config, "cpu")
    demand_room(builder, config, "scheduler_metadata")


def local_spec(config: Any) -> Any:
    """The KV cache of a layer with chunks."""
    return SimpleNamespace(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE,
                           dtype=config.model_config.dtype, attention_chunk_size=CHUNK)  # fmt: skip


@PROBES.add
def v1_flashinfer_irope(tree: Tree) -> None:
    """A layer with chunks takes their plan."""
    demand_local(tree, "flashinfer", "FlashInferImpl")


@dataclass
class Plan:
    """FlashInfer's metadata, as far as a plan is made of it."""

    page_size: int = BLOCK
    qo_indptr: Any = None
    paged_kv_indptr: Any = None
    paged_kv_indices: Any = None
    paged_kv_last_page_len: Any = None
    num_prefills: int = 1
    use_cascade: bool = False
    prefill_wrapper: Any = None
    decode_wrapper: Any = None
    cascade_wrapper: Any = None
    local_attn_metadata: Any = None


@PROBES.add
def v1_flashinfer_local(tree: Tree) -> None:
    """A prompt past the chunk is also planned with each chunk apart."""
    require_backends_do_it(tree)
    torch, local = tree.torch, f"{BACKENDS}flashinfer_local"
    real = [f"{BACKENDS}flashinfer", f"{BACKENDS}flash_attn", UTILS, local]
    tree = tree.with_(*(one for one in real if tree.path(one)), **CDIV)
    unit = tree.unit(f"{BACKENDS}flashinfer")
    planned: list[Plan] = []
    unit.take("FlashInferMetadataBuilder")._plan = lambda _, plan: planned.append(plan)
    made = unit.take("FlashInferBackend").get_builder_cls()
    builder = made.__new__(made)
    table = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.int32)
    ends, lens = (torch.tensor(one, dtype=torch.int32).numpy() for one in ([0, PROMPT], [PROMPT]))
    tables = SimpleNamespace(get_device_tensor=lambda *_: table)
    builder.block_table = tables
    builder.runner = SimpleNamespace(
        attention_chunk_size=CHUNK, seq_lens_np=lens, query_start_loc_np=ends, device="cpu",
        input_batch=SimpleNamespace(block_table=tables),
    )  # fmt: skip
    builder._num_decodes, builder._num_prefills = 0, 1
    builder._prefill_wrapper = builder._decode_wrapper = None
    builder._plan(Plan())
    found = [plan.qo_indptr.diff().tolist() for plan in planned if plan.qo_indptr is not None]
    demand(CUT in found, f"FlashInfer plans global attention alone, for a prompt of {PROMPT} tokens"
                         f" and chunks of {CHUNK}")  # fmt: skip


@PROBES.add
def v1_flex_block_table(tree: Tree) -> None:
    """A block that a row names twice has the place where it comes first."""
    torch = tree.torch
    find = tree.with_(**CDIV).unit(f"{BACKENDS}flex_attention").take(
        "physical_to_logical_mapping"
    )  # fmt: skip
    # A sequence of 10 tokens in the blocks 8, 7, 6; what lies behind is a former request's.
    table = torch.tensor([[8, 7, 6, 4, 5, 6, 7, 8]], dtype=torch.int32)
    known = {"block_table": table, "total_blocks": 9, "block_size": 4,
             "seq_lens": torch.tensor([10], dtype=torch.int32)}  # fmt: skip
    found = find(**{name: known[name] for name in inspect.signature(find).parameters})[0].tolist()
    places = f"{found[8]}, {found[7]} and {found[6]}"
    demand(found[6:] == [2, 1, 0], f"blocks of a sequence are looked for at {places}")


@contextmanager
def instead(thing: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute replaced, for a while."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


@contextmanager
def without_dynamo(tree: Tree, compiled: Callable[..., Any]) -> Iterator[None]:
    """Have `compiled` in place of torch.compile."""
    with instead(tree.torch, "compile", compiled):
        yield


def require_masks_by_torch(tree: Tree) -> None:
    """Nothing, if create_block_mask makes the masks of causal attention.

    Raises:
        AbsentError: they are built directly, which upstream does from torch 2.9 on.
    """
    is_direct = "direct_build" in tree.text(f"{BACKENDS}flex_attention")
    if is_direct and tree.torch_version >= (2, 9):
        raise AbsentError("from torch 2.9 on it builds the masks of causal attention directly")


@PROBES.add
def v1_flex_mask_graphs(tree: Tree) -> None:
    """No CUDA graph holds the masks of a step."""
    require_masks_by_torch(tree)
    modes: list[Any] = []

    def compiled(function: Any, *_: Any, mode: Any = None, **__: Any) -> Any:
        modes.append(mode)
        return function

    with without_dynamo(tree, compiled):
        tree.unit(f"{BACKENDS}flex_attention").take("create_block_mask_compiled")
    if not modes:
        raise UnknownError("create_block_mask is not compiled where it is looked for")
    demand("reduce-overhead" not in modes and "max-autotune" not in modes,
           "the second mask of a step overwrites the first, in a CUDA graph's memory")  # fmt: skip


class Asked(Exception):  # noqa: N818
    """create_block_mask is called."""


def ask(*_: Any, **__: Any) -> Any:
    """In place of create_block_mask."""
    raise Asked


@PROBES.add
def v1_flex_causal_masks(tree: Tree) -> None:
    """The block mask of causal attention is made without create_block_mask."""
    require_masks_by_torch(tree)
    torch, tree = tree.torch, tree.with_(**CDIV)
    unit = tree.unit(f"{BACKENDS}flex_attention")
    made: dict[str, Any] = {}

    class BlockMask:
        @staticmethod
        def from_kv_blocks(number: Any, indices: Any, **_: Any) -> None:
            made.update(number=number[0, 0].tolist(), indices=indices[0, 0].tolist())

    unit.set(create_block_mask_compiled=ask, create_block_mask=ask, BlockMask=BlockMask)
    with without_dynamo(tree, lambda function=None, **_: function):
        kind = unit.take("FlexAttentionMetadata")
    mask = kind.__new__(kind)
    # One decode after 200 tokens, in blocks of 64: the pages 4, 1, 2 and 5 of 8.
    places = torch.tensor([[-1, 1, 2, -1, 0, 3, -1, -1]], dtype=torch.int64)
    vars(mask).update(
        causal=True, num_actual_tokens=1, max_query_len=1, max_seq_len=201, block_size=64,
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32), num_reqs=1,
        seq_lens=torch.tensor([201], dtype=torch.int32),
        block_table=torch.tensor([[4, 1, 2, 5]], dtype=torch.int32), physical_to_logical=places,
        total_cache_tokens=512, decode_offset=torch.tensor([200], dtype=torch.int32),
        doc_ids=torch.zeros((1,), dtype=torch.int32), q_block_size=128, kv_block_size=128,
        mask_mod=Loose(), logical_mask_mod=unit.take("causal_mask_mod"),
    )  # fmt: skip
    try:
        mask.build_block_mask()
    except Asked:
        raise WrongError("create_block_mask makes them, of each query and token") from None
    # Blocks of keys are of 128: pages 0 and 1, 2 and 3, 4 and 5 are seen.
    found = made["indices"][0][: made["number"][0]]
    demand(sorted(found) == [0, 1, 2], f"a decode sees the blocks {found} of keys")


@PROBES.add
def v1_flex_local(tree: Tree) -> None:
    """A layer with chunks takes their mask."""
    with without_dynamo(tree, lambda function=None, **_: function):
        demand_local(tree, "flex_attention", "FlexAttentionImpl")


class Supporting(MetadataBuilder):
    """In place of a builder that supports full CUDA graphs, in the ways that releases ask it."""

    cudagraph_support = _cudagraph_support = "always"

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> Any:
        """The same."""
        return cls._cudagraph_support


@PROBES.add
def v1_full_graph_local(tree: Tree) -> None:
    """Full CUDA graphs are refused for a model with chunks."""
    if tree.path(CHUNKED) is None:
        _refused_by_config(tree)
        return
    tree = tree.with_(CHUNKED, UTILS)
    utils = tree.unit(UTILS)
    utils.set(AttentionMetadataBuilder=MetadataBuilder)
    made = tree.unit(CHUNKED).take("create_chunked_local_attention_backend")
    never = utils.take("AttentionCGSupport").NEVER
    backend = type("Any", (Backend,), {"get_builder_cls": staticmethod(lambda: Supporting)})
    builder = made(backend, CHUNK, BLOCK).get_builder_cls()
    told = (builder.cudagraph_support, builder._cudagraph_support,
            builder.get_cudagraph_support(None, None))  # fmt: skip
    demand(never in told, "nothing says that chunks cannot be in a full CUDA graph")


def _refused_by_config(tree: Tree) -> None:
    module = tree.path("vllm.config")
    if module is None or "full_cuda_graph" not in module.read_text("utf-8"):
        raise AbsentError("there are no full CUDA graphs")
    tree = tree.with_(vllm__envs__VLLM_USE_V1=True, vllm__platforms__current_platform=Loose())
    unit = tree.unit("vllm.config")
    unit.set(VllmConfig=Loose(), CompilationConfig=Loose)
    check = unit.method("VllmConfig", "__post_init__")
    config = engine_config(tree)
    model = Loose(attention_chunk_size=CHUNK, max_model_len=MAX_LEN)
    graphs = Loose(full_cuda_graph=True)
    parts = {**vars(config), "model_config": model, "compilation_config": graphs}
    parts["cache_config"] = parts["scheduler_config"] = Loose()
    try:
        check(Loose(**parts, lora_config=None, quant_config=Loose(), load_config=None))
    except ValueError as error:
        if "chunk" not in str(error):
            raise
        return
    raise WrongError("full CUDA graphs are taken, and replay the chunks of the step they captured")


class Spec:
    """In place of the spec of a KV cache."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class OtherSpec:
    """In place of the others."""


class Counted(Builder):
    """In place of a metadata builder: it is counted."""

    made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        type(self).made += 1


@PROBES.add
def v1_hybrid_off_local(tree: Tree) -> None:
    """Layers with and without chunks in one group have metadata of their own."""
    if chunked_layer(tree, True).get("use_irope"):
        raise AbsentError("V1 backends attend within chunks by themselves")
    unit = tree.unit("vllm.v1.worker.gpu_model_runner")
    kind: Any = type("Counted", (Counted,), {"made": 0})
    backends = [type(name, (Backend,), {"get_builder_cls": staticmethod(lambda: kind)})
                for name in ("Whole", "Chunks")]  # fmt: skip
    for one in backends:
        one.full_cls_name = classmethod(lambda cls: cls.__name__)  # type: ignore[attr-defined]
    layers = {
        "global": Loose(use_irope=False, get_attn_backend=lambda: backends[0]),
        "local": Loose(use_irope=True, get_attn_backend=lambda: backends[1]),
    }
    unit.set(
        AttentionSpec=Spec,
        FullAttentionSpec=Spec,
        MambaSpec=OtherSpec,
        UniformTypeKVCacheSpecs=OtherSpec,
        get_attn_backend=lambda *_, **__: backends[0],
        get_layers_from_vllm_config=lambda *_: layers,
        AttentionGroup=lambda *_, **__: Loose(),
    )
    start = unit.method("GPUModelRunner", "initialize_attn_backend")
    spec = Spec(attention_chunk_size=CHUNK, head_size=HEAD_SIZE, dtype="auto", block_size=BLOCK,
                use_mla=False, num_kv_heads=HEADS)  # fmt: skip
    runner = Loose(
        attn_backends=[], attn_metadata_builders=[], attn_groups=[], local_attn_layers={},
        max_model_len=MAX_LEN, full_cuda_graph=False, vllm_config=engine_config(tree),
    )  # fmt: skip
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=list(layers))
    start(runner, SimpleNamespace(kv_cache_groups=[group]))
    demand(kind.made == 2, f"two kinds of layers share {kind.made} metadata builder")
