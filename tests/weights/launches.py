"""Have a step run without a GPU, and note the kernels that it launches.

vLLM's compiled extension is not loaded. Others stand in for its operators and compute nothing:
those that write into a tensor leave it as it is, the rest return one of the right shape.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from regress import fake_cuda
from regress.releases import installed_release, span

LIBRARIES = ("_C", "_moe_C")

_noted: list[dict[str, None]] = []


class UnknownKernelError(AttributeError):
    """An operator of the compiled extension that has no stand-in here, as if it had none."""


@contextmanager
def noting() -> Iterator[dict[str, None]]:
    """Note what is launched meanwhile, each once, in order."""
    _noted.append({})
    try:
        yield _noted[-1]
    finally:
        _noted.pop()


def note(name: str) -> None:
    """Note a launch."""
    if _noted:
        _noted[-1][name] = None


class _Library:
    """Operators of a compiled extension."""

    def __init__(self, name: str, real: Any) -> None:
        self.name = name
        self.real = real

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        if operator == "cutlass_scaled_mm":
            return _scaled_mm
        if operator in VOID.get(self.name, ()):
            return self._noting(operator, lambda *_, **__: None)
        if operator in DIRECT:
            return self._noting(operator, DIRECT[operator])
        if operator in fake_cuda.CAPABILITY_QUESTIONS:
            return _answers()[operator]
        raise UnknownKernelError(f"{self.name}.{operator}")

    def _noting(self, operator: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            note(operator)
            return compute(*arguments, **options)

        return noted


VOID: Mapping[str, tuple[str, ...]] = {
    "_C": (
        "silu_and_mul", "static_scaled_fp8_quant", "dynamic_scaled_fp8_quant",
        "dynamic_per_token_scaled_fp8_quant", "static_scaled_int8_quant",
        "dynamic_scaled_int8_quant", "per_token_group_fp8_quant", "per_token_group_quant_int8",
        "cutlass_scaled_mm_azp", "cutlass_moe_mm", "get_cutlass_moe_mm_problem_sizes",
        "cutlass_blockwise_scaled_grouped_mm",
        "gptq_shuffle", "silu_and_mul_quant", "rearrange_kn_weight_as_n32k16_order",
    ),
    "_moe_C": (
        "moe_align_block_size", "sgl_moe_align_block_size", "moe_sum", "moe_wna16_gemm",
        "shuffle_rows", "moe_permute", "moe_unpermute",
    ),
}  # fmt: skip
"""Operators that write into tensors that they get, with a few of vLLM's own wrapping them."""


def _marlin_gemm_moe(
    a: torch.Tensor, _weight: Any, _sorted: Any, topk: torch.Tensor, _ids: Any,
    scales: torch.Tensor, *_: Any
) -> torch.Tensor:  # fmt: skip
    return a.new_zeros(a.shape[0], topk.shape[1], scales.shape[-1])


def _sorted_by_expert(_ids: torch.Tensor, *arguments: Any) -> None:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            argument.zero_()


def _direct_repack(weight: torch.Tensor, *sizes: Any) -> torch.Tensor:
    size_k, size_n, bits = sizes[-3:]
    return weight.new_zeros(size_k // 16, size_n * (bits // 2))


def _scaled_mm(
    _out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor,
    b_scales: torch.Tensor, *_: Any
) -> None:  # fmt: skip
    """Note the kernels that `cutlass_scaled_mm` chooses between, as it does."""
    is_plain = a_scales.numel() in (1, a.shape[0]) and b_scales.numel() in (1, b.shape[1])
    kind = "" if is_plain else ".block"
    note(f"cutlass_scaled_mm{'.int8' if a.dtype == torch.int8 else kind}")


DIRECT: Mapping[str, Callable[..., Any]] = {
    "marlin_gemm_moe": _marlin_gemm_moe,
    "awq_marlin_repack": _direct_repack,
    "gptq_marlin_repack": _direct_repack,
    "get_cutlass_moe_mm_data": _sorted_by_expert,
}
"""Operators that return a tensor and are called without a wrapper of vLLM's, and those whose answer
is an index of others."""


def _rows(given: Mapping[str, Any]) -> torch.Tensor:
    """Return the input of a matrix product, whatever the release calls it."""
    return next(given[name] for name in ("a", "input", "x") if name in given)


def _sized(given: Mapping[str, Any]) -> torch.Tensor:
    return _rows(given).new_zeros(given["size_m"], given["size_n"])


def _repacked(given: Mapping[str, Any]) -> torch.Tensor:
    weight = given["b_q_weight"]
    shape = given["size_k"] // 16, given["size_n"] * (given["num_bits"] // 2)
    return weight.new_zeros(*weight.shape[:-2], *shape)


def _moe_marlin(given: Mapping[str, Any]) -> torch.Tensor:
    output = next((given[name] for name in ("output", "c_or_none", "c") if name in given), None)
    if output is not None:
        return output
    return _rows(given).new_zeros(given["size_m"] * given["top_k"], given["size_n"])


RETURNING: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "gptq_marlin_gemm": _sized,
    "fp8_marlin_gemm": _sized,
    "gptq_marlin_repack": _repacked,
    "awq_marlin_repack": _repacked,
    "moe_wna16_marlin_gemm": _moe_marlin,
    "awq_gemm": lambda given: given["input"].new_zeros(
        given["input"].shape[0], given["qweight"].shape[1] * 8
    ),
    "awq_dequantize": lambda given: given["scales"].new_zeros(
        given["qweight"].shape[0], given["qweight"].shape[1] * 8
    ),
    "gptq_gemm": lambda given: given["a"].new_zeros(
        given["a"].shape[0], given["b_q_weight"].shape[1]
    ),
    "permute_cols": lambda given: torch.zeros_like(given["a"]),
    "machete_prepack_B": lambda given: torch.zeros_like(given["b_q_weight"]),
    "machete_supported_schedules": lambda _: [],
    "machete_mm": lambda given: given["a"].new_zeros(given["a"].shape[0], given["b_q"].shape[1]),
    "allspark_repack_weight": lambda given: (
        torch.zeros_like(given["qweight"]),
        torch.zeros_like(given["scale"]),
        given["zero_point"],
    ),
    "allspark_w8a16_gemm": lambda given: given["a"].new_zeros(given["a"].shape[0], given["n"]),
}
"""Wrappers in `vllm._custom_ops` of operators that return a tensor."""

HOST_ONLY = ("machete_supported_schedules",)
"""What launches nothing."""


def _stand_in(name: str, wrapper: Any, compute: Callable[[Mapping[str, Any]], Any]) -> Any:
    signature = inspect.signature(wrapper)

    def stand_in(*arguments: Any, **options: Any) -> Any:
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        if name not in HOST_ONLY:
            note(name)
        return compute(given.arguments)

    return stand_in


def _up_from(first: int, end: int = 1000) -> Callable[[int], bool]:
    return lambda capability: first <= capability < end


def _answers() -> dict[str, Callable[[int], bool]]:
    """Return what `scaled_mm_entry.cu` answers, compiled with CUDA 12.4 or, since 0.9.0, 12.8.

    The rest of what it is asked is nothing to these checkpoints.
    """
    release = installed_release()
    grouped = _up_from(90) if release in span("0.10.0") else _up_from(90, 91)
    no = _up_from(1000)
    return {
        "cutlass_scaled_mm_supports_fp8": _up_from(89),
        "cutlass_scaled_mm_supports_block_fp8": _up_from(
            90, 1000 if release in span("0.9.0") else 100
        ),
        "cutlass_group_gemm_supported": grouped,
        "cutlass_scaled_mm_supports_fp4": no,
        "cutlass_sparse_scaled_mm_supported": no,
    }


def kind_of(kernel: str, options: Mapping[str, Any]) -> str:
    """Return how experts are held for which Triton's kernel is launched, as `compiled` calls it."""
    if kernel == "fused_moe_kernel_gptq_awq":
        if options["use_int8_w8a16"]:
            return "gptq-int8"
        return "awq-int4" if options["has_zp"] else "gptq-int4"
    if options["use_int8_w8a16"]:
        return "experts_int8"
    if options.get("use_int8_w8a8"):
        return "int8-w8a8"
    if not options["use_fp8_w8a8"]:
        return "unquantised"
    if options.get("group_k"):
        return "fp8-block"
    return "fp8-channel" if options.get("per_channel_quant") else "fp8"


def name_of(kernel: str, options: Mapping[str, Any]) -> str:
    """Return what a launch of Triton's is called: of experts with how they are held."""
    if kernel.startswith("fused_moe_kernel"):
        return f"triton.fused_moe.{kind_of(kernel, options)}"
    return f"triton.{kernel}"


def prepare() -> None:
    """Answer what vLLM asks of its extension while it is imported, and run its own operators on the
    CPU as they are, which it registers for a GPU."""
    register = torch.library.Library.impl

    def impl(
        self: Any, name: Any, function: Any, dispatch_key: str = "", *arguments: Any, **options: Any
    ) -> Any:
        key = "CPU" if (self.ns, dispatch_key) == ("vllm", "CUDA") else dispatch_key
        return register(self, name, function, key, *arguments, **options)

    setattr(torch.library.Library, "impl", impl)  # noqa: B010
    for question, answer in _answers().items():
        setattr(torch.ops._C, question, answer)


def install() -> None:
    """Have everything that would launch a kernel note it, once vLLM is loaded."""
    ops = importlib.import_module("vllm._custom_ops")
    for name, compute in RETURNING.items():
        if hasattr(ops, name):
            setattr(ops, name, _stand_in(name, getattr(ops, name), compute))
    for library in LIBRARIES:
        setattr(torch.ops, library, _Library(library, getattr(torch.ops, library)))

    def scaled_mm(
        a: torch.Tensor, b: torch.Tensor, *_: Any, out_dtype: Any = None, **__: Any
    ) -> torch.Tensor:
        note("torch._scaled_mm")
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype)

    def linear(x: torch.Tensor, weight: torch.Tensor, _bias: Any = None) -> torch.Tensor:
        """What is not quantised has nothing to tell, and takes most of the time."""
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    setattr(torch, "_scaled_mm", scaled_mm)  # noqa: B010
    setattr(torch.nn.functional, "linear", linear)  # noqa: B010
    jit = importlib.import_module("triton.runtime.jit")

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        given = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        note(name_of(self.fn.__name__, given))

    jit.JITFunction.run = launch
