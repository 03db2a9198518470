"""Run one engine with given settings and write down what it says; a process of its own each time.

python -m gpu.engine SETTINGS.json ANSWERS.json

Environment variables choose engine and backend, and vLLM reads some of them once a process.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IMAGE_TOKEN = 4
"""`<|image|>` of the checkpoint's tokenizer, in whose place vLLM puts the tokens of an image."""


@dataclass(frozen=True)
class Settings:
    """What to run."""

    model: str
    """Folder of the checkpoint."""
    prompts: list[list[int]]
    """Token ids."""
    new_tokens: list[int]
    """How many tokens each prompt is continued by, greedily."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `vllm.LLM`."""
    image_side: int = 0
    """Side in pixels of the image in each prompt, or 0 for none."""
    is_cached: bool = False
    """Whether the prompts are run once before, for their KV cache to be found again."""
    has_prompt_logprobs: bool = True
    """Whether to ask for the prompt's log-probabilities too."""


@dataclass(frozen=True)
class Answer:
    """One sequence."""

    tokens: list[int]
    """Prompt and continuation; with an image, its tokens in the prompt."""
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

    about: dict[str, str]
    """What ran, as the engine itself has it: versions, device, engine, backend, dtypes, graphs."""
    seconds: float
    """Wall time of the last generation."""
    answers: list[Answer]

    @property
    def backend(self) -> str:
        """Module and class of the attention impl that all workers have."""
        return self.about["backend"]

    @classmethod
    def read(cls, file: Path) -> Answers:
        """Read what `main` wrote."""
        data = json.loads(file.read_text("utf-8"))
        return cls(**{**data, "answers": [Answer(**each) for each in data["answers"]]})


def picture(side: int, number: int) -> Any:
    """The image of prompt `number`: noise, [side, side] pixels of 3 colours, as PIL has it."""
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(number).integers(0, 256, (side, side, 3), numpy.uint8)
    return Image.fromarray(pixels)


def instances(name: str, module: str) -> list[Any]:
    """All living instances of a class in this process."""
    import gc
    import importlib

    cls = getattr(importlib.import_module(module), name)
    # Not isinstance: that asks weak references to what is gone.
    return [each for each in gc.get_objects() if issubclass(type(each), cls)]


def backend_of(_worker: object = None) -> str:
    """Module and class of the attention impl in this process, of a worker or not."""
    impls = [type(layer.impl) for layer in instances("Attention", "vllm.attention.layer")]
    # The text model's layers come last.
    return f"{impls[-1].__module__}.{impls[-1].__name__}" if impls else ""


def about(llm: Any, ask_workers: Callable[..., list[str]]) -> dict[str, str]:
    """Say what ran; `ask_workers` calls a function in each worker."""
    import torch
    import vllm

    config = instances("VllmConfig", "vllm.config")[0]
    workers = [backend_of()]
    if config.parallel_config.world_size > 1:
        workers = ask_workers(backend_of)
    engine = "V1" if ".v1." in type(getattr(llm, "llm_engine", llm)).__module__ else "V0"
    return {
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "engine": engine,
        "backend": " and ".join(sorted(set(workers))),
        "workers": str(len(workers)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "compilation": compilation(config, engine),
        "prefix_caching": str(bool(config.cache_config.enable_prefix_caching)),
    }


def compilation(config: Any, engine: str) -> str:
    """The level of torch.compile, and which CUDA graphs."""
    compiled = config.compilation_config
    if config.model_config.enforce_eager:
        graphs = "no graphs"
    elif engine == "V0":
        graphs = "graphs of decodes"
    else:
        mode = getattr(compiled, "cudagraph_mode", None)
        graphs = f"graphs {mode.name.lower()}" if mode else "graphs piecewise"
    return f"level {int(compiled.level)}, {graphs}"


def prompts_of(settings: Settings) -> list[Any]:
    """The prompts as `LLM.generate` takes them."""
    if not settings.image_side:
        return [{"prompt_token_ids": prompt} for prompt in settings.prompts]
    return [
        {
            "prompt_token_ids": prompt,
            "multi_modal_data": {"image": picture(settings.image_side, number)},
        }
        for number, prompt in enumerate(settings.prompts)
    ]


def sampling_of(settings: Settings) -> list[Any]:
    """Greedy, for each prompt."""
    from vllm import SamplingParams

    return [
        SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            logprobs=1,
            prompt_logprobs=1 if settings.has_prompt_logprobs else None,
            detokenize=False,
        )
        for new_tokens in settings.new_tokens
    ]


def run(settings: Settings) -> Answers:
    """Start an engine, generate, and collect tokens and log-probabilities."""
    from vllm import LLM

    llm = LLM(settings.model, **settings.engine_args)
    prompts, sampling = prompts_of(settings), sampling_of(settings)
    if settings.is_cached:
        llm.generate(prompts, sampling, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Answers(about(llm, llm.collective_rpc), seconds, [answer(o) for o in outputs])


def is_v0_pipeline(settings: Settings) -> bool:
    """Whether the engine is one that `LLM` refuses."""
    stages = settings.engine_args.get("pipeline_parallel_size", 1)
    return stages > 1 and os.environ.get("VLLM_USE_V1") == "0"


async def run_pipeline(settings: Settings) -> Answers:
    """Do the same with V0's asynchronous engine, the only one of its engines that has stages."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    # LLM's default; no server reads the statistics.
    args = AsyncEngineArgs(settings.model, **{"disable_log_stats": True, **settings.engine_args})
    engine = AsyncLLMEngine.from_engine_args(args)
    # Once requests run, the workers of the stages are in a loop that answers nothing else.
    what_runs = about(engine.engine, engine.engine.collective_rpc)

    async def last(number: int, prompt: Any, sampling: Any) -> Any:
        outputs = [each async for each in engine.generate(prompt, sampling, f"request-{number}")]
        return outputs[-1]

    asked = zip(prompts_of(settings), sampling_of(settings), strict=True)
    start = time.perf_counter()
    outputs = await asyncio.gather(*(last(i, *each) for i, each in enumerate(asked)))
    seconds = time.perf_counter() - start
    engine.shutdown_background_loop()
    return Answers(what_runs, seconds, [answer(o) for o in outputs])


def answer(output: Any) -> Answer:
    """Flatten a `RequestOutput`."""
    prompt = list(output.prompt_token_ids)
    completion = output.outputs[0]
    tokens = [*prompt, *completion.token_ids]
    entries = [*(output.prompt_logprobs or [None] * len(prompt)), *completion.logprobs]
    first = 1 if output.prompt_logprobs else len(prompt)
    pairs = zip(tokens[first:], entries[first:], strict=True)
    # An engine that says nothing of a token that it was given or gave is wrong there.
    logprobs = [entry[token].logprob if token in entry else -math.inf for token, entry in pairs]
    return Answer(tokens, len(prompt), logprobs, first, output.num_cached_tokens or 0)


def own_caches(folder: Path) -> dict[str, str]:
    """Variables that keep what is compiled in `folder`: engines side by side share nothing."""
    names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name.lower()) for name in names}


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
        env={**os.environ, **own_caches(folder), **env, "PYTHONPATH": path},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def main(arguments: Sequence[str]) -> None:
    """Read settings, run, write answers."""
    source, target = map(Path, arguments)
    settings = Settings(**json.loads(source.read_text("utf-8")))
    answers = asyncio.run(run_pipeline(settings)) if is_v0_pipeline(settings) else run(settings)
    target.write_text(json.dumps(asdict(answers)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
