"""Which engine and backend a configuration gets, and whether it is right: looked up in matrix/.

A configuration is a `matrix.Cell`. Nothing is run here, and nothing guessed: what the matrix does
not have is said to be unknown.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

from overlay.answers import basis, evidence, flags, gpus, matrix, runnable, weights
from overlay.answers.checkpoint import Checkpoint
from overlay.answers.evidence import Run
from overlay.answers.flags import NO_FLAGS, Flags
from overlay.answers.matrix import UNSET, Cell, Matrix, Outcome, Variant
from overlay.answers.runnable import Kernels, Place
from overlay.answers.weights import Asked
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, Versions, ranges

#: `attention_chunk_size` of the released Llama 4 models, tokens.
CHUNK = 8192
BACKEND, ENGINE = "VLLM_ATTENTION_BACKEND", "VLLM_USE_V1"
#: A change that takes twice the memory for weights and KV cache.
FLOAT32 = "--dtype float32"
#: vLLM's other names of an axis' values.
SYNONYMS = {"fp8_e4m3": "fp8", "half": "float16", "float": "float32"}
VARIANTS: tuple[Variant, Variant] = ("stock", "patched")
#: Faults of stock that no setting of the matrix shows, by the topic of the patch that fixes each.
OTHER_FAULTS = {
    "llama4-qk-norm": "Scout's queries and keys are normed wrongly, at any length",
    "llama4-sampler": "a request for prompt_logprobs stops the V1 engine",
    "local-attention-clip": "V1 dies near a max_model_len that is no multiple of the chunk",
    "llama4-image-dtype": "with images and any dtype but bfloat16, it dies at start-up",
    "llama4-images-off": "with --limit-mm-per-prompt '{\"image\": 0}', V1 with CUDA graphs answers "
    "garbage",
    "llama4-text-only": "a text-only checkpoint (Llama4ForCausalLM) attends globally in all layers",
    "v1-hybrid-off-local": "with KV transfer, KV events, EAGLE or "
    "--disable-hybrid-kv-cache-manager, V1 attends globally",
    "moe-input-mutation": "compiled, V1 may answer garbage, by the sizes of the model's shards",
    "v1-flashinfer-buffers": "V1 FlashInfer dies where a step has more chunks than max_num_seqs",
    "v1-flash-attn-buffers": "on capability 9.0, V1 FlashAttention with CUDA graphs dies where a "
    "step has more chunks than max_num_seqs",
    "v1-full-graph-local": "with full CUDA graphs, V1 attends globally",
}

Length = Literal["past", "at"]
Kept = dict[Variant, Matrix]


@dataclass(frozen=True)
class Settings:
    """What a user has set, in the matrix' words."""

    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    backend: str = UNSET
    v1: str = UNSET
    flashinfer: bool = False
    max_model_len: int | None = None
    """Tokens; None takes it to be past the chunk."""
    chunk: int = CHUNK
    """`attention_chunk_size` of the model, tokens."""
    weights: Asked | None = None
    """None takes them to be unquantised."""
    flags: Flags = NO_FLAGS
    """What else is set."""

    @property
    def length(self) -> Length:
        """Whether a sequence can grow past the chunk."""
        is_at = self.max_model_len is not None and self.max_model_len <= self.chunk
        return "at" if is_at else "past"

    def cell(self, column: str) -> Cell:
        """Its place in the matrix, in a capability's column."""
        place = self.place(column)
        return Cell(
            self.backend, self.v1, self.length, self.flashinfer, place.dtype,
            place.kv_cache_dtype, column,
        )  # fmt: skip

    def place(self, capability: str) -> Place:
        """What kernels depend on, on a GPU of that capability."""
        kv_cache_dtype = SYNONYMS.get(self.kv_cache_dtype, self.kv_cache_dtype)
        return Place(SYNONYMS.get(self.dtype, self.dtype), kv_cache_dtype, capability)

    def __str__(self) -> str:
        """In a sentence's words."""
        said = [f"KV cache {self.kv_cache_dtype}", f"dtype {self.dtype}", self._told_length]
        said += [f"{name}={value}" for name, value in self._variables if value != UNSET]
        said.append("with FlashInfer" if self.flashinfer else "without FlashInfer")
        said += [str(self.weights)] if self.weights else []
        said += [flags.WRITTEN[name] for name in self.flags.names]
        return ", ".join(said)

    @property
    def _variables(self) -> tuple[tuple[str, str], ...]:
        return (BACKEND, self.backend), (ENGINE, self.v1)

    @property
    def _told_length(self) -> str:
        if self.max_model_len is None:
            return f"max_model_len past the chunk of {self.chunk} (assumed)"
        where = "past" if self.length == "past" else "within"
        return f"max_model_len {self.max_model_len}, {where} the chunk of {self.chunk}"


@dataclass(frozen=True)
class Target:
    """The GPU that is asked about, and which column of the matrix answers for it."""

    name: str
    """Of the GPU; empty if only its capability is known."""
    capability: str
    column: str | None
    """None if no column does."""
    note: str = ""
    """Why it is another column than its own, or none; or what else is to be known of it."""
    is_too_old: bool = False
    """Whether vLLM's wheels have no kernels for it."""

    @property
    def stands_for(self) -> dict[str, str]:
        """Its capability, by the column that answers for it."""
        return {} if self.column is None else {self.column: self.capability}

    def __str__(self) -> str:
        """T4 (capability 7.5)."""
        said = f"capability {self.capability}"
        return f"{self.name} ({said})" if self.name else said


@dataclass(frozen=True)
class RightSettings:
    """Settings that are right."""

    cell: Cell
    outcome: Outcome
    changes: tuple[str, ...]
    """What to change for it, each a flag, an environment variable or `unset` one."""
    drops: bool = False
    """Whether a flag is left out for it that the matrix does without."""


@dataclass(frozen=True)
class VariantAnswer:
    """What one variant of a release does."""

    outcome: Outcome
    use: RightSettings | None
    """The nearest settings that are right, these very ones if they are; None if there are none."""
    runs: tuple[Run, ...] = ()
    """Whole engines that had this outcome on a GPU of the same capability."""
    tree: str = ""
    """Git tree id of the variant's sources, as they are now."""

    @property
    def is_right(self) -> bool:
        """Whether nothing need be changed."""
        return self.outcome.verdict == "right"

    @property
    def cannot_run(self) -> bool:
        """Whether the GPU lacks the kernels for these settings, or no others are right that keep
        the flags."""
        if self.is_unasked:
            return False
        return self.outcome.verdict == "cannot-run" or self.use is None or self.use.drops

    @property
    def is_unasked(self) -> bool:
        """Whether nothing is known, since a flag was not asked with these settings."""
        return self.outcome.verdict == "unasked"


@dataclass(frozen=True)
class Elsewhere:
    """A release that is right, patched, on the same GPU."""

    release: str
    changes: tuple[str, ...]
    """What to set for it; nothing if it is right with the same settings."""


@dataclass(frozen=True)
class Answer:
    """How Llama 4 runs in one configuration of one release."""

    release: Release
    version: str
    """Of the patched wheel."""
    stock: VariantAnswer
    patched: VariantAnswer
    other_faults: tuple[str, ...]
    """What else is wrong in stock, which the matrix' settings do not show."""
    besides: tuple[str, ...] = ()
    """What does not work there, patched, with settings that the matrix does not have."""
    unknown: tuple[str, ...] = ()
    """What is not known of the weights and the flags, stock and patched."""
    of_flags: tuple[str, ...] = ()
    """What is to be said of the flags beside the outcomes, stock and patched."""
    elsewhere: tuple[Elsewhere, ...] = ()
    """Where this release, patched, cannot run with these settings: the releases that can."""


def of_checkpoint(
    settings: Settings, found: Checkpoint | None, quantization: str | None, chunk: int | None
) -> Settings:
    """The settings with a checkpoint, --quantization and the chunk, where each is given: what a
    checkpoint tells counts where no option says otherwise.

    Raises:
        OverlayError: nothing is known of such a flag.
    """
    form, experts, text_only = (
        (found.form, found.experts, found.is_text_only) if found else (None, weights.EXPERTS, None)
    )
    settings = replace(
        settings,
        chunk=chunk or (found and found.chunk) or CHUNK,
        weights=weights.asked(form, quantization, experts, text_only),
    )
    if found is None:
        return settings
    # A checkpoint in half precision is served so; of bfloat16 the GPU decides.
    is_half = settings.dtype == "auto" and found.dtype == "float16"
    return replace(
        settings,
        dtype="float16" if is_half else settings.dtype,
        max_model_len=settings.max_model_len or found.max_model_len,
    )


def capability_of(text: str) -> str:
    """A capability as people write it: 7.5, 75, sm_75, sm90a.

    Raises:
        OverlayError: it is none.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?", text.strip().casefold())
    if not found:
        raise OverlayError(
            f"no compute capability {text!r}", "one is a number such as 7.5",
            "Pass --capability 7.5, or the name of the GPU: --gpu T4", Exit.USAGE,
        )  # fmt: skip
    return f"{int(found[1])}.{found[2]}"


def target(name: str, capability: str, columns: Sequence[str]) -> Target:
    """Which of the matrix' capabilities answers for a GPU: its own, else the next lower one of
    its major version, whose kernels it runs."""
    if capability in columns:
        return Target(name, capability, capability)
    mine, known = gpus.version(capability), sorted(map(gpus.version, columns))
    if mine < known[0]:
        oldest = ".".join(map(str, known[0]))
        note = (
            f"vLLM's wheels have no kernels for capability {capability}: they start at {oldest}. "
            "A vLLM and a torch built for it would not do: the experts run in Triton, which starts "
            "there too"
        )
        return Target(name, capability, None, note, is_too_old=True)
    column = gpus.column(capability, columns)
    if column is None:
        return Target(name, capability, None, f"the matrix has no capability like {capability}")
    note = f"the matrix has no capability {capability}; this is what it has for {column}"
    return Target(name, capability, column, note)


def load(root: Path, release: Release) -> Kept:
    """What is kept of a release's engines and attention, stock and patched.

    Raises:
        OverlayError: a file is missing or damaged.
    """
    return {
        variant: matrix.read(matrix.path_of(root, release.name, variant)) for variant in VARIANTS
    }


def _patched(root: Path, release: Release) -> Matrix:
    """What is kept of a patched release, with what cannot run said to be so.

    Raises:
        OverlayError: a file is missing or damaged.
    """
    kept = matrix.read(matrix.path_of(root, release.name, "patched"))
    return runnable.laid_over(kept, runnable.known(root, release.name))


def kernels_of(root: Path, build: Release) -> Kernels:
    """What is kept of the kernels of a build.

    For 64-bit Arm without those of torch: the package index has one without CUDA, so that it is
    another one.

    Raises:
        OverlayError: a file is damaged.
    """
    kernels = runnable.known(root, build.name, build.platform)
    return kernels if build.platform == "x86_64" else kernels.with_any_torch()


def _build(release: Release, found: Target) -> Release:
    """The release as the build for what a GPU is sold in; that for x86_64 where there is none."""
    is_arm = gpus.host(found.name) == "aarch64"
    return release.on("aarch64") if is_arm and release.aarch64 else release


def is_kept(root: Path, release: Release) -> bool:
    """Whether the matrix has a release."""
    return all(matrix.path_of(root, release.name, variant).is_file() for variant in VARIANTS)


def why_not(versions: Versions, release: Release) -> str | None:
    """Why there is nothing to explain of a release that has no patches; None if there is."""
    if release.is_patched:
        return None
    first, last = versions.patched[0], versions.patched[-1]
    if release.version < first.version:
        return f"{release.name} has no Llama 4: the model came with {first.name}"
    return (
        f"{release.name} needs no overlay: it has no V0 engine, and its V1 attends within chunks. "
        f"The matrix ends at {last.name}"
    )


def look_up(kept: Matrix, cell: Cell) -> Outcome:
    """How Llama 4 runs in `cell`.

    Raises:
        OverlayError: the matrix does not have it.
    """
    # Rows of backends that FlashInfer is nothing to are kept once, as without it.
    found = kept.outcome_of(cell) or kept.outcome_of(replace(cell, flashinfer=False))
    if found is None:
        raise OverlayError(
            f"matrix/ does not have this configuration of {kept.release}", str(cell),
            f"Make it again: vllm-overlay matrix {kept.release} --stock", Exit.USAGE,
        )  # fmt: skip
    return found


def nearest(kept: Matrix, cell: Cell, chunk: int) -> RightSettings | None:
    """The settings nearest to `cell` that are right on its GPU; None if there are none.

    Fewest changes count as nearest, then the mildest. A shorter max_model_len comes last.
    """
    outcome = look_up(kept, cell)
    if outcome.verdict == "right":
        return RightSettings(cell, outcome, ())
    found = [(distance(cell, other), other, out) for other, out in _candidates(kept, cell)]
    if not found:
        return None
    _, best, outcome = min(found, key=lambda item: (item[0], item[1]))
    return RightSettings(best, outcome, changes(cell, best, chunk))


def _candidates(kept: Matrix, cell: Cell) -> Iterator[tuple[Cell, Outcome]]:
    for other, outcome in kept.column(cell.capability):
        if (
            outcome.verdict == "right"
            and other.flashinfer == _flashinfer(kept, other, cell)
            and (other.length == cell.length or other.length == "at")
            and (other.backend in (cell.backend, UNSET) or _means(other.backend, outcome))
        ):
            yield other, outcome


def _flashinfer(kept: Matrix, other: Cell, cell: Cell) -> bool:
    """Whether FlashInfer is installed, in the row of `other` that speaks for `cell`."""
    return cell.flashinfer and kept.outcome_of(replace(other, flashinfer=True)) is not None


def _means(backend: str, outcome: Outcome) -> bool:
    """Whether a backend's name gets that backend. Some names of other platforms get any."""
    wanted = backend.removesuffix("_VLLM_V1").replace("_", "").casefold()
    return wanted in outcome.backend.replace("_", "").casefold()


def distance(old: Cell, new: Cell) -> tuple[bool, int, list[int]]:
    """How far apart two configurations are: comparable."""
    costs = [_cost(axis, getattr(old, axis), getattr(new, axis)) for axis in _AXES]
    real = sorted((cost for cost in costs if cost), reverse=True)
    return old.length != new.length, len(real), real


#: What may be changed, and in which order it is told.
_AXES = ("backend", "v1", "kv_cache_dtype", "dtype")


def _cost(axis: str, old: str, new: str) -> int:
    if old == new:
        return 0
    if axis == "backend":
        return 1 if new == UNSET else 4
    if axis == "v1":
        return 2 if new == UNSET else 3
    if axis == "kv_cache_dtype":
        # As many bytes as before, then twice as many; fp8 where nobody asked for it comes last.
        return 7 if old == "auto" else 6 if new == "auto" else 5
    return {"auto": 8, "float16": 9, "bfloat16": 10}.get(new, 11)


def changes(old: Cell, new: Cell, chunk: int) -> tuple[str, ...]:
    """What to do to a configuration to make it another one."""
    pairs = {axis: (getattr(old, axis), getattr(new, axis)) for axis in (*_AXES, "length")}
    return tuple(_setting(axis, new, chunk) for axis, (old, new) in pairs.items() if old != new)


def _setting(axis: str, value: str, chunk: int) -> str:
    variable = {"backend": BACKEND, "v1": ENGINE}.get(axis)
    if variable:
        return f"unset {variable}" if value == UNSET else f"{variable}={value}"
    if axis == "length":
        return f"--max-model-len {chunk}"
    return f"--{axis.replace('_', '-')} {value}"


def ask(
    workspace: Workspace,
    releases: Sequence[Release],
    gpu: tuple[str, str],
    settings: Settings,
    kernels: Kernels | None = None,
) -> tuple[Target, list[Answer]]:
    """How Llama 4 runs with `settings` on a GPU, given as name and capability, in patched releases.

    `kernels` are those of the environment, where it has others than the release.
    Of several releases, those that the matrix has and that know the backend. No answers, but a
    note, if the matrix has none for the GPU or the release has no patches.

    Raises:
        OverlayError: it has none of the releases, or none of them has the backend.
    """
    nothing = why_not(workspace.versions, releases[0])
    if nothing:
        return Target(*gpu, None, nothing), []
    root = workspace.project.root
    there = [release for release in releases if is_kept(root, release)] or releases[:1]
    every = {release: load(root, release) for release in there}
    known = {release: kept for release, kept in every.items() if _knows(kept, settings.backend)}
    if not known:
        raise _no_backend(every[there[-1]]["stock"], settings.backend)
    found, answers = Target(*gpu, None), list[Answer]()
    for release, kept in known.items():
        found = target(*gpu, kept["stock"].axes.capability)
        if found.column is not None:
            build = _build(release, found)
            kernels_here = kernels or kernels_of(root, build)
            kernels_here = kernels_here.holding(root, release.name, settings.weights)
            held = flags.hold(root, release.name, settings.flags)
            kernels_here = replace(kernels_here, flags=settings.flags)
            flagged = {name: held.laid_over(one, found.stands_for) for name, one in kept.items()}
            laid = {
                variant: runnable.laid_over(one, kernels_here, found.stands_for)
                for variant, one in flagged.items()
            }
            one = _answer(workspace, build, laid, settings, found.column)
            one = _with_flags(one, flagged, kernels_here, found, settings)
            one = _without_flags(one, kept, kernels_here, held, found, settings)
            place, outcome = settings.place(found.capability), one.patched.outcome
            cell, besides = settings.cell(found.column), _besides(outcome, kernels_here, place)
            is_text_only = bool(settings.weights and settings.weights.is_text_only)
            unknown = (
                *kernels_here.unknown(place),
                *flags.unknown(settings.flags, outcome, is_text_only),
            )
            of_flags = _of_flags(kept, kernels_here, held, cell, place)
            answers.append(replace(one, besides=besides, unknown=unknown, of_flags=of_flags))
    for_arm = [one.name for one in workspace.versions.patched if one.aarch64]
    caveat = gpus.caveat(found.name, ranges(for_arm, workspace.versions.releases))
    if caveat:
        found = replace(found, note="; ".join(part for part in (found.note, caveat) if part))
    if any(one.patched.cannot_run for one in answers):
        # Those of another torch or Triton say nothing of the release's own.
        uses = {} if kernels else {one.release.name: one.patched.use for one in answers}
        others = _elsewhere(workspace, found, settings, uses)
        answers = [replace(one, elsewhere=others) if one.patched.cannot_run else one
                   for one in answers]  # fmt: skip
    return found, answers


def capabilities(root: Path, release: Release) -> dict[str, tuple[str, ...]]:
    """On which compute capabilities of the matrix a patched release is right past the chunk, and
    what has to be set there; nothing if the matrix does not have the release.

    Raises:
        OverlayError: a file is damaged.
    """
    if not is_kept(root, release):
        return {}
    patched = _patched(root, release)
    cells = {name: Settings().cell(name) for name in patched.axes.capability}
    found = {name: _way(nearest(patched, cell, CHUNK), cell) for name, cell in cells.items()}
    return {name: changes for name, changes in found.items() if changes is not None}


def _way(use: RightSettings | None, cell: Cell) -> tuple[str, ...] | None:
    """What makes a cell right at the same length, in half precision, with all flags; None if `use`
    does not.

    float32 is no way: it takes twice the memory.
    """
    return None if use is None or use.drops or not _is_way(use, cell) else use.changes


def _is_way(use: RightSettings, cell: Cell) -> bool:
    return use.cell.length == cell.length and FLOAT32 not in use.changes


def _besides(outcome: Outcome, kernels: Kernels, place: Place) -> tuple[str, ...]:
    """What is known of a patched release beyond its outcome."""
    if kernels.flags:
        return ()
    prefix = kernels.without_chunks(outcome, place)
    return (f"chunked prefill and prefix caching cannot run: {prefix}",) if prefix else ()


def _elsewhere(
    workspace: Workspace,
    found: Target,
    settings: Settings,
    uses: Mapping[str, RightSettings | None],
) -> tuple[Elsewhere, ...]:
    """The releases of the matrix that are right on a GPU, patched, and what to set there.

    `uses`: what is known of some of them already, by name.
    """
    assert found.column is not None
    cell, ways = settings.cell(found.column), list[Elsewhere]()
    for release in workspace.versions.patched:
        if release.name in uses:
            use = uses[release.name]
        else:
            use = _use_elsewhere(workspace.project.root, release, found, cell, settings)
        way = _way(use, cell)
        if way is not None:
            ways.append(Elsewhere(release.name, way))
    return tuple(ways)


def _use_elsewhere(
    root: Path, release: Release, found: Target, cell: Cell, settings: Settings
) -> RightSettings | None:
    """The nearest settings that are right in another release; None if it does not have the cell."""
    if not is_kept(root, release):
        return None
    kept = matrix.read(matrix.path_of(root, release.name, "patched"))
    if kept.outcome_of(replace(cell, flashinfer=False)) is None:
        return None
    kernels = kernels_of(root, _build(release, found)).holding(root, release.name, settings.weights)
    if kernels.held and kernels.held.kept is None:
        return None
    kept = flags.hold(root, release.name, settings.flags).laid_over(kept, found.stands_for)
    kernels = replace(kernels, flags=settings.flags)
    return nearest_with(kept, kernels, found, cell, settings.chunk)


def nearest_with(
    kept: Matrix, kernels: Kernels, found: Target, cell: Cell, chunk: int
) -> RightSettings | None:
    """The nearest settings that are right in a release, as the matrix has it kept, with the weights
    that `kernels` hold, another --quantization among them; None if there are none.

    Raises:
        OverlayError: the matrix does not have the settings.
    """
    use = nearest(runnable.laid_over(kept, kernels, found.stands_for), cell, chunk)
    return _with_flag(use, kept, kernels, found, cell, chunk)


def _with_flags(
    one: Answer, kept: Kept, kernels: Kernels, found: Target, settings: Settings
) -> Answer:
    """The answer, with another --quantization where no settings are right without."""
    assert found.column is not None
    cell = settings.cell(found.column)
    stock, patched = (
        replace(side, use=_with_flag(side.use, kept[variant], kernels, found, cell, settings.chunk))
        for variant, side in zip(VARIANTS, (one.stock, one.patched), strict=True)
    )
    return replace(one, stock=stock, patched=patched)


def _with_flag(
    use: RightSettings | None, kept: Matrix, kernels: Kernels, found: Target, cell: Cell, chunk: int
) -> RightSettings | None:
    """The settings nearest to `cell` that are right with another --quantization, if `use` is no
    way; else `use`."""
    if kernels.held is None or _way(use, cell) is not None:
        return use
    ways = [use] if use else []
    for flag, held in kernels.held.otherwise():
        laid = runnable.laid_over(kept, replace(kernels, held=held), found.stands_for)
        other = nearest(laid, cell, chunk)
        if other:
            ways.append(replace(other, changes=(flag, *other.changes)))
    return min(ways, key=lambda way: (_way(way, cell) is None, len(way.changes)), default=None)


def _without_flags(
    one: Answer, kept: Kept, kernels: Kernels, held: flags.Set, found: Target, settings: Settings
) -> Answer:
    """The answer, with a flag left out where nothing is right with all of them."""
    assert found.column is not None
    cell = settings.cell(found.column)

    def use(side: VariantAnswer, plain: Matrix) -> RightSettings | None:
        if not held.flags or side.is_unasked or (side.use and _is_way(side.use, cell)):
            return side.use
        ways = [side.use] if side.use else []
        for left_out, fewer in held.fewer():
            laid = runnable.laid_over(
                fewer.laid_over(plain, found.stands_for),
                replace(kernels, flags=fewer.flags),
                found.stands_for,
            )
            other = nearest(laid, cell, settings.chunk)
            if other:
                ways.append(replace(other, changes=(*left_out, *other.changes), drops=True))
        return min(ways, key=lambda way: (not _is_way(way, cell), len(way.changes)), default=None)

    stock, patched = (
        replace(side, use=use(side, kept[variant]))
        for variant, side in zip(VARIANTS, (one.stock, one.patched), strict=True)
    )
    return replace(one, stock=stock, patched=patched)


def _of_flags(
    kept: Kept, kernels: Kernels, held: flags.Set, cell: Cell, place: Place
) -> tuple[str, ...]:
    """What is to be said of flags beside the outcomes in a cell: a line each."""

    def is_alike(one: flags.Set) -> bool:
        """Whether nothing is otherwise with it, stock and patched."""
        plain = {variant: look_up(matrix, cell) for variant, matrix in kept.items()}
        bare, with_it = replace(kernels, flags=NO_FLAGS), replace(kernels, flags=one.flags)
        return all(
            with_it.over(one.over(variant, cell, outcome), place) == bare.over(outcome, place)
            for variant, outcome in plain.items()
        )

    return held.told([one for one in held.each() if is_alike(one)])


def _filled(outcome: Outcome, cell: Cell, settings: Settings) -> Outcome:
    """An outcome whose message speaks of the settings."""
    length = settings.max_model_len or 2 * settings.chunk
    return outcome.model_copy(update={"message": outcome.message_for(cell, length)})


def _knows(kept: Kept, backend: str) -> bool:
    return any(row.backend == backend for row in kept["stock"].rows)


def _no_backend(kept: Matrix, backend: str) -> OverlayError:
    names = sorted({row.backend for row in kept.rows} - {UNSET})
    near = difflib.get_close_matches(backend.upper().replace("-", "_"), names, n=1, cutoff=0.6)
    return OverlayError(
        f"{kept.release} has no backend {backend!r}", f"its backends are {', '.join(names)}",
        f"Did you mean {near[0]}? Else unset {BACKEND}" if near else
        f"Name one of them, or none: unset {BACKEND}",
        Exit.USAGE,
    )  # fmt: skip


def _answer(
    workspace: Workspace, release: Release, kept: Kept, settings: Settings, column: str
) -> Answer:
    cell = settings.cell(column)
    runs = [
        run
        for run in evidence.read(workspace.project.root, release.name).runs
        if _has_run(run, settings.weights) and settings.flags.had_by(run.test)
    ]
    stock, patched = (
        _side(kept[variant], cell, settings, (r for r in runs if r.variant == variant), release)
        for variant in VARIANTS
    )
    other_faults = [
        OTHER_FAULTS[p.topic]
        for p in workspace.series(release)
        if p.topic in OTHER_FAULTS
        and _concerns(p.topic, settings.weights)
        and settings.flags.concerns(p.topic)
    ]
    version = workspace.versions.local_version(release)
    return Answer(release, version, stock, patched, tuple(other_faults))


def _has_run(run: Run, asked: Asked | None) -> bool:
    """Whether an engine ran with such weights: all were unquantised, but those called AWQ."""
    if asked is None:
        return True
    if "awq" in run.test:
        return asked.checkpoint == "awq"
    return (asked.checkpoint, asked.quantization) == ("none", "")


def _concerns(topic: str, asked: Asked | None) -> bool:
    """Whether a fault can be met with a checkpoint: with images, or without."""
    if asked is None or asked.is_text_only is None:
        return True
    return topic not in (_OF_IMAGES if asked.is_text_only else _OF_TEXT)


#: Topics of faults that checkpoints without images have, and those with them.
_OF_TEXT, _OF_IMAGES = ("llama4-text-only",), ("llama4-image-dtype", "llama4-images-off")


def _side(
    kept: Matrix, cell: Cell, settings: Settings, runs: Iterable[Run], release: Release
) -> VariantAnswer:
    outcome = look_up(kept, cell)
    return VariantAnswer(
        _filled(outcome, cell, settings),
        nearest(kept, cell, settings.chunk),
        tuple(run for run in runs if run.speaks_for(outcome, cell)),
        evidence.tree_of(release, kept.variant),
    )


#: The verdicts in a user's words.
_WORDS = {
    "type-error": "TypeError", "explained": "refused", "unexplained": "refused",
    "worker-refused": "refused by a worker", "cannot-run": "cannot run", "unasked": "not known",
}  # fmt: skip


def place(outcome: Outcome) -> str:
    """The engine and the backend: V0 XFormers; empty if it got to neither."""
    impl = outcome.backend.rpartition(".")[2].removesuffix("Impl").removesuffix("Backend")
    return " ".join(part for part in (outcome.engine.upper(), impl) if part)


def brief(outcome: Outcome) -> str:
    """The verdict and where: right, V0 XFormers."""
    word = _WORDS.get(outcome.verdict, outcome.verdict)
    return ", ".join(part for part in (word, place(outcome)) if part)


def message(outcome: Outcome, gpu: str) -> str:
    """What the user reads on a GPU called `gpu`, in place of the one the matrix stands in for."""
    return outcome.message.replace("made-up GPU", f"{gpu} GPU".strip())


def told(side: VariantAnswer, gpu: str) -> str:
    """All of an outcome on a GPU called `gpu`."""
    said = ": ".join(part for part in (brief(side.outcome), message(side.outcome, gpu)) if part)
    known = basis.told(side.outcome, side.runs, side.tree)
    return f"{said} ({known})" if known else said


def change(side: VariantAnswer) -> str:
    """What to change, in a table's cell."""
    if side.is_unasked:
        return "not known"
    if side.use is None:
        return "nothing helps"
    return "; ".join(side.use.changes) or "nothing"


def advice(side: VariantAnswer) -> str:
    """What to change, and what it brings."""
    if side.is_right:
        return "no change needed"
    if side.is_unasked:
        return "what to change is not known"
    if side.use is None:
        return "no settings are right on this GPU"
    return f"to change: {change(side)}; then it is {brief(side.use.outcome)}"


def lines(one: Answer, gpu: str) -> list[tuple[str, str]]:
    """An answer for a person: labels and texts."""
    return [
        ("stock", told(one.stock, gpu)),
        ("", advice(one.stock)),
        *(("", f"other fault: {fault}") for fault in one.other_faults),
        ("overlay", told(one.patched, gpu)),
        ("", advice(one.patched)),
        *(("", f"besides: {said}") for said in one.besides),
        *(("", f"not known: {said}") for said in one.unknown),
        *(("", way) for way in ways_out(one)),
        *zip(chain(("flags",), repeat("")), one.of_flags, strict=False),
        ("wheel", install(one)),
    ]


def summary(answers: Sequence[Answer]) -> str:
    """Which of several releases, in their order, are right when patched: a sentence."""
    order = [one.release.name for one in answers]
    uses = [(one.release.name, one.patched.use) for one in answers]
    found = _by_changes(
        (name, use.changes)
        for name, use in uses
        if use
        and not use.drops
        and not (use.changes and use.changes[-1].startswith("--max-model-len"))
    )
    if not found:
        if any(use and use.drops for _, use in uses):
            return "No release that this overlay patches is known to run this with these flags."
        return "No release that this overlay patches runs Llama 4 on this GPU past a chunk."
    told = [_with(changes, ranges(names, order)) for changes, names in found]
    return f"Patched and right here: {'; '.join(told)}."


def other_faults(answers: Sequence[Answer]) -> list[str]:
    """What else is wrong in stock of several releases, in their order: a sentence a fault."""
    found = _by_words(answers, lambda one: one.other_faults)
    return [f"Stock {names}: {fault}." for fault, names in found]


def unknown(answers: Sequence[Answer]) -> list[str]:
    """What is not known of several releases, in their order: a sentence each."""
    found = _by_words(answers, lambda one: one.unknown)
    return [f"Not known of {names}: {words}." for words, names in found]


def of_flags(answers: Sequence[Answer]) -> list[str]:
    """What is to be said of flags in several releases, in their order: a sentence each."""
    found = _by_words(answers, lambda one: one.of_flags)
    return [f"{names}: {words}." for words, names in found]


def _by_words(
    answers: Sequence[Answer], told: Callable[[Answer], Iterable[str]]
) -> Iterator[tuple[str, str]]:
    """What is told of releases, in their order, and of which."""
    order = [one.release.name for one in answers]
    by_words: dict[str, list[str]] = {}
    for one in answers:
        for words in told(one):
            by_words.setdefault(words, []).append(one.release.name)
    return ((words, ranges(names, order)) for words, names in by_words.items())


def _by_changes(
    found: Iterable[tuple[str, tuple[str, ...]]],
) -> list[tuple[tuple[str, ...], list[str]]]:
    """Releases that want the same changes together, those that want the fewest first."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, changes in found:
        names.setdefault(changes, []).append(name)
    return sorted(names.items(), key=lambda item: len(item[0]))


def _with(changes: tuple[str, ...], releases: str) -> str:
    """Releases, and what to set for them."""
    costs = ", at twice the memory" if FLOAT32 in changes else ""
    return releases + (f" with {' and '.join(changes)}{costs}" if changes else "")


def ways_out(one: Answer) -> list[str]:
    """The releases that run where this one cannot, those with the same settings first."""
    if one.patched.cannot_run and not one.elsewhere:
        if one.patched.use and one.patched.use.drops:
            return ["no release that this overlay patches is known to run it here with these flags"]
        return ["no release that this overlay patches runs it on this GPU"]
    found = _by_changes(
        (other.release, other.changes)
        for other in one.elsewhere
        if other.release != one.release.name
    )
    return [f"patched and right on this GPU: {_with(changes, ', '.join(names))}"
            for changes, names in found]  # fmt: skip


def install(one: Answer) -> str:
    """How to have the patched wheel."""
    return f"vllm=={one.version}: vllm-overlay build {one.release.asked}"


def as_json(found: Target, settings: Settings, answers: Sequence[Answer]) -> dict[str, Any]:
    """Question and answers for a script."""
    asked = {**dataclasses.asdict(settings), "flags": list(settings.flags.names)}
    return {
        "gpu": found.name or None,
        "capability": found.capability,
        "answered_as": found.column,
        "note": found.note or None,
        "settings": {**asked, "length": settings.length},
        "releases": {one.release.name: _answer_json(one, found.name) for one in answers},
    }


def _answer_json(one: Answer, gpu: str) -> dict[str, Any]:
    sides = {"stock": one.stock, "patched": one.patched}
    both = {name: _side_json(side, gpu) for name, side in sides.items()}
    return {
        "version": one.version,
        **both,
        "stock_besides": list(one.other_faults),
        "besides": list(one.besides),
        "unknown": list(one.unknown),
        "of_flags": list(one.of_flags),
        "elsewhere": {other.release: list(other.changes) for other in one.elsewhere},
    }


def _side_json(side: VariantAnswer, gpu: str) -> dict[str, Any]:
    outcome = {**side.outcome.model_dump(), "message": message(side.outcome, gpu)}
    return {
        **outcome,
        "use": None if side.use is None else _use_json(side.use),
        "gpu_runs": [run.model_dump(mode="json") for run in side.runs],
    }


def _use_json(use: RightSettings) -> dict[str, Any]:
    variables = {BACKEND: use.cell.backend, ENGINE: use.cell.v1}
    return {
        "changes": list(use.changes),
        "environment": {name: value for name, value in variables.items() if value != UNSET},
        "kv_cache_dtype": use.cell.kv_cache_dtype,
        "dtype": use.cell.dtype,
        "length": use.cell.length,
        "engine": use.outcome.engine,
        "backend": use.outcome.backend,
        "basis": use.outcome.basis,
    }
