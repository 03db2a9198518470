"""The command lines that heal an installed vLLM, as `doctor` and the errors of `install` name them.

None names a version that no package index has: a patched one, or another build's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from overlay.answers.probe import Python
from overlay.releases.versions import Release


def overlay(python: Python, *options: str) -> str:
    """`vllm-overlay install` with `options`, for that Python."""
    return f"vllm-overlay install{python.flag}{''.join(f' {option}' for option in options)}"


def upstreams(python: Python, release: Release | None, label: str = "") -> str:
    """What puts upstream's files in the place of an installed vLLM's; `label` is its build's."""
    return _again(python, release, label, "--force-reinstall --no-deps")


def without_metadata(
    python: Python, site: Path, infos: Sequence[str], release: Release | None, label: str = ""
) -> str:
    """The same where pip can't uninstall it: RECORD is lost, or there are several."""
    again = _again(python, release, label, "--no-deps")
    if not infos:
        return again
    folders = shlex.join(str(site / info) for info in infos)
    return f"rm -r {folders}{', then ' if label else ' && '}{again}"


def _again(python: Python, release: Release | None, label: str, options: str) -> str:
    if label and release:
        name = release.labelled(label)
        return f"install {name} again from where you have it, with pip's {options}"
    return f"pip{python.flag} install {options} 'vllm=={release.name if release else 'RELEASE'}'"


def anew(python: Python, release: Release, label: str = "", *, other_build: bool = False) -> str:
    """The same, and the patches on top of them."""
    return f"{upstreams(python, release, label)}, then {patch(python, label, other_build)}"


def patch(python: Python, label: str = "", other_build: bool = False) -> str:
    """`vllm-overlay install` for a build of that label."""
    return overlay(python, *(("--other-build",) if other_build or label else ()))


def wheel(release: Release, label: str = "") -> str:
    """What puts the patched wheel in the place of a damaged one that was installed."""
    build = f"vllm-overlay build {'--wheel FILE' if label else release.asked}"
    return f"{build}, and install that wheel with pip's --force-reinstall --no-deps"
