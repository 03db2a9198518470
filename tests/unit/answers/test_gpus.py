"""GPUs by name."""

from __future__ import annotations

import pytest

from overlay.answers.gpus import GPUS, Gpu, find, version
from overlay.base.errors import Exit, OverlayError


def test_order_and_names() -> None:
    keys = [(version(gpu.capability), gpu.name) for gpu in GPUS]
    assert keys == sorted(set(keys))
    names = [name for gpu in GPUS for name in (gpu.name, *gpu.aliases)]
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_spelling_finds_it(gpu: Gpu) -> None:
    for name in (gpu.name, *gpu.aliases):
        for spelt in (name, name.lower(), name.replace(" ", "-"), name.replace(" ", "")):
            assert find(spelt) == gpu
        assert find(f"NVIDIA {name}") == gpu


@pytest.mark.parametrize(
    ("driver", "name", "capability"),
    [
        ("Tesla T4", "T4", "7.5"),
        ("GRID T4-16Q", "T4", "7.5"),
        ("Tesla V100-SXM2-16GB", "V100", "7.0"),
        ("Tesla V100S-PCIE-32GB", "V100", "7.0"),
        ("Quadro RTX 8000", "Quadro RTX 8000", "7.5"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080", "7.5"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "RTX 2080", "7.5"),
        ("NVIDIA A100-SXM4-80GB", "A100", "8.0"),
        ("NVIDIA A100 80GB PCIe", "A100", "8.0"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100", "8.0"),
        ("NVIDIA A10", "A10", "8.6"),
        ("NVIDIA A10G", "A10G", "8.6"),
        ("NVIDIA RTX A6000", "RTX A6000", "8.6"),
        ("NVIDIA L40S", "L40S", "8.9"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "8.9"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", "8.9"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070", "8.9"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090", "8.9"),
        ("NVIDIA H100 80GB HBM3", "H100", "9.0"),
        ("NVIDIA H100 NVL", "H100", "9.0"),
        ("NVIDIA GH200 480GB", "GH200", "9.0"),
        ("NVIDIA B200", "B200", "10.0"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell", "12.0"),
        ("NVIDIA GB10", "GB10", "12.1"),
        ("Orin (nvgpu)", "Jetson Orin", "8.7"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "Jetson Orin", "8.7"),
        ("NVIDIA Thor", "Jetson Thor", "11.0"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell", "12.0"),
        ("NVIDIA H20-3e", "H20", "9.0"),
        ("NVIDIA A100-PG509-200", "A100", "8.0"),
        ("NVIDIA GB200", "GB200", "10.0"),
        ("rtx4070ti", "RTX 4070", "8.9"),
        ("h100-pcie", "H100", "9.0"),
    ],
)
def test_driver_names(driver: str, name: str, capability: str) -> None:
    found = find(driver)
    assert (found.name, found.capability) == (name, capability)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RTX 6000", ("Quadro RTX 6000 (7.5)", "RTX 6000 Ada (8.9)", "RTX PRO 6000")),
        ("A101", ("A100 (8.0)",)),
        ("A100 banana", ("A100 (8.0)",)),
        ("", ("no name in the table is near it",)),
        ("--", ("no name",)),
    ],
)
def test_unknown_names(name: str, said: tuple[str, ...]) -> None:
    with pytest.raises(OverlayError, match="--capability") as raised:
        find(name)
    assert raised.value.status is Exit.USAGE
    for words in said:
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AMD Instinct MI300X", "ROCm"),
        ("MI250", "ROCm"),
        ("Radeon RX 7900 XTX", "ROCm"),
        ("Intel Arc A770", "Intel"),
        ("Gaudi2", "Intel"),
        ("TPU v5e", "XLA"),
        ("Trainium2", "Neuron"),
        ("CPU", "CPUs"),
        ("Apple M3", "CPUs"),
    ],
)
def test_what_is_no_nvidia_gpu(name: str, said: str) -> None:
    with pytest.raises(OverlayError, match="is not covered") as raised:
        find(name)
    assert said in str(raised.value)
    assert raised.value.status is Exit.USAGE
