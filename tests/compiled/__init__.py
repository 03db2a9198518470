"""What the installed release's Triton makes of the kernels that Llama 4 launches, for every GPU.

`python -m compiled` runs in the environment of the release, without a GPU and without a network.
The release's own launchers choose the kernels, their tiles and warps; Triton specialises and
compiles them ahead of time, with the ptxas it brings along, as far as machine code. Nothing is
launched. `vllm-overlay matrix --triton` calls it and keeps what it finds.

Not here: kernels that are compiled with vLLM or torch, those of `torch.compile`, xformers' own
(XFORMERS_VLLM_V1), and those for LoRA and speculative decoding. `merge_attn_states` has one too,
but takes vLLM's own operator for the dtypes and the head size of Llama 4.
"""
