"""Which paths may be read from a patch, an archive or VERSIONS.toml."""

from __future__ import annotations

#: The longest path, in characters, and the longest name in it, in bytes, that Linux takes.
_MAX_PATH, _MAX_NAME = 1024, 255


def is_safe_path(path: str) -> bool:
    """Whether `path` is relative, normal and stays below its root.

    >>> [is_safe_path(p) for p in ("vllm/a.py", "/etc/passwd", "a/../../b", ".git/hooks/x")]
    [True, False, False, False]
    """
    if "\\" in path or not path.isprintable() or len(path) > _MAX_PATH:  # a NUL is not printable
        return False
    parts = path.split("/")
    return all(
        part not in ("", ".", "..") and part.lower() != ".git" and len(part.encode()) <= _MAX_NAME
        for part in parts
    )
