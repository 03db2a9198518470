"""What becomes of Llama 4 in a configuration: the matrix, and the commands that look it up."""
