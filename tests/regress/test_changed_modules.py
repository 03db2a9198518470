"""Each module of the package that a patch changed imports, without a GPU."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from .expected import IMPLS

#: Named by `vllm-overlay validate --each --run`, after each patch those that were changed so far.
MODULES: list[str] = json.loads(os.environ.get("OVERLAY_MODULES", "[]"))
NONE = pytest.param("", id="none", marks=pytest.mark.skip(
    reason="no module is named: validate --each --run names those that a prefix changes"
))  # fmt: skip
#: Packages that only the hardware has which a backend is for.
HARDWARE = tuple(sorted({name for impl in IMPLS for name in impl.stubs}))


@pytest.mark.parametrize("module", MODULES or [NONE])
def test_imports(
    module: str,
    stubs: Callable[[tuple[str, ...]], None],
    start_engine: Callable[..., Any],
) -> None:
    stubs(HARDWARE)
    impl = next((impl for impl in IMPLS if impl.module == module), None)
    # Some backends look at what was chosen while they are imported.
    engine = {"VLLM_USE_V1": "0"} if impl and impl.engine == "v0" else {}
    start_engine({**engine, **(impl.env if impl else {})})
    assert importlib.import_module(module).__name__ == module
