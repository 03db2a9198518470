"""What an installed vLLM, stock or patched, does with Llama 4 in every configuration.

`python -m matrix` runs in the environment of the release, without a GPU and without a network, and
shares its fake GPU, tiny model and stand-ins for kernels with the regression tests. `vllm-overlay
matrix` calls it, and keeps and compares what it finds.
"""
