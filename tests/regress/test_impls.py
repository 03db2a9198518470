"""Every attention impl that Llama 4 can be given takes what its attention layer passes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import tiny_llama4
from .expected import (
    BY_KEY,
    IMPLS,
    NOT_REFUSED_ERROR,
    PLUGIN_NOT_TOLD,
    Impl,
    unexpected_keyword,
)
from .releases import LLAMA4, in_order, installed_release

RELEASE = installed_release()

COMMON_ARGUMENTS: dict[str, Any] = {
    "num_heads": tiny_llama4.HEADS,
    "head_size": tiny_llama4.HEAD_SIZE,
    "scale": tiny_llama4.HEAD_SIZE**-0.5,
    "num_kv_heads": tiny_llama4.KV_HEADS,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "blocksparse_params": None,
    "logits_soft_cap": None,
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
}
"""What the attention layer passes to every impl; not all of it in all the releases."""


def fail_to_pass(impl: Impl) -> list[pytest.MarkDecorator]:
    """Return the marker for a test that gives `impl` the keyword, if any release lacks it."""
    if not impl.rejects:
        return []
    error = unexpected_keyword(impl.cls)
    return [pytest.mark.fail_to_pass(releases=in_order(impl.rejects), raises=error)]


def no_marks(impl: Impl) -> list[pytest.MarkDecorator]:
    """Return nothing: stock passes the test in every release."""
    return []


def must_refuse(impl: Impl) -> list[pytest.MarkDecorator]:
    """Return the marker for a test that `impl` is refused: no stock engine refuses it."""
    return [pytest.mark.fail_to_pass(releases=in_order(impl.refuses), raises=NOT_REFUSED_ERROR)]


def strictness(impl: Impl) -> list[pytest.MarkDecorator]:
    """Return a skip where upstream takes any keyword by intention."""
    if RELEASE not in impl.swallows:
        return []
    return [pytest.mark.skip(reason=f"{impl.cls} of {RELEASE} has a **kwargs of upstream's own")]


def params(
    impls: list[Impl],
    why_none: str,
    marks: Callable[[Impl], list[pytest.MarkDecorator]] = no_marks,
) -> list[Any]:
    """Return one parameter for each impl, or a single skipped one that says why there is none."""
    if not impls:
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=why_none))]
    return [pytest.param(impl, id=impl.key, marks=marks(impl)) for impl in impls]


def layer_params() -> list[Any]:
    """Return each impl with a chunked and with a global layer."""
    if RELEASE not in LLAMA4:
        skip = pytest.mark.skip(reason=f"{RELEASE} has no Llama 4")
        return [pytest.param(None, None, id="none", marks=skip)]
    return [
        pytest.param(impl, layer, id=f"{impl.key}-{name}", marks=layer_marks(impl, layer))
        for impl in PRESENT
        for layer, name in tiny_llama4.LAYERS.items()
    ]


def layer_marks(impl: Impl, layer: int) -> list[pytest.MarkDecorator]:
    """Return the marks for one layer: what stock fails, for `use_irope` or for another fault."""
    if layer == tiny_llama4.ROPE_LAYER and RELEASE in impl.no_chunks:
        reason = f"{impl.backend} of {RELEASE} has no metadata builder to make chunks with"
        return [pytest.mark.xfail(reason=reason, raises=NotImplementedError, strict=True)]
    return fail_to_pass(impl)


PRESENT = [impl for impl in IMPLS if RELEASE in impl.exists]
ABSENT = [impl for impl in IMPLS if RELEASE not in impl.exists]
REFUSING = [impl for impl in IMPLS if RELEASE in impl.refuses]
PASSED = [impl for impl in IMPLS if RELEASE in impl.passed]

NONE_PRESENT = f"{RELEASE} has no attention impl"
NONE_REFUSES = f"no impl of {RELEASE} has to refuse chunked layers"
NOT_PASSED = f"no attention layer of {RELEASE} passes use_irope to its impl"


@pytest.fixture
def load(
    stubs: Callable[[tuple[str, ...]], None],
    start_engine: Callable[..., Any],
) -> Callable[[Impl], tuple[Any, Any]]:
    """Return a function that gives an impl's module and a config of the engine it belongs to."""

    def load_impl(impl: Impl) -> tuple[Any, Any]:
        stubs(impl.stubs)
        engine = {"VLLM_USE_V1": "0"} if impl.engine == "v0" else {}
        config = start_engine({**engine, **impl.env})
        return importlib.import_module(impl.module), config

    return load_impl


def construct(module: Any, impl: Impl, config: Any, **extra: object) -> Any:
    """Construct an impl as the attention layer does, with `extra` keywords passed on."""
    cls = getattr(module, impl.cls)
    accepted = inspect.signature(cls.__init__).parameters
    common = {name: value for name, value in COMMON_ARGUMENTS.items() if name in accepted}
    with tiny_llama4.loading(config):
        return cls(**common, **extra)


@pytest.mark.parametrize("use_irope", [True, False])
@pytest.mark.parametrize("impl", params(PASSED, NOT_PASSED, fail_to_pass))
def test_takes_use_irope(impl: Impl, use_irope: bool, load: Any) -> None:
    """The layer passes the keyword for chunked and for global layers alike."""
    module, config = load(impl)
    made = construct(module, impl, config, use_irope=use_irope)
    assert made.num_kv_heads == tiny_llama4.KV_HEADS


@pytest.mark.parametrize("impl", params(PRESENT, NONE_PRESENT))
def test_constructs_without_use_irope(impl: Impl, load: Any) -> None:
    """All the other models construct the same impls and know nothing of the keyword."""
    module, config = load(impl)
    made = construct(module, impl, config)
    assert made.num_kv_heads == tiny_llama4.KV_HEADS


@pytest.mark.parametrize("impl", params(PRESENT, NONE_PRESENT, strictness))
def test_rejects_unknown_keyword(impl: Impl, load: Any) -> None:
    """An impl that swallowed any keyword would hide the next mistake of this kind."""
    module, config = load(impl)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_argument'"):
        construct(module, impl, config, no_such_argument=True)


@pytest.mark.parametrize(("impl", "layer"), layer_params())
def test_llama4_layer_constructs_it(
    impl: Impl, layer: int, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through `llama4.py` and the attention layer, whatever those pass."""
    module, config = load(impl)
    backend = getattr(module, impl.backend)
    for user in ("vllm.attention.layer", "vllm.attention.layers.chunked_local_attention"):
        if importlib.util.find_spec(user.rpartition(".")[0]) is not None:
            monkeypatch.setattr(f"{user}.get_attn_backend", lambda *_, **__: backend)
    made = tiny_llama4.attention_layer(config, layer)
    assert type(made.attn.impl) is getattr(module, impl.cls)


@pytest.mark.parametrize("impl", params(REFUSING, NONE_REFUSES, must_refuse))
def test_refuses_what_it_lacks(impl: Impl, stubs: Any, start_engine: Any) -> None:
    """Wrong answers are worse than none: the engine does not start, and says what works."""
    stubs(impl.stubs)
    env = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": impl.module.rpartition(".")[2].upper()}
    with pytest.raises(ValueError, match=r"plans the same attention.*VLLM_ATTENTION_BACKEND"):
        start_engine(env, max_model_len=tiny_llama4.CHUNK + 1)
    start_engine(env, max_model_len=tiny_llama4.CHUNK)


@pytest.mark.fail_to_pass(releases=in_order(PLUGIN_NOT_TOLD), raises=r"AssertionError")
@pytest.mark.skipif(RELEASE not in PLUGIN_NOT_TOLD, reason=f"{RELEASE} tells all V0 impls or none")
def test_impl_of_a_plugin(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An impl that takes no `use_irope` gets a layer that says that it is global."""
    module, config = load(BY_KEY["v0-flash_attn"])

    def init(self: Any, *args: Any) -> None:
        module.FlashAttentionImpl.__init__(self, *args)

    impl = type("PluginImpl", (module.FlashAttentionImpl,), {"__init__": init})
    members = {"get_impl_cls": staticmethod(lambda: impl)}
    backend = type("PluginBackend", (module.FlashAttentionBackend,), members)
    said: list[str] = []
    layer = importlib.import_module("vllm.attention.layer")
    monkeypatch.setattr(layer, "get_attn_backend", lambda *_, **__: backend)
    monkeypatch.setattr(layer.logger, "warning_once", lambda text, *args: said.append(text % args))
    made = tiny_llama4.attention_layer(config, tiny_llama4.ROPE_LAYER)
    assert type(made.attn.impl) is impl
    assert any("PluginImpl" in text and "global attention" in text for text in said)


@pytest.mark.parametrize("impl", params(ABSENT, "all the impls listed exist in this release"))
def test_absent(impl: Impl) -> None:
    """An impl left out of the tests above is one that this release does not have."""
    try:
        spec = importlib.util.find_spec(impl.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return
    assert f"class {impl.cls}(" not in Path(spec.origin).read_text(encoding="utf-8")
