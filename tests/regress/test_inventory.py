"""The table of impls is complete: no impl of the installed release is missing from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .expected import IMPLS, UNREACHABLE, V0, V1
from .releases import installed_release


def package_folder(package: str) -> Path:
    """Return where the files of a package lie, without importing it."""
    return Path(
        str(metadata.distribution("vllm").locate_file(package.strip(".").replace(".", "/")))
    )


def impl_classes(package: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of each class in `package` that is an attention impl by its name."""
    folder = package_folder(package)
    for path in sorted(folder.rglob("*.py")):
        module = package + ".".join(path.relative_to(folder).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Impl"):
                yield module, node.name


def is_unreachable(module: str) -> bool:
    return any(module == name or module.startswith(name) for name in UNREACHABLE)


def test_every_impl_is_listed() -> None:
    """What is found is either tested, or listed with the reason why Llama 4 never gets it."""
    release = installed_release()
    found = {
        (module, name)
        for package in (V0, V1)
        for module, name in impl_classes(package)
        if not is_unreachable(module)
    }
    assert found == {(impl.module, impl.cls) for impl in IMPLS if release in impl.exists}
