"""cllm_gpu: language models trained with every gradient written by hand, on NumPy or CuPy."""

__version__ = "0.1.0"
