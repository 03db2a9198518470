"""What kernels cannot do under these settings, which nothing on a CPU can tell: data, with where it
is written. What they cannot do in any case is `matrix.limits`.
"""

from __future__ import annotations

from matrix.limits import XFORMERS, Limit

LIMITS = (
    Limit(
        XFORMERS,
        "Unsupported block size",
        "csrc/attention/paged_attention_v1.cu, CALL_V1_LAUNCHER_BLOCK_SIZE",
        takes_blocks_of=frozenset({8, 16, 32}),
    ),
)
