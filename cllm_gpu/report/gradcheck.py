"""Table of a gradient check: the largest relative error of every parameter, compared with the bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from cllm_gpu.model.gradcheck import GroupCheck
from cllm_gpu.report.table import Table, print_table


def print_checks(checks: Sequence[GroupCheck], console: Console | None = None) -> None:
    """Print the table of a gradient check."""
    print_table(gradient_table(checks), console)


def gradient_table(checks: Sequence[GroupCheck]) -> Table:
    """The table of a gradient check, with a row per parameter."""
    failed = [check for check in checks if not check.passed]
    worst = max((c.relative_error for c in checks), key=lambda error: math.inf if math.isnan(error) else error)
    verdict = f"{len(failed)} of {len(checks)} groups FAILED" if failed else f"all {len(checks)} groups passed"
    return Table(
        title="Gradient check, float64: analytic against numerical directional derivatives",
        header=("parameter", "size", "analytic", "numerical", "relative error", "result"),
        rows=tuple(
            (
                check.name,
                f"{check.size:,}",
                f"{check.analytic:.9e}",
                f"{check.numerical:.9e}",
                f"{check.relative_error:.1e}",
                "pass" if check.passed else "FAIL",
            )
            for check in checks
        ),
        bad_rows=frozenset(number for number, check in enumerate(checks) if not check.passed),
        spare_columns=(3, 2, 1),
        notes=(f"{verdict}; largest relative error {worst:.1e}, bound {checks[0].bound:.0e}.",),
    )


def gradient_data(checks: Sequence[GroupCheck]) -> dict[str, Any]:
    """The results as plain data."""
    return {"passed": all(check.passed for check in checks), "groups": [check.as_dict() for check in checks]}
