"""Data: from text to token shards to batches.

sources.py and text.py find and stream text, split.py decides which of it is held out, prepare.py and shards.py write
and verify token shards, bpe.py trains a tokenizer, llmc.py reads llm.c's shards, patterns.py generates the synthetic
data set, text_source.py reads a text for evaluation, tokens.py and batches.py make batches of windows.
"""

from cllm_gpu.data.batches import Batches, evaluation_batches, evaluation_windows
from cllm_gpu.data.dataset import Dataset, open_dataset, open_prepared
from cllm_gpu.data.text_source import open_text
from cllm_gpu.data.tokens import IGNORE_INDEX, TokenSource

__all__ = [
    "IGNORE_INDEX",
    "Batches",
    "Dataset",
    "TokenSource",
    "evaluation_batches",
    "evaluation_windows",
    "open_dataset",
    "open_prepared",
    "open_text",
]
