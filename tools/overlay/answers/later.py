"""Releases newer than all of VERSIONS.toml: what is known of Llama 4 in them, unpatched.

Two files of matrix/ say it. later.json is what each release's own selection gave, executed on a
faked GPU (tests/later writes it). later.toml has the faults, written by hand: each with its
releases, its conditions, what to use instead, and where that stands in upstream's sources.
Neither is about a patch of this overlay, nor did an engine run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, model_validator

from overlay.answers import kept
from overlay.answers.explain import SYNONYMS, Settings, Target, target
from overlay.answers.matrix import UNSET
from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError, said
from overlay.releases.versions import Specifier, Versions, ranges

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTS, SELECTED = "later.toml", "later.json"
#: From here on, an option names the attention backend; before, only a variable does.
OPTION_SINCE = Version("0.13.0")
DEFAULT = "default"
HALVES = ("auto", "float16", "bfloat16")

Backend = Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"]
Capability = Literal["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
KvCacheDtype = Literal["auto", "fp8", "fp8_e5m2"]
BACKENDS, CAPABILITIES = get_args(Backend), get_args(Capability)
KV_CACHE_DTYPES = get_args(KvCacheDtype)
Happens = Literal["cannot run", "dies", "silently wrong", "refused", "ignored", "not known"]
Setting = Literal[
    "", "--block-size above 64", "few --max-num-seqs",
    "few --max-num-seqs and --kv-cache-memory-bytes", "VLLM_USE_V1", "VLLM_ATTENTION_BACKEND",
]  # fmt: skip
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
#: What keeps it from being served so.
FAULTS = ("cannot run", "dies", "silently wrong", "refused")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Right(_Model):
    """What a reader may fear for, and is right there."""

    what: Text
    sources: Texts


class Fact(_Model):
    """A fault of upstream's, where it is met and what to use instead."""

    name: Text
    releases: Specifier
    capabilities: tuple[Capability, ...] = ()
    """Empty: all."""
    kv_cache_dtypes: tuple[KvCacheDtype, ...] = ()
    """Empty: all."""
    backends: tuple[Backend, ...] = ()
    """Which is selected or named. Empty: whichever."""
    setting: Setting = ""
    """What else has to be set."""
    past_chunk: bool = False
    """Whether it takes sequences longer than a chunk."""
    happens: Happens
    what: Text
    use: tuple[Text, ...] = ()
    """What to set instead, any one of them; BACKEND=NAME stands for naming a backend."""
    sources: Texts
    """Of upstream: release, file and line; or a thread."""

    @model_validator(mode="after")
    def _fault_has_a_way(self) -> Fact:
        if self.happens in FAULTS and not self.use:
            raise ValueError(f"{self.name}: nothing is said to use instead")
        return self

    def holds_in(self, release: str) -> bool:
        """Whether a release has it."""
        return SpecifierSet(self.releases).contains(release)

    def is_met(self, capability: str, kv_cache_dtype: str, backend: str) -> bool:
        """Whether it is met so, in a release that has it."""
        return (
            capability in (self.capabilities or (capability,))
            and kv_cache_dtype in (self.kv_cache_dtypes or (kv_cache_dtype,))
            and backend in (self.backends or (backend,))
        )

    def way(self, release: str) -> str:
        """What to use instead in a release; empty if nothing is said."""
        flag = "--attention-backend " if Version(release) >= OPTION_SINCE else _VARIABLE
        return " or ".join(one.replace("BACKEND=", flag) for one in self.use)


_VARIABLE = "VLLM_ATTENTION_BACKEND="


class Facts(_Model):
    """later.toml."""

    read: date
    """When the sources were read, and the index listed."""
    releases: tuple[str, ...]
    """Those of the index, in order, from the one after the newest that is patched."""
    right: tuple[Right, ...]
    fact: tuple[Fact, ...]

    @model_validator(mode="after")
    def _facts_are_of_releases(self) -> Facts:
        for one in self.fact:
            if not any(map(one.holds_in, self.releases)):
                raise ValueError(f"{one.name}: {one.releases} has none of the releases")
        return self


class Group(_Model):
    """Releases that select alike."""

    releases: Texts
    selected: Mapping[str, Mapping[str, Mapping[str, str]]]
    """By capability and KV cache: `default` is the backend that is selected with none named; of
    those that are refused when they are named, the reason."""

    @model_validator(mode="after")
    def _is_whole(self) -> Group:
        names = {DEFAULT, *BACKENDS}
        for cells in self.selected.values():
            for cell in cells.values():
                if cell.get(DEFAULT) not in BACKENDS or not names >= set(cell):
                    raise ValueError(f"{cell} is no selection")
        if {*self.selected} != {*CAPABILITIES} or any(
            {*cells} != {*KV_CACHE_DTYPES} for cells in self.selected.values()
        ):
            raise ValueError("a capability or a KV cache is missing, or one too many")
        return self


class Selections(_Model):
    """later.json."""

    executed: date
    groups: tuple[Group, ...]

    @cached_property
    def by_release(self) -> Mapping[str, Group]:
        """The group of each release that was executed."""
        return {name: group for group in self.groups for name in group.releases}


@dataclass(frozen=True)
class Known:
    """What is known of releases that are newer than all of VERSIONS.toml."""

    facts: Facts
    selections: Selections
    releases: tuple[str, ...]
    """Those that VERSIONS.toml does not have, in order."""

    @property
    def newest(self) -> str:
        """The newest release of which something is known."""
        return self.facts.releases[-1]


@dataclass(frozen=True)
class Later:
    """How Llama 4 runs in one of them, in one configuration."""

    release: str
    target: Target
    backend: str
    """Empty if none is selected, or it is not known which."""
    refusal: str
    basis: str
    """Of what is selected."""
    met: tuple[Fact, ...]
    """With these very settings."""
    others: tuple[tuple[str, Fact], ...]
    """Faults on the same GPU with other settings, and with which."""
    unknown: tuple[str, ...]

    @property
    def faults(self) -> tuple[Fact, ...]:
        """What fails with these settings."""
        return tuple(one for one in self.met if one.happens in FAULTS)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.target.is_too_old:
            return "cannot run"
        if self.faults:
            return min((one.happens for one in self.faults), key=FAULTS.index)
        if self.refusal:
            return "refused"
        is_open = self.unknown or any(one.happens == "not known" for one in self.met)
        return "not known" if is_open else "nothing known against it"


def load(root: Path, versions: Versions) -> Known | None:
    """What is known; None without the files, or if VERSIONS.toml has caught up.

    Raises:
        OverlayError: a file is damaged.
    """
    path = root / "matrix" / FACTS
    if not path.is_file():
        return None
    way = f"Restore it from git, or set it right: {path}"
    try:
        raw = tomllib.loads(plain_file.read(path).decode())
    except (OSError, ValueError) as error:
        raise OverlayError(f"cannot read {path}", said(error), way, Exit.USAGE) from error
    facts = kept.validated(Facts, raw, f"{path} is damaged", way)
    made = root / "matrix" / SELECTED
    remade = "Make it again: python -m later SOURCES… (CONTRIBUTING.md)"
    selections = kept.validated(Selections, kept.load(made, remade), f"{made} is damaged", remade)
    newest = max(release.version for release in versions.releases.values())
    releases = tuple(name for name in facts.releases if Version(name) > newest)
    return Known(facts, selections, releases) if releases else None


def find(known: Known | None, versions: Versions, name: str) -> str | None:
    """The release called `name`, if it is newer than all of VERSIONS.toml; else None.

    Raises:
        OverlayError: it is newer, and nothing is known of it.
    """
    try:
        version = Version(name.removeprefix("v"))
    except InvalidVersion:
        return None
    newest = max(release.version for release in versions.releases.values())
    if known is None or version.public in versions.releases or version < newest:
        return None
    if release := named(known, name):
        return release
    raise OverlayError(f"nothing is known of {name}", beyond(known), _CLOSER, Exit.USAGE)


_CLOSER = (
    "Ask about one that is known, or watch what the patches come to: vllm-overlay watch --newer"
)


def named(known: Known, version: str) -> str | None:
    """The release that a version, such as 0.12.0+cu129, is of; None if nothing is known of it."""
    public = Version(version.removeprefix("v")).public
    return public if public in known.releases else None


def beyond(known: Known) -> str:
    """Where knowledge ends."""
    return (
        f"beside the releases of VERSIONS.toml, {known.releases[0]} to {known.newest} are known, "
        f"as the index had them on {known.facts.read}"
    )


def ask(
    known: Known,
    release: str,
    gpu: tuple[str, str],
    settings: Settings,
    *,
    by_variable: bool = False,
) -> Later:
    """How Llama 4 runs in a release that is known, on a GPU, given as name and capability.

    `by_variable`: only VLLM_ATTENTION_BACKEND names the backend, which later releases do not read.

    Raises:
        OverlayError: these releases have no such attention backend.
    """
    found = target(*gpu, CAPABILITIES)
    if found.column is None:
        return Later(release, found, "", "", "", (), (), (found.note,))
    kv_cache_dtype = SYNONYMS.get(settings.kv_cache_dtype, settings.kv_cache_dtype)
    here = [fact for fact in known.facts.fact if fact.holds_in(release)]
    is_unread = by_variable and any(fact.setting == "VLLM_ATTENTION_BACKEND" for fact in here)
    wanted = "" if is_unread else _backend(settings.backend)
    group = known.selections.by_release.get(release)
    cells = group.selected[found.column] if group else {}
    cell = cells.get(kv_cache_dtype, {})
    backend = wanted or cell.get(DEFAULT, "")
    refusal = cell.get(wanted, "") if wanted else ""
    if SYNONYMS.get(settings.dtype, settings.dtype) not in HALVES:
        backend, refusal = wanted, ""
    met = [
        fact
        for fact in here
        if fact.is_met(found.column, kv_cache_dtype, backend) and _is_set(fact, settings)
    ]
    is_open = not any(fact.happens == "cannot run" for fact in met)
    others = [
        (words, fact)
        for fact in (here if is_open else ())
        if fact not in met and fact.happens in FAULTS and _is_of(fact, settings)
        for words in (_reached(fact, found.column, cells),)
        if words is not None
    ]
    return Later(
        release, found, "" if refusal else backend, refusal, _basis(known, group), tuple(met),
        tuple(others), tuple(_unknown(settings, group, found)),
    )  # fmt: skip


def _backend(asked: str) -> str:
    """A backend by the name that these releases have for it; empty if none is asked for."""
    name = _name_of(asked)
    if name and name not in BACKENDS:
        raise OverlayError(
            f"no backend {asked!r} in releases after those of VERSIONS.toml",
            f"known of them are {', '.join(BACKENDS)}", "Name one of these, or none", Exit.USAGE,
        )  # fmt: skip
    return name


def _name_of(asked: str) -> str:
    return "" if asked == UNSET else asked.upper().removesuffix("_VLLM_V1")


def _is_of(fact: Fact, settings: Settings) -> bool:
    return settings.length == "past" or not fact.past_chunk


def _is_set(fact: Fact, settings: Settings) -> bool:
    """Whether what a fact wants set is, as far as settings tell."""
    told = {
        "": True,
        "VLLM_USE_V1": settings.v1 != UNSET,
        "VLLM_ATTENTION_BACKEND": settings.backend != UNSET,
    }
    return told.get(fact.setting, False) and _is_of(fact, settings)


def _reached(fact: Fact, capability: str, cells: Mapping[str, Mapping[str, str]]) -> str | None:
    """With which settings a fault is met on a GPU; None if selection never leads there."""
    if capability not in (fact.capabilities or (capability,)):
        return None
    chosen = [cells[dtype] for dtype in fact.kv_cache_dtypes or cells] if cells else []
    ways = [(cell, name) for cell in chosen for name in fact.backends if name not in cell]
    if fact.backends and chosen and not ways:
        return None
    is_default = bool(ways) and all(cell[DEFAULT] == name for cell, name in ways)
    parts = (
        f"--kv-cache-dtype {' or '.join(fact.kv_cache_dtypes)}" if fact.kv_cache_dtypes else "",
        "" if is_default else " or ".join(fact.backends),
        fact.setting,
    )
    return " and ".join(part for part in parts if part) or "the default"


def _basis(known: Known, group: Group | None) -> str:
    if group is None:
        return f"read in upstream's sources, {known.facts.read}"
    return f"selection executed on a faked GPU, {known.selections.executed}; no engine ran"


def _unknown(settings: Settings, group: Group | None, found: Target) -> Iterator[str]:
    dtype = SYNONYMS.get(settings.dtype, settings.dtype)
    if group is None:
        yield "which backend is selected: this release's selection was not executed"
    elif dtype not in HALVES:
        yield f"which backend is selected with {dtype}: selection was executed for 16 bits only"
    if settings.weights:
        yield f"whether {settings.weights} run there"
    if found.note:
        yield found.note


def lines(one: Later) -> list[tuple[str, str]]:
    """An answer for a person: labels and texts."""
    told = [
        (one.release, "not patched by this overlay; upstream's own attention keeps to the chunks")
    ]
    told += [("upstream", f"{one.verdict}; {_chosen(one)}")] if one.basis else []
    told += [("here", f"{fact.happens}: {_told(fact, one.release)}") for fact in one.met]
    told += [
        ("otherwise", f"with {words}, {fact.happens}: {_told(fact, one.release)}")
        for words, fact in one.others
    ]
    return told + [("not known", words) for words in one.unknown]


def _chosen(one: Later) -> str:
    chosen = f"selects {one.backend}" if one.backend else "which backend it selects is not known"
    if one.refusal:
        chosen = f"selection refuses the backend: {one.refusal}"
    return f"{chosen} ({one.basis})"


def _told(fact: Fact, release: str) -> str:
    """A fact, what to use instead, and a place where it was read; all are in the JSON."""
    way, (place, *more) = fact.way(release), fact.sources
    use = f"; use {way}" if way else ""
    others = f" and {len(more)} more" if more else ""
    return f"{fact.what}{use} (read in {place}{others})"


def changes(one: Later) -> list[str]:
    """What to change for an engine that runs and is right."""
    ways = [f"use {fact.way(one.release)}: {fact.what}" for fact in one.faults]
    if one.refusal:
        ways.append(f"name no attention backend: it is refused ({one.refusal})")
    return ways


def ask_all(known: Known, gpu: tuple[str, str], settings: Settings) -> list[Later]:
    """The same of all of the releases; nothing if a backend is named that they do not have."""
    if _name_of(settings.backend) not in ("", *BACKENDS):
        return []
    return [ask(known, release, gpu, settings) for release in known.releases]


def summary(answers: Sequence[Later]) -> str:
    """What becomes of settings in several releases, in their order: a sentence."""
    order = [one.release for one in answers]
    told: dict[str, list[str]] = {}
    for one in answers:
        told.setdefault(_brief(one), []).append(one.release)
    parts = [f"{ranges(names, order)} {words}" for words, names in told.items()]
    return (
        "Later releases keep to the chunks and are not patched here; what is known of them with "
        f"these settings: {'; '.join(parts)}. One of them in detail: --release {order[-1]}"
    )


def _brief(one: Later) -> str:
    with_backend = f" ({one.backend})" if one.backend and one.verdict != "cannot run" else ""
    ways = dict.fromkeys(fact.way(one.release) for fact in one.faults)
    use = f", use {' and '.join(ways)}" if ways else ""
    return f"{one.verdict}{with_backend}{use}"


def brief_json(answers: Iterable[Later]) -> dict[str, Any]:
    """Answers for a script, by release, without their reasons."""
    return {
        one.release: {
            "verdict": one.verdict,
            "backend": one.backend or None,
            "use": [fact.way(one.release) for fact in one.faults],
        }
        for one in answers
    }


def as_json(one: Later, settings: Settings) -> dict[str, Any]:
    """Question and answer for a script."""
    return {
        "gpu": one.target.name or None,
        "capability": one.target.capability,
        "answered_as": one.target.column,
        "settings": {**dataclasses.asdict(asked(settings)), "length": settings.length},
        "release": one.release,
        "patched": False,
        "verdict": one.verdict,
        "backend": one.backend or None,
        "refusal": one.refusal or None,
        "basis": one.basis or None,
        "met": [_fact_json(fact, one.release) for fact in one.met],
        "otherwise": [
            {"with": words, **_fact_json(fact, one.release)} for words, fact in one.others
        ],
        "unknown": list(one.unknown),
    }


def asked(settings: Settings) -> Settings:
    """The settings as these releases have them: FlashInfer is among what they require."""
    return replace(settings, flashinfer=True)


def _fact_json(fact: Fact, release: str) -> dict[str, Any]:
    return {
        "name": fact.name, "happens": fact.happens, "what": fact.what,
        "use": fact.way(release) or None, "sources": list(fact.sources),
    }  # fmt: skip


def spans(known: Known, fact: Fact) -> str:
    """The releases that have a fact, as ranges."""
    return ranges([name for name in known.releases if fact.holds_in(name)], known.releases)


def conditions(fact: Fact) -> str:
    """Where a fact is met, in words."""
    parts = (
        f"capability {', '.join(fact.capabilities)}" if fact.capabilities else "",
        f"KV cache {' or '.join(fact.kv_cache_dtypes)}" if fact.kv_cache_dtypes else "",
        " or ".join(fact.backends),
        fact.setting,
        "past the chunk" if fact.past_chunk else "",
    )
    return ", ".join(part for part in parts if part) or "everywhere"


def executed(known: Known) -> tuple[str, str]:
    """The releases whose selection was executed, and those whose sources were only read."""
    ran = [name for name in known.releases if name in known.selections.by_release]
    others = [name for name in known.releases if name not in ran]
    return ranges(ran, known.releases), ranges(others, known.releases)


def defaults(known: Known) -> Iterator[tuple[str, Sequence[tuple[str, str]]]]:
    """By GPU, what is selected by default with a KV cache of 16 bits, fp8 and fp8_e5m2: releases as
    ranges, and the backends in that order."""
    for capability in CAPABILITIES:
        told: dict[str, list[str]] = {}
        for name in known.releases:
            group = known.selections.by_release.get(name)
            if group:
                cells = group.selected[capability].values()
                told.setdefault(", ".join(cell[DEFAULT] for cell in cells), []).append(name)
        yield capability, [(ranges(names, known.releases), words) for words, names in told.items()]
