"""As much of torch as the probed functions take, on numpy; where there is no torch.

It is only asked for small whole numbers. What it lacks is a stand-in whose value nothing may depend
on (`tree.Soft`), or says that it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from .tree import Soft, UnknownError

np: Any
try:
    import numpy as np
except ImportError:
    np = None

DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
          "float64", "half", "float", "long", "int", "float8_e4m3fn", "float8_e5m2")  # fmt: skip


class Dtype:
    """A type of numbers, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    @property
    def numbers(self) -> Any:
        """numpy's."""
        if "float" in self.name or self.name == "half":
            return np.float64
        return {"bool": np.bool_, "long": np.int64, "int": np.int32}.get(self.name, self.name)


def bare(value: Any) -> Any:
    """The array of a tensor; anything else as it is."""
    return value.array if isinstance(value, Tensor) else value


class Tensor:
    """An array with torch's names."""

    dtype: Any = Soft("a tensor's dtype")
    device = "cpu"
    is_cuda = False

    def __init__(self, array: Any, dtype: Any = None) -> None:
        if np is None:
            raise UnknownError("neither torch nor numpy is installed")
        self.array = np.asarray(bare(array))
        if dtype is not None:
            self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownError(f"the stand-in for torch has no Tensor.{name}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __int__(self) -> int:
        return int(self.array)

    __index__ = __int__

    def __getitem__(self, key: Any) -> Tensor:
        keys = tuple(map(bare, key)) if isinstance(key, tuple) else bare(key)
        return Tensor(self.array[keys])

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = tuple(map(bare, key)) if isinstance(key, tuple) else bare(key)
        self.array[keys] = bare(value)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return int(self.array.size)

    def item(self) -> Any:
        return self.array.item()

    def tolist(self) -> Any:
        return self.array.tolist()

    def numpy(self) -> Any:
        return self.array

    def view(self, *sizes: Any) -> Tensor:
        return Tensor(self.array.reshape(*sizes))

    reshape = view

    def to(self, *given: Any, dtype: Any = None, **_: Any) -> Tensor:
        kinds = [one for one in (*given, dtype) if isinstance(one, Dtype)]
        return Tensor(self.array.astype(kinds[0].numbers), kinds[0]) if kinds else self

    def is_floating_point(self) -> bool:
        return bool(self.array.dtype.kind == "f")

    def float(self) -> Tensor:
        return Tensor(self.array.astype("float64"))

    def split(self, sizes: Sequence[int], dim: int) -> list[Tensor]:
        ends = np.cumsum(sizes)[:-1]
        return [Tensor(part) for part in np.split(self.array, ends, dim)]

    def masked_fill(self, mask: Tensor, value: Any) -> Tensor:
        return Tensor(np.where(mask.array, value, self.array))

    def masked_fill_(self, mask: Tensor, value: Any) -> Tensor:
        return self.copy_(self.masked_fill(mask, value))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Tensor:
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        return Tensor(self.array.reshape(shape))

    def amin(self, dim: int) -> Tensor:
        return Tensor(self.array.min(dim))

    def index_add_(self, dim: int, index: Tensor, source: Tensor) -> Tensor:
        if dim:
            raise UnknownError("the stand-in for torch adds rows only")
        np.add.at(self.array, index.array, source.array)
        return self

    def argsort(self, dim: Any = -1, descending: bool = False, **_: Any) -> Tensor:
        array = -self.array if descending else self.array
        return Tensor(array.argsort(dim, kind="stable"))

    def long(self) -> Tensor:
        return Tensor(self.array.astype("int64"))

    def cpu(self) -> Tensor:
        return self

    contiguous = cuda = cpu

    def diff(self) -> Tensor:
        return Tensor(np.diff(self.array))

    def cumsum(self, dim: int = 0, **_: Any) -> Tensor:
        return Tensor(self.array.cumsum(dim))

    def clamp(self, min: Any = None, max: Any = None) -> Tensor:
        return Tensor(np.clip(self.array, bare(min), bare(max)))

    def clamp_(self, min: Any = None, max: Any = None) -> Tensor:
        self.array[...] = np.clip(self.array, bare(min), bare(max))
        return self

    def unsqueeze(self, dim: int) -> Tensor:
        return Tensor(np.expand_dims(self.array, dim))

    def flatten(self) -> Tensor:
        return Tensor(self.array.reshape(-1))

    def expand(self, *sizes: Any) -> Tensor:
        wanted = sizes[0] if isinstance(sizes[0], tuple) else sizes
        known = [self.shape[dim] if size == -1 else size for dim, size in enumerate(wanted)]
        return Tensor(np.broadcast_to(self.array, known))

    def repeat_interleave(self, times: Any) -> Tensor:
        return Tensor(np.repeat(self.array, bare(times)))

    def gather(self, dim: int, index: Tensor) -> Tensor:
        return Tensor(np.take_along_axis(self.array, index.array, dim))

    def scatter_(self, dim: int, index: Tensor, src: Any) -> Tensor:
        if dim not in (1, -1) or self.ndim != 2:
            raise UnknownError("the stand-in for torch scatters along rows only")
        for row, columns in enumerate(index.array):
            for place, column in enumerate(columns):
                self.array[row, column] = bare(src)[row, place]
        return self

    def scatter_reduce_(
        self, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
    ) -> Tensor:
        if reduce != "amin" or include_self:
            raise UnknownError(f"the stand-in for torch does not reduce by {reduce}")
        order = np.argsort(-src.array, axis=-1, kind="stable")  # so that the least comes last
        sorted_ = (Tensor(np.take_along_axis(one.array, order, -1)) for one in (index, src))
        return self.scatter_(dim, *sorted_)

    def argmax(self, dim: int | None = None) -> Tensor:
        return Tensor(self.array.argmax(dim))

    def max(self, dim: Any = None) -> Tensor:
        return Tensor(self.array.max(dim))

    def min(self, dim: Any = None) -> Tensor:
        return Tensor(self.array.min(dim))

    def sum(self, dim: Any = None, **_: Any) -> Tensor:
        return Tensor(self.array.sum(dim))

    def any(self) -> Tensor:
        return Tensor(self.array.any())

    def all(self) -> Tensor:
        return Tensor(self.array.all())

    def fill_(self, value: Any) -> Tensor:
        self.array[...] = value
        return self

    def copy_(self, other: Any, **_: Any) -> Tensor:
        self.array[...] = bare(other)
        return self


def _operator(name: str) -> Callable[[Tensor, Any], Tensor]:
    def apply(self: Tensor, other: Any) -> Tensor:
        if isinstance(other, Soft):
            raise UnknownError(f"it depends on {other!r}, which has a stand-in here")
        return Tensor(getattr(self.array, name)(bare(other)))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "or", "eq",
              "ne", "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))
# Under this name alone: within the class it would hide Python's own.
setattr(Tensor, "int", lambda self: Tensor(self.array.astype("int32")))  # noqa: B010
Tensor.__hash__ = object.__hash__  # type: ignore[method-assign]


class Module:
    """In place of torch.nn.Module."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _made(function: str) -> Callable[..., Tensor]:
    def make(*sizes: Any, dtype: Any = None, **_: Any) -> Tensor:
        shape = sizes[0] if len(sizes) == 1 else sizes
        kind = dtype.numbers if isinstance(dtype, Dtype) else dtype
        return Tensor(getattr(np, function)(shape, dtype=kind or "float64"), dtype)

    return make


def _full(size: Any, value: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Tensor(np.full(size, value, dtype=dtype and dtype.numbers))


def _tensor(data: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    listed = [bare(one) for one in data] if isinstance(data, (list, tuple)) else bare(data)
    return Tensor(np.array(listed, dtype=dtype and dtype.numbers))


def _arange(*ends: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Tensor(np.arange(*map(bare, ends), dtype=dtype and dtype.numbers))


def _pad(tensor: Tensor, widths: Sequence[int], value: Any = 0, **_: Any) -> Tensor:
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
    pairs += [(0, 0)] * (tensor.ndim - len(pairs))
    return Tensor(np.pad(tensor.array, pairs[::-1], constant_values=value))


def _searchsorted(ordered: Tensor, values: Any, *, right: bool = False, **_: Any) -> Tensor:
    return Tensor(np.searchsorted(ordered.array, bare(values), "right" if right else "left"))


class Torch(Soft):
    """The module."""

    def __init__(self) -> None:
        super().__init__("torch")
        functional = Soft("torch.nn.functional")
        vars(functional)["pad"] = _pad
        neural = Soft("torch.nn")
        vars(neural).update(Module=Module, functional=functional)
        vars(self).update(
            {name: Dtype(name) for name in DTYPES},
            Tensor=Tensor,
            nn=neural,
            tensor=_tensor,
            zeros=_made("zeros"),
            empty=_made("zeros"),
            ones=_made("ones"),
            full=_full,
            arange=_arange,
            searchsorted=_searchsorted,
            from_numpy=lambda array: Tensor(array),
            empty_like=lambda one, **_: Tensor(np.zeros_like(bare(one))),
            zeros_like=lambda one, **_: Tensor(np.zeros_like(bare(one))),
            any=lambda one: Tensor(bare(one).any()),
            all=lambda one: Tensor(bare(one).all()),
            max=lambda one: Tensor(bare(one).max()),
            cumsum=lambda one, dim, **_: Tensor(bare(one).cumsum(dim)),
            minimum=lambda a, b: Tensor(np.minimum(bare(a), bare(b))),
            cat=lambda parts, dim=0: Tensor(np.concatenate([bare(p) for p in parts], dim)),
            get_default_dtype=lambda: vars(self)["float32"],
            repeat_interleave=lambda one, times: one.repeat_interleave(times),
            where=lambda test, a, b: Tensor(np.where(bare(test), bare(a), bare(b))),
            iinfo=lambda dtype: np.iinfo(dtype.numbers),
            device=SimpleNamespace,
        )
