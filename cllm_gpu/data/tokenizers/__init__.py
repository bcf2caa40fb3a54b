"""Tokenizers: bytes (the default), the letters of `patterns`, and Hugging Face's tokenizer.json.

Every tokenizer has one id that no text encodes to, the end of text: it follows each document and ends generation.
"""

from cllm_gpu.data.tokenizers.base import Tokenizer
from cllm_gpu.data.tokenizers.byte import ByteTokenizer
from cllm_gpu.data.tokenizers.decoding import byte_characters
from cllm_gpu.data.tokenizers.huggingface import END_OF_TEXT_NAMES, HuggingFaceTokenizer
from cllm_gpu.data.tokenizers.load import load_tokenizer, require_same_tokenizer, tokenizer_from_dict, tokenizer_label
from cllm_gpu.data.tokenizers.lossless import lost_share
from cllm_gpu.data.tokenizers.neighbours import with_neighbours
from cllm_gpu.data.tokenizers.patterns import LETTERS, PatternTokenizer

__all__ = [
    "END_OF_TEXT_NAMES",
    "LETTERS",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "PatternTokenizer",
    "Tokenizer",
    "byte_characters",
    "load_tokenizer",
    "lost_share",
    "require_same_tokenizer",
    "tokenizer_from_dict",
    "tokenizer_label",
    "with_neighbours",
]
