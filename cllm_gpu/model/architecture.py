"""The shape of a model: what decides its parameters and its mathematics, and nothing else.

Letters used everywhere: B batch, T sequence, C model width, H heads, D head size, L layers, V vocabulary, N = B·T.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class LatticeTerms:
    """What crystalline attention sees of the lattice. Every term has a learned scalar per layer and head."""

    matches: int = 8
    """Longest translation match that counts: a scalar for each order from 1 to it, at most 8; 0: none."""
    same_token: bool = True
    """A term where query and key are the same token."""
    distance: bool = False
    """The distance of the two tokens' lattice points."""
    prime_distance: bool = False
    """The distance of the logarithms of their primes."""
    symmetry_fraction: float = 0.0
    """Share of each head's dimensions of queries and keys on which the token's symmetry element acts."""
    learned_points: bool = False
    """The lattice points are learned, starting where the lattice has them."""
    start: float = 0.0
    """Value that every scalar starts at."""

    def __post_init__(self) -> None:
        if not 0 <= self.matches <= MAXIMUM_MATCHES:
            raise UserError(f"model.lattice.matches is {self.matches}; it must lie between 0 and {MAXIMUM_MATCHES}")
        if not 0.0 <= self.symmetry_fraction <= 1.0:
            raise UserError(f"model.lattice.symmetry_fraction is {self.symmetry_fraction}; it must lie between 0 and 1")
        if not math.isfinite(self.start):
            raise UserError(f"model.lattice.start is {self.start}; it must be a finite number")
        if self.learned_points and not self.uses_points:
            raise UserError(
                "model.lattice.learned_points needs a term that sees the points: switch on distance or prime_distance"
            )

    @property
    def spoken(self) -> str:
        """What attention sees, in words."""
        flags = ("distance", "prime_distance", "same_token", "learned_points")
        parts = [name.replace("_", " ") for name in flags if getattr(self, name)]
        if self.matches:
            parts.append(f"matches to {self.matches}")
        if self.symmetry_fraction:
            parts.append(f"symmetry on {self.symmetry_fraction:g}")
        return ", ".join(parts) or "nothing"

    @property
    def uses_points(self) -> bool:
        """A term is computed from the lattice points."""
        return self.distance or self.prime_distance

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of a head's scalars, in the order of `reference.score_bias`."""
        terms = ("distance", "prime_distance", "same_token")
        return (*(name for name in terms if getattr(self, name)), *(f"match_{n + 1}" for n in range(self.matches)))


@dataclass(frozen=True)
class Architecture:
    """A decoder-only pre-norm transformer. Raises UserError when no model can have this shape."""

    vocabulary: int
    """V, number of token ids, at most 2^20."""
    context: int = 128
    """Longest sequence T the model is trained on."""
    layers: int = 4
    """L."""
    heads: int = 4
    """H, query heads; must divide the width."""
    kv_heads: int = 4
    """Key/value heads (grouped-query attention when fewer than the query heads); must divide `heads`."""
    width: int = 128
    """C."""
    mlp_width: int = 512
    """Hidden width of the MLP, usually 4·C."""
    positions: Literal["learned", "rope"] = "learned"
    """A learned embedding per position, or rotary embedding of queries and keys (RoPE, Su et al. 2021)."""
    tied_head: bool = True
    """The output projection shares the token embedding's weights."""
    bias: bool = True
    """Linear layers and layer norms carry a bias."""
    dropout: float = 0.0
    """Probability of dropping an element of the embedding and of each residual branch."""
    lattice: LatticeTerms | None = None
    """What attention sees of the lattice (crystalline attention); None: nothing (standard attention)."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "kv_heads", "width", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.vocabulary > MAXIMUM_VOCABULARY:
            raise UserError(f"vocabulary is {self.vocabulary}; at most {MAXIMUM_VOCABULARY} token ids are supported")
        if self.width % self.heads:
            raise UserError(f"model.heads is {self.heads}, which does not divide model.width {self.width}")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads is {self.kv_heads}, which does not divide model.heads {self.heads}")
        if self.positions == "rope" and self.head_size % 2:
            raise UserError(f"RoPE rotates pairs: width/heads must be even, not {self.head_size}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def head_size(self) -> int:
        """D = C / H."""
        return self.width // self.heads

    @property
    def symmetry_pairs(self) -> int:
        """Pairs of a head's dimensions on which the lattice's symmetry acts."""
        return 0 if self.lattice is None else int(self.lattice.symmetry_fraction * self.head_size) // 2

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, kv_heads·D."""
        return self.kv_heads * self.head_size

    @property
    def qkv_width(self) -> int:
        """Width of the fused projection to queries, keys and values."""
        return self.width + 2 * self.kv_width

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; a field that not every version has is left out at its default."""
        later = [f for f in dataclasses.fields(self) if f.name not in OF_EVERY_VERSION]
        left_out = {f.name for f in later if getattr(self, f.name) == f.default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of `as_dict`. TypeError for names that no model of this version has."""
        lattice = values.get("lattice")
        return cls(**values | {"lattice": None if lattice is None else LatticeTerms(**lattice)})


OF_EVERY_VERSION = frozenset(
    {"vocabulary", "context", "layers", "heads", "kv_heads", "width", "mlp_width", "positions", "tied_head", "bias"}
    | {"dropout"}
)
"""Fields of `Architecture` that stand in every manifest. A new field is none of them: with its default, which must be
what models were before, a manifest is read by the versions before it, and theirs by this one."""
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "heads": 2, "width": 64, "context": 64},
    "mini": {"layers": 4, "heads": 4, "width": 128, "context": 128},
    "small": {"layers": 6, "heads": 6, "width": 384, "context": 256},
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "context": 1024},
    "gpt2-medium": {"layers": 24, "heads": 16, "width": 1024, "context": 1024},
    "gpt2-large": {"layers": 36, "heads": 20, "width": 1280, "context": 1024},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "context": 1024},
}
"""Named sizes. The gpt2 rows are those of Radford et al. 2019."""
