"""What the programs that look at a release write: outcomes, and a table of their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from regress.releases import installed_release


def table(
    dtypes: Sequence[str],
    kv_cache_dtypes: Sequence[str],
    capabilities: Iterable[tuple[int, int]],
    outcomes: Iterable[Any],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the document: what axes a row has, and the outcomes in the order of their numbers."""
    return {
        "release": installed_release(),
        "axes": {
            "dtype": dtypes,
            "kv_cache_dtype": kv_cache_dtypes,
            "capability": [f"{major}.{minor}" for major, minor in capabilities],
        },
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "rows": rows,
    }
