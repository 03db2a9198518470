"""Reading fat binaries: made-up ones, and any bytes in their place."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.kernels import fatbin, library
from overlay.kernels.code import Code, code_of
from overlay.kernels.fatbin import DamagedError

from ..made_library import cubin, elf, entry, mangled, unit
from ..made_library import library as made

RMS, ROPE = "rms_norm_kernel", "rotary_embedding_kernel"
BOTH = cubin(mangled(RMS), mangled(ROPE))
WHOLE = made(
    unit(entry("8.0", BOTH), entry("9.0a", BOTH, lz4ed=True), entry("9.0", b"text", kind=1)),
    unit(entry("10.0", cubin(mangled("moe_kernel")))),
)


def kernels_in(data: bytes, *names: str) -> dict[str, set[Code]]:
    return library.kernels_in(io.BytesIO(data), names)


def test_what_is_in_a_library() -> None:
    stream = io.BytesIO(WHOLE)
    first, second = fatbin.units(stream)
    assert [each.architecture for each in first.cubins] == ["8.0", "9.0a"]
    assert (first.ptx, second.ptx) == (["9.0"], [])
    for each in first.cubins:  # compressed and not
        assert fatbin.kernels(stream, each) == {mangled(RMS), mangled(ROPE)}


def test_units_may_be_padded() -> None:
    """As in vLLM's libraries for aarch64, between units and at the end."""
    units = (unit(entry("9.0", BOTH)), bytes(24), unit(entry("10.0", BOTH)), bytes(12))
    found = list(fatbin.units(io.BytesIO(made(*units))))
    assert [one.cubins[0].architecture for one in found] == ["9.0", "10.0"]


def test_only_the_unit_that_has_the_kernel_counts() -> None:
    found = kernels_in(WHOLE, RMS, "moe_kernel", "flash_kernel")
    assert found == {
        RMS: {code_of(["8.0", "9.0a"], ["9.0"])},
        "moe_kernel": {code_of(["10.0"], [])},
    }


def test_only_the_cubins_that_have_the_kernel_count() -> None:
    one = unit(entry("8.0", BOTH), entry("9.0", cubin(mangled(ROPE))))
    assert kernels_in(made(one), RMS) == {RMS: {code_of(["8.0"], [])}}


def test_a_kernel_is_not_one_whose_name_ends_alike() -> None:
    other = cubin(mangled(f"fused_add_{RMS}"), mangled(f"{RMS}_static"))
    assert kernels_in(made(unit(entry("8.0", other))), RMS) == {}


def test_a_kernel_of_several_units_has_the_code_of_each() -> None:
    units = (unit(entry("8.0", BOTH)), unit(entry("9.0", BOTH)), unit(entry("8.0", BOTH)))
    assert kernels_in(made(*units), RMS) == {RMS: {code_of(["8.0"], []), code_of(["9.0"], [])}}


def test_what_is_in_every_unit() -> None:
    """A unit that has more than another one says nothing of its own."""
    code = cubin("kernel")
    more = unit(entry("7.0", code), entry("8.0", code), entry("9.0a", code))
    less, other = unit(entry("7.0", code), entry("8.0", code)), unit(entry("9.0", code))
    assert library.in_every_unit(io.BytesIO(made(more, less))) == {code_of(["7.0", "8.0"], [])}
    assert library.in_every_unit(io.BytesIO(made(less, other))) == {
        code_of(["7.0", "8.0"], []),
        code_of(["9.0"], []),
    }


def test_kinds_that_no_gpu_runs_are_left_out() -> None:
    """Such as NVVM's, for linking with optimisation."""
    (found,) = fatbin.units(io.BytesIO(made(unit(entry("8.0", b"ir", kind=8)))))
    assert found.entries == ()


def test_a_library_without_gpu_code() -> None:
    assert list(fatbin.units(io.BytesIO(elf({".text": b"host code"})))) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no ELF file"),
        (b"MZ" * 100, "no ELF file"),
        (WHOLE[:-1], "ELF|ends at byte"),
        (WHOLE[:1000], "ELF|ends at byte"),
        (made(b"\1" * 64), "no fat binary"),
        (made(unit(entry("8.0", BOTH))[:-8]), "cut short"),
        (made(unit(entry("8.0", BOTH)[:-8])), "cut short"),
        (made(unit(entry("8.0", b"no ELF file"))), "a cubin is no ELF file"),
    ],
)
def test_damage_is_told(data: bytes, why: str) -> None:
    with pytest.raises(DamagedError, match=why):
        kernels_in(data, RMS)


def test_another_compression_is_told() -> None:
    """Zstandard, which newer compilers can be asked for."""
    data = bytearray(entry("8.0", BOTH, lz4ed=True))
    data[40:48] = (0x8011).to_bytes(8, "little")
    with pytest.raises(DamagedError, match="another way than LZ4"):
        kernels_in(made(unit(bytes(data))), RMS)


#: Where a byte matters most: the headers of the file, of its sections and of its fat binaries.
HEADERS = [
    *range(64),
    *range(len(WHOLE) - 5 * 64, len(WHOLE)),
    *(WHOLE.index(b"\x50\xed\x55\xba") + place for place in range(16 + 72 + 64)),
]
PLACES = st.one_of(st.sampled_from(HEADERS), st.integers(0, len(WHOLE) - 1))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8), st.integers(0, len(WHOLE)))
def test_any_damage_is_told_or_harmless(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    for some in (bytes(data), bytes(data[:cut])):
        try:
            kernels_in(some, RMS, ROPE)
            library.in_every_unit(io.BytesIO(some))
        except DamagedError:
            continue
