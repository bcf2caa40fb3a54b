"""GPT-2 as Hugging Face stores it: read into a checkpoint of ours, and written from one."""

from cllm_gpu.huggingface.exporting import export_model
from cllm_gpu.huggingface.importing import import_model

__all__ = ["export_model", "import_model"]
