"""Patches that do what no patch here may: an error of one line, or the very bytes they say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from made_upstream import IMPL, Upstream, message
from overlay.base.errors import Exit, OverlayError
from overlay.patches.tree import Result, check_out

#: A mail as git format-patch writes it, around a diff.
MAIL = (
    "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
    "From: A Tester <tester@example.org>\nDate: Sun, 22 Nov 2026 12:00:00 +0000\n"
    "Subject: {}\n---\n{}"
)
OLD, NEW = "        self.scale = scale\n", "        self.scale = 2 * scale\n"
HUNK = f"@@ -9,3 +9,3 @@ class XFormersImpl:\n         self.num_heads = num_heads\n-{OLD}+{NEW} \n"


def mail(diff: str) -> bytes:
    subject, _, body = message("[Bugfix] A topic").partition("\n\n")
    return MAIL.format(f"{subject}\n\n{body}", diff).encode("utf-8", "surrogateescape")


def change(path: str, hunk: str = HUNK, extra: str = "", other: str | None = None) -> str:
    """A diff that changes one file."""
    new = other or path
    return f"diff --git a/{path} b/{new}\n{extra}--- a/{path}\n+++ b/{new}\n{hunk}"


def create(path: str, text: str = "+x\n", mode: str = "100644", lines: int = 1) -> str:
    """A diff that adds one file."""
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
        f"@@ -0,0 +1,{lines} @@\n{text}"
    )


IMPL_PY = "vllm/attention.py"
GOOD = change(IMPL_PY)
LINK = create("vllm/link", "+/tmp\n\\ No newline at end of file\n", "120000")
REFUSED: dict[str, tuple[str, str]] = {
    **{
        f"the path {path!r}": (create(path), "leaves the source tree|malformed|different|is not")
        for path in (
            "../evil", "/etc/evil", "a/../../evil", "./evil", "a//evil", ".git/hooks/evil",
            "a/.git/config", "a/.GIT/config", "a\\..\\evil", "..", "a/", "x" * 300,
            "x/" * 600 + "x",
        )
    },
    "a quoted path": ('diff --git "a/e\\303" "b/e\\303"\n' + GOOD, "different files|name"),
    "two names": (change(IMPL_PY, other="vllm/other.py"), "different files"),
    "another file below the header": (
        GOOD.replace("--- a/vllm/attention.py", "--- a/setup.py"), "is not a/|malformed"
    ),
    "no prefix": (
        GOOD.replace("a/vllm", "vllm").replace("b/vllm", "vllm"), "different files|is not"
    ),
    "a rename": (
        "diff --git a/setup.py b/evil.py\nsimilarity index 100%\n"
        "rename from setup.py\nrename to evil.py\n", "a rename|different files",
    ),
    "a rename to its own name": (
        "diff --git a/setup.py b/setup.py\nsimilarity index 100%\n"
        "rename from setup.py\nrename to setup.py\n", "a rename",
    ),
    "a copy": (
        "diff --git a/setup.py b/setup.py\ncopy from setup.py\ncopy to /tmp/evil\n", "a copy"
    ),
    "half a rename": (change(IMPL_PY, extra="rename to ../evil\n"), "a rename"),
    "half a copy": (change(IMPL_PY, extra="copy to ../evil\n"), "a copy"),
    "a new mode": (
        "diff --git a/setup.py b/setup.py\nold mode 100644\nnew mode 100755\n", "a mode change"
    ),
    "half a new mode": (change(IMPL_PY, extra="new mode 100755\n"), "a mode change"),
    "a symlink": (LINK, "mode 120000"),
    "a file below a symlink of the same patch": (LINK + create("vllm/link/evil"), "mode 120000"),
    "a submodule": (create("vllm/sub", mode="160000"), "mode 160000"),
    "a setuid file": (create("vllm/x.py", mode="104755"), "mode 104755"),
    "a binary hunk": (
        "diff --git a/x b/x\nnew file mode 100644\nGIT binary patch\nliteral 1\nIcmZPo000310RR91\n"
        "\nliteral 0\nHcmV?d00001\n", "a binary hunk",
    ),
    "binary files": (
        "diff --git a/x b/x\nBinary files a/x and b/x differ\n", "a binary hunk"
    ),
    "CRLF everywhere": (GOOD.replace("\n", "\r\n"), "CRLF|different files|malformed|no diff"),
    "CRLF in its hunk": (change(IMPL_PY, HUNK.replace("\n", "\r\n")), "CRLF"),
    "CRLF in a line": (GOOD.replace(NEW, NEW.replace("\n", "\r\n")), "CRLF"),
    "one file twice": (GOOD + GOOD, "twice"),
    "a folder where a file is": (create("vllm/attention.py/x.py"), "does not apply"),
    "a file where a folder is": (create("vllm"), "does not apply"),
    "a file that is there": (create("setup.py"), "exists already"),
    "a file that is not there": (change("vllm/nothing.py"), "no such file"),
    "a hunk cut short": (GOOD.rpartition("+")[0], "malformed|does not"),
    "a count too large": (GOOD.replace("-9,3", "-9,9"), "malformed|does not"),
    "a count too small": (GOOD.replace("+9,3", "+9,2"), "malformed|does not"),
    "an enormous line": (GOOD.replace("@@ -9,3", "@@ -" + "9" * 5000 + ",3"), "malformed|does not"),
    "no hunk": (f"diff --git a/{IMPL_PY} b/{IMPL_PY}\n", "no diff|malformed|does not"),
    "a hunk and no file": (HUNK, "malformed|no diff"),
    "nothing": ("", "no diff|no git mail"),
    "an old newline that is not missing": (
        GOOD.replace(f"-{OLD}", f"-{OLD}\\ No newline at end of file\n"), "does not|malformed"
    ),
    "not UTF-8": (GOOD.replace(NEW, "# \udcff\n"), "not UTF-8"),
}  # fmt: skip


def applied(upstream: Upstream, data: bytes) -> Result:
    """The series of 1.0, this patch being all of it."""
    file = upstream.patches / "topic-a/1.0.patch"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    (upstream.patches / "series/1.0").write_text("topic-a/1.0.patch\n")
    workspace = upstream.workspace()
    return workspace.apply(workspace.versions.get("1.0"))


def entries(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts}


def test_refused(bare_upstream: Upstream, tmp_path: Path) -> None:
    applied(bare_upstream, mail(GOOD)).require()
    before, said = entries(tmp_path), {}
    for what, (diff, _) in REFUSED.items():
        error = applied(bare_upstream, mail(diff)).error
        said[what] = f"{error and error.status!r} {error}"
        assert entries(tmp_path) == before, what
    wrong = {
        what: said[what]
        for what, (_, why) in REFUSED.items()
        if not re.match(f"{Exit.PATCH!r} .*({why})", said[what], re.DOTALL)
    }
    assert wrong == {}
    assert len(said) == 47


NO_NEWLINE = "\\ No newline at end of file\n"
#: Proper ones at the edge: the diff, the file, and what becomes of it (None: it goes).
HANDLED: dict[str, tuple[str, str, str | None]] = {
    "a change": (GOOD, IMPL_PY, IMPL.replace(OLD, NEW)),
    "a new file without a newline at its end": (
        create("vllm/x.py", f"+x{chr(10)}{NO_NEWLINE}"), "vllm/x.py", "x"
    ),
    "a last line that loses its newline": (
        change(
            "setup.py",
            f"@@ -1,3 +1,3 @@\n import setuptools\n \n-setuptools.setup()\n"
            f"+setuptools.setup()\n{NO_NEWLINE}",
        ), "setup.py", "import setuptools\n\nsetuptools.setup()",
    ),
    "a program": (create("vllm/run.sh", mode="100755"), "vllm/run.sh", "x\n"),
    "a deletion": (
        "diff --git a/vllm/data/config.json b/vllm/data/config.json\n"
        "deleted file mode 100644\n--- a/vllm/data/config.json\n+++ /dev/null\n"
        "@@ -1 +0,0 @@\n-{}\n", "vllm/data/config.json", None,
    ),
    "a name that needs no quotes": (create("vllm/a b.py"), "vllm/a b.py", "x\n"),
    "other line ends that are none": (
        create("vllm/x.py", "+a\x0bb\x0cc\u2028d\x85e\n"), "vllm/x.py", "a\x0bb\x0cc\u2028d\x85e\n"
    ),
    "a mail in CRLF but for its diff": (GOOD, IMPL_PY, IMPL.replace(OLD, NEW)),
}  # fmt: skip


def test_handled(bare_upstream: Upstream, tmp_path: Path) -> None:
    def crlf(data: bytes) -> bytes:
        head, mark, diff = data.partition(b"---\n")
        return head.replace(b"\n", b"\r\n") + mark + diff

    for number, (what, (diff, path, text)) in enumerate(HANDLED.items()):
        make: Callable[[bytes], bytes] = crlf if "CRLF" in what else bytes
        result = applied(bare_upstream, make(mail(diff))).require()
        folder = tmp_path / f"tree-{number}"
        check_out(bare_upstream.workspace().store, result, folder, "v1.0")
        file = folder / path
        found = file.read_bytes().decode() if file.exists() else None
        assert found == text, what
    assert number + 1 == len(HANDLED) == 8


def test_work_tree_through_a_symlink(bare_upstream: Upstream, tmp_path: Path) -> None:
    """The folder named is the one made; a link in its place is not written through."""
    result = applied(bare_upstream, mail(GOOD)).require()
    store = bare_upstream.workspace().store
    real, cases = tmp_path / "real", 0
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    check_out(store, result, tmp_path / "link" / "tree", "v1.0")
    assert (real / "tree" / IMPL_PY).is_file()
    cases += 1
    for name, target in (("to-nothing", tmp_path / "nothing"), ("to-empty", tmp_path / "empty")):
        if name == "to-empty":
            target.mkdir()
        (tmp_path / name).symlink_to(target)
        with contextlib.suppress(OverlayError):
            check_out(store, result, tmp_path / name, "v1.0")
        assert not target.exists() or not list(target.iterdir())
        cases += 1
    assert cases == 3
