"""For which GPUs a release has code, from its binaries: matrix/RELEASE.kernels.json, and for
64-bit Arm matrix/RELEASE.aarch64.kernels.json.

Read from the official wheel, kernel by kernel, and from the wheel of the torch that it pins
(`binaries_run`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from overlay.answers.matrix import FOLDER, write_text
from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.models import first_problem
from overlay.kernels import needed
from overlay.kernels.code import Code
from overlay.kernels.needed import Need
from overlay.releases.platforms import Platform, platform_of
from overlay.releases.versions import Sha256

SCHEMA: Literal[1] = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Wheel(_Model):
    """What was read."""

    file: str
    sha256: Sha256


class Part(_Model):
    """Kernels of one library that have the same code."""

    library: str
    """Its path in the wheel."""
    kernels: tuple[str, ...]
    """As `needed` names them."""
    code: Code


class Torch(_Model):
    """The torch that a release pins, as the package index has it."""

    version: str
    wheel: Wheel
    """That of one Python version."""
    code: tuple[Code, ...]
    """What its units have: what serves these serves all of it. One, unless units differ; one
    without anything is of a torch without CUDA. None: it is not known, and no obstacle."""

    def serves(self, capability: str) -> bool:
        """Whether all of it runs on a GPU of that compute capability."""
        return all(code.serves(capability) for code in self.code)


class Binaries(_Model):
    """The code of a release."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    """Version of this file's layout."""
    release: str
    wheel: Wheel
    parts: tuple[Part, ...]
    torch: Torch

    @property
    def platform(self) -> Platform:
        """What the wheel is for."""
        return platform_of(self.wheel.file)

    def with_any_torch(self) -> Binaries:
        """The same with a torch that is not known."""
        return self.model_copy(update={"torch": self.torch.model_copy(update={"code": ()})})

    def code_of(self, need: Need) -> tuple[Code, ...]:
        """The code of a need's kernels, as far as the release has them."""
        return tuple(
            part.code
            for part in self.parts
            if part.library == need.library and set(part.kernels) & set(need.kernels)
        )

    def serves(self, need: Need, capability: str) -> bool:
        """Whether a GPU of that compute capability can run the kernels of a need, or one of them
        where it is the operator's choice."""
        serving = [code.serves(capability) for code in self.code_of(need)]
        return any(serving) if need.is_choice else all(serving)

    def lacking(self, capability: str, backend: str = "") -> tuple[str, ...]:
        """What has no code for a GPU of that compute capability: names of needs, or torch.

        It is what Llama 4 needs in any case, and what the attention impl `backend` needs
        (`matrix.Outcome.backend`). Empty: the binaries are no obstacle.
        """
        lacking = [] if self.torch.serves(capability) else ["torch"]
        for need in needed.NEEDS:
            is_needed = need.is_needed(backend, capability) and not need.optional
            if is_needed and not self.serves(need, capability):
                lacking.append(need.name)
        return tuple(lacking)


def compare(made: Binaries, kept: Binaries) -> list[str]:
    """What of `made` is not as it is kept: a line each."""
    problems = []
    if made.wheel != kept.wheel:
        problems.append(f"{made.release}: what is kept is of {kept.wheel.file}, another wheel")
    for part in (part for part in made.parts if part not in kept.parts):
        names = ", ".join(part.kernels)
        problems.append(
            f"{made.release}: {part.library} has {part.code} for {names}, which is not what is kept"
        )
    if len(made.parts) < len(kept.parts):
        problems.append(f"{made.release}: more is kept than the wheel has")
    return problems + compare_torch(made.torch.code, kept)


def compare_torch(code: tuple[Code, ...], kept: Binaries) -> list[str]:
    """Whether it is what is kept of torch: a problem, or none."""
    if code == kept.torch.code:
        return []
    found = "; ".join(map(str, code))
    return [f"{kept.release}: torch {kept.torch.version} has {found}, which is not what is kept"]


def path_of(root: Path, release: str, platform: Platform = "x86_64") -> Path:
    """Where it is kept in the project at `root`."""
    infix = "" if platform == "x86_64" else f".{platform}"
    return root / FOLDER / f"{release}{infix}.kernels.json"


def read(root: Path, release: str, platform: Platform = "x86_64") -> Binaries:
    """What is kept of a release.

    Raises:
        OverlayError: there is nothing, or the file is damaged.
    """
    path = path_of(root, release, platform)
    try:
        return Binaries.model_validate_json(plain_file.read(path))
    except (OSError, ValueError) as error:
        raise OverlayError(
            f"{path} can't be read", first_problem(error),
            f"Make it: vllm-overlay kernels {release} --keep", Exit.USAGE,
        ) from error  # fmt: skip


def dumps(binaries: Binaries) -> str:
    """The text of a file: a field or a part a line."""
    dumped = binaries.model_dump(by_alias=True)
    parts = ",\n  ".join(json.dumps(part) for part in dumped.pop("parts"))
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in dumped.items()]
    return "{\n" + ",\n".join(fields) + f',\n"parts": [\n  {parts}\n]\n}}\n'


def write(root: Path, binaries: Binaries) -> Path:
    """Keep it. Returns its file.

    Raises:
        OverlayError: the folder can't be written.
    """
    return write_text(path_of(root, binaries.release, binaries.platform), dumps(binaries))
