"""Read for which GPUs a release has code: from its wheel, and from that of its torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from overlay.answers import binaries
from overlay.answers.binaries import Binaries, Part, Torch, Wheel
from overlay.base.console import Progress
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.kernels import library, needed
from overlay.kernels.code import Code
from overlay.kernels.fatbin import DamagedError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

#: Where torch has its kernels, in its wheel and where it is installed.
TORCH = "torch/lib/libtorch_cuda.so"


def of_wheel(release: Release, wheel: Path, folder: Path, progress: Progress) -> tuple[Part, ...]:
    """What the official wheel of a release has; its libraries are unpacked on the disk of `folder`.

    Raises:
        OverlayError: it is damaged, or none of the kernels of a need is in it.
    """
    parts: list[Part] = []
    what = f"{release.name} {wheel.name}, unpacked"
    for name, opened in library.each(wheel, needed.LIBRARIES, folder, progress, what):
        with _explained(f"{wheel.name}: {name}"):
            parts += _parts(name, library.kernels_in(opened, needed.names_in(name)))
    _require_all(wheel, parts)
    return tuple(parts)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise library.broken(name, str(error)) from error


def _parts(name: str, found: dict[str, set[Code]]) -> Iterator[Part]:
    """Kernels with the same code together, in the order of `needed`."""
    kernels: dict[Code, list[str]] = defaultdict(list)
    needs = (need for need in (*needed.NEEDS, *needed.QUANTISED) if need.library == name)
    order = dict.fromkeys(kernel for need in needs for kernel in need.kernels)
    for kernel in order:
        for code in sorted(found.get(kernel, ()), key=str):
            kernels[code].append(kernel)
    for code, each in kernels.items():
        yield Part(library=name, kernels=tuple(each), code=code)


def _require_all(wheel: Path, parts: Iterable[Part]) -> None:
    known = {(part.library, kernel) for part in parts for kernel in part.kernels}
    for need in needed.NEEDS:
        if not known & {(need.library, kernel) for kernel in need.kernels}:
            raise library.broken(
                wheel.name, f"{need.library} has none of the kernels for {need.name}"
            )


def of_torch(wheel: Path, folder: Path, progress: Progress) -> Torch:
    """What a torch wheel has; nothing, if it is built without CUDA.

    Raises:
        OverlayError: it is none, or damaged.
    """
    try:
        name, version, _, _ = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise _no_torch(wheel, str(error)) from error
    if name != "torch" or not wheel.is_file():
        raise _no_torch(wheel, "there is no such file" if name == "torch" else f"it is of {name}")
    what = f"{wheel.name}, unpacked"
    code = (
        [
            code
            for _, opened in library.each(wheel, [TORCH], folder, progress, what)
            for code in _code_of_torch(opened, wheel.name)
        ]
        if library.has(wheel, TORCH)
        else [Code()]
    )
    read = Wheel(file=wheel.name, sha256=sha256(wheel))
    return Torch(version=str(version), wheel=read, code=tuple(code))


def of_unpacked_torch(site: Path) -> tuple[Code, ...]:
    """`Torch.code` of the torch that lies below `site`, as in site-packages.

    Raises:
        OverlayError: it is damaged.
    """
    with (site / TORCH).open("rb") as opened:
        return _code_of_torch(opened, str(site / TORCH))


def _code_of_torch(opened: IO[bytes], name: str) -> tuple[Code, ...]:
    with _explained(name):
        found = tuple(sorted(library.in_every_unit(opened), key=str))
    if not found:
        raise library.broken(name, "there is no GPU code in it")
    return found


def _no_torch(wheel: Path, why: str) -> OverlayError:
    return OverlayError(
        f"{wheel} is no wheel of torch", why, "Name one that 'pip download torch==…' fetched",
        Exit.USAGE,
    )  # fmt: skip


def make(workspace: Workspace, release: Release, torch: Path | None) -> Binaries:
    """What the official wheel of a release has, fetched if need be; and what the wheel `torch` has,
    or is kept of the torch that the release pins.

    Raises:
        OverlayError: a wheel is unavailable, damaged or another one, or nothing is kept of torch.
    """
    wheel = workspace.fetcher.fetch(release, "wheel", check=True)
    folder, progress = workspace.fetcher.cache.folder, workspace.progress
    known = of_torch(torch, folder, progress) if torch else _kept_torch(workspace, release)
    if known.version != release.torch:
        raise OverlayError(
            f"{release.name} pins torch {release.torch}", f"the wheel is of {known.version}",
            _HOW.format(release.torch), Exit.USAGE,
        )  # fmt: skip
    return Binaries(
        release=release.name,
        wheel=Wheel(file=release.wheel.file, sha256=release.wheel.sha256),
        parts=of_wheel(release, wheel, folder, progress),
        torch=known,
    )


#: How to come by a wheel of torch.
_HOW = "Pass --torch with the wheel that 'pip download --no-deps torch=={}' fetches"


def _kept_torch(workspace: Workspace, release: Release) -> Torch:
    root = workspace.project.root
    platform = release.platform
    for other in (release, *workspace.versions.patched):
        if other.torch == release.torch and binaries.path_of(root, other.name, platform).is_file():
            return binaries.read(root, other.name, platform).torch
    raise OverlayError(
        f"{release.name}: nothing is kept of torch {release.torch}", "it is in no release's file",
        _HOW.format(release.torch), Exit.USAGE,
    )  # fmt: skip
