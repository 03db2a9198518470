"""One run on a site-packages folder: alone in it, and all of its changes or none."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overlay.answers import advice, probe
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError
from overlay.base.journal import IN_SITE, ChangedMeanwhileError, Journal
from overlay.inplace import site_files
from overlay.releases.versions import Versions
from overlay.wheels.identity import first_known

Purpose = Literal["install", "revert", "repair"]


@dataclass(frozen=True)
class Session:
    """The folder that vLLM lies in."""

    python: Python
    site: Path
    has_recovered: bool
    """Whether an interrupted run was brought to its end first."""


@dataclass(frozen=True)
class Writing:
    """What to do to the files below site-packages."""

    written: Mapping[str, bytes]
    removed: frozenset[str]
    models: Mapping[str, str]
    """By path of a new file, an old one's: where mode and owner come from."""


@contextmanager
def opened(
    versions: Versions, python: Python, purpose: Purpose, *, dry_run: bool
) -> Iterator[Session]:
    """The folder of the vLLM of `python`, kept from other runs; one that was interrupted is ended
    first.

    A repair ends it even if a file was changed since, so that what is patched is patched in whole.

    Raises:
        OverlayError: there is no vLLM, what was interrupted can't be ended, or the folder can't be
            written.
    """
    site = find_site(python, versions.upstream.project)
    recovered = False
    try:
        with site_files.locked(site) as journal:
            if journal.is_left():
                if dry_run:
                    raise _interrupted(
                        site,
                        "an earlier run was interrupted",
                        "Run it without --dry-run: it brings that to its end",
                    )
                recovered = _end(journal, versions, is_repair=purpose == "repair")
            yield Session(python, site, recovered)
    except ChangedMeanwhileError as error:
        raise _interrupted(
            site,
            f"an earlier run was interrupted, and {error.path} was changed since",
            _after_a_change(site, versions, python, purpose),
        ) from error
    except OSError as error:
        raise _unwritable(site, error.strerror or str(error)) from error


def find_site(python: Python, project: str) -> Path:
    """The folder in which `python` finds vLLM.

    Raises:
        OverlayError: it finds none.
    """
    found = probe.find_vllm(python.paths, project)
    if found is None:
        raise OverlayError(
            f"{python.executable} has no vLLM",
            "there is none on the paths that it imports from",
            "Name the Python that vLLM runs on: --python /path/to/venv/bin/python",
            Exit.USAGE,
        )
    return Path(str(found.locate_file("")))


def _end(journal: Journal, versions: Versions, *, is_repair: bool) -> bool:
    """Bring to its end what was interrupted. Returns whether anything had been changed."""
    try:
        return bool(journal.finish())
    except ChangedMeanwhileError:
        if is_repair and journal.label() == "repair":
            journal.drop()  # this one does it all again
            return True
        if not is_repair or not _is_alone(journal, versions):
            raise
        # Where there is no more than a patched vLLM, what is patched can be made again.
        end = journal.undo if journal.label() == "revert" else journal.finish
        return bool(end(whatever=True))


def _is_alone(journal: Journal, versions: Versions) -> bool:
    """Whether no vLLM is there but those that the interrupted run is about."""
    if journal.label() == "repair":
        return True
    known = {path.split("/")[0] for path in journal.paths()}
    return set(probe.dist_infos(journal.root, versions.upstream.project)) <= known


def _after_a_change(site: Path, versions: Versions, python: Python, purpose: Purpose) -> str:
    journal = site_files.journal(site)
    if purpose != "repair" and _is_alone(journal, versions):
        return f"Bring it to its end in spite of that: {advice.overlay(python, '--repair')}"
    infos = probe.dist_infos(site, versions.upstream.project)
    one, stage = first_known(infos, versions), shlex.quote(str(site / IN_SITE))
    again = advice.without_metadata(python, site, infos, one.release, one.label)
    return f"Install vLLM anew: rm -r {stage} && {again}"


def _interrupted(site: Path, why: str, fix: str) -> OverlayError:
    return OverlayError(f"cannot go on in {site}", why, fix, Exit.INTEGRITY)


def _unwritable(path: Path, why: str) -> OverlayError:
    return OverlayError(
        f"cannot write {path}",
        f"{why}; nothing was changed",
        "Run it as the user who installed vLLM, on a file system that can be written; for an "
        "image, in its Dockerfile",
        Exit.ENVIRONMENT,
    )


def write(site: Path, writing: Writing, purpose: Purpose) -> None:
    """Do it, or nothing.

    Raises:
        OverlayError: a folder can't be written.
        OSError: something else is amiss, a full disk say; nothing has changed.
    """
    names = {*writing.written, *writing.removed}
    for folder in sorted({site, *((site / name).parent for name in names)}):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise _unwritable(folder, "this user may not, or it is read-only")
    # What is new comes first: there is never less than one whole dist-info's METADATA.
    files: dict[str, bytes | None] = {
        name: writing.written[name] for name in sorted(writing.written)
    }
    files |= dict.fromkeys(sorted(writing.removed), None)
    site_files.journal(site).write(files, purpose, writing.models)
