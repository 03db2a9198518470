"""How fast chunked local attention is, against global attention on the same GPU, in one run.

python -m gpu.speed layer --backend xformers|flash_attn
python -m gpu.speed engines --backend xformers|flash_attn|v1 --stock PATH --patched PATH

`layer`: one RoPE layer at Llama 4 Scout's shape, with `use_irope` and without: without is what
stock computes in every layer. A decode step is timed as in the engine: a CUDA graph of the 36 RoPE
layers, the first of which makes the chunk-local metadata, divided by 36.
`engines`: tokens a second of whole engines at Scout's shape with four of its layers, stock and
patched, each imported from its own PYTHONPATH, both on the GPU at once and asked in turns.
Prints JSON: milliseconds or tokens a second, ratios, device and versions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .cases import V0_FLASH, V0_XFORMERS

CHUNK = 8192
BLOCK = 16
HEADS, KV_HEADS, HEAD_SIZE = 40, 8, 128
ROPE_LAYERS = 36
"""Of Scout's 48 layers, three in four."""
LONG, PROMPT = 131072, 65536
WARM_UP, ROUNDS = 3, 15


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed up to `seq_len - query_len`."""

    query_len: int
    seq_len: int
    count: int = 1
    use_cuda_graph: bool = False


def milliseconds(run: Callable[[], object]) -> float:
    """GPU time of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median of each, run in turns so that a drifting clock touches all alike."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(each) for name, each in times.items()}


class Bench:
    """Layers of one backend, and the metadata they need."""

    def __init__(self, backend: str) -> None:
        importlib.import_module("vllm._custom_ops")  # FlashAttention takes its kernels for granted
        self.backend = backend
        self.module = importlib.import_module(f"vllm.attention.backends.{backend}")
        self.local = [self._impl(True) for _ in range(ROPE_LAYERS)]
        self.everywhere = [self._impl(False) for _ in range(ROPE_LAYERS)]
        one = torch.ones((), device="cuda")
        self.scales = SimpleNamespace(
            _q_scale=one, _k_scale=one, _v_scale=one, _k_scale_float=1.0, _v_scale_float=1.0
        )

    def _impl(self, is_chunked: bool) -> Any:
        from vllm.config import VllmConfig, set_current_vllm_config

        config: Any = VllmConfig()
        config.model_config = SimpleNamespace(attention_chunk_size=CHUNK, max_model_len=LONG)
        config.cache_config = SimpleNamespace(block_size=BLOCK, enable_prefix_caching=False)
        config.scheduler_config = SimpleNamespace(chunked_prefill_enabled=False)
        cls = {"xformers": "XFormersImpl", "flash_attn": "FlashAttentionImpl"}[self.backend]
        with set_current_vllm_config(config):
            return getattr(self.module, cls)(
                num_heads=HEADS,
                head_size=HEAD_SIZE,
                scale=HEAD_SIZE**-0.5,
                num_kv_heads=KV_HEADS,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype="auto",
                use_irope=is_chunked,
            )

    def metadata(self, batch: Batch) -> Any:
        """A batch of prompts (query_len == seq_len), of continued ones, or of decodes."""
        is_decode = batch.query_len == 1
        columns = -(-(batch.seq_len if is_decode else 0) // BLOCK)
        tokens = batch.query_len * batch.count
        cls = {"xformers": "XFormersMetadata", "flash_attn": "FlashAttentionMetadata"}[self.backend]

        def to_gpu(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        ends = range(batch.count + 1)
        return getattr(self.module, cls)(
            num_prefills=0 if is_decode else batch.count,
            num_prefill_tokens=0 if is_decode else tokens,
            num_decode_tokens=tokens if is_decode else 0,
            slot_mapping=torch.full((tokens,), -1, device="cuda"),
            multi_modal_placeholder_index_maps=None,
            enable_kv_scales_calculation=False,
            seq_lens=[batch.seq_len] * batch.count,
            seq_lens_tensor=to_gpu([batch.seq_len] * batch.count),
            max_prefill_seq_len=0 if is_decode else batch.seq_len,
            max_decode_seq_len=batch.seq_len if is_decode else 0,
            context_lens_tensor=to_gpu([batch.seq_len - batch.query_len] * batch.count),
            block_tables=torch.arange(columns * batch.count, dtype=torch.int32, device="cuda").view(
                batch.count, columns
            ),
            use_cuda_graph=batch.use_cuda_graph,
            max_query_len=batch.query_len,
            max_decode_query_len=1,
            query_start_loc=to_gpu([end * batch.query_len for end in ends]),
            seq_start_loc=to_gpu([end * batch.seq_len for end in ends]),
        )

    def cache(self, batch: Batch) -> torch.Tensor:
        """A KV cache [2, blocks, …] that holds the batch."""
        blocks = max(1, -(-batch.seq_len // BLOCK) * batch.count)
        size = (2, blocks, BLOCK, KV_HEADS, HEAD_SIZE)
        cache = torch.randn(size, device="cuda", dtype=torch.float16)
        return cache.flatten(2) if self.backend == "xformers" else cache

    def layer(self, impl: Any, batch: Batch, cache: torch.Tensor) -> Callable[[Any], None]:
        """Return a function that runs one layer with the metadata it is given."""
        tokens = batch.query_len * batch.count

        def random(heads: int) -> torch.Tensor:
            size = (tokens, heads, HEAD_SIZE)
            return torch.randn(size, device="cuda", dtype=torch.float16)

        query, key, value = random(HEADS), random(KV_HEADS), random(KV_HEADS)
        output = torch.empty_like(query)

        def run(metadata: Any) -> None:
            impl.forward(self.scales, query, key, value, cache, metadata, output)

        return run

    def decode(self, impls: list[Any], batch: Batch, cache: torch.Tensor) -> Callable[[], object]:
        """Return the replay of a CUDA graph of one step's RoPE layers."""
        layers = [self.layer(impl, batch, cache) for impl in impls]

        def step() -> None:
            metadata = self.metadata(batch)
            for run in layers:
                run(metadata)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        metadata = self.metadata(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in layers:
                run(metadata)

        def replay(_keep: object = (layers, metadata, cache)) -> None:
            """A graph does not keep the tensors alive that were there before it."""
            graph.replay()

        return replay

    def prompt(self, impl: Any, batch: Batch) -> Callable[[], object]:
        """Return the first layer of a step over a prompt: its metadata is new each time."""
        run = self.layer(impl, batch, self.cache(Batch(1, BLOCK)))
        fresh = [self.metadata(batch) for _ in range(WARM_UP + ROUNDS)]
        return lambda: run(fresh.pop())


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Global attention's time over local attention's, and decodes relative to a whole chunk."""
    found = {}
    for name, value in times.items():
        kind, _, what = name.partition(" ")
        if kind == "local":
            found[f"{what}: global / local"] = times[f"global {what}"] / value
    for name, value in times.items():
        if name.startswith("local decode") and f"{LONG}" in name:
            short = name.replace(f"{LONG}", f"{CHUNK}")
            found[f"{name} / {CHUNK}"] = value / times[short.replace("local", "global")]
    return found


def bench_layer(backend: str) -> dict[str, Any]:
    """Time decode steps and prompts, with chunks and without."""
    bench = Bench(backend)
    impls = {"local": bench.local, "global": bench.everywhere}
    times: dict[str, float] = {}
    for count in (1, 8):
        runs: dict[str, Callable[[], object]] = {}
        for length in (CHUNK // 2, CHUNK, LONG):
            batch = Batch(1, length, count, use_cuda_graph=True)
            cache = bench.cache(batch)
            for kind, impl in impls.items():
                runs[f"{kind} decode {count} x {length}"] = bench.decode(impl, batch, cache)
        found = medians(runs)
        times |= {name: value / ROPE_LAYERS for name, value in found.items()}
    for length in (CHUNK // 2, CHUNK, PROMPT):
        batch = Batch(length, length)
        times |= medians(
            {
                f"{kind} prompt {length}": bench.prompt(impl[0], batch)
                for kind, impl in impls.items()
            }
        )
    return {"milliseconds": times, "ratios": ratios(times)}


LAYERS = 4
"""Of an engine at Scout's shape: three RoPE layers and one without positions."""
NEW_TOKENS, MOST_PROMPTS = 256, 4
LENGTHS = (4096, 16384, 65536, 131000)
"""Tokens of a prompt: below a chunk, and of many chunks."""
ENGINE_ROUNDS = 5
CAPTURED = 8192
"""Tokens; vLLM's default of `max_seq_len_to_capture`."""
ENVIRONMENTS = {
    "xformers": V0_XFORMERS,
    "flash_attn": V0_FLASH,
    "v1": {"VLLM_USE_V1": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
}


def scout_config(layers: int) -> Any:
    """Scout's text config but for the number of layers and a small vocabulary."""
    import llama4_checkpoint

    return llama4_checkpoint.text_config(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=8192,
        intermediate_size_mlp=16384,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2 * LONG,
        attention_chunk_size=CHUNK,
        no_rope_layers=llama4_checkpoint.NO_ROPE_LAYERS * (layers // LAYERS),
        num_local_experts=16,
        architectures=["Llama4ForCausalLM"],
        torch_dtype="bfloat16",
    )


def serve_engine(model: str, captured: int) -> None:
    """Answer each line "COUNT LENGTH" with JSON: seconds of a prompt alone and with new tokens.

    `captured`: up to how many tokens V0 decodes in CUDA graphs.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=LONG + 1024,
        max_num_seqs=MOST_PROMPTS,
        gpu_memory_utilization=0.45,
        enable_prefix_caching=False,
        disable_log_stats=True,
        max_seq_len_to_capture=captured,
    )

    def seconds(count: int, length: int, new_tokens: int) -> float:
        random = torch.Generator().manual_seed(length)
        prompts = torch.randint(10, 32000, (count, length), generator=random).tolist()
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        torch.cuda.synchronize()
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    print("ready", file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        count, length = map(int, line.split())
        found = [seconds(count, length, tokens) for tokens in (1, 1 + NEW_TOKENS)]
        print(json.dumps(found), file=sys.__stdout__, flush=True)


class Engine:
    """A process with one engine, which is asked in turns with others."""

    def __init__(self, pythonpath: str, model: Path, captured: int, env: Mapping[str, str]) -> None:
        tests = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu.speed", "serve", str(model), str(captured)],
            env={**os.environ, **env, "PYTHONPATH": os.pathsep.join([tests, pythonpath])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line("ready")

    def _line(self, begin: str) -> str:
        """The next line that is an answer; vLLM prints others."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(begin):
                return line
        raise SystemExit(f"the engine died: {self.process.wait()}")

    def ask(self, count: int, length: int) -> list[float]:
        assert self.process.stdin
        self.process.stdin.write(f"{count} {length}\n")
        self.process.stdin.flush()
        found: list[float] = json.loads(self._line("["))
        return found


def bench_engines(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of stock and patched engines, both on the GPU and asked in turns.

    Decoding is the difference between a run with new tokens and one without. A turn begins with
    the other engine each time, and the first is not counted.
    """
    paths = {"stock": args.stock, "patched": args.patched}
    env = ENVIRONMENTS[args.backend]
    with tempfile.TemporaryDirectory() as name:
        scout_config(args.layers).save_pretrained(name)
        engines = {
            which: Engine(path, Path(name), args.captured, env) for which, path in paths.items()
        }
        found: dict[str, Any] = {}
        for count in args.counts:
            for length in args.lengths:
                runs: dict[str, list[list[float]]] = {which: [] for which in engines}
                for turn in range(1 + args.rounds):
                    for which in sorted(engines, reverse=bool(turn % 2)):
                        answer = engines[which].ask(count, length)
                        if turn:
                            runs[which].append(answer)
                found[f"{count} x {length}"] = {
                    which: rates(count, length, each) for which, each in runs.items()
                }
                print(f"{count} x {length}: {found[f'{count} x {length}']}", file=sys.stderr)
        for engine in engines.values():
            engine.process.kill()
    return {"layers": args.layers, "captured": args.captured, "tokens_per_second": found}


def rates(count: int, length: int, runs: list[list[float]]) -> dict[str, Any]:
    """Tokens a second: of the prompts, and of new tokens; medians and each run's."""
    prompt = [count * length / alone for alone, _ in runs]
    decode = [count * NEW_TOKENS / (both - alone) for alone, both in runs]
    return {
        "prompt": statistics.median(prompt),
        "decode": statistics.median(decode),
        "runs": {"prompt": prompt, "decode": decode},
    }


def main() -> None:
    """Run one benchmark and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    layer = commands.add_parser("layer")
    layer.add_argument("--backend", choices=["xformers", "flash_attn"], required=True)
    engines = commands.add_parser("engines")
    engines.add_argument("--backend", choices=[*ENVIRONMENTS], required=True)
    engines.add_argument("--stock", required=True, metavar="PYTHONPATH")
    engines.add_argument("--patched", required=True, metavar="PYTHONPATH")
    engines.add_argument("--counts", type=int, nargs="+", default=[1, MOST_PROMPTS])
    engines.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    engines.add_argument("--rounds", type=int, default=ENGINE_ROUNDS)
    engines.add_argument("--layers", type=int, default=LAYERS, help="a multiple of four")
    engines.add_argument(
        "--captured",
        type=int,
        default=CAPTURED,
        help="tokens up to which V0 decodes in CUDA graphs; vLLM's own is the default",
    )
    serve = commands.add_parser("serve")
    serve.add_argument("model")
    serve.add_argument("captured", type=int)
    args = parser.parse_args()
    if args.what == "serve":
        serve_engine(args.model, args.captured)
        return
    found = bench_layer(args.backend) if args.what == "layer" else bench_engines(args)
    import vllm

    about = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "what": args.what,
        "backend": args.backend,
    }
    print(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    main()
