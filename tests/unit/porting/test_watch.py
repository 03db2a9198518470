"""watch: which releases of an index count, and what becomes of each topic on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import stamina
from packaging.version import Version

from made_upstream import (
    IMPL,
    NEEDS,
    TEST,
    Ran,
    Upstream,
    accept_use_irope,
    accepted,
    release,
)
from overlay.base.console import Progress
from overlay.base.errors import Exit, OverlayError
from overlay.base.project import Project
from overlay.patches.attempt import AttemptStatus
from overlay.patches.workspace import Workspace
from overlay.porting import candidate, watch
from overlay.releases import versions
from overlay.releases.index import IndexSettings
from overlay.releases.sources import Cache, Fetcher

from ..server import Faults, serve

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    stamina.set_testing(True, attempts=2)
    yield
    stamina.set_testing(False)


def names(upstream: Upstream, *, newer: bool = False) -> list[str]:
    return [one.name for one in candidate.find_candidates(upstream.workspace(), newer=newer)]


def test_final_and_post_releases_in_range_that_are_not_listed(upstream: Upstream) -> None:
    for version in ("1.2", "1.0.post1", "1.2rc1", "1.3.dev0", "2.0", "0.8", "1.1+llama4.1", "1.10"):
        release(upstream, version, wheel=False)
    (upstream.served / "vllm_tools-1.4.tar.gz").write_bytes(b"another project's")
    (upstream.served / "vllm-1.5.zip.sig").write_bytes(b"no distribution")
    assert names(upstream) == ["1.0.post1", "1.2", "1.10"]
    assert names(upstream, newer=True) == ["1.0.post1", "1.2", "1.10", "2.0"]


def test_nothing_new(run: Run) -> None:
    ran = run("watch", "--exit-code")
    assert (ran.status, ran.out) == (0, "no new release of vllm in >=1.0,<2\n")
    assert run("watch", "--markdown").out == "There is no new release of vllm in >=1.0,<2.\n"
    assert json.loads(run("watch", "--json").out)["releases"] == {}


def test_a_new_release(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2")
    ran = run("watch")
    assert ran.status == 0, ran.err
    assert "1 offset (series of 1.1)" in ran.out
    assert "1 of 1 patch applied as is" in ran.out
    assert "attention-signatures/1.0.patch  offset +3" in ran.out
    assert "vllm-1.2-cp38-abi3-manylinux_2_31_x86_64.whl" in ran.out
    assert "Python >=3.9, torch 2.7.1, xformers 0.0.31" in ran.out
    assert run("watch", "--exit-code").status == 1
    before = (upstream.root / "VERSIONS.toml").read_bytes()
    found = json.loads(run("watch", "--json").out)["releases"]["1.2"]
    assert found["patches"] == {"applied": 1, "listed": 1}
    assert found["topics"]["attention-signatures"] == {
        "patch": "attention-signatures/1.0.patch",
        "status": "offset",
        "offsets": [3],
        "detail": "",
        "removal_met": None,
        "probe": {
            "verdict": "unknown",
            "why": "there is no vllm/model_executor/models/llama4.py",
            "needed": None,
        },
    }
    assert found["sdist"]["size"] == (upstream.served / "vllm-1.2.tar.gz").stat().st_size
    assert (upstream.root / "VERSIONS.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"vllm/attention.py": "\n" + IMPL}, "offset", ""),
        ({"vllm/attention.py": accepted(), **TEST}, "already upstream", "its reverse applies"),
        (
            {"vllm/attention.py": accepted().replace("self.scale = scale", "self.s = scale"),
             **TEST},
            "already upstream", "a merge changes nothing",
        ),
        (
            {"vllm/attention.py": IMPL.replace("self.scale = scale", "self.s = scale")},
            "conflict", "a three-way merge is clean",
        ),
        (
            {"vllm/attention.py": IMPL.replace("num_heads, scale", "heads, scale")},
            "conflict", "vllm/attention.py hunk 1",
        ),
        (
            {"vllm/attention.py": IMPL.replace("num_heads, scale", "heads, scale")},
            "conflict", "a three-way merge conflicts in vllm/attention.py",
        ),
        (TEST, "conflict", "tests/test_irope.py: the file exists already"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_topic(
    upstream: Upstream, changes: Mapping[str, str], status: str, told: str
) -> None:
    release(upstream, "1.2", changes)
    workspace = upstream.workspace()
    _, commit = candidate.fetch_sdist(workspace, candidate.get_candidate(workspace, "1.2"))
    (attempt,) = candidate.try_topics(workspace, "1.2", commit)
    assert candidate.shown_status(attempt).value == status
    assert told in candidate.detail(attempt)


def test_a_conflict_does_not_stop_the_topics_after_it(upstream: Upstream, run: Run) -> None:
    def doubled(tree: Path) -> None:
        file = tree / "vllm/__init__.py"
        file.write_text(file.read_text() + "doubled = True\n")

    upstream.patch("later/1.1.patch", doubled, series=("1.1",), before=())
    upstream.lock()
    release(upstream, "1.2", {"vllm/attention.py": "gone = True\n"})
    found = json.loads(run("watch", "--json").out)["releases"]["1.2"]
    assert found["patches"] == {"applied": 1, "listed": 2}
    assert "- patches: `1 of 2 patches applied as is`" in run("watch", "--markdown").out
    assert {topic: one["status"] for topic, one in found["topics"].items()} == {
        "attention-signatures": "conflict",
        "later": "clean",
    }


def test_an_older_text_of_a_topic_is_tried_and_a_newer_one_is_not(bare_upstream: Upstream) -> None:
    def changed(word: str) -> Callable[[Path], None]:
        def change(tree: Path) -> None:
            file = tree / "vllm/data/config.json"
            file.write_text(file.read_text().replace("{}", word))

        return change

    bare_upstream.patch("topic/1.0.patch", accept_use_irope, series=("1.0",))
    bare_upstream.patch("topic/1.1.patch", changed("[]"), series=("1.1",))
    newer = bare_upstream.patches / "topic/1.3.patch"
    newer.write_bytes((bare_upstream.patches / "topic/1.0.patch").read_bytes())
    bare_upstream.lock()
    release(bare_upstream, "1.2", {"vllm/data/config.json": "[1]\n"})
    workspace = bare_upstream.workspace()
    _, commit = candidate.fetch_sdist(workspace, candidate.get_candidate(workspace, "1.2"))
    (attempt,) = candidate.try_topics(workspace, "1.2", commit)
    assert (str(attempt.path), attempt.status) == ("topic/1.0.patch", AttemptStatus.OFFSET)


def test_later_topics_are_tried_on_what_applied(bare_upstream: Upstream) -> None:
    first = "topic-a/1.1.patch"
    bare_upstream.patch(first, accept_use_irope, series=("1.1",))

    def use_it(tree: Path) -> None:
        file = tree / "vllm/attention.py"
        file.write_text(file.read_text().replace("use_irope=False", "use_irope=True"))

    bare_upstream.patch("topic-b/1.1.patch", use_it, series=("1.1",), before=(first,))
    bare_upstream.lock()
    release(bare_upstream, "1.2")
    workspace = bare_upstream.workspace()
    _, commit = candidate.fetch_sdist(workspace, candidate.get_candidate(workspace, "1.2"))
    attempts = candidate.try_topics(workspace, "1.2", commit)
    assert [a.status for a in attempts] == [AttemptStatus.CLEAN, AttemptStatus.CLEAN]


def test_a_draft_is_what_the_files_say(upstream: Upstream) -> None:
    release(upstream, "1.2")
    workspace = upstream.workspace()
    found = candidate.draft_release(workspace, candidate.get_candidate(workspace, "v1.2"))
    assert (found.name, found.tag, found.series) == ("1.2", "v1.2", "series/1.2")
    assert (found.requires_python, found.torch, found.xformers) == (">=3.9", "2.7.1", "0.0.31")
    assert (
        workspace.base(found)
        == candidate.fetch_sdist(workspace, candidate.get_candidate(workspace, "1.2"))[1]
    )
    assert workspace.fetcher.fetch(found, "wheel", check=True).is_file()


@pytest.mark.parametrize(
    ("needs", "wheel", "why"),
    [
        (NEEDS.replace("torch==", "torch>="), True, "states no exact torch"),
        (NEEDS.replace("xformers", "triton"), True, "states no exact xformers"),
        ("", True, "no exact Requires-Python, torch, xformers"),
        ("Requires-Python: three\n", True, "three"),
        (NEEDS, False, "has no x86_64 wheel on the index"),
    ],
)
def test_a_draft_needs_every_pin(upstream: Upstream, needs: str, wheel: bool, why: str) -> None:
    release(upstream, "1.2", needs=needs, wheel=wheel)
    workspace = upstream.workspace()
    with pytest.raises(OverlayError, match=why):
        candidate.draft_release(workspace, candidate.get_candidate(workspace, "1.2"))


def test_a_condition_for_removal_that_is_met(run: Run, upstream: Upstream) -> None:
    file = upstream.patches / "attention-signatures/1.0.patch"
    removal = "Remove-When: v1.2 (V0 is gone)"
    file.write_text(re.sub("Remove-When: .*", removal, file.read_text()))
    upstream.lock()
    release(upstream, "1.2")
    told = f"its condition for removal is met: {removal}"
    assert told in " ".join(run("watch").out.split())
    assert f"- attention-signatures: `{told}`" in run("watch", "--markdown").out
    found = json.loads(run("watch", "--json").out)["releases"]["1.2"]["topics"]
    assert found["attention-signatures"]["removal_met"] == removal


def test_a_release_without_files_is_told_and_the_others_are_tried(
    run: Run, upstream: Upstream
) -> None:
    release(upstream, "1.2", wheel=False)
    release(upstream, "1.3")
    (upstream.served / "vllm-1.3.tar.gz").unlink()
    (upstream.served / "vllm-1.4.tar.gz").write_bytes(b"no archive")
    ran = run("watch")
    assert ran.status == 0, ran.err
    assert "1.2 has no x86_64 wheel on the index" in ran.out
    assert "1.3 has no sdist on the index" in ran.out
    assert "vllm-1.4.tar.gz is damaged" in " ".join(ran.out.split())
    assert ran.out.count("offset +3") == 1
    assert ran.out.count("not tried") == 2
    assert ran.out.count("0 of 1 patch applied as is") == 2


def asking(upstream: Upstream, url: str) -> Workspace:
    """A workspace that has nothing but the index at `url`."""
    settings = IndexSettings((url,), timeout=5.0)
    fetcher = Fetcher(
        Cache(upstream.cache), "vllm", lambda: settings, progress=Progress(enabled=False)
    )
    return Workspace(Project(upstream.root), fetcher)


def test_an_index_and_a_yanked_release_whose_reason_names_nobody(upstream: Upstream) -> None:
    release(upstream, "1.2")
    yanked = {"vllm-1.2.tar.gz": "ping @somebody `x`"}
    with serve(upstream.served, Faults(yanked=yanked)) as url:
        workspace = asking(upstream, url)
        (found,) = watch.watch(workspace)
    assert found.problems == ()
    assert found.wheel is not None
    assert found.wheel.size == (upstream.served / found.wheel.file).stat().st_size
    text = watch.markdown(workspace.versions, [found])
    assert "\n- yanked: `` ping @somebody `x` ``\n" in text
    assert "| attention-signatures | `attention-signatures/1.0.patch` | offset +3 |" in text
    assert text == watch.markdown(workspace.versions, [found])


def test_an_index_that_states_no_hash_is_not_trusted(upstream: Upstream) -> None:
    release(upstream, "1.2")
    with serve(upstream.served, Faults(no_hashes=True)) as url:
        (found,) = watch.watch(asking(upstream, url))
    assert [problem.partition(":")[0] for problem in found.problems] == [
        "cannot pin vllm-1.2.tar.gz",
        "cannot pin vllm-1.2-cp38-abi3-manylinux_2_31_x86_64.whl",
    ]
    assert not (upstream.cache / "files/vllm-1.2.tar.gz").exists()


def test_bytes_that_are_not_those_of_the_index_are_not_tried(upstream: Upstream) -> None:
    release(upstream, "1.2")
    size = (upstream.served / "vllm-1.2.tar.gz").stat().st_size
    upstream.workspace().apply(upstream.workspace().versions.get("1.1"))  # in the store
    with serve(upstream.served, Faults(body=b"x" * size)) as url:
        (found,) = watch.watch(asking(upstream, url))
    assert found.attempts == ()
    assert "is not the vllm-1.2.tar.gz that is pinned" in found.problems[0]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("watch", "--json", "--markdown"), 2, "--json or --markdown"),
        (("watch", "--newer", "1.2"), 2, "name releases or pass --newer"),
        (("watch", "1.1"), 2, "VERSIONS.toml lists it"),
        (("watch", "1.7"), 2, "the package index has no final or post release of that version"),
        (("--offline", "watch"), 2, "--offline forbids"),
        (("--index-url", "http://127.0.0.1:9/simple", "watch"), 3, "did not answer"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], status: int, text: str) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_the_range_covers_what_is_patched(upstream: Upstream) -> None:
    text = (upstream.root / "VERSIONS.toml").read_text()
    narrow = text.replace('">=1.0,<2"', '">=1.1,<2"')
    assert narrow != text
    with pytest.raises(OverlayError, match=r"range leaves out 1\.0") as caught:
        versions.parse(narrow, "VERSIONS.toml")
    assert caught.value.status is Exit.USAGE


def test_nearest(upstream: Upstream) -> None:
    listed = upstream.workspace().versions
    for version, name in (("1.0.post1", "1.0"), ("1.1.1", "1.1"), ("9", "1.1"), ("0.8", "1.0")):
        assert candidate.nearest_release(listed, Version(version)).name == name
