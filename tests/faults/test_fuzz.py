"""Any series, patch or VERSIONS.toml: an error of the tool's own or success, and no file written.

300 inputs each, the same every time; `nox -s fuzz` tries 10,000 others.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from made_upstream import Upstream
from overlay.base.errors import OverlayError
from overlay.patches import series
from overlay.patches.hunks import apply_hunks, parse_diff
from overlay.patches.patch import lint_patch
from overlay.patches.series import PatchPath
from overlay.patches.tree import apply_patch
from overlay.releases import versions

from .conftest import EXAMPLES
from .test_patches import HANDLED, REFUSED, mail
from .tool import is_write

_outside: list[str] = []
_watching: list[Path] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event.startswith(("open", "os.")) and is_write(event, arguments):
        folder = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
        known = isinstance(folder, int) and folder >= 0
        base = Path(f"/proc/self/fd/{folder}").readlink() if known else Path()
        for path in arguments[:2]:
            if isinstance(path, str | bytes) and path:
                whole = Path(base, os.fsdecode(path))
                if not _is_inside(whole):
                    _outside.append(f"{event} {str(whole)!r}")


def _is_inside(path: Path) -> bool:
    if str(path) == os.devnull or len(str(path)) < 4:  # a mode, as the second argument of open
        return True
    if {"__pycache__", ".hypothesis"} & set(path.parts):  # Python's own, and hypothesis's
        return True
    return any(path.is_relative_to(folder) for folder in _watching)


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def _written_inside(tmp_path: Path) -> Iterator[None]:
    """No test writes a file but below its own folder and that for temporary ones."""
    _outside.clear()
    _watching[:] = [tmp_path, Path(tempfile.gettempdir())]
    yield
    _watching.clear()
    assert _outside == []


class Cases:
    """How many inputs were accepted and refused."""

    def __init__(self) -> None:
        self.good = self.bad = 0

    def count(self, call: Callable[[], object]) -> None:
        """Anything raised but an OverlayError of one line ends the test."""
        try:
            call()
        except OverlayError as error:
            self.bad += 1
            text = str(error)
            assert text == text.strip()
        else:
            self.good += 1

    def require(self) -> None:
        """All were tried, and they were neither all good nor all bad."""
        assert self.good + self.bad >= EXAMPLES
        assert self.good
        assert self.bad


def edits(text: str) -> st.SearchStrategy[str]:
    """`text` with up to four of its pieces cut out, doubled or replaced."""
    pieces = st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ("", "\n", "\r\n", "\0", "\t", "..", "/", "../", "a/", "b/", "-", "+", "@@",
             "@@ -1 +1 @@\n",
             "\\ No newline at end of file\n", "diff --git ", "9" * 30, "-1", "\\", '"', "'''", "=",
             "[", "]", "{", "1e999", "inf", "nan", "\ufeff", "\x1b[31m", "\u202e", "0" * 5000)
        ),
    )  # fmt: skip
    at = st.integers(0, len(text))
    edit = st.tuples(at, st.integers(0, 40), pieces)

    def apply(changes: list[tuple[int, int, str]]) -> str:
        changed = text
        for start, length, piece in changes:
            changed = changed[:start] + piece + changed[start + length :]
        return changed

    return st.lists(edit, max_size=4).map(apply)


LINES = st.sampled_from(
    ("attention-signatures/1.0.patch", "a/1.0.patch", "b/0.8.5.post1.patch", "# comment", "",
     " ", "../a/1.0.patch", "/a/1.0.patch", "a/../1.0.patch", "a/1.0.patch -p0", "a//1.0.patch",
     "A/1.0.patch", "a/1.0.diff", "a/v1.0.patch", "\ta/1.0.patch")
)  # fmt: skip


def test_series(tmp_path: Path) -> None:
    cases = Cases()

    def read(data: bytes) -> None:
        (tmp_path / "1.0").write_bytes(data)
        for path in series.read_series(tmp_path, "1.0"):
            assert path.under(tmp_path).resolve().is_relative_to(tmp_path.resolve())

    any_text = st.one_of(
        st.lists(st.one_of(LINES, st.text(max_size=20)), max_size=6).map("\n".join),
        edits("# Patches\nattention-signatures/1.0.patch\nchunked/1.0.patch\n"),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))

    @given(st.one_of(any_text, any_text, st.binary(max_size=50)))
    def check(data: bytes) -> None:
        cases.count(lambda: read(data))

    check()
    cases.require()


def test_versions(patched: Upstream, tmp_path: Path) -> None:
    cases = Cases()
    text = (patched.root / "VERSIONS.toml").read_text()
    parsed = tomlkit.parse(text).unwrap()
    file = tmp_path / "VERSIONS.toml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found = versions.load(file)
        for release in found.releases.values():
            local = f"{found.upstream.project}-{found.local_version(release)}.tar.gz"
            names = (release.sdist.file, release.wheel.file, release.name, release.tag, local)
            assert all(Path("x", name).parent == Path("x") for name in names)
            below = (tmp_path / (release.series or "x")).resolve()
            assert below.is_relative_to(tmp_path.resolve())

    values = st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10),
            st.dates(), st.sampled_from(("../x", "/x", "1.0", "vllm", "x.whl", "0" * 64, ">=1")),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )  # fmt: skip

    @st.composite
    def retyped(draw: st.DrawFn) -> str:
        """One key of the file with another value."""
        document = copy.deepcopy(parsed)
        place = document
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or draw(st.booleans()):
                break
            place = place[key]
        value = draw(values)
        if value is None:
            del place[key]
        elif draw(st.booleans()):
            place[key] = value
        else:
            place[draw(st.text(max_size=5))] = place.pop(key)
        try:
            return tomlkit.dumps(document)
        except Exception:  # a value that TOML has no form for
            return text

    inputs = st.one_of(edits(text), edits(text), retyped(), st.text(max_size=50))

    @given(inputs.map(lambda t: t.encode("utf-8", "surrogatepass")))
    def check(data: bytes) -> None:
        cases.count(lambda: read(data))

    check()
    cases.require()


HONEST = mail(HANDLED["a change"][0]).decode()
DIFFS = [diff for diff, _, _ in HANDLED.values()] + [
    diff for diff, _ in REFUSED.values() if len(diff) < 2000 and diff.isascii()
]
BEFORE = "# Attention.\n\nimport math\n"


def test_diffs() -> None:
    """The part of a patch that git does not read first, without git."""
    cases = Cases()

    def read(diff: str) -> None:
        for file in parse_diff(diff, "x"):
            assert not Path("x", file.path).is_absolute()
            assert ".." not in Path(file.path).parts
            apply_hunks(file, None if file.is_new else BEFORE)
            apply_hunks(file, BEFORE)

    @given(st.sampled_from(DIFFS).flatmap(edits))
    def check(diff: str) -> None:
        cases.count(lambda: read(diff))

    check()
    cases.require()


def test_mails(patched: Upstream, tmp_path: Path) -> None:
    """Whole patches, through git: read, judged and applied to the release."""
    cases = Cases()
    upstream = Upstream(patched.served, patched.root, tmp_path / "cache")
    workspace = upstream.workspace()
    store, base = workspace.store, workspace.base(workspace.versions.get("1.0"))
    file = tmp_path / "fuzzed" / "1.0.patch"
    file.parent.mkdir()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        result = apply_patch(store, "1.0", base, tmp_path, PatchPath("fuzzed", "1.0"))
        if result.patch:
            lint_patch(result.patch)
        if result.error:
            raise result.error

    headers = st.lists(
        st.tuples(
            st.sampled_from(("From", "Date", "Subject", "Content-Type", "X", "From 0")),
            st.one_of(
                st.text(max_size=20),
                st.sampled_from(
                    ("=?utf-8?q?=00?=", "=?utf-8?b?AAAA?=", "A <a@b>", "<>", "x" * 2000,
                     "=?x?q?y?=",
                     "text/plain; charset=klingon", "multipart/mixed; boundary=x", "1 Jan 1970",
                     "text/plain; charset=utf-16", "Mon, 99 Foo 99999 99:99:99 +9999")
                ),
            ),
        ).map(": ".join),
        max_size=3,
    ).map(lambda lines: "".join(f"{line}\n" for line in lines))  # fmt: skip
    first, _, rest = HONEST.partition("\n")
    inputs = st.one_of(
        edits(HONEST),
        headers.map(lambda head: f"{first}\n{head}{rest}"),
        st.sampled_from(DIFFS).map(lambda diff: mail(diff).decode()).flatmap(edits),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))

    @given(st.one_of(inputs, inputs, inputs, st.binary(max_size=200)))
    def check(data: bytes) -> None:
        cases.count(lambda: read(data))

    check()
    cases.require()
