"""What a release does with quantised weights: matrix/RELEASE.weights.json.

`tests/weights` finds it out in the release's environment, without a GPU, as far as the kernels.
Which of those can run, `binaries` and `compiled` know. It is the same for stock and patched: no
patch changes how weights are held, and a test holds that.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overlay.answers import gpus, kept
from overlay.answers.binaries import Binaries
from overlay.answers.compiled import Compiled
from overlay.answers.matrix import (
    FOLDER,
    Axes,
    Runs,
    compress,
    computed_dtype,
    expand,
    settle_text,
)
from overlay.base.errors import Exit, OverlayError
from overlay.kernels import needed

SCHEMA = 1
AGAIN = "Make it again: vllm-overlay matrix RELEASE --weights"
#: Experts of Scout, which are assumed where no checkpoint tells.
EXPERTS = 16
#: The flag, as a change of the settings.
FLAG, NO_FLAG = "--quantization {}", "unset --quantization"

#: The formats, in words.
FORMATS: Mapping[str, str] = {
    "none": "unquantised",
    "awq": "AWQ, 4 bits",
    "gptq": "GPTQ, 4 bits",
    "gptq-int8": "GPTQ, 8 bits",
    "gptq-act-order": "GPTQ, 4 bits, desc_act",
    "w4a16": "compressed-tensors w4a16",
    "w4a16-act-order": "compressed-tensors w4a16, actorder group",
    "w8a16": "compressed-tensors w8a16, a scale an output",
    "w8a8-fp8": "compressed-tensors fp8, a scale an output and a token",
    "w8a8-fp8-tensor": "compressed-tensors fp8, a scale a tensor",
    "w8a8-int8": "compressed-tensors int8, inputs too",
    "fp8": "fp8, inputs scaled as they come",
    "fp8-static": "fp8, inputs scaled as calibrated",
    "fp8-block": "fp8 in blocks",
    "fbgemm-fp8": "FBGEMM fp8",
    "modelopt-fp8": "ModelOpt fp8",
    "bitsandbytes": "bitsandbytes, 4 bits",
}
#: The checkpoint's own name for its format, which `--quantization` may repeat.
METHODS: Mapping[str, str] = {
    **{name: "compressed-tensors" for name in FORMATS if name.startswith("w")},
    **{name: "fp8" for name in FORMATS if name.startswith("fp8")},
    "fbgemm-fp8": "fbgemm_fp8",
    "modelopt-fp8": "modelopt",
    "bitsandbytes": "bitsandbytes",
}
#: The format that a flag is for, where no checkpoint tells.
_MEANT: Mapping[str, str] = {
    "none": "none",
    "awq": "awq",
    "awq_marlin": "awq",
    "moe_wna16": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "fp8": "none",
    "experts_int8": "none",
    "bitsandbytes": "none",
    "compressed-tensors": "w4a16",
    "fbgemm_fp8": "fbgemm-fp8",
    "modelopt": "modelopt-fp8",
}

#: When it ends, in a user's words.
_STAGES = {
    "config": "refused at start-up",
    "layers": "stops while its layers are made",
    "weights": "stops while its weights are loaded",
    "step": "stops in the first step",
}
#: What all experts launch, of which `needed.NEEDS` knows.
_COMMON = frozenset({"silu_and_mul", "moe_align_block_size", "sgl_moe_align_block_size", "moe_sum"})
_EXPERTS, _TORCH = "triton.fused_moe.", "torch._scaled_mm"
#: Experts that were not compiled, by those of the same type that were: what Triton refuses of them,
#: it refuses of the type. What it takes may still be too large.
SAME_TYPE: Mapping[str, str] = {"fp8-block": "fp8"}
#: "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9"
_TORCH_FROM = "8.9"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Model):
    """What becomes of weights."""

    experts: str = ""
    """Module and class of the experts' method."""
    linear: str = ""
    """Of the shared expert's."""
    launches: tuple[str, ...] = ()
    """The kernels of a step: vLLM's operators, torch's, or Triton's."""
    stage: Literal["", "config", "layers", "weights", "step", "wrong", "unknown"] = ""
    """Where the release refuses or dies; `wrong` if it answers wrongly, `unknown` if it launches
    something that is not known here."""
    message: str = ""
    """What it says, or what is wrong."""

    @property
    def told(self) -> str:
        """Why it does not run, in a line."""
        words = self.message
        if words.endswith("quant_method is not None"):
            words = f"its method has nothing for experts ({words})"
        where = f", {self.experts}" if self.experts and self.stage == "step" else ""
        return f"{_STAGES[self.stage]}{where}: {words}"


class Row(_Model):
    """A checkpoint with a flag, everywhere."""

    checkpoint: str
    quantization: str = ""
    """--quantization; empty: it is not given, or repeats the checkpoint's."""
    experts: int
    results: Runs
    """Numbers of outcomes, place by place, equal neighbours as COUNT*NUMBER."""

    @property
    def name(self) -> tuple[str, str, int]:
        """What no two rows share."""
        return self.checkpoint, self.quantization, self.experts


class Weights(_Model):
    """What a release does with weights of every format."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    """Version of this file's layout."""
    release: str
    axes: Axes
    outcomes: tuple[Outcome, ...]
    """Each once, in the order of their first rows."""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Weights:
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError("two rows are of the same weights")
        for row in self.rows:
            numbers = expand(row.results)
            if len(numbers) != self.axes.size:
                raise ValueError(f"{row.name} has {len(numbers)} places, not {self.axes.size}")
            if max(numbers) >= len(self.outcomes):
                raise ValueError(f"{row.name} names an outcome that is not there")
        return self

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str, int], list[int]]:
        return {row.name: expand(row.results) for row in self.rows}

    def outcome_of(
        self, asked: Asked, dtype: str, kv_cache_dtype: str, capability: str
    ) -> Outcome | None:
        """What becomes of weights in a place; None if it is not known.

        A capability that is not there is answered by the next lower one of its major version.
        """
        numbers = self._numbers.get((asked.checkpoint, asked.quantization, asked.experts))
        column, axes = gpus.column(capability, self.axes.capability), self.axes
        if numbers is None or column is None:
            return None
        try:
            place = axes.dtype.index(dtype) * len(axes.kv_cache_dtype)
            place += axes.kv_cache_dtype.index(kv_cache_dtype)
        except ValueError:
            return None
        return self.outcomes[numbers[place * len(axes.capability) + axes.capability.index(column)]]

    def flags(self, checkpoint: str, experts: int) -> tuple[str, ...]:
        """What --quantization may be for a checkpoint."""
        return tuple(
            row.quantization
            for row in self.rows
            if (row.checkpoint, row.experts) == (checkpoint, experts)
        )


@dataclass(frozen=True)
class Asked:
    """The weights that a user has, and how they are served."""

    checkpoint: str
    """The format, of `FORMATS`; or another one's name, of which nothing is known."""
    quantization: str = ""
    """--quantization; empty if it is not given, or says what the checkpoint does."""
    experts: int = EXPERTS
    is_text_only: bool | None = None
    """Whether the checkpoint is a `Llama4ForCausalLM`; None if nothing tells."""

    def __str__(self) -> str:
        """In a sentence's words."""
        flag = f", {FLAG.format(self.quantization)}" if self.quantization else ""
        form = FORMATS.get(self.checkpoint, self.checkpoint)
        return f"weights {form} ({self.experts} experts{flag})"


def asked(
    checkpoint: str | None, quantization: str | None, experts: int = EXPERTS,
    is_text_only: bool | None = None,
) -> Asked | None:  # fmt: skip
    """The weights that options name: a checkpoint's format, and --quantization; None if neither.

    Without a checkpoint the flag tells which: `awq` is served from an AWQ checkpoint, `fp8` from an
    unquantised one. It may be the name of a format too, and then no flag is given.

    Raises:
        OverlayError: there is no such flag.
    """
    if checkpoint is None and quantization is None:
        return None
    flag = (quantization or "").replace("compressed_tensors", "compressed-tensors")
    if checkpoint is None and flag in FORMATS and flag not in _MEANT:
        checkpoint, flag = flag, ""
    elif checkpoint is None:
        if flag not in _MEANT:
            raise _no_flag(flag)
        checkpoint = _MEANT[flag]
    if flag == "none" or flag == METHODS.get(checkpoint):
        flag = ""
    return Asked(checkpoint, flag, experts, is_text_only)


def _no_flag(flag: str) -> OverlayError:
    known = ", ".join(dict.fromkeys((*_MEANT, *FORMATS)))
    return OverlayError(
        f"nothing is known of --quantization {flag}", f"known are {known}",
        "Pass one of them, or --checkpoint with the checkpoint's config.json", Exit.USAGE,
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """How weights are held, and what a release does with them."""

    asked: Asked
    kept: Weights | None
    """None if nothing is kept of the release."""

    def outcome(self, dtype: str, kv_cache_dtype: str, capability: str) -> Outcome | None:
        """What becomes of them in a place; None if it is not known."""
        if self.kept is None:
            return None
        # Patches, and releases since 0.9.0, take half precision where the GPU has no bfloat16.
        computed = computed_dtype(dtype, capability)
        dtype = computed if computed == "float16" else dtype
        return self.kept.outcome_of(self.asked, dtype, kv_cache_dtype, capability)

    def otherwise(self) -> Iterator[tuple[str, Held]]:
        """The same weights with other flags, and each flag as a change."""
        if self.kept is None:
            return
        for flag in self.kept.flags(self.asked.checkpoint, self.asked.experts):
            # Unquantised weights are not made others: those of a checkpoint are meant to be kept.
            if flag != self.asked.quantization and self.asked.checkpoint != "none":
                change = FLAG.format(flag) if flag else NO_FLAG
                yield change, replace(self, asked=replace(self.asked, quantization=flag))


def without_code(found: Outcome, binaries: Binaries, capability: str) -> str:
    """Why the kernels that weights launch are not in the binaries; nothing if they are."""
    for operator in found.launches:
        if operator == _TORCH and gpus.version(capability) < gpus.version(_TORCH_FROM):
            return f"{_TORCH} needs capability {_TORCH_FROM}"
        for need in needed.of_operator(operator):
            if not need.is_launched(operator, capability) or not binaries.code_of(need):
                continue
            if not binaries.serves(need, capability):
                return (
                    f"the wheel of {binaries.release} has no code for capability {capability} in "
                    f"its kernels for {need.name}, which {operator} launches"
                )
    return ""


def kinds(found: Outcome) -> tuple[str, ...]:
    """How the experts are held that Triton compiles, as `compiled` calls it."""
    return tuple(
        name.removeprefix(_EXPERTS) for name in found.launches if name.startswith(_EXPERTS)
    )


def unknown(
    held: Held, binaries: Binaries | None, compiled: Compiled | None, dtype: str,
    kv_cache_dtype: str, capability: str,
) -> tuple[str, ...]:  # fmt: skip
    """What is not known of weights in a place, each in a few words."""
    found = held.outcome(dtype, kv_cache_dtype, capability)
    if found is None:
        return (f"what becomes of {held.asked}; what is said is of unquantised ones",)
    if found.stage == "unknown":
        return (f"whether {held.asked} can run, since it {found.message}",)
    if found.stage:
        return ()
    missing = [name for name in found.launches if not _is_known(name, binaries)]
    for kind in kinds(found):
        told = compiled and compiled.answer(
            "fused_moe", kind, computed_dtype(dtype, capability), capability
        )
        if told is None:
            missing.append(f"{_EXPERTS}{kind}")
    return tuple(f"whether {name} runs on this GPU" for name in missing)


def _is_known(name: str, binaries: Binaries | None) -> bool:
    if name in _COMMON or name == _TORCH or name.startswith(_EXPERTS):
        return True
    needs = needed.of_operator(name)
    return bool(needs) and binaries is not None and any(map(binaries.code_of, needs))


def hold(root: Path, release: str, weights: Asked | None) -> Held | None:
    """What a release does with weights; None if none are asked for.

    Raises:
        OverlayError: the file is damaged.
    """
    if weights is None:
        return None
    is_kept = path_of(root, release).is_file()
    return Held(weights, read(root, release) if is_kept else None)


def from_run(raw: dict[str, Any]) -> Weights:
    """What is in what tests/weights wrote.

    Raises:
        OverlayError: it is something else.
    """
    rows = [{**row, "results": compress(row["results"])} for row in raw["rows"]]
    return _validated({**raw, "schema": SCHEMA, "rows": rows}, "the run")


def read(root: Path, release: str) -> Weights:
    """What is kept of a release.

    Raises:
        OverlayError: nothing is, or the file is damaged.
    """
    path = path_of(root, release)
    return _validated(kept.load(path, AGAIN), str(path))


def _validated(raw: object, where: str) -> Weights:
    return kept.validated(Weights, raw, f"{where} is not of weights", AGAIN)


def dumps(weights: Weights) -> str:
    """The text of a file: an outcome or a row a line."""
    head = {"schema": SCHEMA, "release": weights.release, "axes": weights.axes.model_dump()}
    return kept.dumps(head, {"outcomes": weights.outcomes, "rows": weights.rows})


def path_of(root: Path, release: str) -> Path:
    """Where the result of a release is kept in the project at `root`."""
    return root / FOLDER / f"{release}.weights.json"


def settle(root: Path, made: Weights, check: bool) -> list[str]:
    """Keep a result, or with `check` compare it with the one that is kept. Returns problems."""
    return settle_text(path_of(root, made.release), dumps(made), made.release, check)


def counts(weights: Weights) -> dict[str, int]:
    """Places of all weights by what becomes of them, the most frequent first."""
    numbers = Counter(number for row in weights.rows for number in expand(row.results))
    found = Counter[str]()
    for number, count in numbers.items():
        found[weights.outcomes[number].stage or "launched"] += count
    return dict(found.most_common())


def summary(weights: Weights) -> str:
    """The counts in a line."""
    told = ", ".join(f"{count} {name}" for name, count in counts(weights).items())
    return f"{weights.release} weights: {len(weights.rows)} rows, {told}"
