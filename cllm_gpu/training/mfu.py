"""How much of a GPU training takes: the model's FLOP per token over the GPU's peak (model FLOP utilisation, MFU).

MFU = tokens/s · FLOP per token / peak (Chowdhery et al. 2022, PaLM, appendix B). Others count a token's FLOP otherwise
(causal attention half, embeddings too), so the formula is said beside the figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm_gpu.devices.peak_flops import Peak
from cllm_gpu.model.flops import FORMULA


@dataclass(frozen=True)
class Throughput:
    """What turns a training run's tokens/s into an MFU."""

    flop_per_token: int
    peak: Peak

    def utilisation(self, tokens_per_second: float) -> float:
        """MFU, as a fraction of 1."""
        return tokens_per_second * self.flop_per_token / self.peak.flop_per_second

    @property
    def description(self) -> str:
        """The formula and the peak, in one line."""
        return (
            f"MFU: tokens/s · ({FORMULA} = {self.flop_per_token / 1e9:.4g} GFLOP) over "
            f"{self.peak.flop_per_second / 1e12:.4g} TFLOP/s, {self.peak.source}"
        )
