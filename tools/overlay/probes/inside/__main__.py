"""Run probes on the package below a folder; what they say goes to standard output, a line each.

Standard input has a JSON object: `root`, the folder; `topics`, those to probe.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from . import models, v0, v1
from .tree import AbsentError, Probes, Tree, UnknownError, WrongError

PROBES = Probes({**v0.PROBES, **v1.PROBES, **models.PROBES})


def torch_there() -> Any:
    """The environment's torch, or what stands in for it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        from .standin import Torch

        return Torch()


def verdict(topic: str, tree: Tree) -> tuple[str, str]:
    """What a topic's probe says, and why."""
    probe = PROBES.get(topic)
    if probe is None:
        return "unknown", "the topic has no probe"
    try:
        probe(tree)
    except WrongError as error:
        return "wrong", str(error)
    except AbsentError as error:
        return "absent", str(error)
    except UnknownError as error:
        return "unknown", str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return "unknown", f"{type(error).__name__} in {where}: {error}"
    return "right", ""


def imported() -> str | None:
    """The folder that a program of this Python has vLLM from; it is not imported for that."""
    try:
        found = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        return None
    return str(Path(found.origin).parents[1]) if found and found.origin else None


def main() -> None:
    """Read what is asked for, and answer."""
    asked = json.load(sys.stdin)
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code of the tree prints is no answer
    start = time.perf_counter()
    torch = torch_there()
    version = torch.__version__ if isinstance(torch, ModuleType) else ""
    took = round(time.perf_counter() - start, 3)
    said = {"torch": str(version), "import_seconds": took, "imported": imported()}
    print(json.dumps(said), file=answers, flush=True)
    for topic in asked["topics"]:
        start = time.perf_counter()
        word, why = verdict(topic, Tree(Path(asked["root"]), torch))
        took = round(time.perf_counter() - start, 3)
        line = {"topic": topic, "verdict": word, "why": " ".join(why.split()), "seconds": took}
        print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
