"""What the patches make of an installed vLLM: the patched wheel's files, to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from overlay.answers import probe
from overlay.base.errors import Exit, OverlayError
from overlay.inplace import installed
from overlay.inplace.installed import Target
from overlay.patches.changes import Changes
from overlay.patches.tally import Tally
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import on_files, originals, record, sbom
from overlay.wheels.on_files import MisfitError
from overlay.wheels.origin import Origin
from overlay.wheels.plan import Plan, complete, require_repackable


@dataclass(frozen=True)
class Patched:
    """The files that a patched vLLM has other than before."""

    plan: Plan
    changes: Changes
    written: Mapping[str, bytes]
    """By path in the patched one, RECORD and the originals among them."""
    gone: frozenset[str]
    """Paths before of what the patched one does not have."""
    tally: Tally
    """Patches that changed a file of it, of those that the series lists."""


def patch(workspace: Workspace, origin: Origin, target: Target) -> Patched:
    """What the patches make of `target`, which is not patched.

    Raises:
        OverlayError: a patch does not apply, or the outcome is not the one locked.
    """
    patches = workspace.patches(origin.release)
    try:
        changes, applied = on_files.apply(patches, target.find)
    except MisfitError as error:
        raise OverlayError(
            f"{origin.release.name}: {error.path} does not apply to what is installed",
            error.why,
            f"See what it must fit with 'vllm-overlay validate {origin.release.name}'",
            Exit.PATCH,
        ) from error
    _require_locked(origin.release, target, changes)
    bill = sbom.build(workspace.versions, origin, patches)
    plan = complete(
        workspace.versions, origin, changes, bill, lambda name: target.read(name).decode()
    )
    written, gone = _files(target, plan)
    tally = Tally(len(applied), len(workspace.series(origin.release)))
    return Patched(plan, changes, written, gone, tally)


def _require_locked(release: Release, target: Target, changes: Changes) -> None:
    for path, how in changes.kinds.items():
        require_repackable(release, path, how, path in target.rows)
    if changes.digest != release.files:
        raise OverlayError(
            f"{release.name}: what the patches make of it is not what is locked",
            f"its digest is {changes.digest}, VERSIONS.toml says {release.files}",
            f"Undo the change of the patches, or run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )


def _files(target: Target, plan: Plan) -> tuple[dict[str, bytes], frozenset[str]]:
    """The plan as files of the install, with the originals and a new RECORD; and what goes."""
    # The file that it was installed from is not what it is any more.
    origins = {f"{plan.old_info}/{n}" for n in (probe.ORIGIN, installed.CACHED_ORIGIN)}
    gone = plan.removed | (origins & target.rows.keys())
    kept = sorted({*plan.replaced, *gone, f"{plan.old_info}/RECORD"})
    written = {plan.target(n): d for n, d in {**plan.replaced, **plan.added}.items()}
    zipped = originals.write({name: target.read(name) for name in kept})
    written[f"{plan.new_info}/{record.ORIGINALS}"] = zipped
    rows = [
        (plan.target(name), *row[1:])
        for name, row in target.rows.items()
        if name not in gone and not _is_bytecode_of(name, {*plan.replaced, *gone})
    ]
    renewed = {name: record.line(name, data) for name, data in written.items()}
    names = {row[0] for row in rows}
    rows = [renewed.get(row[0], row) for row in rows]
    rows += [row for name, row in renewed.items() if name not in names]
    record_name = f"{plan.new_info}/RECORD"
    rows = [row for row in rows if row[0] != record_name] + [(record_name, "", "")]
    written[record_name] = record.write(rows)
    return written, gone


def _is_bytecode_of(name: str, modules: set[str]) -> bool:
    """Whether `name` is what Python has compiled of one of `modules`; it goes with them."""
    path = PurePosixPath(name)
    source = f"{path.parent.parent}/{path.name.partition('.')[0]}.py"
    return path.suffix == ".pyc" and source in modules
