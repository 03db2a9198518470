"""The package index: what pip and uv find in it, and what does not get in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream
from overlay.base.errors import Exit, OverlayError
from overlay.releases.uv import find_uv
from overlay.wheels import simple_index
from overlay.wheels.build import build_wheel

NAME = "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"
WANTED = "vllm==1.0+llama4.1"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"
Run = Callable[..., Ran]


class _Handler(SimpleHTTPRequestHandler):
    """Python's own file server; told to, it negotiates content as PEP 691 has it."""

    negotiates = False
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.negotiates and self.path.endswith("/"):
            assert JSON_TYPE in self.headers["Accept"]
            self.path += "index.json"
        super().do_GET()

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return JSON_TYPE if str(path).endswith("index.json") else super().guess_type(path)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve(folder: Path, *, negotiates: bool) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; yields its URL and the paths that are asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"negotiates": negotiates, "asked": asked})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def build(upstream: Upstream, release: str = "1.0") -> Path:
    workspace = upstream.workspace()
    return build_wheel(workspace, workspace.versions.get(release), Path("dist").absolute()).path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def made(upstream: Upstream, run: Run, tmp_path: Path) -> Path:
    """An index of one wheel."""
    build(upstream)
    ran = run("index", "simple")
    assert ran.status == 0, ran.err
    return tmp_path / "simple"


def clean_environment() -> dict[str, str]:
    """Without this machine's pip and uv settings."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    return {**ours, "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}


def download_with_pip(index: str, folder: Path) -> None:
    # No index but this one: the test needs no network.
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir",
         "--index-url", index, "--platform", "manylinux1_x86_64", "--only-binary", ":all:",
         "--disable-pip-version-check", "-d", str(folder), WANTED],
        check=True, env=clean_environment(),
    )  # fmt: skip


def install_with_uv(index: str, folder: Path) -> None:
    subprocess.run(
        [find_uv(), "pip", "install", "-q", "--no-deps", "--no-cache", "--index-url", index,
         "--python", sys.executable, "--target", str(folder), WANTED],
        check=True, env=clean_environment(),
    )  # fmt: skip


@pytest.mark.parametrize("way", ["file", "http", "http, JSON"])
def test_pip_and_uv_install_from_it(made: Path, tmp_path: Path, way: str) -> None:
    with contextlib.ExitStack() as stack:
        url, asked = made.as_uri(), ["/vllm/", f"/vllm/{NAME.replace('+', '%2B')}"]
        if way != "file":
            url, asked = stack.enter_context(serve(made, negotiates=way.endswith("JSON")))
        download_with_pip(url, tmp_path / "pip")
        install_with_uv(url, tmp_path / "uv")
    assert (tmp_path / "pip" / NAME).read_bytes() == (made / "vllm" / NAME).read_bytes()
    assert b"use_irope=False" in (tmp_path / "uv/vllm/attention.py").read_bytes()
    assert asked[0] == "/vllm/"
    assert any(NAME.replace("+", "%2B") in path for path in asked)


def test_its_metadata_is_asked_for_in_place_of_the_wheel(made: Path) -> None:
    with serve(made, negotiates=False) as (url, asked):
        subprocess.run(
            [find_uv(), "pip", "install", "-q", "--dry-run", "--no-deps", "--no-cache",
             "--index-url", url, "--python", sys.executable, "--target", "nowhere", WANTED],
            check=True, env=clean_environment(),
        )  # fmt: skip
    assert not any(path.endswith(".whl") for path in asked)
    with zipfile.ZipFile(made / "vllm" / NAME) as archive:
        metadata = archive.read("vllm-1.0+llama4.1.dist-info/METADATA")
    assert (made / "vllm" / f"{NAME}.metadata").read_bytes() == metadata


def test_what_it_says(made: Path) -> None:
    data = (made / "vllm" / NAME).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    page = (made / "vllm/index.html").read_text()
    assert f'href="{NAME.replace("+", "%2B")}#sha256={digest}"' in page
    found = json.loads((made / "vllm/index.json").read_text())
    assert found["versions"] == ["1.0+llama4.1"]
    (file,) = found["files"]
    assert (file["hashes"], file["size"]) == ({"sha256": digest}, len(data))
    assert '<a href="vllm/">vllm</a>' in (made / "index.html").read_text()
    assert json.loads((made / "index.json").read_text())["projects"] == [{"name": "vllm"}]


def test_required_python_is_told_and_escaped() -> None:
    entry = simple_index.Entry(NAME, "0" * 64, 1, "1" * 64, "<3.13,>=3.9")
    assert 'data-requires-python="&lt;3.13,&gt;=3.9"' in entry.anchor()
    assert entry.as_json()["requires-python"] == "<3.13,>=3.9"


def test_twice_the_same_bytes_and_an_earlier_wheel_stays(
    made: Path, upstream: Upstream, run: Run
) -> None:
    before = tree(made)
    assert run("index", "simple").status == 0
    assert tree(made) == before
    other = build(upstream, "1.1")
    found = json.loads(run("index", "simple", str(other), "--json").out)
    assert found["versions"] == ["1.0+llama4.1", "1.1+llama4.1"]
    again = tree(made)
    assert run("index", "anew").status == 0  # both at once
    assert tree(made.parent / "anew") == again


def test_a_wheel_that_verify_refuses(made: Path, upstream: Upstream, run: Run) -> None:
    before = tree(made)
    path = build(upstream, "1.1")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"evil" if name == "vllm/attention.py" else data)
    ran = run("index", "simple", str(path))
    assert ran.status == 4
    assert "is refused" in ran.err
    assert tree(made) == before


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("index",), 2, "Missing argument 'DIR'"),
        (("index", "simple"), 2, "holds none of this overlay's"),
        (("index", "simple", "gone.whl"), 2, "there is no such file"),
        (("index", "simple", "served/vllm-1.0-cp38-abi3-manylinux1_x86_64.whl"), 2,
         "none of this overlay's wheels"),
    ],
)  # fmt: skip
def test_wrong_usage(run: Run, arguments: tuple[str, ...], status: int, text: str) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err
    assert not Path("simple").exists()


def test_a_folder_with_something_else_in_it(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    build(upstream)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("Dear")
    ran = run("index", "mine")
    assert ran.status == 6
    assert "is in the way" in ran.err
    assert tree(tmp_path / "mine") == {"letter.txt": b"Dear"}


def test_a_wheel_that_was_changed_in_the_index(made: Path, run: Run) -> None:
    path = made / "vllm" / NAME
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\0")
    ran = run("index", "simple")
    assert ran.status == 4
    assert "is damaged" in ran.err


def test_what_a_killed_run_leaves_is_no_hindrance(
    upstream: Upstream, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages come last, so an index never names a file that is not there."""
    build(upstream)

    def stop(*_: object) -> None:
        raise OverlayError("stopped", "here", "Go on", Exit.ENVIRONMENT)

    with monkeypatch.context() as patching:
        patching.setattr(simple_index, "_write_pages", stop)
        assert run("index", "simple").status == 6
    assert not list((tmp_path / "simple").rglob("index.*"))
    assert run("index", "simple").status == 0
    assert json.loads((tmp_path / "simple/vllm/index.json").read_text())["files"]


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_a_damaged_page_is_named(made: Path, run: Run, text: bytes) -> None:
    (made / "vllm/index.json").write_bytes(text)
    ran = run("index", str(made))
    assert (ran.status, ran.out) == (6, "")
    assert "no index that this command wrote" in ran.err


def test_a_bill_that_is_not_text(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    wheel = build(upstream)
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"\xff" if name.endswith(".cdx.json") else data)
    ran = run("index", str(tmp_path / "simple"), str(wheel))
    assert (ran.status, ran.out) == (4, "")
    assert "is refused" in ran.err
    ran = run("verify", str(wheel))
    assert ran.status == 1
    assert "it is not JSON" in ran.err
