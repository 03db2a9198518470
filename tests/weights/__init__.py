"""What an installed vLLM does with Llama 4 in checkpoints of every format, on every GPU.

`python -m weights` runs in the environment of the release, without a GPU and without a network. The
release reads the config of a small checkpoint, chooses its methods and constructs its own layers;
they are given weights, and a step is run through them with Llama 4's arguments, up to the kernels:
what is launched is noted, and nothing is computed. `vllm-overlay matrix --weights` calls it and
keeps what it finds.

Not here: reading the tensors of a checkpoint, and what torch.compile makes of a step.
"""
