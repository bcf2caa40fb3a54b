"""`python -m cllm_gpu` and the command `cllm-gpu`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from cllm_gpu.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
