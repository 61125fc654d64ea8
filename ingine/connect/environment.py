"""The `INGINE_` variables that any part of ingine reads, and the check for unknown ones."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dotenv import dotenv_values

from ingine.connect.secrets import secrets_dir
from ingine.errors import ConfigError
from ingine.private_files import planted_by

ENV_PREFIX = "INGINE_"
ENV_FILE = ".env"

# fmt: off
KNOWN_SETTINGS = frozenset({
    # A worker's settings; a producer has the first two as well.
    "redis_url", "queue", "worker_id",
    "model", "dtype", "quantization", "kv_cache_dtype", "device", "max_model_len", "max_num_seqs",
    "max_choices", "max_num_batched_tokens", "block_size", "kv_cache_bytes", "gpu_memory_utilization",
    "enable_prefix_caching", "tensor_parallel_size", "async_scheduling", "speculation",
    "num_speculative_tokens", "suffix_decoding_max_cached_tokens", "suffix_decoding_across_tenants",
    "priority_ageing_s", "generation_config", "tool_parser", "reasoning_parser", "mixed_models",
    "model_wait_s", "lease_s", "result_ttl_s", "max_jobs", "max_job_bytes", "max_bytes", "max_jobs_per_s",
    "max_deaths", "step_timeout_s", "drain_timeout_s", "http_host", "http_port", "log_level", "log_json",
    "log_prompts",
    # A gateway's settings.
    "gateway_host", "gateway_port", "gateway_keys", "gateway_without_keys", "gateway_max_body_bytes",
    "gateway_body_timeout_s", "gateway_timeout_s", "gateway_send_timeout_s", "gateway_ping_s",
    "gateway_max_requests",
    # Read from the environment alone.
    "cache_dir", "data_dir", "secrets_dir",
})
# fmt: on
"""All settings of all parts, since a producer must know a worker's variables without importing the worker. A
test compares them with the settings classes."""

MISSPELLED = 0.8
"""Similarity (difflib's ratio) from which an unknown name counts as a misspelled known one."""

_NAME = re.compile(r"[\w.~-]+", re.ASCII)
_SERVICE_LINK = re.compile(r"(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)")
_LINK_VALUE = re.compile(r"(?:tcp|udp|sctp)://")


def check_variables() -> list[str]:
    """Return the unknown `INGINE_` variables of the environment, `.env` and the secrets folder.

    They may belong to a newer version, or to a program that shares the environment. Raises ConfigError for
    one that looks like a misspelled setting.
    """
    misspelled, unknown = [], []
    for name, where in _unknown_variables():
        near = _nearest(name)
        if near:
            misspelled.append(f"{name} ({where}) is not a setting: did you mean {near}?")
        else:
            unknown.append(name)
    if misspelled:
        raise ConfigError("\n".join(misspelled))
    return unknown


def is_service_link(name: str, value: str | None) -> bool:
    """True if Kubernetes has set this variable in the pod. It sets some for each Service of the namespace: a
    Service named `ingine-http` causes INGINE_HTTP_PORT=tcp://10.0.0.7:9464, among others.
    """
    if name.endswith("PORT") and _LINK_VALUE.match(value or ""):
        return True
    return _SERVICE_LINK.fullmatch(name.removeprefix(ENV_PREFIX)) is not None


def _unknown_variables() -> Iterator[tuple[str, str]]:
    """Name and place of each unknown variable."""
    for where, variables in _sources():
        for name, value in variables.items():
            upper = name.upper()  # settings are read in any case of letters
            setting = upper.removeprefix(ENV_PREFIX).lower()
            is_ours = upper.startswith(ENV_PREFIX) and not is_service_link(upper, value)
            if is_ours and not _NAME.fullmatch(upper):  # it may have a password in it
                begins = _NAME.match(upper)[0]
                raise ConfigError(f"{where}: what begins with {begins} must be a NAME, and a line NAME=VALUE")
            if is_ours and setting not in KNOWN_SETTINGS:
                yield upper, where


def _sources() -> Iterator[tuple[str, dict[str, str | None]]]:
    yield "in the environment", dict(os.environ)
    file = Path(ENV_FILE)
    try:
        if file.is_file():
            if stranger := planted_by(file):
                raise ConfigError(
                    f"{file.absolute()} was put there by another user, {stranger}, and would decide where "
                    "jobs go: remove it, or work in another folder"
                )
            yield f"in {file.absolute()}", dotenv_values(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file.absolute()} cannot be read: {reason}") from None
    if folder := secrets_dir():
        yield f"in {folder}", dict.fromkeys(os.listdir(folder))


def _nearest(name: str) -> str | None:
    known = [setting.upper() for setting in KNOWN_SETTINGS]
    found = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), known, n=1, cutoff=MISSPELLED)
    return ENV_PREFIX + found[0] if found else None
