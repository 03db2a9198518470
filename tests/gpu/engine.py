"""Run one engine with given settings and write down what it says; a process of its own each time.

python -m gpu.engine SETTINGS.json ANSWERS.json

Environment variables choose engine and backend, and vLLM reads some of them once a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What to run."""

    model: str
    """Folder of the checkpoint."""
    prompts: list[list[int]]
    """Token ids."""
    new_tokens: int
    """How many tokens each prompt is continued by, greedily."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `vllm.LLM` beside the common ones below."""
    is_cached: bool = False
    """Whether the prompts are run once before, for their KV cache to be found again."""
    has_prompt_logprobs: bool = True
    """Whether to ask for the prompt's log-probabilities too."""


@dataclass(frozen=True)
class Answer:
    """One sequence."""

    tokens: list[int]
    """Prompt and continuation."""
    prompt_len: int
    logprobs: list[float]
    """Of the tokens from `first` on."""
    first: int
    """1 with log-probabilities of the prompt, else the prompt's length."""
    cached_tokens: int
    """Prompt tokens taken from the prefix cache."""


@dataclass(frozen=True)
class Answers:
    """What came of a run."""

    vllm: str
    """Installed version."""
    backend: str
    """Module and class of the attention impl, or "" where the layers are in another process."""
    seconds: float
    """Wall time of the last generation."""
    answers: list[Answer]

    @classmethod
    def read(cls, file: Path) -> Answers:
        """Read what `main` wrote."""
        data = json.loads(file.read_text("utf-8"))
        return cls(**{**data, "answers": [Answer(**each) for each in data["answers"]]})


COMMON: dict[str, Any] = {
    "dtype": "float16",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 16,
    "gpu_memory_utilization": 0.1,
    "num_gpu_blocks_override": 512,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
}


def backend_of() -> str:
    """Name the module and class of the impl that an attention layer in this process has."""
    import gc

    from vllm.attention.layer import Attention

    # Not isinstance: that asks weak references to what is gone.
    layers = [each for each in gc.get_objects() if issubclass(type(each), Attention)]
    impls = [type(layer.impl) for layer in layers]
    return f"{impls[0].__module__}.{impls[0].__name__}" if impls else ""


def run(settings: Settings) -> Answers:
    """Start an engine, generate, and collect tokens and log-probabilities."""
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(settings.model, **{**COMMON, **settings.engine_args})
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=settings.new_tokens,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=1 if settings.has_prompt_logprobs else None,
        detokenize=False,
    )
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in settings.prompts]
    if settings.is_cached:
        llm.generate(prompts, sampling, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Answers(vllm.__version__, backend_of(), seconds, [answer(o) for o in outputs])


def answer(output: Any) -> Answer:
    """Flatten a `RequestOutput`."""
    prompt = list(output.prompt_token_ids)
    completion = output.outputs[0]
    tokens = [*prompt, *completion.token_ids]
    entries = [*(output.prompt_logprobs or [None] * len(prompt)), *completion.logprobs]
    first = 1 if output.prompt_logprobs else len(prompt)
    pairs = zip(tokens[first:], entries[first:], strict=True)
    logprobs = [entry[token].logprob for token, entry in pairs]
    return Answer(tokens, len(prompt), logprobs, first, output.num_cached_tokens or 0)


def start(
    folder: Path, settings: Settings, env: Mapping[str, str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this module in a process of its own in `folder`, where it leaves answers.json.

    `env` is added to this process's environment, and these tests to the path that it imports from.
    """
    (folder / "settings.json").write_text(json.dumps(asdict(settings)), "utf-8")
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "gpu.engine", "settings.json", "answers.json"],
        cwd=folder,
        env={**os.environ, **env, "PYTHONPATH": path},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    """Read settings, run, write answers."""
    source, target = map(Path, sys.argv[1:])
    settings = Settings(**json.loads(source.read_text("utf-8")))
    target.write_text(json.dumps(asdict(run(settings))), "utf-8")


if __name__ == "__main__":
    main()
