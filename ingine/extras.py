"""The packages that `pip install ingine-llm` leaves out, and the message for a missing one."""

# fmt: off
WORKER_EXTRA = {
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub",
    "gguf", "numpy", "jinja2", "filelock", "prometheus_client", "llguidance",
}
# fmt: on
GATEWAY_EXTRA = {"starlette", "uvicorn"}


def missing_extra(error: ModuleNotFoundError, wanted: str) -> str | None:
    """Return a message that says how to install what `wanted` needs; None if another module is missing."""
    name = (error.name or "").partition(".")[0]
    extra = "worker" if name in WORKER_EXTRA else "gateway" if name in GATEWAY_EXTRA else None
    return f"{wanted} needs {name}: pip install 'ingine-llm[{extra}]'" if extra else None
