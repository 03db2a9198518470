"""Compute attention as `matrix.measure` does, with what 0.10.0's model runner makes of one group.

Without the hybrid KV-cache manager, chunked and global layers have one KV cache. Which of them get
the metadata of chunks is then the runner's to say; it is asked with layers and a cache of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import measure as whole
from matrix import probe, v1
from matrix.cells import Cell
from matrix.outcome import Outcome
from matrix.probe import Key
from regress import v1_runner
from regress.seen import CHUNK, MAX_LEN, Request


def measure(folder: Path, key: Key, cell: Cell) -> Outcome:
    """Run the layers of the cell's model and judge what they answer."""
    if not key.one_group:
        return whole.measure(folder, key, cell)
    makes_chunks = runner_makes_chunks(folder, key, cell)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v1.LayerEngine, "is_local", lambda _, layer: layer.use_irope and makes_chunks)
        return whole.measure(folder, key, cell)


def runner_makes_chunks(folder: Path, key: Key, cell: Cell) -> bool:
    """Return whether the model runner gives chunked layers other metadata than global ones."""
    with probe.environment(cell), pytest.MonkeyPatch.context() as patch:
        config = probe.engine_config(folder, "llama4", cell)
        config.compilation_config.static_forward_context.clear()
        # The config has drawn its conclusions; who proposes tokens is not loaded here.
        config.speculative_config = None
        max_len = MAX_LEN if key.length == "past" else CHUNK
        engine = v1_runner.new_engine(config, "triton", patch, max_len)
        metadata, _ = engine.prepare([Request(0, max_len)])
    of_kinds = {
        chunked: {id(metadata[name]) for name, layer in engine.layers.items()
                  if layer.use_irope is chunked}
        for chunked in (False, True)
    }  # fmt: skip
    return not of_kinds[False] & of_kinds[True]
