"""The patched source distribution, and wheels built from it through PEP 517.

For what repacking cannot do: patches to compiled sources, other CUDA versions, CPU builds.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from overlay.base import atomic
from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases import archive
from overlay.releases.uv import UvCache, choose_python, find_uv
from overlay.releases.versions import Release
from overlay.wheels import stated_version
from overlay.wheels.build import Built, require_locked_tree, unwritable

Target = Literal["empty", "cpu", "cuda"]
#: 1980-01-01 00:00 UTC, as in our wheels.
_TIME = 315532800
#: Files that state the version in an sdist.
_PKG_INFO = ("PKG-INFO", "vllm.egg-info/PKG-INFO")


def build_sdist(workspace: Workspace, release: Release, folder: Path) -> Built:
    """Write the patched sdist of `release` into `folder`, atomically.

    The tar inside depends on the patched tree alone; the gzip around it on zlib as well.

    Raises:
        OverlayError: the series does not apply or is not as locked, or `folder` can't be
            written.
    """
    result = require_locked_tree(workspace, release)
    version = workspace.versions.local_version(release)
    name = f"{workspace.versions.upstream.project}-{version}"
    target = folder / f"{name}.tar.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            atomic.writing(target) as out,
            gzip.GzipFile("", "wb", 9, out, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path, executable, data in _files(workspace, release, result.head, version):
                tar.addfile(_info(f"{name}/{path}", executable, data), io.BytesIO(data))
    except OSError as error:
        raise unwritable(release, target, error) from error
    log_for(release.name).info("patched source in %s", target)
    return Built.of(target)


def _files(
    workspace: Workspace, release: Release, head: str, version: str
) -> Iterator[tuple[str, bool, bytes]]:
    for path, executable, data in workspace.store.files(head):
        if path == stated_version.VERSION_MODULE:
            data = stated_version.set_in_module(data.decode(), release.name, version)
        elif path in _PKG_INFO:
            data = stated_version.set_in_metadata(data.decode(), release.name, version)
        yield path, executable, data


def _info(name: str, executable: bool, data: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), _TIME, 0o755 if executable else 0o644
    return info


def build_from_source(
    workspace: Workspace, release: Release, target: Target, folder: Path
) -> Built:
    """Build a wheel from the patched sdist by PEP 517.

    `target` is upstream's VLLM_TARGET_DEVICE; cpu and cuda need the compilers that upstream
    documents, and `empty` has the Python files alone.

    Raises:
        OverlayError: as `build_sdist`, or the build fails; its output has been shown.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as scratch:
        sdist = build_sdist(workspace, release, Path(scratch)).path
        # Unpacked, since upstream's setup.py adds the target to the version (…+llama4.1.empty)
        # and uv holds a wheel built from an archive to the archive's version.
        tree = Path(scratch, sdist.name.removesuffix(".tar.gz"))
        archive.unpack(sdist, Path(scratch))
        out = Path(scratch, "wheel")
        version = workspace.versions.local_version(release)
        environment = {
            **UvCache.open(workspace.fetcher.cache.folder, release).env,
            "VLLM_TARGET_DEVICE": target,
            "SETUPTOOLS_SCM_PRETEND_VERSION": version,
        }
        log_for(release.name).info("building %s from source for %s", version, target)
        command = [
            find_uv(), "build", "--wheel", "--python", choose_python(workspace.versions.python),
            "--out-dir", str(out), str(tree),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, check=False)
        wheels = list(out.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise OverlayError(
                f"{release.name}: the source build for {target} failed",
                f"uv build exited {done.returncode}; its output is above",
                "Install the compilers that upstream's installation page names for this "
                "target, or build without --source",
                Exit.ENVIRONMENT,
            )
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / wheels[0].name
        atomic.put(final, wheels[0].read_bytes())
    return Built.of(final)
