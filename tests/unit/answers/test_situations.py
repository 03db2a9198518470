"""What users ask, of the real matrix: each as somebody reported it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overlay.cli.main import main

ROOT = Path(__file__).parents[3]

MAVERICK = "maverick-fp8"
MAVERICK_CONFIG = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama4_text", "num_local_experts": 128, "attention_chunk_size": 8192,
        "max_position_embeddings": 1048576,
    },
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": "float", "num_bits": 8, "strategy": "channel",
                            "symmetric": True, "dynamic": False},
                "input_activations": {"type": "float", "num_bits": 8, "strategy": "token",
                                      "symmetric": True, "dynamic": True},
            }
        },
        "ignore": ["language_model.model.layers.0.self_attn.q_proj"],
    },
}  # fmt: skip
"""Of Meta's FP8 Maverick, as far as it decides."""


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
             "patched and right on this GPU: 0.10.2, 0.11.0 wheel"),
        ),
        (
            ("--gpu", "T4", "--release", "0.9.0.1"),
            ("overlay cannot run, V0 XFormers: Triton 3.3.0 does not compile fused_moe_kernel",
             "to change: --dtype float32",
             "patched and right on this GPU: 0.8.3, 0.8.4, 0.8.5, 0.8.5.post1, 0.10.2, "
             "0.11.0 wheel"),
        ),
        (
            ("--gpu", "V100"),
            ("Patched and right here: 0.10.2 – 0.11.0; 0.8.3 – 0.10.1.1 with --dtype float32, at "
             "twice the memory.",),
        ),
        (
            ("--gpu", "Orin (nvgpu)", "--release", "0.10.2"),
            ("no wheel for a Jetson", "Nothing was run on one"),
        ),
        (
            ("--gpu", "NVIDIA GH200 480GB", "--release", "0.10.2"),
            ("its processor is 64-bit Arm", "overlay right, V1 FlashAttention",
             "vllm-overlay build 0.10.2 --platform aarch64", "a torch without CUDA"),
        ),
        (("--gpu", "AMD Instinct MI300X"), ("is not covered", "it runs ROCm")),
        (
            ("--gpu", "H100", "--release", "0.10.0"),
            ("other fault: with KV transfer, KV events, EAGLE", "V1 attends globally"),
        ),
        (
            ("--gpu", "H100", "--release", "0.10.0", "--kv-connector"),
            ("stock wrong, V1 FlashAttention: wrong attention in chunked layers",
             "overlay right, V1 FlashAttention"),
        ),
        (
            ("--gpu", "A100", "--release", "0.8.5.post1", "--speculative", "ngram"),
            ("stock wrong, V0 FlashAttention", "overlay right, V0 FlashAttention"),
        ),
        (
            ("--gpu", "A100", "--release", "0.10.2", "--enable-lora"),
            ("overlay refused by a worker", "does not support LoRA yet",
             "to change: unset --enable-lora; then it is right, V1 FlashAttention",
             "no release that this overlay patches is known to run it here with these flags"),
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
            ("--gpu", "A100", "--release", "0.8.5.post1", "--checkpoint", "awq"),
            ("overlay cannot run, V1 FlashAttention: stops in the first step, "
             "awq_marlin.AWQMoEMethod: Apply router weight on input is not supported",
             "to change: --quantization moe_wna16; then it is right, V1 FlashAttention",
             "patched and right on this GPU: 0.9.0, 0.9.0.1, 0.9.1, 0.9.2, 0.10.0, 0.10.1, "
             "0.10.1.1, 0.10.2, 0.11.0 patched"),
        ),
        (
            ("--gpu", "A100", "--release", "0.9.2", "--checkpoint", "w4a16",
             "--kv-cache-dtype", "fp8_e5m2"),
            ("overlay cannot run, V0 XFormers: stops while its layers are made: fp8_e5m2 kv-cache "
             "is not supported with fp8 checkpoints",
             "to change: --kv-cache-dtype fp8; then it is right, V0 XFormers"),
        ),
        (
            ("--gpu", "A100", "--release", "0.9.2", "--checkpoint", "w4a16",
             "--kv-cache-dtype", "fp8"),
            ("overlay right, V0 XFormers",
             "besides: chunked prefill and prefix caching cannot run"),
        ),
        (
            ("--gpu", "A100", "--release", "0.8.5", "--checkpoint", MAVERICK),
            ("max_model_len 1048576, past the chunk of 8192",
             "weights compressed-tensors fp8, a scale an output and a token (128 experts)",
             "overlay cannot run, V1 FlashAttention: Triton 3.2.0 does not compile "
             "fused_moe_kernel: ValueError: type fp8e4nv not supported",
             "no settings are right on this GPU",
             "patched and right on this GPU: 0.9.2, 0.10.0, 0.10.1, 0.10.1.1, 0.10.2, "
             "0.11.0 wheel"),
        ),
        (
            ("--gpu", "T4", "--checkpoint", "awq"),
            ("Patched and right here: 0.10.2 – 0.11.0; 0.8.3 – 0.8.5.post1 with --quantization "
             "moe_wna16.",),
        ),
        (
            ("--gpu", "GB300"),
            ("No release that this overlay patches runs Llama 4 on this GPU past a chunk.",),
        ),
    ],
    ids=["5090", "t4", "v100", "orin", "gh200", "mi300x", "other-faults", "kv-connector", "ngram",
         "lora", "text-only", "flex",
         "t4-v0", "awq", "w4a16-e5m2", "w4a16-fp8", "maverick-fp8", "t4-awq", "gb300"],
)  # fmt: skip
def test_it_is_answered(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: tuple[str, ...],
    tmp_path: Path,
) -> None:
    folder = tmp_path / MAVERICK
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MAVERICK_CONFIG), "utf-8")
    monkeypatch.chdir(tmp_path)
    found = explained(monkeypatch, capsys, *arguments)
    for words in said:
        assert words in found
