"""The report: matrices of the made-up releases, on one page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import tomlkit
from markupsafe import escape

from made_upstream import Ran, Upstream
from overlay.answers import basis, evidence, grid, matrix, report
from overlay.answers.basis import BASES
from overlay.answers.grid import LOOKS, NOT_RUN, Grid
from overlay.answers.matrix import Matrix, Variant
from overlay.base import document
from overlay.base.errors import OverlayError

from ..made_gpu_run import gpu_case

AXES = {
    "dtype": ["auto", "float16"],
    "kv_cache_dtype": ["auto", "fp8"],
    "capability": ["7.5", "10.0"],
}
HOSTILE = "</script><img src=x onerror=alert(1)> & 'quotes' \u2028"
OUTCOMES = [
    {"verdict": "right", "engine": "v1", "backend": "v1.flash_attn", "basis": "measured"},
    {"verdict": "type-error", "engine": "v0", "message": f"got 'use_irope' {HOSTILE}"},
    *(
        {"verdict": verdict, "message": f"Why: it is {verdict}."}
        for verdict in get_args(matrix.Verdict)
        if verdict not in ("right", "type-error", "selected")
    ),
    {"verdict": "explained", "message": "FLASH_ATTN on 7.5: no. Why: 7.5 is below 8.0"},
    {"verdict": "explained", "message": "FLASH_ATTN on 10.0: no. Why: 10.0 is below 8.0"},
]
LAST = (len(OUTCOMES) - 2, len(OUTCOMES) - 1)
NUMBERS = {"stock": [1, 2, 3, 4, 5, 6, 7, 8], "patched": [0] * 8}


def made(release: str, variant: Variant, **changes: Any) -> Matrix:
    # A cell of each outcome on stock; all right when patched.
    numbers = [n % len(OUTCOMES) for n in NUMBERS[variant]]
    base = {"v1": "unset", "flashinfer": False, "llama4": numbers, "control": [0] * 8}
    rows = [
        {**base, "backend": "unset", "length": "past"},
        {**base, "backend": "unset", "length": "past", "flashinfer": True},
        {**base, "backend": "FLASH_ATTN", "length": "past", "llama4": [*LAST, *numbers[2:]]},
    ]
    run = {"release": release, "axes": AXES, "outcomes": OUTCOMES, "rows": rows, **changes}
    return matrix.from_run(run, variant)


@pytest.fixture
def checkout(upstream: Upstream) -> Path:
    """The made-up overlay with its matrices and documents."""
    for release in ("1.0", "1.1"):
        for variant in get_args(Variant):
            matrix.write(upstream.root, made(release, variant))
    (upstream.root / "docs").mkdir()
    for _, name, title in report.DOCUMENTS:
        (upstream.root / "docs" / name).write_text(f"# Of {title}\n\n| a | b |\n|---|---|\n")
    return upstream.root


@pytest.fixture
def page(checkout: Path, upstream: Upstream) -> str:
    return report.render(upstream.workspace())


def data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    read: dict[str, Any] = json.loads(found[1])
    return read


def outcomes(page: str) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Every cell of the page's data: release, row, place, and stock and patched as read back."""
    read = data(page)
    axes = [read["axes"][name] for name in ("dtype", "kv_cache_dtype", "capability")]
    places = [(d, k, c) for d in axes[0] for k in axes[1] for c in axes[2]]
    for release in read["releases"]:
        for name, both in release["rows"].items():
            for place, *numbers in zip(places, *map(matrix.expand, both), strict=True):
                told = [
                    said(read, read["outcomes"][n], name.split("|")[0], place[2]) for n in numbers
                ]
                yield release["name"], name, "|".join(place), told


def said(read: dict[str, Any], outcome: list[int], row: str, gpu: str) -> dict[str, Any]:
    """An outcome with its message put together, as the script does."""
    kind, *phrases = outcome
    message = " ".join(read["phrases"][number] for number in phrases)
    for place, value in (("backend", row), ("capability", gpu)):
        message = message.replace(read["places"][place], value)
    return {**read["kinds"][kind], **({"message": message} if message else {})}


def shown(outcome: matrix.Outcome) -> dict[str, Any]:
    """What the page has of an outcome that no GPU ran."""
    told = outcome.model_dump(exclude_defaults=True, exclude={"basis"})
    on, known = basis.name_of(outcome), basis.details(outcome, (), "")
    return {**told, "on": on, **({"known": known} if known else {})}


def test_every_cell_survives(page: str) -> None:
    found = {(release, row, place): told for release, row, place, told in outcomes(page)}
    expected = {}
    for release in ("1.0", "1.1"):
        both = [made(release, variant).llama4 for variant in get_args(Variant)]
        for cell in both[0]:
            flashinfer = "yes" if cell.flashinfer else "no"
            row = f"{cell.backend}|{cell.v1}|{cell.length}|{flashinfer}"
            place = f"{cell.dtype}|{cell.kv_cache_dtype}|{cell.capability}"
            expected[release, row, place] = [shown(one[cell]) for one in both]
    assert found == expected


def test_what_gpus_ran_is_in_their_cells(checkout: Path, upstream: Upstream) -> None:
    """And in no other: not of another dtype, of another variant or with other sources."""
    release = upstream.workspace().versions.get("1.0")
    case = gpu_case()
    flash = {"engine": "V1", "backend": "vllm.v1.attention.backends.flash_attn"}
    case = replace(case, about={**case.about, **flash, "capability": "10.0"})
    runs = evidence.runs_of([case], "patched", release, date(2026, 11, 28))
    evidence.write(checkout, evidence.Evidence(release="1.0").merged(runs))
    cells = list(outcomes(report.render(upstream.workspace())))
    assert not [one for *_, (stock, _) in cells if (one := stock)["on"] == "gpu"]
    found = [(name, place, told[1]) for name, _, place, told in cells if told[1]["on"] == "gpu"]
    assert {(name, place) for name, place, _ in found} == {("1.0", "float16|auto|10.0")}
    known = "Whole engines on an NVIDIA Made-up, 2026-11-28: 1 of 1 right."
    assert {one["known"] for *_, one in found} == {known}


def test_messages_share_what_they_can(page: str) -> None:
    """FLASH_ATTN on 7.5 and on 10.0: one outcome."""
    read = data(page)
    phrases = ("{backend} on {capability}:", "no.", "Why:", "{capability} is below 8.0")
    numbers = [read["phrases"].index(one.format(**read["places"])) for one in phrases]
    assert sum(outcome[1:] == numbers for outcome in read["outcomes"]) == 1


def test_everything_appears(page: str) -> None:
    for release in ("0.9", "1.0", "1.1"):
        assert f">{release}<" in page
    for verdict, look in LOOKS.items():
        shown = f"<b>{verdict}</b> {look.meaning}" in page
        # The one is of another model, and the other of releases that differ.
        assert shown is (verdict not in ("selected", NOT_RUN))
    assert "1.0+llama4.1" in page
    assert 'id="topic-attention-signatures"' in page
    assert '<td colspan="2" class="has"><span>1.0</span></td>' in page
    assert "<td>1.0 – 1.1</td>" in page
    assert "patches last updated 2" in page
    assert "<h2>Of Benchmarks</h2>" in page
    assert "T4, " in page
    for name, one in BASES.items():
        # What nothing rests on is not explained.
        rests = name in ("cpu stand-ins", "start-up")
        assert (f"<b>{name}</b> {escape(one.meaning)}" in page) is rests


def test_every_verdict_has_a_look() -> None:
    """But what is said of settings only, which the report has none of."""
    assert set(LOOKS) == {*get_args(matrix.Verdict), NOT_RUN} - {"unasked"}


def test_grid_without_a_script(page: str) -> None:
    """What the server's side of the grid shows is what the data has for the defaults."""
    for release, row, place, told in outcomes(page):
        dtype, kv, capability = place.split("|")
        if row == "unset|unset|past|no" and dtype == "auto":
            said = (f"{one['verdict']} ({one['on']})" for one in told)
            verdicts = "stock {}, patched {}".format(*said)
            label = f"{release}, capability {capability}, KV cache {kv}: {verdicts}"
            assert page.count(f'aria-label="{label}"') == 1


def test_messages_are_escaped(page: str) -> None:
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert any(HOSTILE in told[0]["message"] for *_, told in outcomes(page) if "message" in told[0])


def test_problems_are_told_and_escaped(checkout: Path, upstream: Upstream) -> None:
    assert "No patched cell fails" in report.render(upstream.workspace())
    worse = made("1.0", "patched").model_copy(update={"rows": made("1.0", "stock").rows})
    matrix.write(checkout, worse)
    page = report.render(upstream.workspace())
    assert "No patched cell fails" not in page
    assert "1.0: type-error: got &#39;use_irope&#39; &lt;/script&gt;" in page


def test_counts(page: str) -> None:
    stock = matrix.counts(made("1.0", "stock"))
    assert sum(stock.values()) == 24
    cells = re.findall(r'<td class="n(?: none)?">([\d ]+)</td>', page)
    total = {one: number * 2 for one, number in stock.items()}
    order = [name for name in LOOKS if name in stock]
    assert " ".join(str(total[name]) for name in order) in " ".join(cells)


class Loads(HTMLParser):
    """Collects what elements would make a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        places = [given.get("src"), given.get("srcset"), given.get("data")]
        if tag == "link":
            places.append(given["href"])
        self.found += [place for place in places if place]


def test_nothing_is_loaded(page: str) -> None:
    """Nor could it be: the policy forbids it."""
    assert "default-src 'none'" in page
    loads = Loads()
    loads.feed(page)
    assert loads.found == ["data:,"]
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    assert "@import" not in style
    assert "url(" not in style


def test_same_bytes_again(page: str, upstream: Upstream) -> None:
    assert report.render(upstream.workspace()) == page


def test_releases_with_other_settings() -> None:
    """A GPU, a dtype and a backend that one release alone has are not run on the other."""
    axes = {**AXES, "capability": ["9.0", "7.5"]}
    row = {
        "backend": "FLEX", "v1": "1", "length": "at", "flashinfer": False,
        "llama4": [0] * 8, "control": [0] * 8,
    }  # fmt: skip
    older = tuple(made("1.0", variant) for variant in get_args(Variant))
    newer = tuple(made("1.1", variant, axes=axes, rows=[row]) for variant in get_args(Variant))
    joined = Grid([(older[0], older[1]), (newer[0], newer[1])])
    assert joined.cell_axes.capability == ("7.5", "9.0", "10.0")
    assert joined.row_axes["backend"] == ("unset", "FLASH_ATTN", "FLEX")
    assert NOT_RUN in joined.verdicts
    gone = (NOT_RUN, ""), (NOT_RUN, "")
    assert joined.default_cells(1) == [[gone] * 2] * 3
    # 9.0 is not in the older file.
    first, second, third = joined.default_cells(0)
    assert second == [gone] * 2
    assert NOT_RUN not in {one for both in first + third for one, _ in both}
    runs = joined.rows[1]["FLEX|1|at|no"][0]
    assert matrix.expand(runs)[2] == 0 != matrix.expand(runs)[0]


def test_short_names_first() -> None:
    assert grid.names_of("7.0")[0] == "V100"
    assert grid.names_of("1.0") == []


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A\n\n## B", "<h2>A</h2>\n<h3>B</h3>\n"),
        ("[a](b.md)", "<p>a</p>\n"),
        ("[a](https://b.example)", '<p><a href="https://b.example">a</a></p>\n'),
        (
            "[*a*](b.md) [c](http://d.example)",
            '<p><em>a</em> <a href="http://d.example">c</a></p>\n',
        ),
        ("![a](b.png)", "<p>a</p>\n"),
        ("<script>a</script>", "<p>&lt;script&gt;a&lt;/script&gt;</p>\n"),
    ],
)
def test_documents(text: str, html: str) -> None:
    assert document.render(text) == html


def test_tables_of_documents_scroll() -> None:
    html = document.render("| a |\n|---|\n| b |\n")
    assert html.startswith('<div class="scroller"><table>')
    assert html.endswith("</table></div>\n")


def test_command(run: Callable[..., Ran], checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    ran = run("report", "--output", str(path))
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"{path}  ")
    as_json = json.loads(run("report", "--output", str(path), "--json").out)
    assert as_json == {"file": str(path), "size": path.stat().st_size}
    assert run("report", "1.0").status == 2
    assert run("report", "--output", str(tmp_path)).status == 2
    blocked = run("report", "--output", str(path / "page.html"))
    assert blocked.status == 6
    assert "cannot write" in blocked.err


def test_missing_matrix(run: Callable[..., Ran], checkout: Path, tmp_path: Path) -> None:
    for variant in get_args(Variant):
        matrix.path_of(checkout, "1.1", variant).unlink()
    ran = run("report", "--output", str(tmp_path / "page.html"))
    assert ran.status == 2
    assert "no matrix of 1.1: " in ran.err
    assert "vllm-overlay matrix 1.1 --stock" in ran.err
    assert not (tmp_path / "page.html").exists()


def test_missing_document(run: Callable[..., Ran], checkout: Path, tmp_path: Path) -> None:
    (checkout / "docs/benchmarks.md").unlink()
    ran = run("report", "--output", str(tmp_path / "page.html"))
    assert ran.status == 2
    assert "docs/benchmarks.md: No such file" in ran.err
    with pytest.raises(OverlayError, match="Restore it from git"):
        document.read(checkout / "docs/benchmarks.md")


@pytest.mark.parametrize("name", [name for _, name, _ in report.DOCUMENTS])
def test_an_installed_tool_has_the_documents(name: str) -> None:
    root = Path(__file__).parents[3]
    pyproject = tomlkit.parse((root / "pyproject.toml").read_text("utf-8")).unwrap()
    data = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert (root / "docs" / name).is_file()
    assert data.get(f"docs/{name}") == f"overlay/_data/docs/{name}"
