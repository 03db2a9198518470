"""What Llama 4 will do in the environment at hand, and what to change there.

`probe` finds what there is, `explain` knows how Llama 4 runs on it; this module puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overlay.answers import explain, probe
from overlay.answers.explain import BACKEND, ENGINE, Answer, Settings, Target, VariantAnswer
from overlay.answers.matrix import UNSET
from overlay.answers.probe import Device, Devices, Installed, Python
from overlay.base.errors import OverlayError, some
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import locked, record
from overlay.wheels.identity import Identity, identify, is_of_official_wheel, other_patches

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
    identity = Identity("absent")
    if installed:
        identity = identify(installed.version, workspace.versions)
    settings, to_change = set_by(environ, settings)
    settings = replace(settings, flashinfer=probe.has_flashinfer(python.paths))
    devices = Devices((), "") if named else probe.devices()
    used = probe.visible(devices.found, environ.get(VISIBLE))
    asked = [named] if named else list(dict.fromkeys((d.name, d.capability) for d in used))
    answers = list[tuple[Target, Answer | None]]()
    try:
        answers = _answers(workspace, identity, asked, settings)
    except OverlayError as error:
        to_change.append(f"{error.what}: {error.why}. {error.fix}")
    to_change += _of_install(workspace, installed, identity, python)
    to_change += _of_gpus(identity, answers)
    if identity.kind == "stock" and identity.release and not answers and not to_change:
        local = workspace.versions.local_version(identity.release)
        to_change.append(
            f"install {local}: this one is not patched, and no GPU tells that it is right "
            f"without; vllm-overlay install --python {python.executable}"
        )
    return Report(
        python.executable, installed, identity, devices, used, settings,
        {name: environ[name] for name in SHOWN if name in environ}, tuple(answers),
        tuple(
            _notes(
                workspace, identity, environ, devices, used, answers,
                bool(installed and installed.is_editable),
            )
        ),
        tuple(dict.fromkeys(to_change)),
    )  # fmt: skip


def _answers(
    workspace: Workspace,
    identity: Identity,
    asked: Sequence[tuple[str, str]],
    settings: Settings,
) -> list[tuple[Target, Answer | None]]:
    """What the matrix has for each capability, once."""
    found = dict[str, tuple[Target, Answer | None]]()
    if identity.release is None or not identity.release.is_patched:
        return []
    for name, capability in asked:
        if capability and capability not in found:
            target, answers = explain.ask(
                workspace, [identity.release], (name, capability), settings
            )
            found[capability] = target, answers[0] if answers else None
    return list(found.values())


def _of_install(
    workspace: Workspace, installed: Installed | None, identity: Identity, python: Python
) -> list[str]:
    """What to change about vLLM itself, whatever the GPU."""
    versions = workspace.versions
    first, last = versions.patched[0].name, versions.patched[-1].name
    if installed is None:
        return [f"install one of the releases {first} to {last}: vllm-overlay build RELEASE"]
    if broken := _of_metadata(installed, python):
        return broken
    changes = []
    if identity.kind == "unknown":
        changes.append(f"install a release: nothing is known here of {installed.version or 'it'}")
    elif identity.release and identity.release.version < versions.patched[0].version:
        changes.append(f"install a release from {first} on: this one has no Llama 4")
    elif identity.release and identity.kind == "patched":
        changes += _of_patched(workspace, installed, identity, identity.release)
    if identity.kind == "stock" and identity.release and not installed.is_editable:
        changes += _of_stock(installed, identity.release)
    if installed.originals == "lost":
        changes.append(
            f"install it again: {record.ORIGINALS}, which holds what was replaced, is missing or "
            "damaged, so that 'vllm-overlay install --revert' cannot restore it"
        )
    if installed.damaged:
        changes.append(f"install it again: not as RECORD has them are {some(installed.damaged)}")
    return changes


def _of_patched(
    workspace: Workspace, installed: Installed, identity: Identity, release: Release
) -> list[str]:
    wheel = f"install {workspace.versions.local_version(release)}"
    build = f"vllm-overlay build {release.name}"
    mine, theirs = release.revision or 0, identity.revision or 0
    if theirs < mine:
        return [f"{wheel}, a newer revision: {build}"]
    if theirs > mine:
        return []  # a note says it
    if why := other_patches(workspace, installed.bill, release):
        return [f"{wheel}: {why}; {build}"]
    if installed.is_editable or installed.damaged:
        return []  # said elsewhere
    patches = workspace.patches(release)
    found = locked.compare(
        workspace.versions, release, patches, installed.read, installed.info,
        other_build=not is_of_official_wheel(installed.bill),
    )  # fmt: skip
    changes = [f"{wheel} again: patched files are not as locked: {why}" for why in found.patched]
    changes += [f"{wheel} again: RECORD is not as locked: {why}" for why in found.others]
    return [f"{change}; {build}" for change in changes]


def _of_metadata(installed: Installed, python: Python) -> list[str]:
    """What to change where metadata can't be believed."""
    if installed.is_interrupted:
        return [
            "end an install that was interrupted: vllm-overlay install --python "
            f"{python.executable}"
        ]
    if len(installed.infos) > 1:
        return [
            f"uninstall vLLM and install one release: there are {' and '.join(installed.infos)}"
        ]
    if not installed.read(f"{installed.info}/RECORD"):
        return ["install it again: it has no RECORD, so that nothing tells what its files are"]
    return []


def _of_stock(installed: Installed, release: Release) -> list[str]:
    """What to change if it has upstream's version, and not upstream's files."""
    try:
        rows = record.read((installed.read(f"{installed.info}/RECORD") or b"").decode()).values()
    except ValueError as error:
        return [f"install it again: its RECORD can't be read: {error}"]
    if release.record_python in (None, record.pins(rows, installed.info)[1]):
        return []
    return [f"install upstream's {release.name} again: its RECORD does not list upstream's files"]


def _of_gpus(identity: Identity, answers: Sequence[tuple[Target, Answer | None]]) -> list[str]:
    """What to change for right answers on the GPUs; where they differ in it, which."""
    by_gpu = {target: _of_gpu(identity, target, answer) for target, answer in answers}
    if len({tuple(changes) for changes in by_gpu.values()}) == 1:
        return next(iter(by_gpu.values()))
    return [f"for {target}: {change}" for target, changes in by_gpu.items() for change in changes]


def _of_gpu(identity: Identity, target: Target, answer: Answer | None) -> list[str]:
    if answer is None:
        # Older than the wheels, or newer than the matrix: only the former is known to fail.
        return [f"use another GPU: {target.note}"] if target.is_too_old else []
    if identity.kind == "patched":
        return [] if answer.patched.is_right else [_settings_or(answer.patched, answer)]
    if answer.stock.is_right and not answer.other_faults:
        return []
    if answer.patched.use is None:
        return [_settings_or(answer.stock, answer)]
    install = f"install {explain.install(answer)}"
    settings = answer.patched.use.changes
    return [f"{install}, and set {'; '.join(settings)}" if settings else install]


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
    is_editable: bool,
) -> list[str]:
    release, versions = identity.release, workspace.versions
    notes = [target.note for target, _ in answers if target.note]
    if release and (why := explain.why_not(versions, release)):
        notes.append(why)
    if is_editable:
        notes.append("it is an editable install: nothing tells whether its files are a release's")
    if identity.kind == "newer":
        notes.append("it is newer than what this overlay is for, and has no V0 engine to patch")
    if release and identity.kind == "foreign":
        notes.append(
            f"this is neither upstream's {release.name} nor this overlay's; what is said of stock "
            "holds only as far as nothing was changed"
        )
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
    return found + [("note", note) for note in report.notes]


def _outcome_lines(report: Report) -> list[str]:
    is_patched, many = report.identity.kind == "patched", len(report.answers) > 1
    told, other_faults = [], dict[str, None]()
    for target, answer in report.answers:
        if answer:
            side = answer.patched if is_patched else answer.stock
            who = f"on {target}: " if many else ""
            told.append(who + explain.told(side, target.name))
            other_faults |= {} if is_patched else dict.fromkeys(answer.other_faults)
    return told + [f"other fault: {fault}" for fault in other_faults]


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
        "notes": list(report.notes),
        "to_change": list(report.to_change),
    }
