"""The probes themselves: each topic has one, and no stand-in decides anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlay.base.project import find_project
from overlay.probes.inside.__main__ import PROBES, verdict
from overlay.probes.inside.standin import Tensor, Torch
from overlay.probes.inside.tree import Loose, Soft, Tree, UnknownError

REAL = find_project(Path(__file__).parents[3]).patches


def test_each_topic_has_a_probe() -> None:
    """A new topic needs one: see CONTRIBUTING.md."""
    topics = {path.name for path in REAL.iterdir() if path.is_dir() and path.name != "series"}
    assert set(PROBES) == topics


def test_each_probe_says_what_it_asserts() -> None:
    assert [name for name, probe in PROBES.items() if not probe.__doc__] == []


def tree(folder: Path, **modules: str) -> Tree:
    """A tree with these modules of vllm, by name with double underscores for dots."""
    for name, text in modules.items():
        file = folder / "vllm" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Tree(folder, Torch())


def test_only_what_is_named_is_executed(tmp_path: Path) -> None:
    text = "1 / 0\ndef half():\n    return WHOLE / 2\nWHOLE = 4\nBROKEN = 1 / 0\n"
    assert tree(tmp_path, a=text).unit("vllm.a").take("half")() == 2


def test_a_circle_of_names(tmp_path: Path) -> None:
    """A base comes before its class, what a function calls may come after it."""
    text = (
        "class One:\n    def other(self):\n        return Two()\n"
        "class Two(One):\n    limit: 'One' = 3\n"
    )
    assert tree(tmp_path, a=text).unit("vllm.a").take("One")().other().limit == 3


def test_what_is_changed_after_it_was_made(tmp_path: Path) -> None:
    text = "A = {}\nA['one'] = 1\nA |= {'two': 2}\nA.update(three=len(A))\n"
    text += "class B:\n    pass\nB.c = 4\n"
    unit = tree(tmp_path, a=text).unit("vllm.a")
    assert unit.take("A") == {"one": 1, "two": 2, "three": 2}
    assert unit.take("B").c == 4


def test_what_is_imported(tmp_path: Path) -> None:
    """Of the tree only where a probe says so; of others never, but for the standard library."""
    made = tree(
        tmp_path, b="VALUE = 1\n", a="import json\nimport xformers\nfrom vllm.b import VALUE\n"
    )
    unit = made.unit("vllm.a")
    assert unit.take("json").dumps([1]) == "[1]"
    assert isinstance(unit.take("xformers"), Soft)
    assert isinstance(unit.take("VALUE"), Soft)
    assert made.with_("vllm.b").unit("vllm.a").take("VALUE") == 1
    assert made.with_(vllm__b__VALUE=2).unit("vllm.a").take("VALUE") == 2


@pytest.mark.parametrize(
    "text",
    ["if has_it():\n    A = 1\n", "A = [x for x in has_it]\n", "A = has_it > 2\n",
     "A = isinstance(1, has_it)\n", "A = 1 in has_it\n", "A = int(has_it)\n"],
)  # fmt: skip
def test_a_stand_in_decides_nothing(tmp_path: Path, text: str) -> None:
    unit = tree(tmp_path, a=f"from vllm.b import has_it\n{text}").unit("vllm.a")
    with pytest.raises(UnknownError, match=r"vllm\.b\.has_it"):
        unit.take("A")


def test_a_stand_in_can_be_passed_around(tmp_path: Path) -> None:
    text = (
        "from other import base, decorate, Kind, Option\n"
        "@decorate\n@decorate(3)\nclass A(base[Kind]):\n    kind: Option | None = Kind.ONE\n"
    )
    made = tree(tmp_path, a=text).unit("vllm.a").take("A")
    assert made(1, two=2).kind is made.kind


@pytest.mark.parametrize(
    ("module", "told"),
    [("", "there is no vllm.model_executor.models.registry"),
     ("_TEXT_GENERATION_MODELS = 1 / 0\n", "ZeroDivisionError in registry.py:1"),
     ("(\n", "does not compile")],
)  # fmt: skip
def test_what_goes_wrong_is_no_verdict(tmp_path: Path, module: str, told: str) -> None:
    modules = {"model_executor__models__registry": module} if module else {}
    word, why = verdict("llama4-text-only", tree(tmp_path, **modules))
    assert word == "unknown"
    assert told in why
    assert verdict("no-such-topic", Tree(tmp_path, Torch()))[0] == "unknown"


def test_the_stand_in_for_torch_knows_what_it_lacks() -> None:
    torch = Torch()
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    assert (tensor + 1).tolist() == [[2, 3], [4, 5]]
    with pytest.raises(UnknownError, match=r"no Tensor\.svd"):
        tensor.svd()
    with pytest.raises(UnknownError):
        bool(torch.linalg.norm(tensor) > 1)
    with pytest.raises(UnknownError, match="stand-in"):
        tensor + Soft("vllm.x")


def test_duplicate_columns_of_a_scatter() -> None:
    """As torch has it: the last one stays, with amin the least."""
    index, source = Tensor([[1, 1, 0]]), Tensor([[5, 7, 6]])
    assert Tensor([[0, 0]]).scatter_(-1, index, source).tolist() == [[6, 7]]
    least = Tensor([[9, 9]]).scatter_reduce_(-1, index, source, "amin", include_self=False)
    assert least.tolist() == [[6, 5]]


@pytest.mark.parametrize(
    ("metadata", "version"),
    [("Requires-Dist: torch==2.9.0\n", (2, 9)), ("Requires-Dist: torchaudio==2.9.0\n", ())],
)
def test_which_torch_a_tree_is_pinned_to(
    tmp_path: Path, metadata: str, version: tuple[int, ...]
) -> None:
    (tmp_path / "PKG-INFO").write_text(f"Metadata-Version: 2.1\n{metadata}")
    assert Tree(tmp_path, Torch()).torch_version == version


def test_a_loose_object_is_false_but_for_what_it_is_given() -> None:
    loose = Loose(given=3)
    assert loose.given == 3
    assert not loose.anything.else_(1)
    assert list(loose) == []
