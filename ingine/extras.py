"""What `pip install ingine-llm` leaves out, and the words for it."""

# fmt: off
WORKER_EXTRA = {
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub",
    "gguf", "numpy", "jinja2", "filelock", "prometheus_client",
}
# fmt: on


def missing_extra(error: ModuleNotFoundError, wanted: str) -> str | None:
    """A sentence that says how to get what `wanted` needs; None where another module is missing."""
    name = (error.name or "").partition(".")[0]
    return f"{wanted} needs {name}: pip install 'ingine-llm[worker]'" if name in WORKER_EXTRA else None
