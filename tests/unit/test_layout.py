"""The folders of the tool: a module takes from its own folder and those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import overlay

PACKAGE = Path(overlay.__file__).parent
FOLDERS = [
    "base", "releases", "patches", "wheels", "kernels", "probes", "testing", "staging", "porting",
    "answers", "inplace", "cli",
]  # fmt: skip
"""From the ground up."""


def imports(module: Path) -> Iterator[str]:
    """What a module imports of the tool, in dotted words after `overlay`."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name[8:] for a in node.names if a.name.startswith("overlay."))
        elif isinstance(node, ast.ImportFrom) and node.module == "overlay":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("overlay."):
            yield from (f"{node.module}.{alias.name}"[8:] for alias in node.names)


def test_every_module_has_its_folder() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_down(folder: str) -> None:
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    for module in sorted((PACKAGE / folder).glob("*.py")):
        above = {name for name in imports(module) if name.split(".")[0] not in allowed}
        assert not above, f"{folder}/{module.name} takes from above: {above}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_says_what_it_is(folder: str) -> None:
    """In one docstring: nothing is to be had but from a module."""
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_itself_through_others(folder: str) -> None:
    """No circle inside of a folder."""
    modules = {path.stem: path for path in (PACKAGE / folder).glob("*.py")}
    takes = {
        name: {
            each.split(".")[1]
            for each in imports(path)
            if each.startswith(f"{folder}.") and each.split(".")[1] in modules
        }
        for name, path in modules.items()
    }
    while free := {name for name, others in takes.items() if not others & takes.keys()}:
        takes = {name: others for name, others in takes.items() if name not in free}
    assert not takes, f"a circle among {sorted(takes)}"
