"""Probes of topics about the V0 engine and about which engine is chosen."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .llama4 import BLOCK, CHUNK, HEAD_SIZE, HEADS, LLAMA4, chunked_layer, engine_config
from .tree import AbsentError, Base, Loose, Probes, Tree, Unit, UnknownError, WrongError, demand

PROBES = Probes()
#: Tokens of the one prompt, and the chunks that they are in.
PROMPT, CUT = 10, [4, 4, 2]
BACKENDS = "vllm.attention.backends."
SIGNATURES = {
    "xformers": "XFormersImpl",
    "flash_attn": "FlashAttentionImpl",
    "flashinfer": "FlashInferImpl",
    "rocm_flash_attn": "ROCmFlashAttentionImpl",
    "torch_sdpa": "TorchSDPABackendImpl",
    "pallas": "PallasAttentionBackendImpl",
    "hpu_attn": "HPUAttentionImpl",
    "ipex_attn": "IpexAttnBackendImpl",
}
"""The V0 impls that Llama 4 can be given, by module."""


def require_v0(tree: Tree, module: str = "") -> None:
    """Nothing, if there is the V0 engine, and the module.

    Raises:
        AbsentError: there is not, and nothing names it.
        UnknownError: it may be elsewhere.
    """
    if tree.path(LLAMA4) is None:
        raise UnknownError(f"there is no {LLAMA4}")
    if tree.path("vllm.worker.worker") is None:
        if tree.path("vllm.v1.worker.gpu_worker") is None:
            raise UnknownError("neither engine has its worker where it is looked for")
        raise AbsentError("the V0 engine is gone: there is no vllm/worker/worker.py")
    if module and tree.path(module) is None:
        if other := tree.mentions(module):
            raise UnknownError(f"there is no {module}, which {other.name} names")
        raise AbsentError(f"there is no {module}, and nothing names it")


class Reached(Exception):  # noqa: N818
    """The kernel, with what it was given."""

    def __init__(self, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.given, self.named = given, named

    def metadata(self) -> Any:
        """The batch among it."""
        every = (*self.given, *self.named.values())
        return next(one for one in every if isinstance(one, Batch))


def reach(*given: Any, **named: Any) -> Any:
    """In place of a kernel."""
    raise Reached(given, named)


@dataclass
class Batch:
    """The metadata of one prompt on V0, as far as backends share it."""

    seq_lens: list[int]
    seq_lens_tensor: Any
    slot_mapping: Any
    query_start_loc: Any
    seq_start_loc: Any
    block_tables: Any
    num_prefills: int = 1
    num_prefill_tokens: int = PROMPT
    num_decode_tokens: int = 0
    max_query_len: int = PROMPT
    max_prefill_seq_len: int = PROMPT
    max_decode_seq_len: int = 0
    max_decode_query_len: int = 1
    context_lens_tensor: Any = None
    use_cuda_graph: bool = False
    chunked_prefill: bool = False
    attn_bias: Any = None
    _cached_prefill_metadata: Any = None
    _cached_decode_metadata: Any = None

    @property
    def prefill_metadata(self) -> Any:
        """Itself, unless it was decided otherwise."""
        return (self._cached_prefill_metadata or self) if self.num_prefills else None

    @property
    def decode_metadata(self) -> Any:
        """The same."""
        return None if self.num_prefills else self._cached_decode_metadata or self


def prompt(torch: Any) -> Batch:
    """A prompt of `PROMPT` tokens, of which none is cached."""
    ends = torch.tensor([0, PROMPT], dtype=torch.int32)
    lens = torch.tensor([PROMPT], dtype=torch.int32)
    none = torch.zeros((0,), dtype=torch.int32)
    slots = torch.arange(PROMPT, dtype=torch.int64)
    return Batch([PROMPT], lens, slots, ends, ends, none)


def chunked_tree(tree: Tree) -> Tree:
    """The tree with the metadata builder, for a model with chunks."""
    return tree.with_(
        f"{BACKENDS}chunked_local",
        vllm__config__get_current_vllm_config=lambda: engine_config(tree),
    )


def forwarded(tree: Tree, module: str, cls: str, **instead: Any) -> Reached:
    """What the kernel of a V0 impl is given of the prompt in a chunked layer."""
    require_v0(tree, BACKENDS + module)
    tree = chunked_tree(tree)
    unit, torch = tree.unit(BACKENDS + module), tree.torch
    paged = SimpleNamespace(get_supported_head_sizes=lambda: [HEAD_SIZE])
    unit.set(
        PagedAttention=paged,
        _get_paged_attn_impl=lambda: paged,
        is_quantized_kv_cache=lambda _: False,
        get_num_prefill_decode_query_kv_tokens=lambda *_: (PROMPT, PROMPT, 0),
        **instead,
    )
    impl = construct(unit, cls)
    for kernel in ("_run_memory_efficient_xformers_forward", "_run_sdpa_forward"):
        if hasattr(type(impl), kernel):
            setattr(impl, kernel, reach)
    query, key = (torch.zeros(PROMPT, HEADS, HEAD_SIZE) for _ in range(2))
    scale = torch.ones(1, 1)
    layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0, _q_scale=scale, _k_scale=scale,
                            _v_scale=scale)  # fmt: skip
    try:
        impl.forward(layer, query, key, key, torch.zeros(0), prompt(torch), query)
    except Reached as reached:
        return reached
    raise UnknownError(f"{cls}.forward calls no kernel that is known here")


def construct(unit: Unit, cls: str) -> Any:
    """An impl of a layer with chunks."""
    made = unit.take(cls)
    given = (HEADS, HEAD_SIZE, 1.0, HEADS, None, None, "auto")
    refuse_unless_accepted(made.__init__, cls)
    return made(*given, use_irope=True)


def refuse_unless_accepted(init: Any, name: str) -> None:
    """Nothing, if `use_irope` is a keyword that it takes.

    Raises:
        WrongError: it is not.
    """
    try:
        inspect.signature(init).bind(None, HEADS, HEAD_SIZE, 1.0, HEADS, None, None, "auto",
                                     use_irope=True)  # fmt: skip
    except TypeError as error:
        raise WrongError(f"{name}: {error}") from None


def demand_cut(lens: Any, who: str) -> None:
    """Nothing, if the kernel gets each chunk apart.

    Raises:
        WrongError: it does not.
    """
    found = lens if isinstance(lens, list) else lens.tolist()
    demand(found == CUT, f"{who} computes a prompt of {PROMPT} tokens as {found}, chunks of {CHUNK}"
                         f" are {CUT}")  # fmt: skip


@PROBES.add
def attention_signatures(tree: Tree) -> None:
    """Every impl that is told `use_irope` takes it."""
    told = [use_v1 for use_v1 in (False, True) if chunked_layer(tree, use_v1).get("use_irope")]
    if not told:
        raise AbsentError("no layer of Llama 4 passes use_irope on")
    modules = {}
    if False in told and tree.path("vllm.worker.worker") is not None:
        modules = {BACKENDS + name: cls for name, cls in SIGNATURES.items()}
    if True in told:
        modules["vllm.v1.attention.backends.pallas"] = "PallasAttentionBackendImpl"
    for module, cls in modules.items():
        if tree.path(module) is not None:
            init = tree.unit(module).method(cls, "__init__")
            refuse_unless_accepted(init, f"{module}.{cls}")


@PROBES.add
def chunked_local_metadata(tree: Tree) -> None:
    """The builder cuts a prompt at the chunk, and starts a decode at its last chunk."""
    require_v0(tree)
    module = f"{BACKENDS}chunked_local"
    demand(tree.path(module), "no V0 backend has metadata in which a sequence is a chunk")
    torch = tree.torch
    builder = tree.unit(module).take("ChunkedLocalMetadataBuilder")(CHUNK, BLOCK)
    demand_cut(builder.build(prompt(torch)).prefill_metadata.seq_lens, "V0")
    decode = prompt(torch)
    decode.num_prefills, decode.num_prefill_tokens, decode.max_decode_seq_len = 0, 0, PROMPT
    decode.block_tables = torch.tensor([[5, 6, 7, 8, 9]], dtype=torch.int32)
    local = builder.build(decode).decode_metadata
    found = local.seq_lens_tensor.tolist(), local.block_tables.tolist()
    demand(found == ([2], [[9, 9]]), f"a decode after {PROMPT} tokens attends to {found}")


@PROBES.add
def chunked_local_xformers(tree: Tree) -> None:
    """XFormers computes each chunk of a prompt apart."""
    reached = forwarded(tree, "xformers", "XFormersImpl")
    demand_cut(reached.metadata().seq_lens, "XFormers")


@PROBES.add
def chunked_local_flash_attn(tree: Tree) -> None:
    """FlashAttention computes each chunk of a prompt apart."""
    reached = forwarded(
        tree,
        "flash_attn",
        "FlashAttentionImpl",
        get_flash_attn_version=lambda **_: 2,
        flash_attn_supports_fp8=lambda: False,
        flash_attn_varlen_func=reach,
        FlashAttentionBackend=SimpleNamespace(get_supported_head_sizes=lambda: [HEAD_SIZE]),
    )
    demand_cut(reached.named["cu_seqlens_k"].diff(), "FlashAttention")


@PROBES.add
def chunked_local_torch_sdpa(tree: Tree) -> None:
    """TorchSDPA computes each chunk of a prompt apart."""
    reached = forwarded(tree, "torch_sdpa", "TorchSDPABackendImpl", _use_ipex=False)
    demand_cut(reached.metadata().seq_lens, "TorchSDPA")


@PROBES.add
def chunked_local_wiring(tree: Tree) -> None:
    """The V0 impl of a layer with chunks is told that it is one."""
    require_v0(tree)
    demand(chunked_layer(tree, False).get("use_irope"),
           "V0 backends are not told which layers have chunks")  # fmt: skip


@PROBES.add
def chunked_local_support(tree: Tree) -> None:
    """There is a table of the KV caches that V1 backends read."""
    module = f"{BACKENDS}chunked_local_support"
    demand(tree.path(module), "nothing tells which V1 backend reads which KV cache")
    unit = tree.unit(module)
    table = unit.take("V1_BACKENDS" if "V1_BACKENDS" in unit else "BACKENDS")
    found = table.get("FLASH_ATTN", ["fp8_e5m2"])
    demand("fp8_e5m2" not in found, "V1 FlashAttention is said to read fp8_e5m2")


class Platform(Base):
    """An H100."""

    device_type = "cuda"
    is_cuda = is_cuda_alike = opaque_attention_op = staticmethod(lambda *_: True)
    is_cpu = is_tpu = staticmethod(lambda *_: False)
    pre_register_and_update = staticmethod(lambda *_: None)

    @staticmethod
    def get_device_capability() -> Any:
        """Its capability."""
        return SimpleNamespace(to_int=lambda: 90)


class Engine(Loose):
    """In place of EngineArgs, as far as the engine is chosen."""

    device, model, dtype, kv_cache_dtype, block_size = "cuda", "llama4", "auto", "auto", None
    enable_chunked_prefill = enable_prefix_caching = None

    def create_model_config(self) -> Any:
        """A model with chunks."""
        return self.config.model_config

    def _is_v1_supported_oracle(self, _: Any) -> bool:
        return True

    _set_default_args_v0 = _set_default_args_v1 = _set_default_args = reach


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, and no other ones of vLLM, for a while."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("VLLM_", "_VLLM_"))]:
        del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@PROBES.add
def engine_selection(tree: Tree) -> None:
    """The engine refuses what is not right: V0 FlashInfer; where there is no V0, fp8_e5m2 with
    FlashAttention."""
    has_v0 = tree.path("vllm.worker.worker") is not None
    if not has_v0 and "def validate_configuration" in tree.text(f"{BACKENDS}abstract"):
        raise UnknownError("each backend checks what it is asked for, where it is chosen")
    selection = "vllm.engine.chunked_local_selection"
    chosen = tree.with_(
        selection,
        f"{BACKENDS}chunked_local_support",
        vllm__platforms__current_platform=Platform(),
        vllm__envs__VLLM_USE_V1=not has_v0,
        vllm__envs__is_set=lambda name: has_v0 and name == "VLLM_USE_V1",
        vllm__attention__utils__fa_utils__flash_attn_supports_fp8=lambda: True,
    )
    if chosen.path(selection) is not None:
        chosen.unit(selection).set(find_spec=chosen.path)
    unit = chosen.unit("vllm.engine.arg_utils")
    unit.set(
        maybe_override_with_speculators=lambda **_: ("llama4", "llama4", None),
        is_cloud_storage=lambda _: False,
        is_gguf=lambda _: False,
    )
    create = unit.method("EngineArgs", "create_engine_config")
    engine = Engine(config=engine_config(tree), kv_cache_dtype="auto" if has_v0 else "fp8_e5m2")
    asked = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "FLASHINFER"}
    taken = "V0 FlashInfer, which is wrong past a chunk"
    if not has_v0:
        asked = {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}
        taken = "a KV cache of fp8_e5m2 with FlashAttention, which fails in its first pass"
    with environment(**asked):
        try:
            create(engine)
        except Reached:
            raise WrongError(f"the engine takes {taken}") from None
        except ValueError as error:
            if "chunks" not in str(error):
                raise
            return
    raise UnknownError("create_engine_config ends before it sets an engine's defaults")
