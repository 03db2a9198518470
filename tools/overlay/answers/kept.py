"""How the tables of matrix/ are read and written: an item a line, so that a diff shows well."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError, said
from overlay.base.models import first_problem

M = TypeVar("M", bound=BaseModel)


def load(path: Path, way: str) -> object:
    """What is in a JSON file; `way` is how it is made.

    Raises:
        OverlayError: there is none, or it is no JSON.
    """
    try:
        return json.loads(plain_file.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise OverlayError(f"cannot read {path}", said(error), way, Exit.USAGE) from error


def validated(model: type[M], raw: object, fault: str, way: str) -> M:
    """`raw` as a `model`; `fault` is what is wrong if it is none, and `way` how it is made again.

    Raises:
        OverlayError: it is none.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise OverlayError(fault, first_problem(error), way, Exit.USAGE) from error


def dumps(head: Mapping[str, object], tables: Mapping[str, Sequence[BaseModel]]) -> str:
    """The text of a file: each field of `head` and each item of a table is a line."""
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name, items in tables.items():
        lines = [json.dumps(i.model_dump(exclude_defaults=True), ensure_ascii=False) for i in items]
        fields.append(f'"{name}": [\n  ' + ",\n  ".join(lines) + "\n]")
    return "{\n" + ",\n".join(fields) + "\n}\n"
