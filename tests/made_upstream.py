"""A made-up upstream, small enough to build in a test.

Two releases of a package called vllm: 1.0 and 1.1, each with an sdist, a wheel and a pin in
VERSIONS.toml, and a control, 0.9. Patches are real git patches against them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from overlay.base.console import Progress
from overlay.base.project import Project
from overlay.cli.main import main
from overlay.patches import lock
from overlay.patches.workspace import Workspace
from overlay.releases.index import IndexSettings
from overlay.releases.sources import Cache, Fetcher
from overlay.wheels.build import sum_of
from overlay.wheels.official import record_digests

IMPL = """# Attention.

import math


class XFormersImpl:

    def __init__(self, num_heads, scale):
        self.num_heads = num_heads
        self.scale = scale

    def forward(self, query):
        return query * self.scale
"""


def version_module(version: str) -> str:
    numbers = ", ".join(version.split("."))
    return (
        f"__version__ = version = '{version}'\n"
        f"__version_tuple__ = version_tuple = ({numbers})\n"
    )  # fmt: skip


def package(version: str) -> dict[str, str]:
    """The files that sdist and wheel share."""
    moved = "# A line that 1.0 has not.\n\n\n" if version == "1.1" else ""
    return {
        "vllm/__init__.py": f"__version__ = '{version}'\n",
        "vllm/_version.py": version_module(version),
        "vllm/attention.py": moved + IMPL,
        "vllm/data/config.json": "{}\n",
    }


def source_tree(version: str) -> dict[str, str]:
    return {
        **package(version),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n\nText.\n",
        "csrc/kernel.cu": "int kernel() { return 0; }\n",
        "setup.py": "import setuptools\n\nsetuptools.setup()\n",
        "tests/test_attention.py": "def test_nothing():\n    pass\n",
        ".gitignore": "vllm/_version.py\n",
    }


def write_sdist(path: Path, files: Mapping[str, str], top: str) -> None:
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, text in files.items():
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def write_wheel(path: Path | IO[bytes], version: str, files: Mapping[str, str | bytes]) -> None:
    info = f"vllm-{version}.dist-info"
    members = {
        name: data.encode() if isinstance(data, str) else data for name, data in files.items()
    }
    members.setdefault(
        f"{info}/METADATA",
        f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n\nText.\n".encode(),
    )
    members[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\n"
        b"Tag: cp38-abi3-linux_x86_64\n"
    )
    members[f"{info}/entry_points.txt"] = b"[console_scripts]\nvllm = vllm:main\n"
    record = io.StringIO()
    for name, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.write(f"{name},sha256={digest},{len(data)}\n")
    record.write(f"{info}/RECORD,,\n")
    members[f"{info}/RECORD"] = record.getvalue().encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@dataclass(frozen=True)
class Upstream:
    """A folder that serves the made-up releases, and how to write patches against them."""

    served: Path
    root: Path
    """The overlay's checkout."""
    cache: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def settings(self) -> IndexSettings:
        return IndexSettings(find_links=(str(self.served),))

    def workspace(self, *, offline: bool = False) -> Workspace:
        fetcher = Fetcher(
            Cache(self.cache), "vllm", lambda: self.settings, offline, Progress(enabled=False)
        )
        return Workspace(Project(self.root), fetcher)

    def lock(self) -> None:
        """Pin the trees of the series as they are."""
        workspace = self.workspace()
        releases = workspace.versions.releases.values()
        changes = lock.compute(workspace, releases, record_digests, sum_of)
        lock.write(self.root / "VERSIONS.toml", changes)

    def patch(
        self,
        path: str,
        change: Callable[[Path], None],
        *,
        series: tuple[str, ...],
        subject: str = "[Bugfix] Accept use_irope in XFormersImpl",
        before: tuple[str, ...] = (),
    ) -> Path:
        """Write patches/<path>, made by `change` on its first tag after the patches `before`,
        and list it in the series of the releases named."""
        first = path.split("/")[1].removesuffix(".patch")
        tree = self.root.parent / f"tree-{path.replace('/', '-')}"
        tree.mkdir()
        for name, text in source_tree(first).items():
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        git(tree, "init", "-q")
        git(tree, "add", "-A", "-f")
        git(tree, "commit", "-q", "-m", "base")
        for other in before:
            git(tree, "am", "-q", "--keep-non-patch", str(self.patches / other))
        change(tree)
        git(tree, "add", "-A", "-f")
        git(tree, "commit", "-q", "-m", message(subject))
        out = git(
            tree, "format-patch", "-1", "--stdout", "--zero-commit", "--no-signature",
            "--full-index", "--no-stat", "--keep-subject",
        )  # fmt: skip
        file = self.patches / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(out)
        for name in series:
            with (self.patches / "series" / name).open("a") as listing:
                listing.write(f"{path}\n")
        return file


def message(subject: str) -> str:
    return f"""{subject}

Llama 4 passes use_irope, which the impl refuses with a TypeError.

Origin: vendor
Bug: https://example.org/issues/1
Forwarded: no (made up)
Remove-When: https://example.org/pull/2
Last-Update: 2026-11-22
Signed-off-by: A Tester <tester@example.org>
"""


def git(folder: Path, *arguments: str) -> bytes:
    who = {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in (
            ("NAME", "A Tester"),
            ("EMAIL", "tester@example.org"),
            ("DATE", "2026-11-22T12:00:00+0000"),
        )
    }
    env = {"PATH": "/usr/bin:/bin:/usr/local/bin", "GIT_CONFIG_GLOBAL": "/dev/null",
           "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent", **who}  # fmt: skip
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, env=env).stdout


def accept_use_irope(tree: Path) -> None:
    file = tree / "vllm/attention.py"
    text = file.read_text()
    file.write_text(text.replace("num_heads, scale)", "num_heads, scale, use_irope=False)"))
    test = tree / "tests/test_irope.py"
    test.write_text("def test_use_irope():\n    assert True\n")


def change(file: Path, old: str, new: str) -> None:
    """Replace text that must be there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def double(tree: Path) -> None:
    """A change of the second topic's, on a line that the first leaves alone."""
    change(tree / "vllm/attention.py", "query * self.scale", "query * self.scale * 2")


def snapshot(upstream: Upstream) -> dict[str, bytes]:
    """Every file of the checkout but work/."""
    files = (path for path in sorted(upstream.root.rglob("*")) if path.is_file())
    names = {path.relative_to(upstream.root): path.read_bytes() for path in files}
    return {str(name): data for name, data in names.items() if name.parts[0] != "work"}


RELEASES = ("0.9", "1.0", "1.1")
#: Upstream's files of 1.0.
SDIST, WHEEL = "vllm-1.0.tar.gz", "vllm-1.0-cp38-abi3-manylinux1_x86_64.whl"


def pin(path: Path, key: str, release: str) -> str:
    data = path.read_bytes()
    return (
        f'[releases."{release}".{key}]\nfile = "{path.name}"\n'
        f'sha256 = "{hashlib.sha256(data).hexdigest()}"\nsize = {len(data)}\n'
    )


def add_arm_wheel(upstream: Upstream, release: str, changes: Mapping[str, str | bytes]) -> Path:
    """Serve and pin a second official wheel, with `changes` to the files of the first. Returns its
    file."""
    of_x86 = upstream.served / f"vllm-{release}-cp38-abi3-manylinux1_x86_64.whl"
    path = upstream.served / f"vllm-{release}-cp38-abi3-manylinux2014_aarch64.whl"
    write_wheel(path, release, {**package(release), **changes})
    toml, before = upstream.root / "VERSIONS.toml", pin(of_x86, "wheel", release)
    assert before in toml.read_text()
    added = before + pin(path, "aarch64.wheel", release)
    toml.write_text(toml.read_text().replace(before, added))
    upstream.lock()
    return path


def at(folder: Path) -> Upstream:
    return Upstream(folder / "served", folder / "overlay", folder / "cache")


def copied(template: Path, folder: Path) -> Upstream:
    """A copy of a made-up upstream, to work on."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return at(folder)


def make_releases(folder: Path, names: tuple[str, ...] = RELEASES) -> Upstream:
    """The releases, with empty series."""
    upstream = at(folder)
    upstream.served.mkdir()
    (upstream.patches / "series").mkdir(parents=True)
    toml = (
        'schema = 1\npython = ">=3.10,<3.13"\n[upstream]\nproject = "vllm"\n'
        'repository = "https://example.org/vllm"\nrange = ">=1.0,<2"\n'
        '[overlay]\nlabel = "llama4"\n'
    )
    for name in names:
        sdist = upstream.served / f"vllm-{name}.tar.gz"
        wheel = upstream.served / f"vllm-{name}-cp38-abi3-manylinux1_x86_64.whl"
        write_sdist(sdist, source_tree(name), f"vllm-{name}")
        write_wheel(wheel, name, {**package(name), "vllm/_C.abi3.so": bytes(range(256)) * 4096})
        control = name == "0.9"
        toml += (
            f'[releases."{name}"]\ntag = "v{name}"\nrequires_python = ">=3.9"\n'
            f'status = "{"control" if control else "affected"}"\n'
            f'torch = "2.6.0"\nxformers = "0.0.29"\nupstream_tree = "{"0" * 40}"\n'
        )
        if not control:
            toml += f'revision = 1\nseries = "series/{name}"\ntree = "{"0" * 40}"\n'
            (upstream.patches / "series" / name).write_text("# none yet\n")
        toml += pin(sdist, "sdist", name) + pin(wheel, "wheel", name)
    (upstream.root / "VERSIONS.toml").write_text(toml)
    upstream.lock()
    return upstream


NEEDS = "Requires-Python: >=3.9\nRequires-Dist: torch==2.7.1\nRequires-Dist: xformers==0.0.31\n"


def release(
    upstream: Upstream,
    version: str,
    changes: Mapping[str, str] | None = None,
    *,
    needs: str = NEEDS,
    wheel: bool = True,
) -> None:
    """Serve a release whose files are 1.1's but for `changes`."""
    files = {**source_tree("1.1"), **(changes or {})}
    files["PKG-INFO"] = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n{needs}\nText.\n"
    write_sdist(upstream.served / f"vllm-{version}.tar.gz", files, f"vllm-{version}")
    if wheel:
        path = upstream.served / f"vllm-{version}-cp38-abi3-manylinux_2_31_x86_64.whl"
        write_wheel(path, version, package("1.1"))


def accepted(text: str = IMPL) -> str:
    return text.replace("num_heads, scale)", "num_heads, scale, use_irope=False)")


TEST = {"tests/test_irope.py": "def test_use_irope():\n    assert True\n"}


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both upstreams, made once; tests work on copies."""
    bare, patched = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("patched")
    make_releases(bare)
    upstream = make_releases(patched)
    upstream.patch("attention-signatures/1.0.patch", accept_use_irope, series=("1.0", "1.1"))
    upstream.lock()
    return {"bare": bare, "patched": patched}


@pytest.fixture
def bare_upstream(templates: dict[str, Path], tmp_path: Path) -> Upstream:
    """The releases, with empty series."""
    return copied(templates["bare"], tmp_path)


@pytest.fixture
def upstream(templates: dict[str, Path], tmp_path: Path) -> Upstream:
    """The releases with one topic, shared: clean on 1.0, at an offset on 1.1."""
    return copied(templates["patched"], tmp_path)


@dataclass(frozen=True)
class Ran:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run `vllm-overlay` on the made-up upstream."""
    monkeypatch.setattr(
        "overlay.releases.index.pip_settings", IndexSettings
    )  # the machine's, each a run of pip
    monkeypatch.chdir(upstream.root.parent)

    def call(*arguments: str, flags: tuple[str, ...] = ()) -> Ran:
        command = [
            "vllm-overlay", "--root", str(upstream.root), "--cache", str(upstream.cache),
            "--find-links", str(upstream.served), *flags, *arguments,
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return call
