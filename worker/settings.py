"""A worker's settings. Each is an `INGINE_` variable, a line in `.env`, or a flag of `ingine worker`."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from ingine.byte_sizes import parse_bytes
from ingine.connect.environment import ENV_FILE, ENV_PREFIX, check_variables, is_service_link
from ingine.connect.secrets import secrets_dir, unreadable
from ingine.connect.url import check_url
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S, Name
from ingine.contract.keys import PARKED_PREFIX, QUEUE_NAME
from ingine.engine.config import EngineConfig
from ingine.errors import ConfigError
from ingine.sampling_params import MAX_CHOICES
from ingine.worker.identity import default_name

Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class WorkerSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_file=ENV_FILE, extra="ignore", frozen=True)

    redis_url: str | None = Field(
        None,
        repr=False,
        description="Unset: the server on 127.0.0.1:6379 or, if none answers, an embedded one.",
    )

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, url: str | None) -> str | None:
        return None if url is None else check_url(url)

    queue: Annotated[str, Field(pattern=rf"^{QUEUE_NAME.pattern}$")] = Field(
        "default", description="Letters, digits and `_.-`, at most 64."
    )
    worker_id: Name = Field(
        default_factory=default_name,
        description="A name, to which each start adds random characters. Unset: host-pid.",
    )

    @field_validator("worker_id")
    @classmethod
    def _no_parking_place(cls, name: str) -> str:
        if name.startswith(PARKED_PREFIX):
            raise ValueError(f"must not begin with {PARKED_PREFIX!r}: that is for parked entries")
        return name

    model: str | None = Field(None, description="Packaged name, folder, GGUF file, hub id. Unset: SmolLM2.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and KV. auto: bfloat16 where it is fast."
    )
    quantization: Literal["int8", "int4"] | None = Field(
        None, description="Of weights: int8 or int4, on CPUs only. Unset: none."
    )
    kv_cache_dtype: Literal["auto", "int8", "int4", "fp8"] = Field(
        "auto", description="Type of the KV cache. auto: as dtype. fp8: CUDA only."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps, ...")
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt + output. Unset: the model's."
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Sequences per step, and choices of jobs held.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Token budget of a step.")
    block_size: int = Field(16, ge=1, description="Tokens in a KV block.")
    kv_cache_bytes: Bytes | None = Field(None, ge=1, description="Such as 8GiB. Unset: what the device has.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory to use.")
    enable_prefix_caching: bool = Field(True, description="Reuse the KV of common prefixes.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model; under torchrun.")
    async_scheduling: bool | None = Field(None, description="Schedule ahead of the device. Unset: on a GPU.")
    max_choices: int = Field(16, ge=1, le=MAX_CHOICES, description="The most choices, `n`, of a job.")
    speculation: Literal["ngram", "suffix"] | None = Field(
        None, description="ngram: by prompt lookup. suffix: from recent outputs too. Unset: none."
    )
    num_speculative_tokens: int = Field(8, ge=1, description="Most draft tokens per sequence and step.")
    suffix_decoding_max_cached_tokens: int = Field(
        65_536, ge=0, description="Recent output tokens to keep. 0: none."
    )
    suffix_decoding_across_tenants: bool = Field(False, description="Draft from any tenant's outputs.")
    priority_ageing_s: float = Field(30.0, gt=0, description="Waiting that outweighs a priority step.")

    generation_config: Literal["auto", "vllm"] = Field(
        "auto", description="Sampling defaults. auto: the model's own. vllm: neutral values."
    )
    tool_parser: Literal["hermes", "llama3_json", "mistral", "qwen3_coder", "generic"] | None = Field(
        None, description="The format of tool calls in the output. Unset: chosen by the model."
    )
    reasoning_parser: Literal["think", "mistral", "none"] | None = Field(
        None, description="The tags around reasoning. Unset: chosen by the model. none: no reasoning."
    )

    lease_s: float = Field(15.0, ge=0.5, description="A worker silent for this long loses its jobs.")
    result_ttl_s: float = Field(DEFAULT_RESULT_TTL_S, gt=0, description="How long an ended job can be read.")
    max_jobs: int | None = Field(None, ge=1, description="Limit of jobs in the queue. Unset: left as it is.")
    max_job_bytes: Bytes | None = Field(
        None, ge=64, description="Limit of a job's size. Unset: left as it is."
    )
    max_bytes: Bytes | None = Field(
        None, ge=64, description="Limit of all jobs' bytes. Unset: left as it is."
    )
    max_jobs_per_s: float | None = Field(None, gt=0, description="Limit per tenant. Unset: left as it is.")
    mixed_models: bool = Field(False, description="Allow workers of other models on the queue.")
    model_wait_s: float = Field(
        300.0, ge=10, description="How long a job waits for a worker of a model that this queue has had."
    )
    max_deaths: int = Field(3, ge=1, description="Worker deaths after which a job fails.")
    step_timeout_s: float = Field(300.0, gt=0, description="A step that takes longer ends the worker.")
    drain_timeout_s: float = Field(10.0, gt=0, description="How long a hand-over may take.")

    http_host: str = Field("127.0.0.1", description="0.0.0.0: reachable from other machines.")
    http_port: int = Field(
        9464,
        ge=-1,
        le=65535,
        description="/metrics, /healthz, /readyz. 0: any free, -1: off. Unset: if it is taken, any free.",
    )

    @field_validator("http_port", mode="before")
    @classmethod
    def _no_service_link(cls, value: Any) -> Any:
        """Ignore the INGINE_HTTP_PORT that Kubernetes sets, to a URL, if there is a Service `ingine-http`."""
        is_link = isinstance(value, str) and is_service_link("INGINE_HTTP_PORT", value)
        return cls.model_fields["http_port"].default if is_link else value

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level to log."
    )
    log_json: bool = Field(False, description="Log one JSON object per line.")
    log_prompts: bool = Field(False, description="Log prompts. Off: no prompt and no output reaches a log.")

    def engine_options(self) -> dict:
        """The settings that are fields of `EngineConfig`, without unset ones."""
        names = {field.name for field in fields(EngineConfig)} & self.__class__.model_fields.keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def load_settings(**flags: object) -> WorkerSettings:
    """Settings from `flags`, then the environment, then `.env`, then the files in INGINE_SECRETS_DIR: the
    first source that has a setting wins.

    Raises ConfigError, which names each invalid variable with its valid values, and each misspelled one.
    """
    check_variables()
    try:
        return WorkerSettings(_secrets_dir=secrets_dir(), **flags)
    except SettingsError as error:
        raise ConfigError(unreadable(error)) from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors(include_url=False))) from None


def _explain(fault: dict) -> str:
    """The message for one invalid setting. It never quotes the value: any variable may hold a URL with its
    password by mistake."""
    name = str(fault["loc"][0])
    field = WorkerSettings.model_fields.get(name)
    flag = f"--{name.replace('_', '-')}"
    sentence = f"{ENV_PREFIX}{name.upper()} ({flag}): {fault['msg'].removeprefix('Value error, ')}"
    return f"{sentence}. {field.description}" if field and field.description else sentence
