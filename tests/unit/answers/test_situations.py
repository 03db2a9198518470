"""What users ask, of the real matrix: each as somebody reported it."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlay.cli.main import main

ROOT = Path(__file__).parents[3]


def explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What `explain` prints, unwrapped."""
    monkeypatch.setattr("sys.argv", ["vllm-overlay", "--root", str(ROOT), "explain", *arguments])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--gpu", "NVIDIA GeForce RTX 5090", "--release", "0.8.5"),
            ("overlay cannot run", "torch 2.6.0 has no code for capability 12.0",
             "patched and right on this GPU: 0.10.2 wheel"),
        ),
        (
            ("--gpu", "T4", "--release", "0.9.0.1"),
            ("overlay cannot run, V0 XFormers: Triton 3.3.0 does not compile fused_moe_kernel",
             "to change: --dtype float32",
             "patched and right on this GPU: 0.8.3, 0.8.4, 0.8.5, 0.8.5.post1, 0.10.2 wheel"),
        ),
        (
            ("--gpu", "V100"),
            ("Patched and right here: 0.10.2; 0.8.3 – 0.10.1.1 with --dtype float32, at twice the "
             "memory.",),
        ),
        (
            ("--gpu", "Orin (nvgpu)", "--release", "0.10.2"),
            ("no wheel for a Jetson", "Nothing was run on one"),
        ),
        (
            ("--gpu", "NVIDIA GH200 480GB", "--release", "0.10.2"),
            ("its processor is 64-bit Arm", "overlay right, V1 FlashAttention"),
        ),
        (("--gpu", "AMD Instinct MI300X"), ("is not covered", "it runs ROCm")),
        (
            ("--gpu", "H100", "--release", "0.10.0"),
            ("other fault: with KV transfer, KV events, EAGLE", "V1 attends globally"),
        ),
        (
            ("--gpu", "A100", "--release", "0.9.1"),
            ("other fault: a text-only checkpoint (Llama4ForCausalLM) attends globally",),
        ),
        (
            ("--gpu", "H200", "--release", "0.10.1.1", "--backend", "FLEX_ATTENTION", "--dtype",
             "float16"),
            ("overlay right, V1 FlexAttention", "whole engines on an NVIDIA H200, 2026-11-29"),
        ),
        (
            ("--gpu", "T4", "--release", "0.10.2", "--v1", "0"),
            ("besides: chunked prefill and prefix caching cannot run: _fwd_kernel needs 98304",),
        ),
        (
            ("--gpu", "GB300"),
            ("No release that this overlay patches runs Llama 4 on this GPU past a chunk.",),
        ),
    ],
    ids=["5090", "t4", "v100", "orin", "gh200", "mi300x", "kv-connector", "text-only", "flex",
         "t4-v0", "gb300"],
)  # fmt: skip
def test_it_is_answered(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: tuple[str, ...],
) -> None:
    found = explained(monkeypatch, capsys, *arguments)
    for words in said:
        assert words in found
