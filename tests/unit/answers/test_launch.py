"""Launch lines: each, typed in, is one that `explain` calls right, on GPUs that hold it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from overlay.answers import cards, explain, gpus, launch, memory
from overlay.answers.cards import CARDS, Card
from overlay.answers.explain import Answer, Settings, Target
from overlay.answers.launch import CHECKPOINTS, LENGTHS, Launch, Line, Verdict
from overlay.base.project import Project
from overlay.cli.ask import explain_command
from overlay.cli.main import main
from overlay.patches.workspace import Workspace

ROOT = Path(__file__).parents[3]
#: A card of each capability.
ONE_EACH = {card.capability: card for card in reversed(CARDS)}


@cache
def asked(card: Card, **settings: Any) -> tuple[Target, Settings, tuple[Answer, ...]]:
    """What `explain` says of a card, in all releases."""
    workspace = Workspace.open(Project(ROOT), ROOT / "nowhere")
    wanted = Settings(**settings)
    gpu = card.gpu, card.capability
    target, answers = explain.ask(workspace, workspace.versions.patched, gpu, wanted)
    return target, wanted, tuple(answers)


#: Makes a judge of what `explain` answers.
Judging = Callable[[Answer], launch.Judge]


def all_run(answer: Answer) -> launch.Judge:
    """Every format runs where unquantised weights do, AWQ's with a flag."""
    use = answer.patched.use
    why = "" if use else "no settings are right on this GPU"
    flags = {"awq": "moe_wna16"}
    return lambda checkpoint: Verdict(use, why, flags.get(checkpoint.kind, ""))


def none_runs(answer: Answer) -> launch.Judge:
    return lambda checkpoint: Verdict(None, f"not in {answer.release.name}")


def none_is_known(answer: Answer) -> launch.Judge:
    return lambda checkpoint: Verdict(None)


def only_unquantised_runs(answer: Answer) -> launch.Judge:
    use = answer.patched.use
    return lambda checkpoint: Verdict(use if checkpoint.format == memory.UNQUANTISED else None)


def launches(card: Card, judging: Judging | None, **settings: Any) -> Iterator[Launch]:
    target, wanted, answers = asked(card, **settings)
    for answer in answers:
        yield launch.launch(ROOT, target, wanted, answer, judging and judging(answer))


def the_line(card: str, release: str, model: str = "Scout", **settings: Any) -> Line:
    """The line of a release for a card on which every format runs."""
    (one,) = (card_ for card_ in CARDS if card_.gpu == card)
    (found,) = (one for one in launches(one, all_run, **settings) if one.release == release)
    return next(line for line in found.lines if line.checkpoint.shape.name == model)


def typed(command: str) -> tuple[list[str], dict[str, str], str]:
    """A line as a shell takes it: its words for `explain`, its other flags, and the model."""
    words = shlex.split(command)
    start = words.index("vllm")
    variables, (vllm, serve, model, *rest) = words[:start], words[start:]
    assert (vllm, serve) == ("vllm", "serve")
    flags = dict(zip(rest[::2], rest[1::2], strict=True))
    options = {"VLLM_USE_V1": "--v1", "VLLM_ATTENTION_BACKEND": "--backend"}
    given = [part for one in variables for part in (options[one.split("=")[0]], one.split("=")[1])]
    # On how many GPUs is the line's own answer, which `explain` gives none of where it is set.
    known = {parameter.opts[0] for parameter in explain_command.params}
    own = {"--quantization", "--tensor-parallel-size"}
    for name in [name for name in flags if name in known - own]:
        given += [name, flags.pop(name)]
    return given, flags, model


@pytest.mark.parametrize("card", ONE_EACH.values(), ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"kv_cache_dtype": "fp8"}, {"backend": "XFORMERS"}], ids=lambda one: str(one)
)
def test_a_line_is_what_explain_calls_right(card: Card, settings: dict[str, Any]) -> None:
    """Of every release: what the line sets is right, asked anew."""
    target, _, answers = asked(card, **settings)
    for answer, found in zip(answers, launches(card, all_run, **settings), strict=True):
        assert bool(found.lines) or found.without
        assert (answer.patched.use is None) <= (not found.lines)
        for line in found.lines:
            given, _, _ = typed(line.command)
            with explain_command.make_context("explain", ["--gpu", card.gpu, *given]) as context:
                read = context.params
            anew = Settings(
                read["kv_cache_dtype"], read["dtype"], read["backend"] or "unset",
                read["v1"] or "unset", False, read["max_model_len"],
            )  # fmt: skip
            assert target.column is not None
            assert answer.patched.use is not None
            assert anew.cell(target.column) == answer.patched.use.cell
            assert answer.patched.use.outcome.verdict == "right"


def test_what_is_printed_is_right_when_asked_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: the command prints a line, whose words the command is asked about."""

    def say(*arguments: str) -> dict[str, Any]:
        command = ["vllm-overlay", "--root", str(ROOT), "explain", *arguments, "--json"]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit):
            main()
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    where = ("--gpu", "Quadro RTX 8000", "--release", "0.8.5.post1")
    (line,) = say(*where, "--kv-cache-dtype", "fp8")["releases"]["0.8.5.post1"]["launch"]["lines"]
    given, others, model = typed(line["command"])
    assert model == "SCOUT-AWQ"
    assert others == {"--tensor-parallel-size": "2", "--quantization": "moe_wna16"}
    assert line["gpus"] == 2
    again = say(*where, *given)["releases"]["0.8.5.post1"]
    assert again["patched"]["verdict"] == "right"
    assert again["launch"]["lines"][0]["command"] == line["command"]


def test_it_is_printed_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To be copied, however narrow the terminal is; of all releases the newest's."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", ["vllm-overlay", "--root", str(ROOT), "explain", "--gpu=H200"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    name = "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic"
    assert f"To launch 0.11.0:\n  vllm serve {name} --max-model-len 32768\n" in said
    name = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
    whole = f"  vllm serve {name} --tensor-parallel-size 4 --max-model-len 131072\n"
    assert f"To launch 0.11.0:\n{whole}" in said
    assert said.count("To launch") == 2


@pytest.mark.parametrize("card", ONE_EACH.values(), ids=str)
def test_it_fits(card: Card) -> None:
    """And with half as many GPUs it does not."""
    for found in launches(card, all_run):
        for line in found.lines:
            shape, format_ = line.checkpoint.shape, line.checkpoint.format
            weights = format_.bytes(shape, 32 if "float32" in line.command else 16)
            assert line.need.fits(card.memory)
            half = line.need.gpus // 2
            if half:
                need = memory.need(shape, weights, line.cache, LENGTHS[1], half)
                assert not need.fits(card.memory)


def test_fewer_gpus_come_before_more_bits() -> None:
    assert the_line("H100", "0.10.2").checkpoint.format == memory.W4A16
    assert the_line("H200", "0.10.2").checkpoint.format == memory.FP8
    assert the_line("H200", "0.10.2").need.gpus == 1
    assert "--tensor-parallel-size" not in the_line("H200", "0.10.2").command


def test_a_flag_that_weights_need_is_in_the_line() -> None:
    def awq_alone(answer: Answer) -> launch.Judge:
        every = all_run(answer)
        return lambda one: every(one) if one.kind == "awq" else Verdict(None, "not here")

    (found,) = (one for one in launches(CARDS[1], awq_alone) if one.release == "0.8.5.post1")
    assert found.lines[0].command.startswith("vllm serve SCOUT-AWQ --tensor-parallel-size 8 ")
    assert "--quantization moe_wna16" in found.lines[0].command


def test_a_length_that_is_asked_for() -> None:
    assert [the_line(card, "0.10.2").length for card in ("A100", "B200")] == [32768, 131072]
    line = the_line("A100", "0.10.2", max_model_len=131072)
    assert (line.length, line.need.gpus) == (131072, 2)
    assert the_line("A100", "0.10.2", max_model_len=4096).length == 4096


def test_layers_that_drop_chunks_take_less() -> None:
    kept, dropped = the_line("H100", "0.9.2"), the_line("H100", "0.10.0")
    assert not kept.cache.drops
    assert dropped.cache.drops
    assert dropped.cache.bytes(memory.SCOUT, 131072) < kept.cache.bytes(memory.SCOUT, 131072) / 2


def test_an_fp8_cache_takes_half() -> None:
    whole, half = the_line("H100", "0.9.2"), the_line("H100", "0.9.2", kv_cache_dtype="fp8")
    assert 2 * half.cache.bytes(memory.SCOUT, 8192) == whole.cache.bytes(memory.SCOUT, 8192)


def test_fp8_maverick_does_not_fit_on_four_a100() -> None:
    """Four hold 320 GB, and it has 417."""
    line = the_line("A100", "0.10.2", "Maverick")
    assert line.checkpoint.name == "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
    assert line.need.gpus == 8
    assert the_line("H200", "0.10.2", "Maverick").need.gpus == 4


def test_why_there_is_no_line() -> None:
    v100, t4 = CARDS[:2]
    newest = list(launches(v100, none_runs))[-1]
    assert not newest.lines
    assert newest.without == (
        "Scout, unquantised, fp8, w4a16, AWQ, GPTQ: not in 0.11.0",
        "Maverick, fp8 experts: not in 0.11.0",
    )
    (oldest, *_) = launches(v100, none_is_known)
    assert oldest.without[0] == (
        "Scout, unquantised, fp8, w4a16, AWQ, GPTQ: whether it runs there is not known here"
    )
    (oldest, *_) = launches(t4, only_unquantised_runs)
    weights = "202.4 GiB of weights and a KV cache of 32768 tokens"
    assert f"unquantised: {weights} do not fit on eight T4 16 GB (15.0 GiB)" in oldest.without[0]


def test_what_triton_does_not_compile_has_no_line() -> None:
    """On a T4, where nothing else computes AWQ's experts."""
    (awq,) = (one for one in CHECKPOINTS if one.kind == "awq")
    target, wanted, answers = asked(CARDS[1], dtype="float16")
    found = {one.release.name: launch.judge_of(ROOT, target, wanted, one)(awq) for one in answers}
    assert found["0.8.5.post1"].quantization == "moe_wna16"
    right = {name for name, verdict in found.items() if verdict.use}
    assert right == {"0.8.3", "0.8.4", "0.8.5", "0.8.5.post1", "0.10.2", "0.11.0"}


def test_where_nothing_is_right_there_is_no_line() -> None:
    for found in launches(ONE_EACH["12.0"], all_run):
        assert bool(found.lines) is (found.release in ("0.10.2", "0.11.0"))
        assert found.lines or found.without[0].startswith("Scout, unquantised, ")
        assert found.lines or found.without[0].endswith(": no settings are right on this GPU")


def test_unknown_memory_is_said() -> None:
    target, wanted, answers = asked(Card("A16", 64, 1))
    (found,) = launch.of_all(ROOT, target, wanted, answers[-1:])
    assert found.without == ("how much memory A16 (capability 8.6) has is not known here",)


def test_cards_are_gpus_that_are_known() -> None:
    names = [card.gpu for card in CARDS]
    assert len(set(names)) == len(names)
    for card in CARDS:
        assert gpus.find(card.gpu).name == card.gpu
        # Error correction may take a sixteenth.
        assert 0.92 * card.sold_as <= card.mib / 1024 <= card.sold_as
    assert cards.card_of("", "8.0") == cards.card_of("A100", "8.0")


def test_every_model_is_on_the_hub_but_ones_own() -> None:
    own = [one for one in CHECKPOINTS if one.name.isupper()]
    assert [one.format for one in own] == [memory.AWQ, memory.GPTQ]
    for one in CHECKPOINTS:
        assert one in own or one.name.count("/") == 1


def test_the_page_is_what_explain_prints(tmp_path: Path) -> None:
    text = (ROOT / "docs/launch.md").read_text("utf-8")
    head, _, rest = text.partition("<!-- weights -->\n")
    _, _, lines = rest.partition("<!-- lines -->\n")
    middle = rest[rest.index("\n\n") :].partition("<!-- lines -->\n")[0]
    made = "".join(
        (head, "<!-- weights -->\n", launch.weights_table().rstrip(), middle, "<!-- lines -->\n",
         launch.page(Workspace.open(Project(ROOT), ROOT / "nowhere")))
    )  # fmt: skip
    (tmp_path / "launch.md").write_text(made, "utf-8")
    assert text == made, f"docs/launch.md is to be as {tmp_path / 'launch.md'}"
    assert lines.count("### ") == len(launch.ON_PAGE)
