"""Variants of all CUDA sources that the CUDA operations use and the compilation checks compile."""

from __future__ import annotations

from cllm_gpu.ops.cuda.kernel_source import source_directory
from cllm_gpu.ops.cuda.optimizer_weights import WITHOUT_MASTERS
from cllm_gpu.ops.cuda.variant import Variant

HEAD_SIZES = (32, 64, 80, 96, 128)
"""Head sizes of published models; others up to 128 are compiled at first use."""
TERMS_HEAD_SIZES = (64, 128)
"""Head sizes compiled with a score bias too."""
_NAMES = ("TERM_DISTANCE", "TERM_PRIME_DISTANCE", "TERM_SAME_TOKEN", "TERM_MATCHES", "TERM_POINT_GRADIENTS")
TERMS = tuple(
    tuple((name, value) for name, value in zip(_NAMES, values, strict=True) if value)
    for values in ((0, 0, 1, 8, 0), (1, 1, 1, 8, 0), (1, 1, 1, 8, 1))
)
"""Terms of the score bias compiled ahead of time: the default ones, all, and all with learned points."""
SYMMETRY_SHARE = 8
"""Dimensions of a head for each pair of the symmetry compiled ahead, alone and with the default terms: a quarter."""
_ATTENTION = ("attention.cu", "attention_fused.cu")
_WITH_GRADIENT = ("adam.cu", "column_sum.cu", "embedding.cu")


def all_variants() -> list[Variant]:
    """Every source in float32 and bf16, with its further options."""
    both = ("float32", "bfloat16")
    sources = sorted(path.name for path in source_directory().glob("*.cu"))
    variants = [Variant(source, storage) for source in sources if source not in _ATTENTION for storage in both]
    variants += [Variant(source, "bfloat16", "float32") for source in _WITH_GRADIENT]
    variants += [Variant("adam.cu", "bfloat16", kind, defines=WITHOUT_MASTERS) for kind in both]
    variants.append(Variant("rotary.cu", "bfloat16", defines=(("CLLM_REAL_TABLE", 1),)))
    variants.append(Variant("attention.cu", "bfloat16", "float32", (("HEAD_SIZE", 64), *TERMS[0])))
    variants += [Variant("rotary.cu", storage, defines=_symmetry(HEAD_SIZES[0])) for storage in both]
    return variants + attention_variants()


def attention_variants() -> list[Variant]:
    """The attention sources for every head size, with the score biases and symmetries compiled ahead of time."""
    choices: list[tuple[int, tuple[tuple[str, int], ...]]] = [(size, ()) for size in HEAD_SIZES]
    for size in TERMS_HEAD_SIZES:
        choices += [(size, terms) for terms in (*TERMS, _symmetry(size), (*TERMS[0], *_symmetry(size)))]
    return [
        Variant(source, storage, defines=(("HEAD_SIZE", size), *chosen))
        for source in _ATTENTION
        for storage in ("float32", "bfloat16")
        for size, chosen in choices
        if source == "attention.cu" or ("TERM_POINT_GRADIENTS", 1) not in chosen  # not supported by the fused kernel
    ]


def _symmetry(head_size: int) -> tuple[tuple[str, int], ...]:
    return (("SYMMETRY_PAIRS", head_size // SYMMETRY_SHARE),)
