"""The ``vllm-overlay`` command, and ``python -m overlay``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Ctrl-C while modules are read ends it as one later does."""
    try:
        from overlay.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
