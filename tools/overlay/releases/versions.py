"""VERSIONS.toml: which releases there are, and what is pinned of each.

Everything outside the tool reads VERSIONS.toml through this module. Nothing here
touches the network.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.specifiers import Specifier as Bound
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError, said
from overlay.base.paths import is_safe_path
from overlay.releases.platforms import Platform, platform_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = 1

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
GitId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
#: A plain name: it ends up in the names of files and of git's tags.
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
FileName = Annotated[str, StringConstraints(pattern=FILE_NAME)]


def _specifier(value: str) -> str:
    try:
        SpecifierSet(value)
    except InvalidSpecifier as error:
        raise ValueError(f"{value!r} is not a version specifier") from error
    return value


def _path(value: str) -> str:
    if not is_safe_path(value):
        raise ValueError(f"{value!r} is no plain relative path")
    return value


RelativePath = Annotated[str, AfterValidator(_path)]
Specifier = Annotated[str, AfterValidator(_specifier)]
Status = Literal["affected", "control", "eol"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PinnedFile(_Model):
    """A file on the package index, pinned whichever mirror serves it."""

    file: FileName
    """Its name on the index."""
    sha256: Sha256
    """Lower-case hexadecimal digest of its bytes."""
    size: Annotated[int, Field(gt=0)]
    """Bytes."""


class Plugin(_Model):
    """A package of upstream's tests that vLLM finds by its entry points, and what tests it.

    It may stand in for the platform, so its tests have a run of their own.
    """

    package: RelativePath
    """Its folder under upstream's tests/."""
    names: tuple[str, ...]
    """Its entry points: the value of VLLM_PLUGINS."""
    tests: tuple[RelativePath, ...]
    """Files under upstream's tests/."""

    @property
    def label(self) -> str:
        """What a run with it is called."""
        return self.package.rpartition("/")[2]


class Upstream(_Model):
    """The project that the patches are against."""

    project: Name
    """Its name on the package index."""
    repository: str
    """Its public repository, for links in reports and pull requests."""
    tests: tuple[RelativePath, ...] = ()
    """Files and folders under its tests/ that can say something without a GPU and without a model
    hub. A release runs those it has."""
    packages: tuple[RelativePath, ...] = ()
    """Folders under its tests/ of the packages that these tests import."""
    plugins: tuple[Plugin, ...] = ()
    """Those whose tests can say something here."""
    range: Specifier
    """Versions that the overlay means to patch; `watch` reports the new ones among them."""


class Overlay(_Model):
    """What marks a build of ours."""

    label: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*$")]
    """Local version label: `llama4` in 0.8.5.post1+llama4.1."""


class Build(_Model):
    """An official wheel, and what is locked of it and of the patched one that is made of it."""

    wheel: PinnedFile
    """The official wheel, which is repacked."""
    record: Sha256 | None = None
    """Digest of the official wheel's RECORD, by which an install is known (`record.pins`)."""
    record_python: Sha256 | None = None
    """The same of its Python files alone: what every CUDA build of the release has in common."""
    record_source: Sha256 | None = None
    """The same without those of the compiled FlashAttention: what builds for any device have in
    common."""
    patched_sha256: Sha256 | None = None
    """Of the patched wheel, which is the same bytes wherever it is built."""
    patched_size: Annotated[int, Field(ge=1)] | None = None
    """Bytes of the patched wheel."""

    @field_validator("wheel")
    @classmethod
    def _is_wheel(cls, pinned: PinnedFile) -> PinnedFile:
        try:
            parse_wheel_filename(pinned.file)
        except InvalidWheelFilename as error:
            raise ValueError(str(error)) from error
        return pinned

    @property
    def platform(self) -> Platform:
        """What the wheel is for, by its name."""
        return platform_of(self.wheel.file)


class Release(Build):
    """One upstream release; as a build, that for x86_64, or for what `on` was asked."""

    name: str
    """The public version, e.g. 0.8.5.post1 (the key in VERSIONS.toml)."""
    tag: Name
    """Upstream's git tag."""
    status: Status
    """affected: patched here; control: needs no patch and proves that checks can tell;
    eol: no longer maintained, kept for reference."""
    sdist: PinnedFile
    """The source distribution that patches apply to."""
    aarch64: Build | None = None
    """The official wheel for 64-bit Arm, if there is one; None too in what `on` gives for that."""
    requires_python: Specifier
    """Python versions upstream declares."""
    torch: str
    """The torch version the release pins."""
    xformers: str
    """The xformers version the release pins."""
    constraints: tuple[str, ...] = ()
    """What a working environment needs beside the release's own metadata: packages it imports
    without asking for them (setuptools, on Python up to 3.11), bounds it leaves open and later
    uploads broke (transformers)."""
    overrides: tuple[str, ...] = ()
    """Requirements that replace the metadata's own, where the index lost what it pins."""
    upstream_tree: GitId
    """Git tree id of the unpacked sdist."""
    series: RelativePath | None = None
    """Path of the quilt series under patches/; affected releases only."""
    tree: GitId | None = None
    """Git tree id after the whole series."""
    files: Sha256 | None = None
    """Digest of what the series makes of the package's files (`wheel.Changes.digest`)."""
    revision: Annotated[int, Field(ge=1)] | None = None
    """The <n> of +llama4.<n>; grows with every published change of the series."""

    @field_validator("name")
    @classmethod
    def _is_version(cls, value: str) -> str:
        try:
            normal = str(Version(value))
        except InvalidVersion as error:
            raise ValueError(f"{value!r} is not a version") from error
        if value != normal or Version(value).local:
            raise ValueError(f"{value!r} is not how a public version is written")
        return value

    @model_validator(mode="after")
    def _files_are_of_their_kind(self) -> Release:
        if not self.sdist.file.endswith(".tar.gz"):
            raise ValueError(f"{self.sdist.file!r} is no sdist")
        if self.aarch64 and self.aarch64.platform != "aarch64":
            raise ValueError(f"{self.aarch64.wheel.file!r} is no wheel for aarch64")
        return self

    @model_validator(mode="after")
    def _overlay_fields_go_together(self) -> Release:
        fields = {"series": self.series, "tree": self.tree, "revision": self.revision}
        if self.status == "control":
            given = [name for name, value in fields.items() if value is not None]
            if given:
                raise ValueError(f"a control release takes no {', '.join(given)}")
        elif missing := [name for name, value in fields.items() if value is None]:
            raise ValueError(f"an {self.status} release needs {', '.join(missing)}")
        return self

    @property
    def version(self) -> Version:
        """The name, comparable."""
        return Version(self.name)

    @property
    def is_patched(self) -> bool:
        """Whether the overlay has a series for it."""
        return self.series is not None

    @property
    def builds(self) -> tuple[Release, ...]:
        """The release on each platform that it has an official wheel for."""
        return (self, self.on("aarch64")) if self.aarch64 else (self,)

    def on(self, platform: Platform) -> Release:
        """The same release, as a build for `platform`.

        Raises:
            OverlayError: upstream has no wheel for it.
        """
        if platform == self.platform:
            return self
        if platform != "aarch64" or self.aarch64 is None:
            raise OverlayError(
                f"{self.name} has no official wheel for {platform}",
                "VERSIONS.toml pins none",
                f"Build from source there: vllm-overlay build {self.name} --source --target cuda",
                Exit.USAGE,
            )
        locked = {field: getattr(self.aarch64, field) for field in Build.model_fields}
        return self.model_copy(update={**locked, "aarch64": None})

    @property
    def asked(self) -> str:
        """What commands are given to mean this build: 0.10.2, or 0.10.2 --platform aarch64."""
        return self.name + ("" if self.platform == "x86_64" else f" --platform {self.platform}")

    def labelled(self, label: str) -> str:
        """The version of a build with a local label: 0.8.5.post1+cu118; the name without one."""
        return f"{self.name}+{label}" if label else self.name


class Versions(_Model):
    """The whole of VERSIONS.toml."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    """Version of this file's layout."""
    upstream: Upstream
    overlay: Overlay
    python: Specifier
    """Python versions that every release's environments and source builds work on."""
    releases: Mapping[str, Release]
    """By name, in version order."""

    @model_validator(mode="after")
    def _patched_are_in_range(self) -> Versions:
        outside = [r.name for r in self.patched if not self.in_range(r.version)]
        if outside:
            raise ValueError(f"upstream.range leaves out {', '.join(outside)}")
        return self

    def in_range(self, version: Version) -> bool:
        """Whether the overlay means to patch it."""
        return SpecifierSet(self.upstream.range).contains(version)

    def range_with(self, version: Version) -> str:
        """The range, with the bounds that leave `version` out moved as far as it needs.

        An upper one goes to where the next release begins: 0.11.0 is in <0.11.1, as its post
        releases are.

        Raises:
            OverlayError: something in it is no bound, such as !=0.9.1.
        """
        bounds = [Bound(part) for part in self.upstream.range.split(",")]
        return ",".join(
            str(bound) if bound.contains(version, prereleases=True) else _moved(bound, version)
            for bound in bounds
        )

    @cached_property
    def patched(self) -> tuple[Release, ...]:
        """The releases with a series, oldest first."""
        return tuple(r for r in self.releases.values() if r.is_patched)

    def get(self, name: str) -> Release:
        """The release called `name`, as PEP 440 reads it: v0.8.5, 0.8.5post1, or a patched
        wheel's version.

        Raises:
            OverlayError: there is none; the nearest names are suggested.
        """
        return self._named(name, self.releases)

    def _named(self, name: str, offered: Iterable[str]) -> Release:
        """The release called `name`; `offered` are those to suggest in place of none."""
        found = self.releases.get(self._public(name))
        if found is None:
            raise OverlayError(
                f"unknown release {name!r}",
                "VERSIONS.toml does not list it",
                _suggestion(name, offered),
                Exit.USAGE,
            )
        return found

    def _public(self, name: str) -> str:
        """The public version in its usual form, of an official version or one of this overlay's."""
        try:
            version = Version(name)
        except InvalidVersion:
            return name
        is_ours = self.overlay.label in (version.local or "").split(".")
        return version.public if is_ours or not version.local else name

    def get_patched(self, name: str) -> Release:
        """The release called `name`, which must have a series.

        Raises:
            OverlayError: unknown, or a control release, which has nothing to patch.
        """
        release = self._named(name, [each.name for each in self.patched])
        if not release.is_patched:
            older = release.version < self.patched[0].version
            raise OverlayError(
                f"release {release.name} has no patches",
                "it has no Llama 4, and is pinned for comparison only"
                if older
                else "it is pinned for comparison only: the use_irope fault is not in it",
                f"Use upstream's own {release.name}, or name one of "
                + ", ".join(r.name for r in self.patched),
                Exit.USAGE,
            )
        return release

    def local_version(self, release: Release, label: str = "") -> str:
        """The version of the patched wheel, e.g. 0.8.5.post1+llama4.1.

        That of a build with a local label keeps it, in front: 0.8.5.post1+cu118.llama4.1. So it is
        greater than 0.8.5.post1+cu118, as PEP 440 compares local versions part by part; with the
        label behind, +xpu.llama4.1 would become +llama4.1.xpu, which is less than +xpu.
        """
        kept = f"{label}." if label else ""
        return f"{release.name}+{kept}{self.overlay.label}.{release.revision}"

    def select(self, names: Iterable[str], *, patched: bool) -> tuple[Release, ...]:
        """The named releases in version order; all (with a series, if `patched`) when none is."""
        get = self.get_patched if patched else self.get
        wanted = {get(name).name for name in names}
        pool = self.patched if patched else tuple(self.releases.values())
        return tuple(r for r in pool if not wanted or r.name in wanted)


def _moved(bound: Bound, version: Version) -> str:
    if bound.operator in (">", ">="):
        return f">={version}"
    if bound.operator in ("<", "<="):
        *first, last = version.release
        return f"<{'.'.join(map(str, (*first, last + 1)))}"
    raise OverlayError(
        f"release {version} is not to be patched",
        f"upstream.range of VERSIONS.toml has {bound}",
        "Change that range first",
        Exit.USAGE,
    )


def ranges(names: Collection[str], order: Iterable[str]) -> str:
    """`names` for people: those that follow each other in `order` as a range.

    >>> ranges(["0.8.3", "0.8.4", "0.9.0"], ["0.8.3", "0.8.4", "0.8.5", "0.9.0"])
    '0.8.3 – 0.8.4, 0.9.0'
    """
    found = []
    for member, group in groupby(order, lambda name: name in names):
        run = list(group)
        if member:
            found.append(run[0] if len(run) == 1 else f"{run[0]} – {run[-1]}")
    return ", ".join(found)


def _suggestion(name: str, known: Iterable[str]) -> str:
    """What to name instead: the releases of a series (0.10), or those of a similar name."""
    names = list(known)
    start = name.removeprefix("v").rstrip(".")
    near = [each for each in names if start and each.startswith(f"{start}.")]
    if not near:
        similar = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        near = [each for each in names if each in similar]
    if near:
        return f"Did you mean {' or '.join(near)}? Known: {', '.join(names)}"
    return f"Name one of {', '.join(names)}"


def load(path: Path) -> Versions:
    """Read VERSIONS.toml at `path`.

    Raises:
        OverlayError: it can't be read, is no TOML, or has a missing, unknown or wrong key.
    """
    try:
        text = plain_file.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise OverlayError(
            f"cannot read {path}", said(error), "Restore it from git", Exit.USAGE
        ) from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Versions:
    """Parse the text of a VERSIONS.toml; `where` names it in errors.

    Raises:
        OverlayError: no TOML, or a missing, unknown or wrong key.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of 5000 digits
        raise OverlayError(
            f"{where} is not TOML", str(error), "Fix that line", Exit.USAGE
        ) from error
    try:
        return Versions.model_validate(_with_names(raw))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise OverlayError(
            f"{where} is wrong at {place}", f"{first['msg']}{more}", "Fix that key", Exit.USAGE
        ) from error


def _with_names(raw: dict[str, object]) -> dict[str, object]:
    """The parsed TOML with each release told its name, in version order."""
    releases = raw.get("releases")
    if not isinstance(releases, dict):
        return raw
    named = {
        name: {**body, "name": name} if isinstance(body, dict) else body
        for name, body in releases.items()
    }
    return {**raw, "releases": dict(sorted(named.items(), key=_version_order))}


def _version_order(item: tuple[str, object]) -> tuple[bool, Version]:
    try:
        return False, Version(item[0])
    except InvalidVersion:
        return True, Version("0")
