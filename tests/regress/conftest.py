"""Fixtures of the tests that need no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# Before anything imports vllm or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Kernels run on the CPU. Triton decides when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch

import fail_to_pass
from fail_to_pass import pytest_collection_modifyitems as pytest_collection_modifyitems

from . import fake_cuda, third_party, tiny_llama4
from .releases import LLAMA4, installed_release


def pytest_configure(config: pytest.Config) -> None:
    fail_to_pass.add_marker(config)
    try:
        installed_release()
    except (LookupError, metadata.PackageNotFoundError) as error:
        raise pytest.UsageError(str(error)) from error
    fake_cuda.install()


def pytest_report_header() -> list[str]:
    import vllm

    return [
        f"vllm: {vllm.__version__} (release {installed_release()})",
        f"torch: {torch.__version__}",
    ]


@pytest.fixture(autouse=True)
def _clean_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test with nothing forced and nothing remembered of other tests' choices."""
    for name in tiny_llama4.SELECTION_ENV:
        # Set first: only then is what the test, or vLLM, puts there removed afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(fake_cuda.Device, "capability", (8, 0))
    # FlashAttention asks torch, not vLLM's platform.
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda *_, **__: fake_cuda.Device.capability
    )
    # The ROCm backend asks which GPU this is.
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_, **__: fake_cuda.Device.properties
    )
    tiny_llama4.forget_engines()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread: small tensors take far longer when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a local model: a tiny Llama 4, or a tiny Llama where there is no Llama 4 yet."""
    folder = tmp_path_factory.mktemp("model")
    models = "vllm.model_executor.models."
    if installed_release() not in LLAMA4:
        tiny_llama4.register_in_process("LlamaForCausalLM", models + "llama")
        return tiny_llama4.write_config(folder, tiny_llama4.LLAMA3_CONFIG)
    tiny_llama4.register_in_process("Llama4ForConditionalGeneration", models + "mllama4")
    return tiny_llama4.write_config(folder, tiny_llama4.CONFIG)


@pytest.fixture
def stubs() -> Iterator[Callable[[tuple[str, ...]], None]]:
    """Return a function that stubs third-party packages until the end of the test."""
    with ExitStack() as stack:

        def stub(packages: tuple[str, ...]) -> None:
            stack.enter_context(third_party.stubbed(packages))

        yield stub


@pytest.fixture
def start_engine(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that takes environment and arguments and gives an engine's config."""

    def start(env: dict[str, str], **engine_args: Any) -> Any:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return tiny_llama4.engine_config(engine_args.pop("model", model_folder), engine_args)

    return start
