"""What torch.compile is told about fused MoE layers: that they write to their input."""

from __future__ import annotations

import pytest
import torch

from .releases import in_order, installed_release, span
from .third_party import import_untuned

RELEASE = installed_release()


@pytest.mark.fail_to_pass(releases=in_order(span("0.8.3", "0.9.1")), raises=r"not declared")
@pytest.mark.skipif(
    RELEASE not in span("0.8.3", "0.10.2"), reason=f"{RELEASE} has no Llama 4, or no V0"
)
def test_declared() -> None:
    """Else Inductor may run Llama 4's shared expert after the routed ones, on what they left."""
    import_untuned("vllm.model_executor.layers.fused_moe.layer")
    hidden_states = torch.ops.vllm.moe_forward.default._schema.arguments[0]
    alias = hidden_states.alias_info
    assert alias is not None and alias.is_write, "the mutation is not declared"  # noqa: PT018
