"""The commands that look up what Llama 4 does somewhere: options and printing."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import click
from rich.table import Table
from rich.text import Text

from overlay.answers import behaviour, doctor, explain, flags, gpus, later, launch, matrix, probe
from overlay.answers.checkpoint import find as find_checkpoint
from overlay.base.console import out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import EPILOG, json_option, pass_workspace, tokens
from overlay.patches.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., None])


def _configuration(command: Command) -> Command:
    """Options that `explain` and `doctor` share: what no environment tells."""
    options = (
        click.option("--gpu", metavar="NAME", help="T4, or as nvidia-smi says: 'Tesla T4'."),
        click.option("--capability", metavar="X.Y", help="Compute capability, in place of --gpu."),
        click.option(
            "--kv-cache-dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "fp8", "fp8_e4m3", "fp8_e5m2"]),
        ),
        click.option(
            "--max-model-len", callback=tokens, metavar="N",
            help="Tokens, or as vLLM takes them: 32k, 32K; past the chunk if not given.",
        ),
        click.option(
            "--chunk", type=click.IntRange(1), metavar="N",
            help=f"attention_chunk_size of the model; {explain.CHUNK}, or as --checkpoint has it.",
        ),
        click.option(
            "--dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "half", "float16", "bfloat16", "float", "float32"]),
        ),
        click.option(
            "--quantization", metavar="NAME",
            help="As vLLM takes it: awq, moe_wna16, fp8 (of an unquantised checkpoint) …",
        ),
        click.option(
            "--checkpoint", metavar="PATH|FORMAT",
            help="Its folder or config.json; or how it is quantised: awq, w4a16, w8a8-fp8 …",
        ),
    )  # fmt: skip
    command = _with_flags(command)
    for option in reversed(options):
        command = option(command)
    return command


def _with_flags(command: Command) -> Command:
    """Options of `vllm serve` that are no axis of the matrix; the command gets them as one."""
    options = {
        "pipeline_parallel_size": click.option(
            "--pipeline-parallel-size", "-pp", type=click.IntRange(1), default=1, metavar="N",
            help="Stages; asked with 2.",
        ),
        "tensor_parallel_size": click.option(
            "--tensor-parallel-size", "-tp", type=click.IntRange(1), default=1, metavar="N",
            help="GPUs that share each layer; asked with 2.",
        ),
        "enable_lora": click.option("--enable-lora", is_flag=True),
        "speculative": click.option(
            "--speculative", type=click.Choice(["ngram", "draft", "eagle"]),
            help="--speculative-config: n-grams, a draft model, or EAGLE's head.",
        ),
        "kv_connector": click.option(
            "--kv-connector", is_flag=True, help="--kv-transfer-config, of any connector."
        ),
        "disable_hybrid_kv_cache_manager": click.option(
            "--disable-hybrid-kv-cache-manager", is_flag=True
        ),
        "enable_chunked_prefill": click.option(
            "--enable-chunked-prefill/--no-enable-chunked-prefill", default=None
        ),
        "enable_prefix_caching": click.option(
            "--enable-prefix-caching/--no-enable-prefix-caching", default=None
        ),
        "block_size": click.option(
            "--block-size", type=click.Choice(["8", "16", "32", "64", "128"]),
            help="Tokens of a block of the KV cache.",
        ),
        "enforce_eager": click.option(
            "--enforce-eager", is_flag=True, help="No CUDA graphs, no torch.compile."
        ),
    }  # fmt: skip

    @functools.wraps(command)
    def wrapped(*arguments: Any, **values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        command(*arguments, set_flags=flags.asked(**given), **values)

    found = cast(Command, wrapped)
    for option in reversed(options.values()):
        found = option(found)
    return found


@click.command(epilog=EPILOG)
@click.option("--release", metavar="RELEASE", help="This one in detail; all in a table without it.")
@_configuration
@click.option("--backend", metavar="NAME", help="VLLM_ATTENTION_BACKEND, if it is set.")
@click.option("--v1", type=click.Choice(["0", "1"]), help="VLLM_USE_V1, if it is set.")
@click.option("--flashinfer/--no-flashinfer", help="Whether FlashInfer is installed.")
@json_option
@pass_workspace
def explain_command(
    workspace: Workspace,
    release: str | None,
    gpu: str | None,
    capability: str | None,
    kv_cache_dtype: str,
    max_model_len: int | None,
    chunk: int | None,
    dtype: str,
    quantization: str | None,
    checkpoint: str | None,
    backend: str | None,
    v1: str | None,
    flashinfer: bool,
    set_flags: flags.Flags,
    as_json: bool,
) -> None:
    """Tell which engine and backend Llama 4 gets, whether it is right, and what to set instead.

    Nothing is run: it is looked up in matrix/.

    \b
    Example:
      vllm-overlay explain --release 0.8.5 --gpu T4
      vllm-overlay explain --capability 8.6 --kv-cache-dtype fp8 --max-model-len 32768
      vllm-overlay explain --release 0.8.5.post1 --gpu A100 --quantization awq
      vllm-overlay explain --gpu T4 --checkpoint models/scout-awq
      vllm-overlay explain --gpu H100 --release 0.10.0 --kv-connector
    """
    named = _named_gpu(gpu, capability)
    if named is None:
        raise click.UsageError("name the GPU: --gpu T4, or --capability 7.5")
    unset = matrix.UNSET
    settings = explain.Settings(
        kv_cache_dtype, dtype, backend or unset, v1 or unset, flashinfer, max_model_len,
        flags=set_flags,
    )  # fmt: skip
    settings = _of_checkpoint(settings, checkpoint, quantization, chunk, as_json)
    versions = workspace.versions
    known = later.load(workspace.project.root, versions)
    if release and (newer := later.find(known, versions, release)):
        assert known is not None
        _explain_later(known, newer, named, settings, as_json)
        return
    chosen = versions.patched if release is None else (versions.get(release),)
    target, answers = explain.ask(workspace, chosen, named, settings)
    afterwards = later.ask_all(known, named, settings) if known and not release else []
    looked_up = workspace.project.root, target, settings, answers
    if as_json:
        told = explain.as_json(target, settings, answers)
        for one in () if settings.flags else launch.of_all(*looked_up):
            told["releases"][one.release]["launch"] = launch.as_json(one)
        if afterwards:
            told["later"] = later.brief_json(afterwards)
        print_json(told)
        return
    _wrapped(f"{target}, {settings}")
    if target.note:
        _wrapped(f"Note: {target.note}.")
    if release:
        _print_lines(explain.lines(answers[0], target.name) if answers else [])
    elif answers:
        _print_answers(answers)
    if afterwards:
        _wrapped(later.summary(afterwards))
    # A line with these flags would not be one that was asked.
    line = None if settings.flags else launch.newest(*looked_up)
    if line:
        _print_launch(line)


def _explain_later(
    known: later.Known,
    release: str,
    gpu: tuple[str, str],
    settings: explain.Settings,
    as_json: bool,
) -> None:
    """Tell of a release that is newer than all that are patched."""
    one = later.ask(known, release, gpu, settings)
    if as_json:
        print_json(later.as_json(one, settings))
        return
    _wrapped(f"{one.target}, {later.asked(settings)}")
    _print_lines(later.lines(one))


@click.command(epilog=EPILOG)
@click.option(
    "--python", metavar="PYTHON", help="Look into its environment; a venv's folder will do."
)
@click.option(
    "--probe",
    "to_probe",
    is_flag=True,
    help="Run the probe of each topic there: one assertion of behaviour, with its torch.",
)
@_configuration
@json_option
@pass_workspace
def doctor_command(
    workspace: Workspace,
    python: str | None,
    to_probe: bool,
    gpu: str | None,
    capability: str | None,
    kv_cache_dtype: str,
    max_model_len: int | None,
    chunk: int | None,
    dtype: str,
    quantization: str | None,
    checkpoint: str | None,
    set_flags: flags.Flags,
    as_json: bool,
) -> None:
    """Tell what Llama 4 will do in this environment, and what to change: its vLLM, GPUs, settings.

    Exit status 1 if something has to be changed; with --probe also where a patched vLLM does not
    behave as patched. Without --python it looks at the environment
    that it runs in if vLLM is there, else at $VIRTUAL_ENV, else at the first python3.

    \b
    Example:
      vllm-overlay doctor --kv-cache-dtype fp8 --max-model-len 32768
      vllm-overlay doctor --probe --python /usr/bin/python3
    """
    settings = explain.Settings(kv_cache_dtype, dtype, max_model_len=max_model_len, flags=set_flags)
    settings = _of_checkpoint(settings, checkpoint, quantization, chunk, as_json)
    named = _named_gpu(gpu, capability)
    interpreter = probe.choose_python(python, os.environ)
    report = doctor.examine(workspace, interpreter, os.environ, named, settings)
    found = behaviour.examine(workspace, interpreter, report) if to_probe else None
    if found:
        report = replace(report, to_change=(*report.to_change, *found.to_change))
    if as_json:
        told = {"probes": found.as_json()} if found else {}
        print_json({**doctor.as_json(report), **told})
    else:
        _print_lines([*doctor.lines(report), *(found.lines() if found else ())])
        for change in report.to_change:
            # Not wrapped: there are commands in it, to be copied.
            out.print(f"To change: {change}", soft_wrap=True, markup=False, highlight=False)
        if not report.to_change:
            _wrapped("No change needed.")
    if report.to_change:
        sys.exit(Exit.PROBLEMS)


def _of_checkpoint(
    settings: explain.Settings,
    checkpoint: str | None,
    quantization: str | None,
    chunk: int | None,
    as_json: bool,
) -> explain.Settings:
    """The settings with what the options name of a checkpoint; a line says what was read of it."""
    found = None if checkpoint is None else find_checkpoint(checkpoint)
    if found and found.source and not as_json:
        _wrapped(f"Read {found.source}: {found}.")
    return explain.of_checkpoint(settings, found, quantization, chunk)


def _named_gpu(gpu: str | None, capability: str | None) -> tuple[str, str] | None:
    """Name and capability of the GPU that the options name."""
    if gpu and capability:
        raise click.UsageError("name the GPU with --gpu or --capability, not both")
    if gpu:
        found = gpus.find(gpu)
        return found.name, found.capability
    return ("", explain.capability_of(capability)) if capability else None


def _wrapped(text: str) -> None:
    out.print(text, soft_wrap=False, markup=False)


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for label, text in lines:
        table.add_row(Text(label), Text(text))
    out.print(table, soft_wrap=False)


def _print_launch(found: launch.Launch) -> None:
    for label, text in launch.lines(found):
        if label == "launch":
            # Not wrapped: it is to be copied.
            out.print(f"To launch {found.release}:", markup=False)
            out.print(f"  {text}", soft_wrap=True, markup=False, highlight=False)
        else:
            _wrapped(f"  {text}" if not label else f"{label}: {text}")


def _print_answers(answers: Sequence[explain.Answer]) -> None:
    _wrapped(explain.summary(answers))
    table = Table("release", "stock", "overlay", "to change here", box=None, pad_edge=False)
    for one in answers:
        row = (
            one.release.name,
            explain.brief(one.stock.outcome),
            explain.brief(one.patched.outcome),
            explain.change(one.patched),
        )
        table.add_row(*map(Text, row))
    out.print(table, soft_wrap=False)
    told = (explain.other_faults, explain.unknown, explain.of_flags)
    for sentence in (one for each in told for one in each(answers)):
        _wrapped(sentence)
    _wrapped("One of them in detail: --release RELEASE")
