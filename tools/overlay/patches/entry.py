"""A release's entry in the text of VERSIONS.toml, as `port` adds it or has a control patched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, MutableMapping

import tomlkit
from packaging.version import InvalidVersion, Version

from overlay.base.errors import Exit, OverlayError
from overlay.releases import versions
from overlay.releases.versions import PinnedFile, Release

_OF_BUILD = ("record", "record_python", "record_source", "patched_sha256", "patched_size")
_HEADER = re.compile(r'^\[releases\."(?P<name>[^"]+)"\]', re.MULTILINE)


def insert(text: str, release: Release) -> str:
    """The VERSIONS.toml `text` with `release` in it, in version order; the rest stays as it is.

    Raises:
        OverlayError: the file is written in a way that leaves no place for it.
    """
    place = _place(text, release.version)
    before, after = text[:place].rstrip("\n"), text[place:]
    added = "\n\n".join(part for part in (before, render(release).rstrip("\n"), after) if part)
    whole = added.rstrip("\n") + "\n"
    versions.parse(whole, "VERSIONS.toml with it")
    return whole


def promote(text: str, release: Release) -> str:
    """The VERSIONS.toml `text` with the control that it lists as `release`, which is patched.

    Comments and the pins of its files stay as they are.

    Raises:
        OverlayError: the file is written in a way that leaves no place for it.
    """
    table = rf'^\[releases\."{re.escape(release.name)}"\]\n(?:(?!\[).*\n)*'
    found = re.search(table, text, re.MULTILINE)
    if found:
        head = render(release).partition(f'[releases."{release.name}".')[0]
        comments = "".join(re.findall(r"^\s*#.*\n", found[0], re.MULTILINE))
        whole = text[: found.start()] + head + comments + text[found.end() :]
        if versions.parse(whole, "VERSIONS.toml with it").get(release.name) == release:
            return whole
    raise OverlayError(
        f"cannot change the entry of {release.name}",
        "VERSIONS.toml does not have it as a table of its own, as the others are",
        "Write it as the others are",
        Exit.PROBLEMS,
    )


def widen(text: str, wanted: str) -> str:
    """The VERSIONS.toml `text` with `wanted` for `upstream.range`; the rest stays as it is."""
    document = tomlkit.parse(text)
    upstream = document["upstream"]
    assert isinstance(upstream, MutableMapping)
    upstream["range"] = wanted
    return tomlkit.dumps(document)


def _place(text: str, version: Version) -> int:
    """Where the first newer release starts, with the comments above it; else the end."""
    for header in _HEADER.finditer(text):
        try:
            newer = Version(header["name"]) > version
        except InvalidVersion:
            continue
        if newer:
            start = header.start()
            while (above := text.rfind("\n", 0, max(start - 1, 0)) + 1) < start and text[
                above
            ] == "#":
                start = above
            return start
    return len(text)


def render(release: Release) -> str:
    """The entry alone, keys in the file's order."""
    return "".join(f"{line}\n" for line in _lines(release))


def _lines(release: Release) -> Iterator[str]:
    yield f'[releases."{release.name}"]'
    keys = ("tag", "status", "revision", "series", "requires_python", "torch", "xformers",
            "constraints", "overrides", "upstream_tree", "tree",
            "files", *_OF_BUILD)  # fmt: skip
    for key in keys:
        value = getattr(release, key)
        if value not in (None, ()):
            yield f"{key} = {_value(value)}"
    yield from _file(release, "sdist", release.sdist)
    yield from _file(release, "wheel", release.wheel)
    if release.aarch64:
        yield f'[releases."{release.name}".aarch64]'
        for key in _OF_BUILD:
            if (value := getattr(release.aarch64, key)) is not None:
                yield f"{key} = {_value(value)}"
        yield from _file(release, "aarch64.wheel", release.aarch64.wheel)


def _file(release: Release, table: str, file: PinnedFile) -> Iterator[str]:
    yield f'[releases."{release.name}".{table}]'
    for key in ("file", "sha256", "size"):
        yield f"{key} = {_value(getattr(file, key))}"


def _value(value: object) -> str:
    # JSON's strings, numbers and lists of strings are TOML's too.
    return json.dumps(value, ensure_ascii=False)
