"""A `vllm serve` line for a GPU: settings that the matrix holds to be right, on GPUs that hold it.

A line is looked up, never known by heart: the settings are those that `explain` found, whether a
checkpoint's format runs is what a `Judge` says, and how many GPUs it takes is arithmetic
(`memory`). Where one of them knows nothing there is no line, and it is said why.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overlay.answers import cards, matrix, memory, weights
from overlay.answers.cards import Card
from overlay.answers.explain import (
    BACKEND,
    ENGINE,
    Answer,
    RightSettings,
    Settings,
    Target,
    ask,
    kernels_of,
    nearest_with,
)
from overlay.answers.matrix import UNSET
from overlay.answers.memory import GIB, Cache, Format, Need, Shape
from overlay.answers.runnable import Place
from overlay.patches.workspace import Workspace
from overlay.releases.versions import ranges

MODELS = (memory.SCOUT, memory.MAVERICK)
#: Lengths that arithmetic is shown for, tokens; a line takes the longest but the first that fits
#: on the GPUs that the second needs.
LENGTHS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be served."""

    name: str
    """On the model hub; in capitals, what stands for a folder of one's own."""
    shape: Shape
    format: Format
    kind: str
    """Its format, as a `Judge` knows it."""


#: Those that exist, of a model those with the most bits first. Of Scout in AWQ and GPTQ none is
#: known; one of one's own stands for it.
CHECKPOINTS = (
    Checkpoint(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", memory.SCOUT, memory.UNQUANTISED, "none"
    ),
    Checkpoint(
        "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic", memory.SCOUT, memory.FP8, "w8a8-fp8"
    ),
    Checkpoint(
        "RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16",
        memory.SCOUT, memory.W4A16, "w4a16",
    ),
    Checkpoint("SCOUT-AWQ", memory.SCOUT, memory.AWQ, "awq"),
    Checkpoint("SCOUT-GPTQ", memory.SCOUT, memory.GPTQ, "gptq"),
    Checkpoint(
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        memory.MAVERICK, memory.FP8_EXPERTS, "w8a8-fp8",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint can be served somewhere, and how."""

    use: RightSettings | None
    """The nearest settings that are right with it; None if there are none, or it is not known."""
    reason: str = ""
    """Why there are none; empty if it is not known whether there are."""
    quantization: str = ""
    """`--quantization`, with which it runs; empty if it need not be given."""


#: What says so, of a GPU and a release.
Judge = Callable[[Checkpoint], Verdict]


def judge_of(root: Path, found: Target, settings: Settings, answer: Answer) -> Judge:
    """What is kept of weights in a release, and what `explain` answers of those asked about.

    The one place that knows where that is.

    Raises:
        OverlayError: a file is missing or damaged.
    """
    assert found.column is not None
    release, cell = answer.release.name, settings.cell(found.column)
    kept = matrix.read(matrix.path_of(root, release, "patched"))
    kernels = kernels_of(root, answer.release)

    def judge(checkpoint: Checkpoint) -> Verdict:
        shape = checkpoint.shape
        given = settings.weights
        if given is None and checkpoint.format == memory.UNQUANTISED:
            # What the matrix is of; Triton's kernels for it are laid over it.
            use = answer.patched.use
            return Verdict(use, "" if use else "no settings are right on this GPU")
        if given is None:
            asked = weights.Asked(checkpoint.kind, experts=shape.experts)
        elif given.checkpoint == checkpoint.kind:
            asked = replace(given, experts=shape.experts)
        else:
            return Verdict(None, "other weights are asked about")
        held = weights.hold(root, release, asked)
        if held is None or held.kept is None:
            return Verdict(None)
        use = nearest_with(kept, replace(kernels, held=held), found, cell, settings.chunk)
        if use is None:
            return Verdict(None, "no settings are right on this GPU")
        asked = replace(asked, quantization=_flag(use, asked.quantization))
        place = Place(use.cell.dtype, use.cell.kv_cache_dtype, found.capability)
        if replace(kernels, held=replace(held, asked=asked)).unknown(place):
            return Verdict(None)
        return Verdict(use, quantization=asked.quantization)

    return judge


def _flag(use: RightSettings, given: str) -> str:
    """`--quantization` of settings that are right; empty if it need not be given."""
    for change in use.changes:
        if change == weights.NO_FLAG:
            return ""
        name, _, value = change.partition(" ")
        if name == weights.FLAG.split()[0]:
            return value
    return given


@dataclass(frozen=True)
class Line:
    """A command, and what it takes."""

    checkpoint: Checkpoint
    quantization: str
    """`--quantization`; empty if it need not be given."""
    card: Card
    use: RightSettings
    length: int
    """`--max-model-len`."""
    cache: Cache
    need: Need

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set for it."""
        cell = self.use.cell
        pairs = {ENGINE: cell.v1, BACKEND: cell.backend}
        return {name: value for name, value in pairs.items() if value != UNSET}

    @property
    def arguments(self) -> list[str]:
        """Of `vllm serve`."""
        cell = self.use.cell
        flags = {
            "--tensor-parallel-size": str(self.need.gpus) if self.need.gpus > 1 else "",
            "--max-model-len": str(self.length),
            "--quantization": self.quantization,
            "--dtype": "" if cell.dtype == "auto" else cell.dtype,
            "--kv-cache-dtype": "" if cell.kv_cache_dtype == "auto" else cell.kv_cache_dtype,
        }
        given = [part for name, value in flags.items() if value for part in (name, value)]
        return [self.checkpoint.name, *given]

    @property
    def command(self) -> str:
        """As it is typed."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, "vllm", "serve", shlex.join(self.arguments)])

    @property
    def sum(self) -> str:
        """The arithmetic, in a sentence."""
        need = self.need
        size = self.checkpoint.format.bytes(self.checkpoint.shape, _bits(self.use))
        spread = f", {_gib(need.weights)} on each" if need.gpus > 1 else ""
        return (
            f"{need.gpus} x {self.card} ({_gib(self.card.memory)}): weights {_gib(size)}"
            f"{spread}; {self.caches}; {_gib(memory.RESERVE)} allowed for the rest"
        )

    @property
    def caches(self) -> str:
        """The arithmetic of the KV cache."""
        sizes = " / ".join(
            f"{self.cache.bytes(self.checkpoint.shape, length, self.need.gpus) / GIB:.1f}"
            for length in LENGTHS
        )
        where = " on each" if self.need.gpus > 1 else ""
        return f"KV cache of a sequence of 8k / 32k / 128k tokens {sizes} GiB{where}"


@dataclass(frozen=True)
class Launch:
    """The lines for a GPU and a release."""

    release: str
    lines: tuple[Line, ...] = ()
    """One a model, Scout first."""
    without: tuple[str, ...] = ()
    """Why there is none, a sentence a model."""


def launch(
    root: Path, found: Target, settings: Settings, answer: Answer, judge: Judge | None = None
) -> Launch:
    """The lines for a GPU that `explain` was asked about, and its answer.

    `judge` says how a checkpoint can be served; by default it is what is kept of the release.
    """
    release = answer.release.name
    card = cards.card_of(found.name, found.capability)
    if card is None:
        return Launch(release, without=(f"how much memory {found} has is not known here",))
    judge = judge or judge_of(root, found, settings, answer)
    lines, without = list[Line](), list[str]()
    for shape in MODELS:
        verdicts = [(one, judge(one)) for one in CHECKPOINTS if one.shape == shape]
        served = [
            _Served(checkpoint, verdict, verdict.use, card, settings, release)
            for checkpoint, verdict in verdicts
            if verdict.use
        ]
        # On the fewest GPUs; of those the one with the most bits, which comes first.
        fitting = [(need.gpus, one.line(need)) for one in served if (need := one.least)]
        if fitting:
            lines.append(min(fitting, key=lambda one: one[0])[1])
        else:
            without.append(f"{shape.name}, {_why_not(verdicts, served)}")
    return Launch(release, tuple(lines), tuple(without))


def _why_not(verdicts: Sequence[tuple[Checkpoint, Verdict]], served: Sequence[_Served]) -> str:
    """Why there is no line for a model: formats of which the same is to be said, together."""
    by_reason: dict[str, list[str]] = {}
    for checkpoint, verdict in verdicts:
        if not verdict.use:
            reason = verdict.reason or "whether it runs there is not known here"
            by_reason.setdefault(reason, []).append(checkpoint.format.name)
    told = [one.too_large for one in served]
    told += [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "; ".join(told)


def of_all(
    root: Path, found: Target, settings: Settings, answers: Sequence[Answer]
) -> list[Launch]:
    """The lines of several releases, in their order."""
    return [launch(root, found, settings, answer) for answer in answers]


def newest(
    root: Path, found: Target, settings: Settings, answers: Sequence[Answer]
) -> Launch | None:
    """Of several releases the newest that has a line; without one, the newest; of none, None."""
    lookups = (launch(root, found, settings, answer) for answer in reversed(answers))
    first = next(lookups, None)
    if first is None or first.lines:
        return first
    return next((one for one in lookups if one.lines), first)


@dataclass(frozen=True)
class _Served:
    """A checkpoint with the settings that are right for it, on GPUs of one kind."""

    checkpoint: Checkpoint
    verdict: Verdict
    use: RightSettings
    card: Card
    settings: Settings
    release: str

    @property
    def cache(self) -> Cache:
        bits = 8 if self.use.cell.kv_cache_dtype != "auto" else _bits(self.use)
        return Cache(bits=bits, drops=memory.drops_chunks(self.release, self.use.outcome.engine))

    @property
    def lengths(self) -> Sequence[int]:
        """What a line may have: the least, then better ones."""
        asked = self.settings.max_model_len
        if self.use.cell.length == "at":
            return (min(asked or self.settings.chunk, self.settings.chunk),)
        return (asked,) if asked else LENGTHS[1:]

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.checkpoint.format.bytes(self.checkpoint.shape, _bits(self.use))

    def fewest(self, length: int) -> Need | None:
        """With the fewest GPUs that hold it; None if eight do not."""
        shape, memory_of_one = self.checkpoint.shape, self.card.memory
        return memory.fewest(shape, self.weights, self.cache, length, memory_of_one)

    @property
    def least(self) -> Need | None:
        """The same, at the least length that a line may have."""
        return self.fewest(self.lengths[0])

    def line(self, least: Need) -> Line:
        """The line, at the greatest length that as many GPUs hold as the `least` needs."""
        length, need = next(
            (length, need)
            for length in reversed(self.lengths)
            if (need := self.fewest(length)) and need.gpus == least.gpus
        )
        return Line(
            self.checkpoint, self.verdict.quantization, self.card, self.use, length, self.cache,
            need,
        )  # fmt: skip

    @property
    def too_large(self) -> str:
        """Why it does not fit."""
        return (
            f"{self.checkpoint.format.name}: {_gib(self.weights)} of weights and a KV cache of "
            f"{self.lengths[0]} tokens do not fit on eight {self.card} ({_gib(self.card.memory)})"
        )


def _bits(use: RightSettings) -> int:
    """Of the model's dtype."""
    return 32 if use.cell.dtype == "float32" else 16


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def lines(found: Launch) -> Iterator[tuple[str, str]]:
    """For a person: labels and texts. A text under the label `launch` is to be copied."""
    for line in found.lines:
        yield "launch", line.command
        yield "", line.sum
    for why in found.without:
        yield "no line", why


def as_json(found: Launch) -> dict[str, Any]:
    """For a script."""
    return {
        "lines": [_line_json(line) for line in found.lines],
        "without": list(found.without),
    }


def _line_json(line: Line) -> dict[str, Any]:
    shape, need = line.checkpoint.shape, line.need
    return {
        "command": line.command,
        "environment": line.environment,
        "arguments": line.arguments,
        "model": shape.name,
        "format": line.checkpoint.format.name,
        "gpu": line.card.gpu,
        "gpu_memory": line.card.memory,
        "gpus": need.gpus,
        "max_model_len": line.length,
        "weights": need.weights,
        "kv_cache": {str(n): line.cache.bytes(shape, n, need.gpus) for n in LENGTHS},
        "allowed_besides": memory.RESERVE,
    }


#: Of the cards, those that docs/launch.md has: one or more of each capability.
ON_PAGE = (
    "V100", "T4", "Quadro RTX 8000", "A100", "RTX 3090", "A10", "A40", "RTX A6000", "L4", "L40S",
    "RTX 4090", "H100", "H200", "GH200", "B200", "RTX 5090", "RTX PRO 6000 Blackwell",
)  # fmt: skip


def weights_table() -> str:
    """What docs/launch.md has of the weights by format, in Markdown."""
    rows = ["| Weights | Scout | Maverick |", "|---|---|---|"]
    for form in (
        memory.UNQUANTISED, memory.FP8_EXPERTS, memory.FP8, memory.GPTQ, memory.AWQ, memory.W4A16,
    ):  # fmt: skip
        sizes = (_gib(form.bytes(shape)) for shape in MODELS)
        rows.append(f"| {form.name} | {' | '.join(sizes)} |")
    return "\n".join(rows) + "\n"


def page(workspace: Workspace) -> str:
    """The lines of all releases for the cards of docs/launch.md, in Markdown."""
    sections = [_section(workspace, card) for card in cards.CARDS if card.gpu in ON_PAGE]
    return "\n".join(sections)


def _section(workspace: Workspace, card: Card) -> str:
    """A card's: each line once, with the releases that it is for, the newest first."""
    releases = workspace.versions.patched
    settings = Settings()
    found, answers = ask(workspace, releases, (card.gpu, card.capability), settings)
    launches = of_all(workspace.project.root, found, settings, answers)
    order = [release.name for release in releases]
    told = [f"### {card}, capability {card.capability}\n"]
    if found.note:
        told.append(f"{found.note[0].upper()}{found.note[1:]}.\n")
    by_command: dict[str, list[tuple[str, Line]]] = {}
    for one in reversed(launches):
        for line in one.lines:
            by_command.setdefault(line.command, []).insert(0, (one.release, line))
    for command, found_lines in by_command.items():
        names = ranges([name for name, _ in found_lines], order)
        told += [f"{names}:\n", f"```\n{command}\n```\n", *_sums(found_lines, order)]
    has_line = {line.checkpoint.shape for one in launches for line in one.lines}
    if len(has_line) < len(MODELS):
        told += [f"No line. {why}.\n" for why in launches[-1].without]
    return "\n".join(told)


def _sums(lines: Sequence[tuple[str, Line]], order: Sequence[str]) -> Iterator[str]:
    """The arithmetic of a line, and what of it is otherwise in some of its releases."""
    last = lines[-1][1]
    yield f"{last.sum}.\n"
    others: dict[str, list[str]] = {}
    for name, line in lines:
        if line.caches != last.caches:
            others.setdefault(line.caches, []).append(name)
    for caches, names in others.items():
        yield f"{ranges(names, order)}: {caches}.\n"
