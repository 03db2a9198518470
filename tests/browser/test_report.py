"""The report in a browser, against the matrix files: what is shown, by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import pytest
from selenium.webdriver import Keys

from overlay.answers import basis, report, runnable
from overlay.answers.basis import BASES
from overlay.answers.grid import LOOKS, Ran
from overlay.answers.matrix import Cell, Matrix, Variant
from overlay.patches.workspace import Workspace

from .page import Page, contrast

Pair = tuple[Matrix, Matrix]
#: Least contrast of WCAG AA for text of this size.
AA = 4.5


@pytest.fixture(scope="module")
def pairs(workspace: Workspace) -> list[Pair]:
    root = workspace.project.root
    return [runnable.judge(root, one.name)[0] for one in workspace.versions.patched]


@pytest.fixture(scope="module")
def ran(workspace: Workspace) -> dict[tuple[str, Variant], Ran]:
    return report.ran(workspace.project.root, workspace.versions.patched)


def rests_on(ran: dict[tuple[str, Variant], Ran], one: Matrix, cell: Cell) -> basis.Name:
    """What a cell's verdict does."""
    outcome = one.llama4[cell]
    here = ran[one.release, one.variant].of(outcome, cell)
    return basis.name_of(outcome, here.runs, here.tree)


def told(ran: dict[tuple[str, Variant], Ran], one: Matrix, cell: Cell) -> dict[str, str]:
    """What the sheet should say of a cell."""
    outcome = one.llama4[cell]
    here = ran[one.release, one.variant].of(outcome, cell)
    on = rests_on(ran, one, cell)
    details = basis.details(outcome, here.runs, here.tree)
    facts = {
        "verdict": outcome.verdict, "engine": outcome.engine.upper(), "backend": outcome.backend,
        "ended in": outcome.stage, "message": outcome.message_beside(cell.backend),
        "known from": "\n".join(filter(None, (f"{on}: {BASES[on].meaning}", details))),
    }  # fmt: skip
    return {name: text for name, text in facts.items() if text}


def telling(pairs: list[Pair], ran: dict[tuple[str, Variant], Ran]) -> Iterator[tuple[Pair, Cell]]:
    """A cell for each verdict of stock and of patched, for all that one rests on, and for each
    value of every setting."""
    seen: set[tuple[str, object]] = set()
    for pair in pairs:
        stock, patched = (one.llama4 for one in pair)
        for cell in stock:
            marks = {
                ("stock", stock[cell].verdict), ("patched", patched[cell].verdict),
                *((one.variant, rests_on(ran, one, cell)) for one in pair),
                *vars(cell).items(),
            }  # fmt: skip
            if not marks <= seen:
                seen |= marks
                yield pair, cell
    assert {on for _, on in seen} >= set(BASES)


def test_details(page: Page, pairs: list[Pair], ran: dict[tuple[str, Variant], Ran]) -> None:
    """A cell says what its file has, and what that is known from, whatever is set."""
    cells = list(telling(pairs, ran))
    assert len(cells) > len(LOOKS)
    for (stock, patched), cell in cells:
        page.choose(cell)
        button = page.button(stock.release, cell)
        if button.get_attribute("aria-expanded") == "false":
            page.click(button)
        for one in (stock, patched):
            assert page.detail(one.variant) == told(ran, one, cell), f"{one.release} {cell}"
            half = page.one(f".cell[aria-expanded=true] [data-half={one.variant}]")
            tag = BASES[rests_on(ran, one, cell)].tag
            assert half.text.split() == [LOOKS[one.llama4[cell].verdict].glyph, tag]
        words = page.one("#detail .words").text
        assert f"VLLM_ATTENTION_BACKEND {cell.backend}" in words
        assert f"KV cache {cell.kv_cache_dtype}" in words
        assert f"{stock.release} on capability {cell.capability}" in page.one("#detail h3").text


def test_grid_is_repainted(
    page: Page, pairs: list[Pair], ran: dict[tuple[str, Variant], Ran]
) -> None:
    """All cells at once, after a change and back."""
    first = page.names(), page.glyphs()
    page.pick("v1", "0")
    axes = pairs[0][0].axes
    expected = []
    for stock, patched in pairs:
        for capability, kv in product(axes.capability, axes.kv_cache_dtype):
            cell = Cell("unset", "0", "past", False, axes.dtype[0], kv, capability)
            said = ", ".join(
                f"{one.variant} {one.llama4[cell].verdict} ({rests_on(ran, one, cell)})"
                for one in (stock, patched)
            )
            expected.append(f"{stock.release}, capability {capability}, KV cache {kv}: {said}")
    assert page.names() == expected
    assert page.glyphs() != first[1]
    page.pick("v1", "unset")
    assert (page.names(), page.glyphs()) == first


def test_tally(page: Page, pairs: list[Pair]) -> None:
    """What is shown, in numbers: of stock and of patched."""
    page.pick("dtype", "float16")
    axes = pairs[0][0].axes
    cells = [
        Cell("unset", "unset", "past", False, "float16", kv, capability)
        for capability, kv in product(axes.capability, axes.kv_cache_dtype)
    ]
    for place, said in enumerate(page.all("#tally > span")):
        verdicts = [pair[place].llama4[cell].verdict for pair in pairs for cell in cells]
        assert f"{verdicts.count('right')} right" in said.text
        assert f"{verdicts.count('cannot-run')} cannot run" in said.text
        numbers = [int(part.split()[0]) for part in said.text.split(", ")]
        assert sum(numbers) == len(verdicts)


def test_legend_is_folded_on_a_phone(page: Page) -> None:
    assert page.one("#legend").get_attribute("open")
    page.emulate(360, 740)
    page.open()
    assert not page.one("#legend").get_attribute("open")
    page.one("#legend summary").click()
    shown = page.one("#legend").text
    assert all(f"{name} " in shown for name in ("right", "cannot-run", "gpu", "binaries"))


def test_flashinfer_where_it_matters(page: Page, pairs: list[Pair]) -> None:
    names = {row.backend for pair in pairs for row in pair[0].rows}
    asked = {row.backend for pair in pairs for row in pair[0].rows if row.flashinfer}
    assert names > asked
    page.pick("flashinfer", "yes")
    page.pick("backend", min(names - asked))
    assert not page.one("input[name=flashinfer][value=yes]").is_enabled()
    assert "FlashInfer not installed" in page.one("#shown").text
    page.pick("backend", max(asked))
    page.pick("flashinfer", "yes")
    assert "FlashInfer installed" in page.one("#shown").text


def place(page: Page) -> tuple[int, int]:
    """Row and column of the cell that has the focus, which alone is a stop of Tab."""
    (stop,) = page.all(".cell[tabindex='0']")
    assert stop == page.focused
    columns = len(page.all("#grid tbody tr:first-child .cell"))
    number = page.all(".cell").index(stop)
    return divmod(number, columns)


def test_keyboard(page: Page) -> None:
    rows = len(page.all("#grid tbody tr"))
    columns = len(page.all("#grid tbody tr:first-child .cell"))
    page.run("document.querySelector('#settings input[name=flashinfer]').focus()")
    page.press(Keys.TAB)
    assert place(page) == (0, 0)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert place(page) == (0, 0)
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert place(page) == (1, 1)
    page.press(Keys.END)
    assert place(page) == (1, columns - 1)
    page.press(Keys.HOME)
    assert place(page) == (1, 0)
    page.press(Keys.CONTROL + Keys.END)
    assert place(page) == (rows - 1, columns - 1)
    page.press(Keys.CONTROL + Keys.HOME)
    assert place(page) == (0, 0)
    assert page.run("return document.activeElement.matches(':focus-visible')")


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_keyboard_opens_and_closes(page: Page, key: str) -> None:
    sheet = page.one("#detail")
    assert not sheet.is_displayed()
    page.all(".cell")[0].send_keys(key)
    assert sheet.is_displayed()
    first = page.one("#detail h3").text
    # The sheet follows the focus, and leaves it in the grid.
    page.press(Keys.ARROW_DOWN)
    assert page.one("#detail h3").text != first
    assert place(page) == (1, 0)
    page.press(Keys.ESCAPE)
    assert not sheet.is_displayed()
    assert place(page) == (1, 0)
    # From within the sheet too, back to the cell.
    page.press(key, Keys.TAB)
    assert page.focused.get_attribute("id") == "close"
    page.press(Keys.ESCAPE)
    assert place(page) == (1, 0)


def test_nothing_is_requested(page: Page) -> None:
    page.logged("browser"), page.requests()
    page.open()
    page.all(".cell")[0].click()
    page.one("#theme").click()
    assert {url.partition(":")[0] for url in page.requests()} <= {"file", "data"}
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.logged("browser") == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_does_not_scroll_sideways(page: Page, width: int) -> None:
    page.emulate(width)
    page.all(".cell")[0].send_keys(Keys.ENTER)
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    page.run("for (const one of document.querySelectorAll('details')) one.open = true")
    scrolled, shown = page.run(widths)
    assert scrolled == shown == width
    grid, box = page.run(
        "const box = document.querySelector('.scroller.grid');"
        "return [box.scrollWidth, box.clientWidth]"
    )
    assert (grid > box) is (width < 1280)


def test_release_stays_in_sight(page: Page) -> None:
    """On a phone, the last column is reached with its release beside it."""
    page.emulate(360, 740)
    page.all(".cell")[0].send_keys(Keys.END)
    cell, head = (
        page.run("return arguments[0].getBoundingClientRect().toJSON()", element)
        for element in (page.focused, page.one("#grid tbody th"))
    )
    assert head["left"] >= 0
    assert head["right"] <= cell["left"]
    assert cell["right"] <= 360


def test_colours_follow_the_system_and_the_button(page: Page) -> None:
    body, button = page.one("body"), page.one("#theme")
    light = page.style(body, "background-color")
    page.emulate(scheme="dark")
    dark = page.style(body, "background-color")
    assert dark != light
    assert button.text == "Light"
    button.click()
    assert page.style(body, "background-color") == light
    page.open()  # which it remembers
    assert page.style(page.one("body"), "background-color") == light
    page.one("#theme").click()
    assert page.style(page.one("body"), "background-color") == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_differ_without_colour(page: Page, scheme: str) -> None:
    """What is right, is wrong and cannot run is told by lightness too, for those who see no hue."""
    page.emulate(scheme=scheme)
    verdicts = ("right", "wrong", "cannot-run")
    grounds = [page.style(page.one(f".legend [data-v={v}]"), "background-color") for v in verdicts]
    assert min(contrast(*both) for both in combinations(grounds, 2)) >= 1.3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Page, scheme: str) -> None:
    """Of every verdict, of which each has a glyph and a colour of its own, and of all text."""
    page.emulate(scheme=scheme)
    page.run(
        "for (const name of arguments[0]) {"
        "  const made = document.createElement('span');"
        "  made.className = 'v made'; made.dataset.v = name; made.textContent = name;"
        "  document.body.append(made);"
        "}",
        list(LOOKS),
    )
    colours = set()
    for made in page.all(".made"):
        text, ground = page.style(made, "color"), page.style(made, "background-color")
        assert contrast(text, ground) >= AA, made.text
        colours.add(ground)
    assert len(colours) == len(LOOKS) == len({look.glyph for look in LOOKS.values()})
    page.all(".cell")[0].click()
    ground = page.style(page.one("body"), "background-color")
    for selector in ("body", ".meta", "#grid .names", "#grid .side", "nav a", ".meaning", "dd"):
        text = page.style(page.one(selector), "color")
        assert contrast(text, ground) >= AA, selector
    for selector in ("#settings legend", ".words li"):
        text = page.style(page.one(selector), "color")
        raised = page.style(page.one("#settings"), "background-color")
        assert contrast(text, raised) >= AA, selector


def test_without_javascript(page: Page, pairs: list[Pair]) -> None:
    page.emulate(script=False)
    page.open()
    # WebDriver takes no noscript element for displayed.
    assert page.one("noscript .note").rect["height"] > 0
    assert not page.one("#settings").is_displayed()
    assert not page.one("#theme").is_displayed()
    stock, patched = pairs[-1]
    axes = stock.axes
    last = Cell(
        "unset", "unset", "past", False, axes.dtype[0], axes.kv_cache_dtype[-1],
        axes.capability[-1],
    )  # fmt: skip
    glyphs = [LOOKS[one.llama4[last].verdict].glyph for one in (stock, patched)]
    assert page.button(stock.release, last).text.split()[::2] == glyphs


def test_screenshot(page: Page, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """The picture of the README (`--screenshot docs/report.png`), small enough for it."""
    path = pytestconfig.getoption("--screenshot") or tmp_path / "report.png"
    path.write_bytes(page.picture("#matrix"))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size <= 350_000
