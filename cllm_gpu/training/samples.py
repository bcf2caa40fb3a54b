"""Text that a run generates while it learns: made the same way every time, kept with the run's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllm_gpu.config import Config
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.inference.generate import generate_text
from cllm_gpu.inference.sampling import Sampler
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.training.metrics import MetricsLog, read_metrics


def sample_pieces(config: Config, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of the text that the model, as it is now, writes after the configured prompt.

    The sampler starts from the run's seed each time, so samples differ only by what was learnt between them, and a
    run that resumes takes the same ones. The model's parameters are only read. UserError as in `generate_text`.
    """
    loop = config.training
    sampler = Sampler(temperature=0.9, top_p=0.95, seed=loop.seed)
    return generate_text(model, tokenizer, config.prompt, tokens=loop.sample_tokens, sampler=sampler)


def keep_sample(metrics: MetricsLog, step: int, prompt: str, text: str) -> None:
    """Append a sample to the metrics, unless the same is there: a finished run that is resumed takes its last again."""
    record: dict[str, Any] = {"kind": "sample", "step": step, "prompt": prompt, "text": text}
    if not metrics.path.exists() or record not in read_metrics(metrics.path):
        metrics.append(record)
