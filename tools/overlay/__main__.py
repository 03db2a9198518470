"""``python -m overlay``: the same as the ``vllm-overlay`` command."""

from overlay.cli.main import main

if __name__ == "__main__":
    main()
