"""Probes of topics about Llama 4's own code."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from .llama4 import HEAD_SIZE, HEADS, attention_module
from .tree import AbsentError, Loose, Probes, Tree, UnknownError, WrongError, demand

PROBES = Probes()
MODELS = "vllm.model_executor.models."
IMAGES = MODELS + "mllama4"
CLASS = "Llama4ForConditionalGeneration"


class Feature(dict[str, Any]):
    """In place of a BatchFeature."""


class Processor:
    """In place of BaseMultiModalProcessor: what the image processor of Transformers makes."""

    made: Any

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __getattr__(self, name: str) -> Any:
        return Loose()

    def _call_hf_processor(self, *_: Any, **__: Any) -> Feature:
        return Feature(pixel_values=self.made)


@PROBES.add
def llama4_image_dtype(tree: Tree) -> None:
    """Pixels have the dtype of the model, where its processor or that of all models makes them."""
    torch = tree.torch
    pixels = torch.zeros((2,), dtype=torch.bfloat16)
    found = _of_model(tree, pixels)
    if found is not torch.float16:
        found = _of_every_model(tree, pixels)
    demand(found is torch.float16, "images are in bfloat16 for a model in float16")


def _of_model(tree: Tree, pixels: Any) -> Any:
    """The dtype that Llama 4's own processor gives them."""
    unit = tree.unit(IMAGES)
    unit.set(BaseMultiModalProcessor=Processor, find_supported_resolutions=lambda **_: [])
    processor = unit.take("Mllama4MultiModalProcessor")()
    model = SimpleNamespace(dtype=tree.torch.float16)
    processor.made, processor.info = pixels, Loose(ctx=SimpleNamespace(model_config=model))
    named = {"prompt": "", "mm_data": {"images": []}, "mm_kwargs": {}, "tok_kwargs": {}}
    wanted = inspect.signature(processor._call_hf_processor).parameters
    made = processor._call_hf_processor(**{name: named[name] for name in wanted})
    return made["pixel_values"].dtype


def _of_every_model(tree: Tree, pixels: Any) -> Any:
    """The dtype that the call of any image processor gives them."""
    modules = [one for one in ("vllm.jsontree", "vllm.utils.jsontree") if tree.path(one)]
    module = next(
        one for one in ("vllm.inputs.registry", "vllm.multimodal.processing") if tree.path(one)
    )
    tree = tree.with_(*modules)
    unit = tree.unit(module)
    unit.set(BatchFeature=Feature, resolve_mm_processor_kwargs=lambda *_, **__: {})
    call = unit.method("InputProcessingContext", "call_hf_processor")
    context = Loose(model_config=Loose(dtype=tree.torch.float16))
    return call(context, lambda **_: Feature(pixel_values=pixels), {})["pixel_values"].dtype


@PROBES.add
def llama4_images_off(tree: Tree) -> None:
    """Without a vision model, the language model gets token ids, which CUDA graphs can read."""
    unit = tree.unit(IMAGES)
    if not unit.reads(CLASS, "__init__", "multimodal_config.get_limit_per_prompt"):
        raise AbsentError("it has a vision model always, and no text-only mode")
    seen: list[Any] = []
    model = Loose(
        vision_model=None,
        language_model=lambda *given, **_: seen.extend(given),
        get_multimodal_embeddings=lambda **_: [],
        get_input_embeddings=lambda *_, **__: "embeddings",
    )
    unit.method(CLASS, "forward")(model, "ids", "positions")
    demand(
        seen[0] == "ids" and "embeddings" not in seen,
        "in text-only mode the language model gets embeddings from outside of its graphs",
    )


@PROBES.add
def llama4_qk_norm(tree: Tree) -> None:
    """Queries and keys are normed head by head."""
    widths = []

    def norm(given: Any) -> Any:
        widths.append(given.shape[-1])
        return given

    made = attention_module(tree, RMSNorm=lambda *_, **__: norm)
    size = 3 * HEADS * HEAD_SIZE
    vars(made).setdefault("_modules", {}).clear()
    made.qkv_proj = lambda _: (tree.torch.zeros((3, size)), None)
    made.rotary_emb = lambda _, query, key: (query, key)
    made.attn, made.o_proj = lambda query, *_: query, lambda given: (given, None)
    made.forward("positions", "hidden states")
    if not widths:
        raise UnknownError("nothing norms queries and keys where it is looked for")
    demand(set(widths) == {HEAD_SIZE},
           f"a norm spans {max(widths)} values, a head has {HEAD_SIZE}")  # fmt: skip


@PROBES.add
def llama4_sampler(tree: Tree) -> None:
    """The model with images has the sampler that the runner asks it for."""
    unit = tree.unit(IMAGES)
    try:
        sampler = unit.method(CLASS, "sampler")
    except UnknownError:
        runner = tree.unit("vllm.v1.worker.gpu_model_runner")
        method = "_get_prompt_logprobs_dict"
        if not runner.reads("GPUModelRunner", method, "self.model.sampler"):
            raise AbsentError("the runner asks the model for no sampler") from None
        raise WrongError(f"{CLASS} has no sampler, which prompt_logprobs asks for") from None
    demand(sampler(Loose(language_model=Loose(sampler="sampler"))) == "sampler",
           "it is another sampler than the language model's")  # fmt: skip


@PROBES.add
def llama4_text_only(tree: Tree) -> None:
    """The class of text-only checkpoints is registered."""
    known = tree.unit(MODELS + "registry").take("_TEXT_GENERATION_MODELS")
    demand("Llama4ForCausalLM" in known, "Llama4ForCausalLM is left to the Transformers backend")


@PROBES.add
def moe_input_mutation(tree: Tree) -> None:
    """torch.compile is told that the MoE layers write to their input."""
    told: dict[str, list[str]] = {}

    def register(op_name: str, *_: Any, mutates_args: list[str], **__: Any) -> None:
        told[op_name] = list(mutates_args)

    unit = tree.unit("vllm.model_executor.layers.fused_moe.layer")
    unit.set(direct_register_custom_op=register)
    unit.run_calls("direct_register_custom_op")
    if "moe_forward" not in told:
        raise UnknownError("no moe_forward is registered where it is looked for")
    demand("hidden_states" in told["moe_forward"], "moe_forward says that it changes nothing")
