"""`python -m cllm_gpu` and the command `cllm-gpu`."""

from __future__ import annotations

import sys

from cllm_gpu.utils.startup import leave_at_once, open_standard_streams


def main() -> None:
    """Run the command line and exit with its status."""
    leave_at_once()
    open_standard_streams()
    from cllm_gpu.cli import run

    status = run(sys.argv[1:])
    leave_at_once()  # while Python ends too
    sys.exit(status)


if __name__ == "__main__":
    main()
