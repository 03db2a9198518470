"""What becomes of a cell."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

RIGHT = "right"
WRONG = "wrong"
SELECTED = "selected"
"""Of a model whose attention is not computed here."""
TYPE_ERROR = "type-error"
CRASH = "crash"
EXPLAINED = "explained"
"""Refused before weights load, with a remedy."""
UNEXPLAINED = "unexplained"
WORKER_REFUSED = "worker-refused"
"""V1 let it in, and a worker refused it then, without a remedy."""

REFUSALS = (ValueError, NotImplementedError, RuntimeError, ImportError)
"""What vLLM raises on purpose; anything else is a crash."""

REMEDY = re.compile(r"\b(use|set|unset|remove|reduce|lower|install|pass|choose|try)\b", re.I)
"""A message that tells what to do has one of these verbs. `VLLM_USE_V1` is none of them."""

OURS = "This model attends within chunks"
WORKS = re.compile(r"What works instead: [^.]")
"""How the overlay's own refusal begins, and what has to be in it."""

SETTINGS = "{settings}"
LENGTH = "{max_model_len}"
BACKEND = "{backend}"
"""Stand for what the cell is, in a message."""

_NOISE = (
    (re.compile(r"0x[0-9a-f]{6,}"), "0x…"),
    (re.compile(r"(?<![\w:/.])/\S*/(?=[\w.-]+)"), ""),
    (re.compile(r"\s+"), " "),
    # What only says again which cell it is, so that cells refused for one reason have one outcome.
    (re.compile(r"(?<=With )--kv-cache-dtype .*(?=, no engine and attention backend)"), SETTINGS),
    (re.compile(r"(?<=can do that up to --max-model-len )\d+"), LENGTH),
)
LONGEST = 2000


@dataclass(frozen=True)
class Outcome:
    """What becomes of a cell."""

    verdict: str
    engine: str = ""
    """v0 or v1, as far as it got."""
    backend: str = ""
    """Module and class of the impl that was constructed."""
    stage: str = ""
    """Of a failure: config, worker, layers or kernel."""
    message: str = ""
    basis: str = ""
    """Of right and wrong: `measured`, or what it is known from."""


def text_of(error: BaseException) -> str:
    """Return an error's message in a line that is the same on every machine."""
    text = str(error)
    for pattern, replacement in _NOISE:
        text = pattern.sub(replacement, text)
    return text.strip()[:LONGEST]


def without_backend(outcome: Outcome, backend: str) -> Outcome:
    """Return an outcome whose reasons name the backend that was asked for by a placeholder."""
    if not outcome.message.startswith(OURS):
        return outcome
    return replace(outcome, message=outcome.message.replace(f" {backend}: ", f" {BACKEND}: "))


def place_of(error: BaseException) -> str:
    """Return the function and the line of an error that says nothing."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, {frame.name}: {frame.line}"


def names_way_out(message: str) -> bool:
    """Return whether a refusal says what to do."""
    return bool((WORKS if message.startswith(OURS) else REMEDY).search(message))


def of_error(error: BaseException, stage: str, engine: str = "") -> Outcome:
    """Judge an exception by its type, its stage and whether it names a way out."""
    message = text_of(error)
    if isinstance(error, TypeError):
        return Outcome(TYPE_ERROR, engine, stage=stage, message=message)
    if not isinstance(error, REFUSALS):
        message = f"{type(error).__name__}: {message or place_of(error)}"
        return Outcome(CRASH, engine, stage=stage, message=message)
    verdict = WORKER_REFUSED if engine == "v1" and stage != "config" else UNEXPLAINED
    if names_way_out(message):
        verdict = EXPLAINED
    return Outcome(verdict, engine, stage=stage, message=message)
