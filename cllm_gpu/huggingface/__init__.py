"""Import and export of GPT-2 models in Hugging Face format."""

from cllm_gpu.huggingface.exporting import export_model
from cllm_gpu.huggingface.importing import Imported, import_model

__all__ = ["Imported", "export_model", "import_model"]
