"""What upstream's own tests run in here: no network, a hub in a folder, a made-up GPU.

Loaded with ``-p upstream.harness`` before vLLM and before upstream's conftest. It changes no test:
it answers what the tests' surroundings are asked. The device has a capability and no kernels, so
a test that computes on the GPU fails, and is listed with that reason.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

from regress import fake_cuda

from . import hub

_OURS = "HF_HOME" not in os.environ
if _OURS:  # else this is a worker: the environment says where the hub is
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vllm-overlay-hub-")
    hub.write(Path(os.environ["HF_HOME"]))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    # Before upstream's conftest, which imports vLLM.
    fake_cuda.install()


def pytest_collection_finish() -> None:
    """Upstream collects garbage after each test: of vLLM's and torch's modules, there is none."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
