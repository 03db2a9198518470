"""The version, where a wheel states it: vllm/_version.py and METADATA."""

from __future__ import annotations

import re

from overlay.base.errors import Exit, OverlayError

VERSION_MODULE = "vllm/_version.py"


def set_in_module(text: str, release: str, new: str) -> bytes:
    """vllm/_version.py with `new` in place of the version of `release`, as setuptools-scm writes a
    local version.

    A build may state its own local version, or not: upstream's setup.py adds the CUDA version to
    METADATA alone.

    >>> text = "__version__ = version = '1.0'\\n__version_tuple__ = version_tuple = (1, 0)\\n"
    >>> print(set_in_module(text, "1.0", "1.0+a.1").decode(), end="")
    __version__ = version = '1.0+a.1'
    __version_tuple__ = version_tuple = (1, 0, 'a.1')
    >>> text = text.replace("1.0'", "1.0+cpu'").replace("0)", "0, 'cpu')")
    >>> print(set_in_module(text, "1.0", "1.0+cpu.a.1").decode(), end="")
    __version__ = version = '1.0+cpu.a.1'
    __version_tuple__ = version_tuple = (1, 0, 'cpu.a.1')

    Raises:
        OverlayError: the text does not state a version of `release` just so.
    """
    local = new.removeprefix(f"{release}+")
    stated = re.compile(rf"(?m)^(__version__ = version = )'{re.escape(release)}(?:\+([^'\n]+))?'$")
    found = stated.search(text)
    own = re.escape(f", '{found[2]}'") if found and found[2] else ""
    text, strings = stated.subn(rf"\g<1>'{new}'", text)
    text, tuples = re.subn(
        rf"(?m)^(__version_tuple__ = version_tuple = \([^)\n]+?)(?:{own})?\)$",
        rf"\g<1>, '{local}')",
        text,
    )
    if (strings, tuples) != (1, 1):
        raise OverlayError(
            f"cannot set the version in {VERSION_MODULE}",
            f"it does not state {release!r} the way setuptools-scm does",
            "Report it: this release needs its own rule",
            Exit.PATCH,
        )
    return text.encode()


def set_in_metadata(text: str, old: str, new: str) -> bytes:
    """METADATA (or PKG-INFO) with `new` in place of `old` in its header.

    >>> set_in_metadata("Name: x\\nVersion: 1\\n\\nVersion: 1\\n", "1", "1+a.1")
    b'Name: x\\nVersion: 1+a.1\\n\\nVersion: 1\\n'

    Raises:
        OverlayError: the header does not state `old`.
    """
    head, blank, body = text.partition("\n\n")
    head, count = re.subn(rf"(?m)^Version: {re.escape(old)}$", f"Version: {new}", head)
    if count != 1:
        raise OverlayError(
            "cannot set the version in METADATA",
            f"it does not state Version: {old} once",
            "Report it: this release needs its own rule",
            Exit.PATCH,
        )
    return (head + blank + body).encode()
