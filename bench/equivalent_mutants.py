"""Mutations of the project's kernels that provably change nothing, each with the proof in a line.

Keyed as mutation.Mutant.key: file, the line's text, "before -> after", and which occurrence in the line.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, int], str] = {}
