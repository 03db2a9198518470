"""Compute attention with the impls that a cell selects, and compare it with the definition.

The layers are those of the model, under a chunk small enough for CPUs. What has no form for CPUs
is stood in for; where there is no stand-in, the impl's answer is known from `limits` alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from regress import tiny_llama4
from regress.driver import Shape

from . import probe, v0, v1
from .cells import Cell
from .outcome import RIGHT, WRONG, Outcome, of_error

CHUNK = 32


def shape_of(key: probe.Key) -> Shape:
    """Return the shape of a run: a few chunks long, or one chunk."""
    block = key.block_size
    chunk = max(CHUNK, 2 * block)
    return Shape(
        chunk=chunk,
        block=block,
        heads=tiny_llama4.HEADS,
        kv_heads=tiny_llama4.KV_HEADS,
        max_len=chunk if key.length == "at" else 3 * chunk,
        head_size=tiny_llama4.HEAD_SIZE,
    )


def measure(folder: Path, key: probe.Key, cell: Cell) -> Outcome:
    """Run the layers of the cell's model and judge what they answer."""
    engine = v1 if key.engine == "v1" else v0
    if not engine.can_run(key):
        return Outcome(RIGHT, key.engine, key.backend, basis="constructed")
    error = _run(folder, key, cell, engine.LAYERS)
    if error is None:
        return Outcome(RIGHT, key.engine, key.backend, basis="measured")
    if not is_wrong(error):
        if is_ours(error):
            raise error
        return of_error(error, "kernel", key.engine)
    global_layers = [layer for layer in engine.LAYERS if not layer[1]]
    which = "chunked" if _run(folder, key, cell, global_layers) is None else "all"
    message = f"wrong attention in {which} layers"
    return Outcome(WRONG, key.engine, key.backend, message=message, basis="measured")


def _run(
    folder: Path, key: probe.Key, cell: Cell, layers: Sequence[tuple[int, bool]]
) -> Exception | None:
    """Run some layers of the model and return what they fail with, if they do."""
    engine = v1 if key.engine == "v1" else v0
    with probe.environment(cell), pytest.MonkeyPatch.context() as patch:
        config = probe.engine_config(folder, "llama4", cell)
        config.compilation_config.static_forward_context.clear()
        shape = shape_of(key)
        # Of the model, as layers since 0.10.1 read it.
        config.model_config.hf_config.text_config.attention_chunk_size = shape.chunk
        try:
            engine.run(config, key, shape, patch, layers)
        except Exception as error:
            return error
    return None


NO_GPU = re.compile(r"NVIDIA driver|not implemented for '\w+'|not compiled with CUDA")
"""What torch says on a machine without a GPU, and on none with one."""


def is_ours(error: Exception) -> bool:
    """Return whether it is the stand-ins that an error is about: not a result, but a fault here."""
    ours = (TypeError, AttributeError, NameError, ImportError, probe.OtherImplError)
    if isinstance(error, ours):
        return True
    return isinstance(error, RuntimeError) and NO_GPU.search(str(error)) is not None


def is_wrong(error: Exception) -> bool:
    """Return whether layers have answered, but not as the definition has it."""
    return isinstance(error, AssertionError) and str(error).startswith("wrong attention")
