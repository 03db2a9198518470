"""What Llama 4 will do in the environment at hand, and what to change there.

`probe` finds what there is, `explain` knows how Llama 4 runs on it; this module puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overlay.answers import advice, explain, later, probe, runnable, stack
from overlay.answers.explain import BACKEND, ENGINE, Answer, Settings, Target, VariantAnswer
from overlay.answers.later import Later
from overlay.answers.matrix import UNSET
from overlay.answers.probe import Device, Devices, Installed, Python
from overlay.answers.runnable import Kernels
from overlay.answers.stack import Stack
from overlay.base.errors import OverlayError, some
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import locked, originals, record
from overlay.wheels.identity import (
    Identity,
    first_known,
    identify,
    official_build,
    other_patches,
    version_of,
)
from overlay.wheels.origin import Match, match
from overlay.wheels.originals import LostError, Originals

#: Variables that change what runs, and that the matrix does not count with.
UNCOUNTED = (
    "VLLM_V1_USE_PREFILL_DECODE_ATTENTION",
    "VLLM_FLASH_ATTN_VERSION",
    "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE",
    "VLLM_PLUGINS",
)
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
COUNTED = (ENGINE, BACKEND)
SHOWN = (*COUNTED, *UNCOUNTED, VISIBLE, ORDER)


@dataclass(frozen=True)
class Report:
    """What there is, what will happen and what to change."""

    python: str
    installed: Installed | None
    identity: Identity
    devices: Devices
    used: tuple[Device, ...]
    """The GPUs that vLLM may see."""
    settings: Settings
    variables: Mapping[str, str]
    answers: tuple[tuple[Target, Answer | None], ...]
    """One a capability."""
    notes: tuple[str, ...]
    to_change: tuple[str, ...]
    later: tuple[Later, ...] = ()
    """Of a release that is newer than all that are patched: one a capability."""


def set_by(environ: Mapping[str, str], settings: Settings) -> tuple[Settings, list[str]]:
    """The settings with what the environment sets, and what is wrong with that."""
    backend = environ.get(BACKEND) or UNSET
    v1, problems = environ.get(ENGINE), list[str]()
    if v1 is not None and not re.fullmatch(r"\s*[+-]?\d+\s*", v1):
        problems.append(f"unset {ENGINE}: {v1!r} is no number, and vLLM dies of it")
        v1 = None
    engine = UNSET if v1 is None else str(int(bool(int(v1))))
    return replace(settings, backend=backend, v1=engine), problems


def examine(
    workspace: Workspace,
    python: Python,
    environ: Mapping[str, str],
    named: tuple[str, str] | None,
    settings: Settings,
) -> Report:
    """Look at the environment of `python`.

    `named` are name and capability of a GPU to take in place of those that there are.

    Raises:
        OverlayError: the matrix lacks the release.
    """
    found = probe.find_vllm(python.paths, workspace.versions.upstream.project)
    installed = probe.inspect(found) if found else None
    identity = _identity(workspace, installed)
    settings, to_change = set_by(environ, settings)
    settings = replace(settings, flashinfer=probe.has_flashinfer(python.paths))
    devices = Devices((), "") if named else probe.devices()
    used = probe.visible(devices.found, environ.get(VISIBLE))
    asked = [named] if named else list(dict.fromkeys((d.name, d.capability) for d in used))
    answers, found_stack = list[tuple[Target, Answer | None]](), Stack(Kernels())
    newer, beyond = tuple[Later, ...](), list[str]()
    try:
        found_stack = _stack(workspace, identity, installed, python)
        answers = _answers(workspace, identity, asked, settings, found_stack.kernels)
        newer, beyond = _newer(workspace, identity, installed, asked, settings)
    except OverlayError as error:
        to_change.append(f"{error.what}: {error.why}. {error.fix}")
    to_change += [change for one in newer for change in later.changes(one)]
    to_change += _of_install(workspace, installed, identity, python)
    local, command = _patch(workspace, installed, identity, python)
    to_change += _of_gpus(identity, answers, f"install {local}: {command}")
    if command and not answers and not to_change:
        why = "this one is not patched, and no GPU tells that it is right without"
        to_change.append(f"install {local}: {why}; {command}")
    return Report(
        python.executable, installed, identity, devices, used, settings,
        {name: environ[name] for name in SHOWN if name in environ}, tuple(answers),
        (
            *_notes(workspace, identity, environ, devices, used, answers, installed),
            *found_stack.notes,
            *beyond,
        ),
        tuple(dict.fromkeys(to_change)),
        newer,
    )  # fmt: skip


def _identity(workspace: Workspace, installed: Installed | None) -> Identity:
    """Which vLLM it is; what was patched here is known by the name of its dist-info folder."""
    if installed is None:
        return Identity("absent")
    named = version_of(installed.info, workspace.versions)
    return identify(named if installed.is_in_place else installed.version, workspace.versions)


def _stack(
    workspace: Workspace, identity: Identity, installed: Installed | None, python: Python
) -> Stack:
    """What the kernels of the release come to with the torch and the Triton that are there."""
    if identity.release is None or installed is None:
        return Stack(Kernels())
    build = _build(installed, identity.release)
    known = runnable.known(workspace.project.root, build.name, build.platform)
    return stack.look(python, known)


def _build(installed: Installed, release: Release) -> Release:
    """The release as the official wheel that is installed, or was patched; x86_64's if that can't
    be told."""
    if build := official_build(installed.bill, release):
        return build
    found = _match_if_readable(installed, release)
    return found[0] if found else release


def _answers(
    workspace: Workspace,
    identity: Identity,
    asked: Sequence[tuple[str, str]],
    settings: Settings,
    kernels: Kernels,
) -> list[tuple[Target, Answer | None]]:
    """What the matrix has for each capability, once."""
    found = dict[str, tuple[Target, Answer | None]]()
    if identity.release is None or not identity.release.is_patched:
        return []
    for name, capability in asked:
        if capability and capability not in found:
            target, answers = explain.ask(
                workspace, [identity.release], (name, capability), settings, kernels
            )
            found[capability] = target, answers[0] if answers else None
    return list(found.values())


def _newer(
    workspace: Workspace,
    identity: Identity,
    installed: Installed | None,
    asked: Sequence[tuple[str, str]],
    settings: Settings,
) -> tuple[tuple[Later, ...], list[str]]:
    """What is known of a release that is newer than all that are patched, for each capability; and
    a note if that is nothing."""
    if identity.kind != "newer" or installed is None:
        return (), []
    known = later.load(workspace.project.root, workspace.versions)
    if known is None:
        return (), []
    release = later.named(known, installed.version)
    if release is None:
        return (), [f"nothing is known of {installed.version}: {later.beyond(known)}"]
    by_capability = {capability: (name, capability) for name, capability in asked if capability}
    found = (
        later.ask(known, release, gpu, settings, by_variable=True) for gpu in by_capability.values()
    )
    return tuple(found), []


def _of_install(
    workspace: Workspace, installed: Installed | None, identity: Identity, python: Python
) -> list[str]:
    """What to change about vLLM itself, whatever the GPU: what is wrong, and what heals it."""
    versions = workspace.versions
    first, last = versions.patched[0].name, versions.patched[-1].name
    if installed is None:
        return [f"install one of the releases {first} to {last}: vllm-overlay build RELEASE"]
    if installed.interrupted is not None:
        return [_of_interrupted(installed, identity, python)]
    if not installed.is_in_place and (broken := _of_metadata(installed)):
        return [f"install it again: {broken}; {_replacing(workspace, installed, python)}"]
    if identity.kind == "patched" and identity.release:
        return _of_patched(workspace, installed, identity, identity.release, python)
    again, changes = advice.upstreams(python, identity.release, identity.label), list[str]()
    if identity.kind == "unknown":
        changes.append(f"install a release: nothing is known here of {installed.version or 'it'}")
    elif identity.release and identity.release.version < versions.patched[0].version:
        changes.append(f"install a release from {first} on: this one has no Llama 4")
    if identity.kind == "stock" and identity.release and not installed.is_editable:
        changes += [
            f"install upstream's {identity.release.name} again: {why}; {again}"
            for why in _of_stock(installed, identity.release)
        ]
    if installed.damaged:
        changes.append(
            f"install it again: not as RECORD has them are {some(installed.damaged)}; {again}"
        )
    return changes


def _replacing(workspace: Workspace, installed: Installed, python: Python) -> str:
    """What puts another vLLM in the place of one whose metadata can't be believed."""
    one = first_known(installed.infos, workspace.versions)
    again = advice.without_metadata(
        python, installed.folder, installed.infos, one.release, one.label
    )
    return f"{again}, then {advice.patch(python, one.label)}" if one.kind == "patched" else again


def _of_interrupted(installed: Installed, identity: Identity, python: Python) -> str:
    """What ends a run of `install` that was killed."""
    run, told = installed.interrupted or "install", ""
    command = advice.patch(python, identity.label)
    if run != "install":
        command = advice.overlay(python, f"--{run}")
    elif not installed.interrupted and installed.is_in_place:
        # It had changed nothing: what it was to heal may still be amiss.
        command = advice.overlay(python, "--repair")
    if installed.changed_since:
        told = f"; {installed.changed_since} was changed since"
        command = advice.overlay(python, "--repair")
    return f"end the {run} that was interrupted{told}: {command}"


def _of_metadata(installed: Installed) -> str:
    """Why metadata can't be believed; empty if it can."""
    if len(installed.infos) > 1:
        return f"there are {' and '.join(installed.infos)}"
    if not installed.read(f"{installed.info}/RECORD"):
        return "it has no RECORD, so that nothing tells what its files are"
    return ""


def _of_patched(
    workspace: Workspace,
    installed: Installed,
    identity: Identity,
    release: Release,
    python: Python,
) -> list[str]:
    """What is wrong with a patched one, and what heals it."""
    local = workspace.versions.local_version(release, identity.label)
    mine, theirs = release.revision or 0, identity.revision or 0
    if theirs < mine:
        how = advice.wheel(_build(installed, release), identity.label)
        if installed.is_in_place:
            back = advice.overlay(python, "--revert")
            how = f"{back}, then {advice.patch(python, identity.label)}"
        return [f"install {local}, a newer revision: {how}"]
    if theirs > mine:
        return []  # a note says it
    kept, problems = None, list[str]()
    if installed.is_in_place:
        try:
            path = installed.folder / installed.info / record.ORIGINALS
            kept = originals.read(path, workspace.versions, release)
        except LostError as error:
            problems.append(f"{record.ORIGINALS}, which holds what was replaced, is lost: {error}")
    broken = _of_metadata(installed)
    problems += [broken] if broken else _of_files(workspace, installed, identity, release)
    how = _healing(workspace, installed, identity, release, python, kept)
    verb = "repair it" if "--repair" in how else f"install {local} again"
    return [f"{verb}: {'; '.join(problems)}; {how}"] if problems else []


def _of_files(
    workspace: Workspace, installed: Installed, identity: Identity, release: Release
) -> list[str]:
    """What is wrong with the files of a patched one."""
    if installed.damaged:
        return [f"not as RECORD has them are {some(installed.damaged)}"]
    if installed.version != version_of(installed.info, workspace.versions):
        return [f"METADATA says {installed.version or 'nothing'}, the folder is {installed.info}"]
    if installed.is_in_place and not installed.lists_originals:
        return [f"RECORD does not list {record.ORIGINALS}"]
    if why := other_patches(workspace, installed.bill, release):
        return [why]
    if installed.is_editable:
        return []  # a note says it
    build = official_build(installed.bill, release)
    found = locked.compare(
        workspace.versions, build or release, workspace.patches(release), installed.read,
        installed.info, label=identity.label, other_build=build is None,
    )  # fmt: skip
    patched = [f"patched files are not as locked: {why}" for why in found.patched]
    return patched + [f"RECORD is not as locked: {why}" for why in found.others]


def _healing(
    workspace: Workspace,
    installed: Installed,
    identity: Identity,
    release: Release,
    python: Python,
    kept: Originals | None,
) -> str:
    """The command that makes a patched one right."""
    label = identity.label
    if kept and {*installed.infos} <= {installed.info, kept.info} and not _others(installed, kept):
        return advice.overlay(python, "--repair")
    if not installed.is_in_place:
        return advice.wheel(_build(installed, release), label)
    if _of_metadata(installed):
        return _replacing(workspace, installed, python)
    is_other = official_build(installed.bill, release) is None
    return advice.anew(python, release, label, other_build=is_other)


def _others(installed: Installed, kept: Originals) -> list[str]:
    """The files that patches leave alone and that are not as they were; libraries left out."""

    def digest(name: str) -> str | None:
        return record.hash_of(installed.folder / record.moved(name, kept.info, installed.info))

    rows = (row for row in kept.others() if not row[0].endswith(".so"))
    return [row[0] for row in rows if digest(row[0]) != row[1]]


def _of_stock(installed: Installed, release: Release) -> Iterator[str]:
    """What is wrong with one that has upstream's version and not upstream's files."""
    try:
        if release.record_python and _matched(installed, release) is None:
            yield "its RECORD does not list upstream's files"
    except ValueError as error:
        yield f"its RECORD can't be read: {error}"


def _matched(installed: Installed, release: Release) -> tuple[Release, Match] | None:
    """Which official wheel RECORD is nearest to, and how much of what it lists is that one's."""
    rows = record.read((installed.read(f"{installed.info}/RECORD") or b"").decode())
    return match(release, record.pins(rows.values(), installed.info))


def _match_if_readable(installed: Installed, release: Release) -> tuple[Release, Match] | None:
    """The same; None too where RECORD says nothing of the files."""
    try:
        return None if installed.is_editable else _matched(installed, release)
    except ValueError:
        return None


def _of_foreign(installed: Installed, release: Release) -> str:
    """What is known of a build of someone else."""
    if _match_if_readable(installed, release):
        return f"this is another build of {release.name}, with upstream's Python files"
    return (
        f"this is neither upstream's {release.name} nor this overlay's; what is said of stock "
        "holds only as far as nothing was changed"
    )


def _patch(
    workspace: Workspace, installed: Installed | None, identity: Identity, python: Python
) -> tuple[str, str]:
    """What an unpatched one is once it is patched, and the command; empty if there are no patches
    for it."""
    release = identity.release
    if not installed or not release or not release.is_patched or identity.kind == "patched":
        return "", ""
    found = _match_if_readable(installed, release)
    if found is None:
        build = f"vllm-overlay build {_build(installed, release).asked}"
        return workspace.versions.local_version(release), build
    local = workspace.versions.local_version(release, identity.label)
    return local, advice.patch(python, identity.label, found[1] != "all")


def _of_gpus(
    identity: Identity, answers: Sequence[tuple[Target, Answer | None]], patch: str
) -> list[str]:
    """What to change for right answers on the GPUs; where they differ in it, which.

    `patch` says how to have it patched.
    """
    by_gpu = {target: _of_gpu(identity, target, answer, patch) for target, answer in answers}
    if len({tuple(changes) for changes in by_gpu.values()}) == 1:
        return next(iter(by_gpu.values()))
    return [f"for {target}: {change}" for target, changes in by_gpu.items() for change in changes]


def _of_gpu(identity: Identity, target: Target, answer: Answer | None, patch: str) -> list[str]:
    if answer is None:
        # Older than the wheels, or newer than the matrix: only the former is known to fail.
        return [f"use another GPU: {target.note}"] if target.is_too_old else []
    side = answer.patched if identity.kind == "patched" else answer.stock
    if side.is_unasked:
        # Nothing is known to be wrong with these flags, nor with those of the others.
        return []
    if identity.kind == "patched":
        return [] if answer.patched.is_right else [_settings_or(answer.patched, answer)]
    if answer.stock.is_right and not answer.other_faults:
        return []
    if answer.patched.use is None:
        return [_settings_or(answer.stock, answer)]
    settings = answer.patched.use.changes
    return [f"{patch}, and set {'; '.join(settings)}" if settings else patch]


def _settings_or(side: VariantAnswer, answer: Answer) -> str:
    if side.use is None:
        return f"use another GPU: no settings of {answer.release.name} are right on this one"
    return explain.change(side)


def _notes(
    workspace: Workspace,
    identity: Identity,
    environ: Mapping[str, str],
    devices: Devices,
    used: Sequence[Device],
    answers: Sequence[tuple[Target, Answer | None]],
    installed: Installed | None,
) -> list[str]:
    release, versions = identity.release, workspace.versions
    notes = [target.note for target, _ in answers if target.note]
    if release and (why := explain.why_not(versions, release)):
        notes.append(why)
    if installed and installed.is_editable:
        notes.append("it is an editable install: nothing tells whether its files are a release's")
    if identity.kind == "newer":
        notes.append("it is newer than what this overlay is for, and has no V0 engine to patch")
    if release and identity.kind == "foreign" and installed:
        notes.append(_of_foreign(installed, release))
    if release and (identity.revision or 0) > (release.revision or 0):
        notes.append(
            f"its revision is newer than this overlay's, {release.revision}; update the overlay"
        )
    if len({device.capability for device in used}) > 1 and environ.get(ORDER) != "PCI_BUS_ID":
        notes.append(f"the GPUs differ: without {ORDER}=PCI_BUS_ID, CUDA numbers them its own way")
    notes += [
        f"{device.name}: capability unknown; pass --capability"
        for device in used
        if not device.capability
    ]
    if devices.source and not used:
        notes.append("no GPU to answer for: pass --gpu or --capability")
    if "MIG-" in environ.get(VISIBLE, ""):
        notes.append(f"{VISIBLE} names MIG slices, which can't be matched: all GPUs are taken")
    notes += [f"{name} is set; the matrix is made without" for name in UNCOUNTED if name in environ]
    return notes


def lines(report: Report) -> list[tuple[str, str]]:
    """The report for a person: labels and texts, but for what to change."""
    found = [("Python", report.python), ("vLLM", _vllm_line(report))]
    if report.installed and report.installed.checked:
        state = "as RECORD has them"
        if report.installed.damaged:
            state = f"{len(report.installed.damaged)} not as RECORD has them"
        found.append(("files", f"{report.installed.checked} Python files, {state}"))
    found += [("GPU", text) for text in _gpu_lines(report)]
    found.append(("settings", str(report.settings)))
    others = {name: value for name, value in report.variables.items() if name not in COUNTED}
    found += [("", f"{name}={value}") for name, value in others.items()]
    found += [("Llama 4", text) for text in _outcome_lines(report)]
    found += [line for one in report.later for line in _later_lines(one, len(report.later) > 1)]
    return found + [("note", note) for note in report.notes]


def _later_lines(one: Later, is_of_many: bool) -> list[tuple[str, str]]:
    who = [("", f"on {one.target}:")] if is_of_many else []
    return who + later.lines(one)


def _outcome_lines(report: Report) -> list[str]:
    is_patched, many = report.identity.kind == "patched", len(report.answers) > 1
    told, other_faults, unknown = [], dict[str, None](), dict[str, None]()
    of_flags = dict[str, None]()
    for target, answer in report.answers:
        if answer:
            side = answer.patched if is_patched else answer.stock
            who = f"on {target}: " if many else ""
            told.append(who + explain.told(side, target.name))
            other_faults |= {} if is_patched else dict.fromkeys(answer.other_faults)
            unknown |= dict.fromkeys(answer.unknown)
            of_flags |= dict.fromkeys(answer.of_flags)
    told += [f"other fault: {fault}" for fault in other_faults]
    told += [f"not known: {words}" for words in unknown]
    return [*told, *of_flags]


def _vllm_line(report: Report) -> str:
    installed, identity = report.installed, report.identity
    if installed is None:
        return "not installed"
    kinds = {
        "stock": "upstream's, not patched",
        "patched": f"patched, revision {identity.revision}",
        "foreign": "a build of someone else",
        "control": "upstream's, not patched here",
        "newer": "newer than this overlay knows",
        "unknown": "no release of upstream that this overlay knows",
    }
    return f"{installed.version or 'no version'}, {kinds[identity.kind]}, in {installed.folder}"


def _gpu_lines(report: Report) -> list[str]:
    if not report.devices.source:
        return [f"{target}, as named" for target, _ in report.answers]
    if not report.devices.found:
        return [f"none seen: {report.devices.problem}"]
    hidden = f", hidden by {VISIBLE}"
    return [
        f"{device.index}: {device.name}, capability {device.capability or 'unknown'}"
        f"{'' if device in report.used else hidden} ({report.devices.source})"
        for device in report.devices.found
    ]


def as_json(report: Report) -> dict[str, Any]:
    """The report for a script."""
    installed, identity = report.installed, report.identity
    gpus = [{**vars(device), "visible": device in report.used} for device in report.devices.found]
    return {
        "python": report.python,
        "vllm": {
            "kind": identity.kind,
            "version": installed.version if installed else None,
            "release": identity.release.name if identity.release else None,
            "revision": identity.revision,
            "newest_revision": identity.release.revision if identity.release else None,
            "folder": str(installed.folder) if installed else None,
            "files_checked": installed.checked if installed else 0,
            "files_damaged": list(installed.damaged) if installed else [],
        },
        "gpus": gpus,
        "gpu_problem": report.devices.problem or None,
        "environment": dict(report.variables),
        "answers": [
            explain.as_json(target, report.settings, [answer] if answer else [])
            for target, answer in report.answers
        ],
        "later": [later.as_json(one, report.settings) for one in report.later],
        "notes": list(report.notes),
        "to_change": list(report.to_change),
    }
