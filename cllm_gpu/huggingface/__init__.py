"""Import and export of GPT-2 models in Hugging Face format."""

from cllm_gpu.huggingface.exporting import export_model
from cllm_gpu.huggingface.importing import import_model

__all__ = ["export_model", "import_model"]
