"""What is wrong with a file that pydantic checks, in a line."""

from __future__ import annotations

from pydantic import ValidationError


def first_problem(error: Exception) -> str:
    """Why a file can't be read: of pydantic's errors the first one with its place, else the first
    line of what the error says.

    >>> first_problem(ValueError("no JSON\\nat line 1"))
    'no JSON'
    """
    if not isinstance(error, ValidationError):
        return str(error).split("\n")[0]
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    return f"{place}: {first['msg']}"
