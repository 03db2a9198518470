"""What an installed vLLM, stock or patched, does with Llama 4 under settings beside the matrix'.

`python -m settings` runs in the environment of the release, without a GPU and without a network. It
asks what `python -m matrix` asks, once for each setting, and writes down where the answer differs.
"""
