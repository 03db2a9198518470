"""A vLLM that is installed: patched where it lies, and put back."""
