"""The packages that `pip install ingine-llm` leaves out, and the message for a missing one."""

# fmt: off
WORKER_EXTRA = {
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub",
    "gguf", "numpy", "jinja2", "filelock", "prometheus_client", "llguidance",
}
# fmt: on


def missing_extra(error: ModuleNotFoundError, wanted: str) -> str | None:
    """Return a message that says how to install what `wanted` needs; None if another module is missing."""
    name = (error.name or "").partition(".")[0]
    return f"{wanted} needs {name}: pip install 'ingine-llm[worker]'" if name in WORKER_EXTRA else None
