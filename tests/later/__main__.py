"""`python -m later FILE SOURCES…`: write which attention backend each release's selection gives.

SOURCES are folders of unpacked sdists, each called by its release. Run it in an environment with a
recent torch and Triton: vLLM is taken from the folder. What is built or newer there is stood in
for: vLLM's extensions, packages and names that are missing, FlashInfer, and FlashAttention, which
counts as there for the capabilities that its own Python code admits. Only selection is run, no
kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"

import torch
from packaging.version import Version

from regress import fake_cuda, third_party
from run_progress import say

CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2")
#: The empty name lets vLLM choose.
BACKENDS = ("", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
HEAD_SIZE, QUERY_HEADS = 128, 40
"""Of Llama 4 Scout."""
#: From here on a release refuses an older one.
TRANSFORMERS_5 = Version("0.24.0")
REFUSED = "refused: "
EXTENSIONS = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch")
MISSING = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")


class _Module(ModuleType):
    """A module that has every name: a mock, but for the count of GPUs that NVML is asked for."""

    __path__ = ()  # type: ignore[assignment]
    nvmlDeviceGetCount = staticmethod(lambda: 1)  # noqa: N815

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def fa_version_supported(version: int, *_: Any) -> bool:
    """Answer as `flash_attn_interface.py` does: 2 from 8.0 on, 3 on 9.x, 4 on 9.x to 11.x."""
    major = fake_cuda.Device.capability[0]
    return major >= 8 if version == 2 else major == 9 if version == 3 else major in (9, 10, 11)


def set_up(has_fa4: bool) -> None:
    """Install the fake GPU and stand in for what is built."""
    fake_cuda.install()
    for name in EXTENSIONS:
        sys.modules.setdefault(f"vllm.{name}", ModuleType(f"vllm.{name}"))
    package, interface = "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"
    for name in (package, interface):
        module = sys.modules[name] = _Module(name)
        vars(module)["is_fa_version_supported"] = lambda version, *_: (
            fa_version_supported(version) and (version != 4 or has_fa4)
        )
    setattr(torch.cuda, "get_device_capability", lambda *_: fake_cuda.Device.capability)  # noqa: B010


def pretend_transformers(release: Version) -> None:
    """Have a Transformers that the release does not refuse; no config of a model is read here."""
    known = metadata.version
    if release >= TRANSFORMERS_5:
        setattr(metadata, "version", lambda n: "5.0.0" if n == "transformers" else known(n))  # noqa: B010


def imported(name: str) -> Any:
    """Import a module; packages that are not there, and names that newer ones have, are mocks."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.startswith("vllm.") and "third_party" not in missing:
                raise
            sys.modules[missing] = _Module(missing)
        except ImportError as error:
            found = MISSING.match(str(error))
            if not found or found[2].startswith("vllm"):
                raise
            setattr(importlib.import_module(found[2]), found[1], MagicMock(name=found[1]))


def first(*names: str) -> Any:
    """Import the first of some modules that the release has."""
    imported("vllm")
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name):
                return imported(name)
    raise LookupError(f"none of {names}")


def load() -> tuple[Any, Any]:
    """Return the enumeration of backends and the selector, whichever place they are in."""
    registry = first("vllm.v1.attention.backends.registry", "vllm.attention.backends.registry")
    selector = first("vllm.v1.attention.selector", "vllm.attention.selector")
    for name in BACKENDS[1:]:
        imported(registry.AttentionBackendEnum[name].get_path().rpartition(".")[0])
    return registry.AttentionBackendEnum, selector


def select(backends: Any, selector: Any, backend: str, kv_cache_dtype: str) -> str:
    """Return the name of the backend that an attention layer of Llama 4 gets, or the refusal."""
    platform = importlib.import_module("vllm.platforms").current_platform
    dtype = torch.bfloat16 if fake_cuda.Device.capability >= (8, 0) else torch.float16
    known = {
        "head_size": HEAD_SIZE, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype,
        "block_size": None, "use_mla": False, "has_sink": False, "use_sparse": False,
        "use_v1": True, "attn_type": "decoder",
        "selected_backend": backends[backend] if backend else None,
    }  # fmt: skip
    wanted = inspect.signature(platform.get_attn_backend_cls).parameters
    if "attn_selector_config" in wanted:
        config = selector.AttentionSelectorConfig
        known["attn_selector_config"] = config(
            **{name: known[name] for name in config._fields if name in known}
        )
        known["num_heads"] = QUERY_HEADS
    try:
        path = platform.get_attn_backend_cls(**{n: known[n] for n in wanted if n in known})
    except ValueError as error:
        reasons = str(error).partition("Reason")[2].partition(":")[2].strip(" .")
        return REFUSED + (reasons.strip("[]").replace("'", "") or str(error))
    return next((name for name in BACKENDS[1:] if backends[name].get_path() == path), path)


def forget() -> None:
    """Empty what modules of vLLM have cached of another capability."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def table(backends: Any, selector: Any) -> Iterator[tuple[str, Any]]:
    """Yield, by capability, what each setting gets."""
    for capability in CAPABILITIES:
        fake_cuda.Device.capability = capability
        forget()
        yield (
            ".".join(map(str, capability)),
            {
                kv_cache_dtype: {
                    backend or "default": select(backends, selector, backend, kv_cache_dtype)
                    for backend in BACKENDS
                }
                for kv_cache_dtype in KV_CACHE_DTYPES
            },
        )


def one(folder: Path) -> dict[str, Any]:
    """Run a release's selection in this process."""
    sys.path.insert(0, str(folder))
    set_up((folder / "vllm/vllm_flash_attn").is_dir())
    pretend_transformers(Version(folder.name))
    with third_party.stubbed(("flashinfer",)):
        backends, selector = load()
        return dict(table(backends, selector))


def kept(selected: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a release: the default, and of what is refused the reason."""
    return {
        capability: {
            kv_cache_dtype: {
                name: found.removeprefix(REFUSED)
                for name, found in cell.items()
                if name == "default" or found.startswith(REFUSED)
            }
            for kv_cache_dtype, cell in cells.items()
        }
        for capability, cells in selected.items()
    }


def document(found: dict[str, dict[str, Any]]) -> str:
    """Return the file: releases that select alike together, a capability a line."""
    groups: dict[str, list[str]] = {}
    for release, selected in found.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(cells)}" for name, cells in selected.items()]
        groups.setdefault(",\n".join(lines), []).append(release)
    texts = [
        f'  {{"releases": {json.dumps(releases)}, "selected": {{\n{lines}\n  }}}}'
        for lines, releases in groups.items()
    ]
    today = date.today().isoformat()
    return f'{{\n"executed": "{today}",\n"groups": [\n' + ",\n".join(texts) + "\n]\n}\n"


def run(folder: Path, cache: Path) -> dict[str, Any]:
    """Run a release's selection in a process of its own, if `cache` does not have it."""
    if not cache.is_file():
        command = [sys.executable, "-m", "later", "--here", str(folder), str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise SystemExit(f"{folder.name}: {last}")
    found: dict[str, Any] = json.loads(cache.read_text("utf-8"))
    return found


def main() -> None:
    """Write what was selected; of each release that was run, the result stays in --cache."""
    parser = argparse.ArgumentParser(prog="later", description=__doc__)
    parser.add_argument("file", type=Path, help="matrix/later.json")
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path, help="a folder; by default a temporary one")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        options.sources[0].write_text(json.dumps(one(options.file.resolve())), "utf-8")
        return
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        for folder in sorted(options.sources, key=lambda path: Version(path.name)):
            found[folder.name] = kept(run(folder.resolve(), cache / f"{folder.name}.json"))
            say(f"{folder.name} selected")
    options.file.write_text(document(found), "utf-8")


if __name__ == "__main__":
    main()
