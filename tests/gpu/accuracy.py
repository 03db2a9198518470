"""What global in place of chunked local attention costs in answers on long contexts.

python -m gpu.accuracy train OUT [--minutes 7]
python -m gpu.accuracy ask CHECKPOINT OUT.json --engine hf|vllm [--global] [--name NAME]
python -m gpu.accuracy table A.json B.json ...
python -m gpu.accuracy plot OUT.svg A.json B.json ...

`train` teaches a small Llama 4 (Hugging Face's own classes) to look things up. A context is made of
slots of 8 tokens: filler, or a record `k1 k2 v1 v2` among filler. When a key comes again, its value
is what the model has to say. The local layers must tie the four tokens together by their positions,
and the global ones, which have none, find the record. No slot straddles the border of two chunks.
`ask` puts the same questions to Transformers and to vLLM: one record is asked for at the end of
a context that is full of others. An answer counts if greedy decoding gives both tokens of the
value. Environment variables choose vLLM's engine and backend; the backend is named in the result
where the model runs in this process (on V1 with VLLM_ENABLE_V1_MULTIPROCESSING=0).
`table` writes Markdown, `plot` a graph (with matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

import llama4_checkpoint

SLOT, RECORD = 8, 4
"""Tokens of a slot and of the record in it, which starts at any of the slot's first five."""
FIRST_KEY, KEYS = 16, 64
"""The tokens before are the tokenizer's special ones."""
FIRST_VALUE, VALUES = FIRST_KEY + KEYS, 64
FIRST_FILLER = FIRST_VALUE + VALUES
VOCAB = 512
CODES = KEYS * KEYS
"""How many keys of two tokens there are."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the record is, as a share of the context."""
CHUNKS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths of a context, in chunks."""
SEED = 20
BIAS = 2.0
"""What the first channel of every embedding is at first; the others have a deviation of 1."""
PEAK = 12.0
"""What a local head's logit is at first where it looks, from positions alone; with 20, heads are so
sure of themselves that nothing is learnt."""
EVERYWHERE = 2**30
"""An `attention_chunk_size` that no context reaches: local layers see everything."""


@dataclass(frozen=True)
class Recipe:
    """The model and how it is trained; each field is an option of `train`."""

    chunk: int = 512
    """`attention_chunk_size`, in tokens."""
    layers: int = 8
    """Every fourth is global."""
    hidden: int = 128
    heads: int = 2
    """Query and KV heads of 64."""
    mlp: int = 128
    """Width of the MLPs, and of the two experts of every fourth layer, of which one is taken."""
    tokens: int = 32768
    """In a step."""
    rate: float = 2e-3
    """Highest learning rate."""
    warm_up: int = 50
    """Steps."""
    decay: float = 0.1
    """Weight decay."""
    init: float = 0.04
    """Standard deviation of the first weights."""
    steps: int = 100_000
    """Train no longer than so many steps,"""
    minutes: float = 7.0
    """nor than so long,"""
    target: float = 0.99
    """nor than until so much of the questions of every length is answered exactly."""
    first: int = 128
    """Tokens of the longest contexts to begin with: where all are long, nothing is learnt."""
    passed: float = 0.85
    """What share of the longest contexts' values must be right for longer ones to join in."""
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of the contexts, from the shortest."""
        return [int(chunks * self.chunk) for chunks in CHUNKS]

    @property
    def stages(self) -> list[int]:
        """Tokens of the contexts in training: doubling, up to the longest that is asked about."""
        length = self.lengths[-1]
        return [length >> n for n in range(length.bit_length()) if length >> n >= 2 * SLOT][::-1]


@dataclass(frozen=True)
class Question:
    """A prompt and the two tokens that continue it."""

    length: int
    """Tokens of prompt and answer."""
    depth: float
    prompt: list[int]
    answer: list[int]


@dataclass
class Cell:
    """What came of the questions of one length and depth."""

    length: int
    depth: float
    asked: int = 0
    exact: int = 0
    """Answers of which both tokens were right."""
    logprob: float = 0.0
    """Mean natural logarithm of the probability of the right answer's first token."""


@dataclass(frozen=True)
class Result:
    """What `ask` writes."""

    name: str
    engine: str
    """`Transformers`, `V0` or `V1`."""
    backend: str
    """Of attention: module and class, or "" where the layers are in another process."""
    chunk: int
    """`attention_chunk_size` of the checkpoint."""
    is_global: bool
    """Whether the local layers were made global."""
    device: str
    versions: dict[str, str]
    seconds: float
    """For all questions, without the engine's start."""
    questions: str
    """Digest of the questions: results compare only where it is the same."""
    cells: list[Cell]

    @classmethod
    def read(cls, file: Path) -> Result:
        """Read what `ask` wrote."""
        data = json.loads(file.read_text("utf-8"))
        return cls(**{**data, "cells": [Cell(**cell) for cell in data["cells"]]})


# Questions


def record(key: int, value: Sequence[int]) -> list[int]:
    """The four tokens of a record; `key` is below `CODES`, `value` two numbers below `VALUES`."""
    first, second = divmod(key, KEYS)
    return [FIRST_KEY + first, FIRST_KEY + second, *(FIRST_VALUE + each for each in value)]


def question(dice: random.Random, length: int, depth: float) -> Question:
    """A context of `length` tokens with a record at `depth` that its end asks for.

    Three slots in four hold a record, each of another key.
    """
    slots = length // SLOT
    needle = min(round(depth * (slots - 1)), slots - 2)
    keys = dice.sample(range(CODES), slots)
    tokens = [dice.randrange(FIRST_FILLER, VOCAB) for _ in range(length)]
    answer: list[int] = []
    for slot, key in enumerate(keys[:-1]):
        value = [dice.randrange(VALUES), dice.randrange(VALUES)]
        start = slot * SLOT + dice.randrange(SLOT - RECORD + 1)
        if slot == needle:
            answer = record(key, value)[-2:]
        if slot == needle or dice.random() < 0.75:
            tokens[start : start + RECORD] = record(key, value)
    prompt = tokens[: length - RECORD] + record(keys[needle], (0, 0))[:-2]
    return Question(length, depth, prompt, answer)


def questions(lengths: Iterable[int], per_cell: int, seed: int = SEED) -> list[Question]:
    """The same ones for every engine: `per_cell` for each length and depth."""
    return [
        question(random.Random(f"{seed} {length} {depth} {number}"), length, depth)
        for length in lengths
        for depth in DEPTHS
        for number in range(per_cell)
    ]


def digest(asked: Sequence[Question]) -> str:
    """A name for these questions."""
    return hashlib.sha256(json.dumps([asdict(q) for q in asked]).encode()).hexdigest()[:16]


def count(asked: Sequence[Question], answers: Sequence[tuple[Sequence[int], float]]) -> list[Cell]:
    """Sum up answers, each of two tokens and the log-probability of the right first one."""
    cells: dict[tuple[int, float], Cell] = {}
    for each, (tokens, logprob) in zip(asked, answers, strict=True):
        cell = cells.setdefault((each.length, each.depth), Cell(each.length, each.depth))
        cell.asked += 1
        cell.exact += list(tokens) == each.answer
        cell.logprob += (logprob - cell.logprob) / cell.asked
    return list(cells.values())


def by_length(cells: Iterable[Cell]) -> dict[int, Cell]:
    """Cells of all depths in one; its depth means nothing."""
    sums: dict[int, Cell] = {}
    for cell in cells:
        total = sums.setdefault(cell.length, Cell(cell.length, math.nan))
        total.asked += cell.asked
        total.exact += cell.exact
        total.logprob += (cell.logprob - total.logprob) * cell.asked / total.asked
    return sums


# Training


def batch(
    length: int, size: int, device: str, dice: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [size, length] and their labels, -100 where there is nothing to know.

    Every slot draws one of a sequence's records, whose number is a quarter of its slots to all of
    them, so that most come one to four times; the labels are the values from the second time on.
    """
    slots = length // SLOT

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=dice)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, device=device, generator=dice)

    records = (slots * (0.25 + 0.75 * uniform(size, 1))).long()
    drawn = (uniform(size, slots) * records).long()
    is_filler = uniform(size, slots) < 0.5 * uniform(size, 1)
    codes = uniform(size, CODES).topk(slots, dim=1).indices.gather(1, drawn)
    pairs = integers(FIRST_VALUE, FIRST_VALUE + VALUES, size, slots, 2)
    values = pairs.gather(1, drawn[..., None].expand(-1, -1, 2))

    same = (drawn[:, :, None] == drawn[:, None, :]) & ~is_filler[:, None, :]
    is_known = same.tril(-1).any(-1) & ~is_filler
    keys = torch.stack([codes // KEYS, codes % KEYS], -1) + FIRST_KEY
    written = torch.cat([keys, values], -1)

    tokens = integers(FIRST_FILLER, VOCAB, size, slots, SLOT)
    places = integers(0, SLOT - RECORD + 1, size, slots, 1) + torch.arange(RECORD, device=device)
    tokens.scatter_(2, places, torch.where(is_filler[..., None], tokens.gather(2, places), written))
    labels = torch.full_like(tokens, -100)
    labels.scatter_(2, places[..., -2:], values.masked_fill(~is_known[..., None], -100))
    return tokens.view(size, length), labels.view(size, length)


def folded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which the chunks of a local layer are entries of the batch.

    `query`, `key`, `value`: [batch, heads, length, 64], as many heads each. No mask is made, so
    fast kernels take it; the lengths are multiples of the chunk, or shorter.
    """
    size, heads, length, width = query.shape
    chunk = min(module.config.attention_chunk_size if module.use_rope else length, length)

    def fold(states: torch.Tensor) -> torch.Tensor:
        chunks = states.reshape(size, heads, length // chunk, chunk, width)
        return chunks.transpose(1, 2).reshape(-1, heads, chunk, width)

    out = F.scaled_dot_product_attention(
        fold(query), fold(key), fold(value), is_causal=True, scale=scaling
    )
    return out.transpose(1, 2).reshape(size, length, heads, width), None


def new_model(recipe: Recipe, device: str) -> Any:
    """A `Llama4ForCausalLM` in fp32 with random weights, whose attention is folded."""
    from transformers import Llama4ForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.manual_seed(recipe.seed)
    config = llama4_checkpoint.text_config(
        vocab_size=VOCAB,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        intermediate_size_mlp=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=16 * recipe.chunk,
        attention_chunk_size=recipe.chunk,
        no_rope_layers=(llama4_checkpoint.NO_ROPE_LAYERS * recipe.layers)[: recipe.layers],
        interleave_moe_layer_step=4,
        use_qk_norm=False,  # else no logit exceeds 8, and no head can look at one token only
        initializer_range=recipe.init,
    )
    model: Any = Llama4ForCausalLM(config)
    model.float()
    with torch.no_grad():
        head_start(model, recipe)
    ALL_ATTENTION_FUNCTIONS["folded"] = folded_attention
    model.config._attn_implementation = "folded"
    return model.to(device)


def head_start(model: Any, recipe: Recipe) -> None:
    """Set first weights from which looking up is soon learnt.

    Embeddings outweigh what the layers add; a global head looks for tokens like its own; all heads
    copy what they see, and what is copied is said. Two heads of each local layer look back.
    """
    for name, weight in model.named_parameters():
        if "experts." in name:  # some releases of Transformers leave them empty
            weight.normal_(std=recipe.init)
    words = model.model.embed_tokens.weight
    words.normal_(std=1.0)
    words[:, 0] = 0
    model.lm_head.weight.copy_(words * 0.5 * recipe.hidden**-0.5)
    words[:, 0] = BIAS
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        if attention.use_rope:
            look_back(attention, model.model.rotary_emb.inv_freq)
        else:
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def look_back(attention: Any, frequencies: torch.Tensor) -> None:
    """Make the first two heads of a local layer look one and two tokens back.

    The first channel, alike in all tokens, gives queries and keys constant parts in the six pairs
    of channels that RoPE turns fastest; those of the keys are turned ahead by the distance.
    """
    turning = frequencies[:6].cpu()
    part = (PEAK * 8 / len(turning)) ** 0.5 / BIAS
    for head in range(2):
        angles = turning * (head + 1)
        rows = slice(64 * head, 64 * head + 2 * len(turning))
        query = torch.tensor([1.0, 0.0]).repeat(len(turning))
        attention.q_proj.weight[rows, 0] = part * query
        key = torch.stack([angles.cos(), angles.sin()], -1)
        attention.k_proj.weight[rows, 0] = part * key.flatten()


def logits_of(model: Any, tokens: torch.Tensor, last: int = 0) -> torch.Tensor:
    """Logits [batch, length, vocab] of the `last` positions, or of all; no masks are made."""
    masks = {"full_attention": None, "chunked_attention": None}
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits: torch.Tensor = model(
            input_ids=tokens, attention_mask=masks, use_cache=False, logits_to_keep=last
        ).logits
    return logits.float()


def loss_of(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The mean loss of the labelled tokens, and the share of them that was foreseen."""
    logits, wanted = logits_of(model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    is_wanted = wanted >= 0
    logits, wanted = logits[is_wanted], wanted[is_wanted]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def optimizer_of(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with no decay on the norms' weights."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))


@dataclass
class Progress:
    """Where training stands."""

    recipe: Recipe
    start: float
    first: int
    """The first `stage`."""
    stage: int
    """Which of the recipe's stages are the longest contexts that take part."""
    step: int = 0
    right: float = 0.0
    """Running share of right values at the longest of them."""
    since: int = 0
    """Steps since it joined in."""

    @property
    def share(self) -> float:
        """How much of the time or of the steps is used up."""
        passed = (time.perf_counter() - self.start) / 60 / self.recipe.minutes
        return max(passed, self.step / self.recipe.steps)

    @property
    def rate(self) -> float:
        """The learning rate: rises, stays until half of the time is used, and falls as a cosine."""
        fall = max(0.0, 2 * min(self.share, 1.0) - 1)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall))
        return self.recipe.rate * min(1.0, (self.step + 1) / self.recipe.warm_up) * cosine

    @property
    def chunk(self) -> int:
        """A quarter of the longest contexts, up to the recipe's, for the global layers to learn."""
        return min(self.recipe.chunk, max(32, self.recipe.stages[self.stage] // 4))

    def length(self, dice: random.Random) -> int:
        """Every other step the longest, else any of those that take part."""
        stage = self.stage if dice.random() < 0.5 else dice.randint(0, self.stage)
        return self.recipe.stages[stage]

    def note(self, length: int, right: float) -> None:
        """Take in a step's share of right values, and let longer contexts in when it is time.

        That is when the longest are learnt, or when their part of the first 60 % of the time is
        over.
        """
        stages = self.recipe.stages
        if length == stages[self.stage]:
            self.right += 0.05 * (right - self.right)
            self.since += 1
        if self.stage + 1 == len(stages):
            return
        is_learnt = self.since >= 50 and self.right > self.recipe.passed
        part = (self.stage + 1 - self.first) / (len(stages) - 1 - self.first)
        if is_learnt or self.share > 0.6 * part:
            self.stage, self.right, self.since = self.stage + 1, 0.0, 0


def answers_of(
    logits: Callable[[torch.Tensor], torch.Tensor], asked: Sequence[Question], device: str
) -> list[tuple[list[int], float]]:
    """Greedy answers and the first token's log-probabilities.

    `logits` makes [batch, 3, vocab] of the last positions. The answer is part of what it is given:
    it is exact if both tokens are the likeliest ones, and there is no need to decode.
    """
    answers: list[tuple[list[int], float]] = []
    start = 0
    while start < len(asked):
        length = asked[start].length
        end = start + 1
        while end < len(asked) and asked[end].length == length and (end - start) * length < 32768:
            end += 1
        tokens = torch.tensor([q.prompt + q.answer for q in asked[start:end]], device=device)
        with torch.inference_mode():
            last = logits(tokens)
        first = last[:, 0].log_softmax(-1).gather(1, tokens[:, -2, None])[:, 0]
        answers += zip(last[:, :2].argmax(-1).tolist(), first.tolist(), strict=True)
        start = end
    return answers


def examine(model: Any, lengths: Iterable[int], per_cell: int, device: str) -> dict[int, float]:
    """The share of exact answers by length, to questions other than those of `ask`."""
    asked = questions(lengths, per_cell, seed=SEED + 1)
    model.eval()
    cells = count(asked, answers_of(lambda t: logits_of(model, t, 3), asked, device))
    model.train()
    return shares_of(cells)


def shares_of(cells: Iterable[Cell]) -> dict[int, float]:
    """The share of exact answers by length."""
    return {length: cell.exact / cell.asked for length, cell in by_length(cells).items()}


def shown(shares: dict[int, float]) -> str:
    """Shares by length, on one line."""
    return ", ".join(f"{length}: {100 * share:.1f} %" for length, share in shares.items())


def train(recipe: Recipe, folder: Path) -> None:
    """Train, save and say what the saved checkpoint answers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(recipe, device)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size / 1e6:.2f} million parameters on {device}; {recipe}", flush=True)
    try:
        fit(model, recipe, device)
    finally:
        model.config.attention_chunk_size = recipe.chunk
        save(model, folder)
    per_cell = 20 if device == "cuda" else 10
    asked = questions(recipe.lengths, per_cell)
    logits = transformers_logits(folder, device, is_global=False)
    shares = shares_of(count(asked, answers_of(logits, asked, device)))
    print(f"saved; Transformers in fp32 answers exactly {shown(shares)}", flush=True)
    if min(shares.values()) < 0.95:
        print("the model does not reach 95 % at every length", flush=True)


def fit(model: Any, recipe: Recipe, device: str) -> None:
    """Train until the target is reached or the time is over."""
    optimizer = optimizer_of(model, recipe)
    dice, draw = random.Random(recipe.seed), torch.Generator(device).manual_seed(recipe.seed)
    first = recipe.stages.index(recipe.first)
    progress = Progress(recipe, time.perf_counter(), first, first)
    told = examined = progress.start
    while progress.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = progress.rate
        length = progress.length(dice)
        model.config.attention_chunk_size = progress.chunk
        tokens, labels = batch(length, max(1, recipe.tokens // length), device, draw)
        loss, right = loss_of(model, tokens, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if bool(norm.isfinite()):
            optimizer.step()
        progress.step += 1
        progress.note(length, right.item())
        now = time.perf_counter()
        if now - told > 5:
            told = now
            print(
                f"{now - progress.start:5.0f} s, step {progress.step}, up to "
                f"{recipe.stages[progress.stage]}: at {length} loss {loss.item():.3f}, right "
                f"{100 * right.item():.1f} % (running {100 * progress.right:.1f} %), "
                f"rate {progress.rate:.1e}",
                flush=True,
            )
        if now - examined > max(20.0, 60 * recipe.minutes / 20):
            model.config.attention_chunk_size = recipe.chunk
            shares = examine(model, recipe.lengths, 20 if device == "cuda" else 10, device)
            print(f"answers exactly {shown(shares)}", flush=True)
            if min(shares.values()) >= recipe.target:
                print("target reached", flush=True)
                break
            examined = time.perf_counter()


def save(model: Any, folder: Path) -> None:
    """Write config, weights in fp16 and tokenizer."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(folder)
    llama4_checkpoint.tokenizer(VOCAB).save_pretrained(folder)


# Asking


def chunk_of(checkpoint: Path) -> int:
    """`attention_chunk_size` of a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return int(config["attention_chunk_size"])


def transformers_logits(
    checkpoint: Path, device: str, is_global: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from tokens [batch, length] to the logits of the last three, in fp32.

    Transformers makes the masks. With `is_global` the local layers, too, see everything.
    """
    from transformers import Llama4ForCausalLM

    model: Any = Llama4ForCausalLM.from_pretrained(
        checkpoint,
        torch_dtype=torch.float32,
        attn_implementation="sdpa",
        **({"attention_chunk_size": EVERYWHERE} if is_global else {}),
    )
    model.to(device).eval()
    return lambda tokens: model(input_ids=tokens, use_cache=False, logits_to_keep=3).logits


def ask_transformers(
    checkpoint: Path, asked: Sequence[Question], name: str, is_global: bool
) -> Result:
    """Put the questions to Transformers."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = transformers_logits(checkpoint, device, is_global)
    start = time.perf_counter()
    answers = answers_of(logits, asked, device)
    return Result(
        name=name or ("Transformers, global" if is_global else "Transformers"),
        engine="Transformers",
        backend="sdpa",
        chunk=chunk_of(checkpoint),
        is_global=is_global,
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seconds=time.perf_counter() - start,
        questions=digest(asked),
        cells=count(asked, answers),
    )


def ask_vllm(
    checkpoint: Path, asked: Sequence[Question], name: str, engine_args: dict[str, Any]
) -> Result:
    """Put the questions to vLLM, which decodes the answers."""
    import transformers
    from vllm import LLM, ModelRegistry, SamplingParams

    from gpu.engine import about

    # Releases that know the class do not all list it.
    if "Llama4ForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            "Llama4ForCausalLM", "vllm.model_executor.models.llama4:Llama4ForCausalLM"
        )
    longest = max(each.length for each in asked)
    args = {
        "dtype": "float16",
        "seed": 0,
        "disable_log_stats": True,
        "max_model_len": longest + 512,
        "max_num_seqs": 32,
        "gpu_memory_utilization": 0.15,
        "num_gpu_blocks_override": 8192,
        "max_logprobs": VOCAB,
        **engine_args,
    }
    llm = LLM(str(checkpoint), **args)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=VOCAB, detokenize=False
    )
    prompts: Any = [{"prompt_token_ids": each.prompt} for each in asked]
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = [
        (list(out.outputs[0].token_ids), out.outputs[0].logprobs[0][each.answer[0]].logprob)
        for out, each in zip(outputs, asked, strict=True)
    ]
    ran = about(llm, llm.collective_rpc)
    engine, backend = ran["engine"], ran["backend"]
    label = " ".join(filter(None, ["vLLM", ran["vllm"], engine, backend.rpartition(".")[2]]))
    return Result(
        name=name or label,
        engine=engine,
        backend=backend,
        chunk=chunk_of(checkpoint),
        is_global=False,
        device=ran["device"],
        versions={
            "vllm": ran["vllm"],
            "torch": ran["torch"],
            "transformers": transformers.__version__,
        },
        seconds=seconds,
        questions=digest(asked),
        cells=count(asked, answers),
    )


# Results


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(cell: Cell) -> str:
    """Exact answers."""
    return f"{100 * cell.exact / cell.asked:.1f} %"


def table(results: Sequence[Result]) -> str:
    """By length, then by length and depth."""
    lengths = sorted({cell.length for cell in results[0].cells})
    head = ["tokens (chunks)", *(f"{n} ({n / results[0].chunk:g})" for n in lengths)]
    sums = [(result, by_length(result.cells)) for result in results]
    asked = sums[0][1][lengths[0]].asked
    exact = [[each.name, *(percent(cells[n]) for n in lengths)] for each, cells in sums]
    logprob = [[each.name, *(f"{cells[n].logprob:.3f}" for n in lengths)] for each, cells in sums]
    parts = [
        f"Exact answers, of {asked} by length:",
        markdown(head, exact),
        "Mean log-probability of the right answer's first token:",
        markdown(head, logprob),
        "Exact answers by the record's depth:",
        markdown(
            ["", "length", *(f"{100 * depth:.0f} %" for depth in DEPTHS)],
            [
                [each.name, str(n), *(percent(cell) for cell in each.cells if cell.length == n)]
                for each in results
                for n in lengths
            ],
        ),
    ]
    return "\n\n".join(parts)


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw exact answers over the context's length."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        sys.exit("plot needs matplotlib: pip install matplotlib")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    marks = "osD^vPX*"
    for number, result in enumerate(results):
        sums = by_length(result.cells)
        lengths = sorted(sums)
        shares = [100 * sums[n].exact / sums[n].asked for n in lengths]
        axes.plot(lengths, shares, marker=marks[number % len(marks)], label=result.name, alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.axvline(results[0].chunk, color="grey", linestyle=":", label="attention chunk")
    axes.set(xlabel="context, tokens", ylabel="exact answers, %", ylim=(-3, 103))
    axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def read_all(files: Sequence[Path]) -> list[Result]:
    """Read results, which must be of the same questions."""
    results = [Result.read(file) for file in files]
    if len({each.questions for each in results}) > 1:
        sys.exit("these results are of different questions")
    return results


# Command line


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("folder", type=Path)
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        one.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    one = commands.add_parser("ask")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--engine", choices=["hf", "vllm"], required=True)
    one.add_argument("--lengths", help="tokens, with commas; default: half a chunk to eight")
    one.add_argument("--per-cell", type=int, default=40, help="questions a length and depth")
    one.add_argument("--name", default="", help="the result's name in tables")
    one.add_argument("--global", action="store_true", dest="is_global", help="hf: no chunks")
    one.add_argument("--engine-args", default="{}", help="vllm: JSON, arguments of vllm.LLM")
    one = commands.add_parser("table")
    one.add_argument("files", type=Path, nargs="+")
    one = commands.add_parser("plot")
    one.add_argument("out", type=Path)
    one.add_argument("files", type=Path, nargs="+")
    return top


def ask(options: argparse.Namespace) -> None:
    """Ask, write the result and print a line of it."""
    chunk = chunk_of(options.checkpoint)
    lengths = [int(chunks * chunk) for chunks in CHUNKS]
    if options.lengths:
        lengths = [int(each) for each in options.lengths.split(",")]
        if any(length < 2 * SLOT or length % SLOT for length in lengths):
            sys.exit(f"lengths are multiples of {SLOT}, from {2 * SLOT} on")
    asked = questions(lengths, options.per_cell)
    if options.engine == "hf":
        result = ask_transformers(options.checkpoint, asked, options.name, options.is_global)
    else:
        result = ask_vllm(options.checkpoint, asked, options.name, json.loads(options.engine_args))
    options.out.write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")
    print(f"{result.name}: {shown(shares_of(result.cells))} in {result.seconds:.1f} s", flush=True)


def main() -> None:
    """Do what the command line says."""
    options = parser().parse_args()
    if options.command == "train":
        names = [field.name for field in dataclasses.fields(Recipe)]
        train(Recipe(**{name: getattr(options, name) for name in names}), options.folder)
    elif options.command == "ask":
        ask(options)
    elif options.command == "table":
        print(table(read_all(options.files)))
    else:
        plot(read_all(options.files), options.out)


if __name__ == "__main__":
    main()
