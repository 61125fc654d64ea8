"""Reads a model's default sampling parameters from its generation_config.json, by vLLM's rule.

Temperature, top_k, top_p, min_p and the repetition penalty apply if a request does not set them, and
max_new_tokens if it does not set max_tokens. The file's `do_sample` is ignored.
"""

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ingine.engine.files.model_files import read_json
from ingine.errors import ConfigError
from ingine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Maps names in the file to names in SamplingParams."""


def read_sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return fields of SamplingParams, none if the file is missing. Raises ConfigError for a wrong value."""
    file = folder / FILE_NAME
    if not file.exists():
        return {}
    content = read_json(file)
    try:
        found = {FIELDS[name]: content[name] for name in FIELDS if content.get(name) is not None}
        defaults = SamplingParams(**found).given()
    except ValidationError as error:
        fault = error.errors()[0]
        [name] = (name for name, field in FIELDS.items() if field == fault["loc"][0])
        raise ConfigError(
            f"{file}: {name}: {fault['msg']:.300}. Correct it, or start with generation_config=vllm"
        ) from None
    if defaults:
        values = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.info("sampling defaults from %s: %s (generation_config=vllm ignores them)", FILE_NAME, values)
    return defaults
