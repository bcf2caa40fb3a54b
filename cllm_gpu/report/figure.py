"""Access to matplotlib (the extra `plots`), which is imported only when a plot is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors


def require_plots() -> Any:
    """matplotlib's Figure class. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'cllm-gpu[plots]'") from None
    return Figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the file extension. Does not use pyplot: no window system, no global state."""
    with clear_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format="svg" if path.suffix == ".svg" else "png")
