"""How Llama 4 runs in a configuration: the matrix, and the commands that look it up."""
