"""The probes, run: in an environment on its vLLM, or on the bare source tree of a release.

They run in a process of their own, which has no more than the standard library (`inside`), numpy
and, in an environment, its torch. A bare tree is probed by this Python, without the variables of
its own environment: code of a release that nobody has looked at is executed there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from overlay.base import atomic, plain_file
from overlay.base.console import counted
from overlay.patches.workspace import Workspace

#: Seconds for all probes; importing torch from a cold disk takes 20 of them.
TIMEOUT = 120.0
_FOLDER = Path(__file__).parent
_SCRIPT = (
    "import sys; sys.path = [{folder!r}] + [p for p in sys.path if p]; "
    "from inside.__main__ import main; main()"
)
#: Without it, there is nothing that a topic could be about.
LLAMA4 = "vllm/model_executor/models/llama4.py"


class Verdict(Enum):
    """What a probe says of a vLLM."""

    RIGHT = "right"
    """It behaves as the topic's patch makes it."""
    WRONG = "wrong"
    """It does what the patch is there to change."""
    ABSENT = "absent"
    """There is nothing that the patch could change."""
    UNKNOWN = "unknown"
    """It cannot be told."""


class Probed(BaseModel):
    """What the probe of a topic says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    topic: str
    verdict: Verdict
    why: str
    """Empty if it is right."""
    seconds: float = 0.0

    @property
    def is_needed(self) -> bool | None:
        """Of a stock release: whether the topic is still needed; None if it cannot be told."""
        return None if self.verdict is Verdict.UNKNOWN else self.verdict is Verdict.WRONG

    def of_stock(self, release: str) -> str:
        """The same for a stock release, in words."""
        if self.verdict is Verdict.RIGHT:
            return f"no longer needed: it passes its test on stock {release}"
        words = {Verdict.ABSENT: "no longer needed", Verdict.WRONG: "needed"}
        return f"{words.get(self.verdict, 'unknown')}: {self.why}"

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"verdict": self.verdict.value, "why": self.why or None, "needed": self.is_needed}


@dataclass(frozen=True)
class Probing:
    """What the probes say."""

    probed: tuple[Probed, ...] = ()
    torch: str = ""
    """The version of the environment's torch; empty if it has none."""
    import_seconds: float = 0.0
    """What importing it took."""
    problem: str = ""
    """Why some or all did not run."""

    def of(self, verdict: Verdict) -> tuple[Probed, ...]:
        """Those that say so."""
        return tuple(one for one in self.probed if one.verdict is verdict)

    def find(self, topic: str) -> Probed | None:
        """What is said of a topic."""
        return next((one for one in self.probed if one.topic == topic), None)

    @property
    def failed(self) -> tuple[Probed, ...]:
        """Of a patched vLLM: those that do not behave as patched."""
        return (*self.of(Verdict.WRONG), *self.of(Verdict.ABSENT))

    @property
    def seconds(self) -> float:
        """What the probes took beside the import of torch."""
        return round(sum(one.seconds for one in self.probed), 3)

    def __str__(self) -> str:
        """How many topics of a patched vLLM behave as patched."""
        right, unknown = len(self.of(Verdict.RIGHT)), len(self.of(Verdict.UNKNOWN))
        told = f"{right} of {counted(len(self.probed), 'topic')} behave as patched"
        return told + (f", {unknown} cannot be told" if unknown else "")

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "topics": {
                one.topic: {
                    "verdict": one.verdict.value, "why": one.why or None, "seconds": one.seconds
                }
                for one in self.probed
            },
            "torch": self.torch or None,
            "import_seconds": self.import_seconds,
            "seconds": self.seconds,
            "problem": self.problem or None,
        }  # fmt: skip


def in_environment(executable: str, site: Path, topics: Sequence[str]) -> Probing:
    """Probe the vLLM below `site`, the site-packages of the Python `executable`."""
    if not (site / LLAMA4).is_file():
        return none_of(topics, f"there is no {LLAMA4}")
    return _run([executable], site, topics, dict(os.environ), site)


def on_tree(workspace: Workspace, commit: str, topics: Sequence[str]) -> Probing:
    """Probe a source tree of the store; what is known of the same tree is taken from the cache."""
    store = workspace.store
    listed = store.listing(commit)
    if LLAMA4 not in listed:
        return none_of(topics, f"there is no {LLAMA4}")
    kept = _kept_file(workspace, store.tree_of(commit), topics)
    if (known := _read(kept)) is not None:
        return known
    paths = [path for path in listed if path.startswith("vllm/") and path.endswith(".py")]
    paths += [path for path in ("PKG-INFO",) if path in listed]
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as name:
        folder = Path(name)
        for path, data in store.show_many(commit, paths).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data or b"")
        keep = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
        found = _run([sys.executable, "-I"], folder, topics, keep, None)
    if not found.problem and not found.of(Verdict.UNKNOWN):
        said = json.dumps([one.model_dump(mode="json") for one in found.probed])
        with suppress(OSError):  # a cache that cannot be written is none
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic.put(kept, said.encode())
    return found


def none_of(topics: Sequence[str], why: str) -> Probing:
    """Nothing that can be told."""
    unknown = (Probed(topic=topic, verdict=Verdict.UNKNOWN, why=why) for topic in topics)
    return Probing(tuple(unknown), problem=why)


def _run(
    command: Sequence[str],
    root: Path,
    topics: Sequence[str],
    environ: Mapping[str, str],
    imported: Path | None,
) -> Probing:
    """Run the probes in a Python; `imported` is where it has to import vLLM from."""
    script = _SCRIPT.format(folder=str(_FOLDER))
    asked = json.dumps({"root": str(root), "topics": list(topics)})
    try:
        done = subprocess.run(
            [*command, "-c", script], input=asked, env=environ, cwd=tempfile.gettempdir(),
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
    except OSError as error:
        return none_of(topics, f"{command[0]} does not start: {error.strerror}")
    except subprocess.TimeoutExpired:
        return none_of(topics, f"the probes gave no answer in {TIMEOUT:g} s")
    first, *lines = [json.loads(line) for line in done.stdout.splitlines()] or [None]
    if first is None:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return none_of(topics, words[-1] if words else f"{command[0]} exited {done.returncode}")
    if imported and (place := first["imported"]) and Path(place).resolve() != imported.resolve():
        return none_of(topics, f"this Python imports vLLM from {place}, not from {imported}")
    probed = tuple(Probed.model_validate(line) for line in lines)
    missing = topics[len(probed) :]
    problem = f"the probe of {missing[0]} ended its process" if missing else ""
    probed += tuple(Probed(topic=t, verdict=Verdict.UNKNOWN, why=problem) for t in missing)
    return Probing(probed, first["torch"], first["import_seconds"], problem)


def _kept_file(workspace: Workspace, tree: str, topics: Sequence[str]) -> Path:
    """Where the answers for a tree are kept: they hold for these probes and topics."""
    sources = sorted((_FOLDER / "inside").glob("*.py"))
    parts = [*(file.read_text("utf-8") for file in sources), *topics]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return workspace.fetcher.cache.folder / "probes" / f"{tree}-{digest[:16]}.json"


def _read(file: Path) -> Probing | None:
    """What is kept; None if nothing is that can be read: it is probed again then."""
    try:
        return Probing(tuple(map(Probed.model_validate, json.loads(plain_file.read(file)))))
    except (OSError, ValueError, TypeError, ValidationError):
        return None
