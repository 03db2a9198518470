"""The ids that git gives to files and folders: git itself does not compare them when it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def blob_id(data: bytes) -> str:
    """The id of a file of these bytes.

    >>> blob_id(b"")
    'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return _id("blob", data).hex()


def tree_id(files: Iterable[tuple[str, bool, str]]) -> str:
    """The id of a folder of files: path, whether it is executable, and blob id of each.

    >>> tree_id([])
    '4b825dc642cb6eb9a060e54bf8d69288fbee4904'
    """
    return _tree([(path.split("/"), is_executable, blob) for path, is_executable, blob in files])


def _tree(files: Iterable[tuple[list[str], bool, str]]) -> str:
    entries: dict[str, tuple[str, str]] = {}
    folders: dict[str, list[tuple[list[str], bool, str]]] = {}
    for (name, *rest), is_executable, blob in files:
        if rest:
            folders.setdefault(name, []).append((rest, is_executable, blob))
        else:
            entries[name] = "100755" if is_executable else "100644", blob
    # A folder stands where its name with a slash would.
    entries |= {f"{name}/": ("40000", _tree(inside)) for name, inside in folders.items()}
    named = {name.encode("utf-8", "surrogateescape"): entry for name, entry in entries.items()}
    data = b"".join(
        b"%s %s\0%s" % (mode.encode(), name.rstrip(b"/"), bytes.fromhex(id_))
        for name, (mode, id_) in sorted(named.items())
    )
    return _id("tree", data).hex()


def _id(kind: str, data: bytes) -> bytes:
    header = f"{kind} {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).digest()
