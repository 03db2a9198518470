"""A made-up upstream with as much of Llama 4 as one probe looks at: the registry of models."""

from __future__ import annotations

from pathlib import Path

import pytest

import made_upstream
from made_upstream import Upstream, change, copied, double, make_releases

REGISTRY = "vllm/model_executor/models/registry.py"
LLAMA4 = "vllm/model_executor/models/llama4.py"
MODELS = '_TEXT_GENERATION_MODELS = {\n    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),\n}\n'
FIXED = MODELS.replace("}", '    "Llama4ForCausalLM": ("llama4", "Llama4ForCausalLM"),\n}')
TOPIC = "llama4-text-only"
TEXT_ONLY = f"{TOPIC}/1.0.patch"


def files(registry: str = MODELS) -> dict[str, str]:
    """What a release has more than `made_upstream`'s."""
    return {LLAMA4: "", REGISTRY: registry}


def register(tree: Path) -> None:
    """The change of the topic."""
    change(tree / REGISTRY, MODELS, FIXED)
    (tree / "tests/test_registry.py").write_text("def test_registry():\n    pass\n")


def do_nothing(tree: Path) -> None:
    """A change that the topic's probe does not see."""
    double(tree)


def make(folder: Path, patch: object = register) -> None:
    """The releases 1.0 and 1.1 with the topic."""
    plain = made_upstream.package
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(made_upstream, "package", lambda name: {**plain(name), **files()})
        upstream = make_releases(folder)
        assert callable(patch)
        upstream.patch(TEXT_ONLY, patch, series=("1.0", "1.1"))
    upstream.lock()


@pytest.fixture(scope="session")
def llama4_templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With a patch that does what its topic is about, and with one that does not."""
    made = {}
    for name, patch in (("good", register), ("bad", do_nothing)):
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name], patch)
    return made


@pytest.fixture
def upstream(llama4_templates: dict[str, Path], tmp_path: Path) -> Upstream:
    """With the good patch."""
    return copied(llama4_templates["good"], tmp_path)


@pytest.fixture
def bad_upstream(llama4_templates: dict[str, Path], tmp_path: Path) -> Upstream:
    """With the bad one."""
    return copied(llama4_templates["bad"], tmp_path)
