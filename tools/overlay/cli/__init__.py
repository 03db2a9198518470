"""The `vllm-overlay` command: a module a group of commands; they parse, call and print."""
