"""Text to token ids and back: bytes (the default), the letters of `patterns`, and Hugging Face's tokenizer.json.

Every tokenizer has one id that no text can produce, the end of text: it follows each document and ends generation.
"""

from cllm_gpu.data.tokenizers.base import Tokenizer
from cllm_gpu.data.tokenizers.byte import ByteTokenizer
from cllm_gpu.data.tokenizers.decoding import byte_characters
from cllm_gpu.data.tokenizers.huggingface import END_OF_TEXT_NAMES, HuggingFaceTokenizer
from cllm_gpu.data.tokenizers.load import identified, load_tokenizer, require_same, tokenizer_from_dict
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
    "identified",
    "load_tokenizer",
    "lost_share",
    "require_same",
    "tokenizer_from_dict",
    "with_neighbours",
]
