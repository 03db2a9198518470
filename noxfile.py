"""Sessions for developers and CI. They call `vllm-overlay`; there is no logic here.

CI asks nox itself for its list of jobs (nox --list-sessions --json -t matrix), and for what a
release is made of (-t release): a session with that tag is run there, a job for each release.

nox                          the README's tests: lint, workflows, types, units, faults, validate
nox -s fuzz                  10,000 inputs each in place of the 300 of `faults`
nox -s "regress(0.8.3)"      a release's regression tests, on the stock and the patched wheel
nox -s "upstream(0.8.3)"     upstream's own tests, on the stock and the patched wheel
nox -s "each(0.8.3)"         every prefix of a series: imports, and breaks no test
nox -s "matrix(0.8.3)"       every configuration of a release; `-- --stock` makes matrix/ anew,
                             `-- --triton` what Triton compiles, `-- --weights` what
                             becomes of quantised weights
nox -s "gpu(0.8.3)"          whole engines of a release, where there is an NVIDIA GPU
nox -s "build(0.8.3)"        a release's patched wheels in dist/, twice the same and verified
nox -s port                  three releases of real history, ported again
nox -s wheels                every wheel built twice, compared and verified
nox -s report                dist/report.html
nox -s browser               the report in Chromium; `-- --screenshot docs/report.png` retakes it
nox -s bench                 the figures of docs/benchmarks.md
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "workflows", "types", "unit", "faults", "validate"]
nox.options.error_on_missing_interpreters = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
VERSIONS = nox.project.load_toml("VERSIONS.toml")
#: Whose prefixes are tested: the first, the one with most patches, and the last with V0.
PREFIXES = ["0.8.3", "0.9.1", "0.10.2"]
RELEASES = list(VERSIONS["releases"])
PATCHED = [name for name, release in VERSIONS["releases"].items() if "series" in release]


def group(name: str) -> tuple[str, ...]:
    """A dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


@nox.session(tags=["quick"])
def lint(session: nox.Session) -> None:
    """Ruff: style and format."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(tags=["quick"])
def workflows(session: nox.Session) -> None:
    """GitHub's workflows: that they run (actionlint), and are safe to (zizmor)."""
    session.install(*group("workflows"))
    session.run("actionlint", "-color", "-pyflakes=")
    session.run("zizmor", "--offline", "--persona=pedantic", ".github")


@nox.session(tags=["quick"])
def types(session: nox.Session) -> None:
    """Mypy --strict over tools, tests and this file."""
    session.install("-e", ".", *group("lint"), *group("test"), *group("browser"), "nox")
    session.run("mypy")


@nox.session(tags=["quick"])
def unit(session: nox.Session) -> None:
    """The tool's own tests, on a made-up upstream; no network."""
    session.install("-e", ".", *group("test"))
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session(tags=["quick"])
def faults(session: nox.Session) -> None:
    """Kills, full disks, bad servers, archives and patches; the same wheel on every Python."""
    session.install("-e", ".", *group("test"))
    session.run("pytest", "-n", "auto", "tests/faults", *session.posargs)


@nox.session(tags=["matrix"])
def fuzz(session: nox.Session) -> None:
    """10,000 inputs each that may be series, patches, VERSIONS.toml: others every time."""
    session.install("-e", ".", *group("test"))
    command = ("pytest", "-n", "auto", "--durations=0", "tests/faults/test_fuzz.py")
    session.run(*command, *session.posargs, env={"FAULTS_EXAMPLES": "10000"})


@nox.session(tags=["quick"])
def validate(session: nox.Session) -> None:
    """Every series applies, canonical and as locked; quilt agrees; no cell is worse than stock."""
    session.install("-e", ".", *group("test"))
    session.run("vllm-overlay", "validate", "--all", "--each")
    session.run("vllm-overlay", "refresh", "--all", "--check", "--no-edits")
    session.run("vllm-overlay", "matrix", "--all", "--compare")
    session.run("pytest", "-n", "auto", "tests/quilt", *session.posargs)


@nox.session(tags=["matrix"])
def port(session: nox.Session) -> None:
    """Ports of upstream's real history, done again; asks the package index for the hashes."""
    session.install("-e", ".", *group("test"))
    session.run("pytest", "-n", "auto", "tests/port", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Every patched wheel: built twice, byte-identical, verified; `-- --sums FILE` to compare.
    And for which GPUs those for 64-bit Arm have code, which `matrix` does for the others."""
    session.install("-e", ".")
    session.run("vllm-overlay", "selfcheck", "--all", *session.posargs)
    session.run("vllm-overlay", "kernels", "--all", "--platform", "aarch64", "--check")


@nox.session(tags=["release"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def build(session: nox.Session, release: str) -> None:
    """The patched wheels of one release in dist/, built twice more, compared and verified."""
    session.install("-e", ".")
    session.run("vllm-overlay", "selfcheck", release)
    session.run("vllm-overlay", "build", release, *session.posargs)
    if "aarch64" in VERSIONS["releases"][release]:
        session.run("vllm-overlay", "build", release, "--platform", "aarch64", *session.posargs)


@nox.session(tags=["matrix"])
@nox.parametrize("release", RELEASES, ids=RELEASES)
def regress(session: nox.Session, release: str) -> None:
    """FAIL_TO_PASS tests of one release, on its stock and on its patched wheel."""
    session.install("-e", ".")
    session.run("vllm-overlay", "regress", release, *session.posargs)


@nox.session(tags=["matrix"])
@nox.parametrize("release", PREFIXES, ids=PREFIXES)
def each(session: nox.Session, release: str) -> None:
    """Every prefix of one release's series imports, and breaks no test that passed before."""
    session.install("-e", ".")
    session.run("vllm-overlay", "validate", release, "--each", "--run", *session.posargs)


@nox.session(tags=["matrix"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def upstream(session: nox.Session, release: str) -> None:
    """Upstream's own tests of one release, on its stock and on its patched wheel."""
    session.install("-e", ".")
    session.run("vllm-overlay", "upstream", release, *session.posargs)


@nox.session(tags=["matrix"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def matrix(session: nox.Session, release: str) -> None:
    """What becomes of every configuration of one release, patched, for which GPUs its wheel and
    torch have code, what its Triton compiles and which weights it takes: as matrix/ has it."""
    session.install("-e", ".")
    if session.posargs:
        session.run("vllm-overlay", "matrix", release, *session.posargs)
        return
    session.run("vllm-overlay", "kernels", release, "--check")
    session.run("vllm-overlay", "matrix", release, "--check")
    session.run("vllm-overlay", "matrix", release, "--triton", "--check")
    session.run("vllm-overlay", "matrix", release, "--weights", "--check")


@nox.session(tags=["matrix"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def settings(session: nox.Session, release: str) -> None:
    """Where parallelism, LoRA, speculative decoding and other settings change what becomes of one
    release's configurations, on its stock and on its patched wheel: as matrix/ has it."""
    session.install("-e", ".")
    if session.posargs:
        session.run("vllm-overlay", "matrix", release, "--settings", *session.posargs)
        return
    session.run("vllm-overlay", "matrix", release, "--settings", "--check")


@nox.session(tags=["gpu"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def gpu(session: nox.Session, release: str) -> None:
    """Whole engines of one release on an NVIDIA GPU, stock and patched; by hand, not in CI."""
    session.install("-e", ".")
    session.run("vllm-overlay", "regress", release, "--suite", "gpu", *session.posargs)


@nox.session(tags=["matrix"])
@nox.parametrize("release", PATCHED, ids=PATCHED)
def source(session: nox.Session, release: str) -> None:
    """A source build for the device `empty`, imported."""
    session.install("-e", ".")
    out = session.create_tmp()
    command = ("build", release, "--source", "--target", "empty", "--check-import", "--out", out)
    session.run("vllm-overlay", *command)


@nox.session(tags=["release"])
def report(session: nox.Session) -> None:
    """The HTML page of the matrix, the patches and the results."""
    session.install("-e", ".")
    session.run("vllm-overlay", "report", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The report in Chromium, by mouse and keyboard, on a wide screen and a narrow one."""
    session.install("-e", ".", *group("test"), *group("browser"))
    session.run("pytest", "tests/browser", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Repacking against wheel unpack + pack, and where validate's time goes."""
    session.install("-e", ".", *group("bench"))
    session.run("vllm-overlay", "bench", *session.posargs)
