"""The options of an engine. Imports no torch, so that options are validated before it is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from ingine.byte_sizes import parse_bytes
from ingine.errors import ConfigError
from ingine.sampling_params import MAX_CHOICES

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8", "int4", "fp8")
QUANTIZATIONS = ("int8", "int4")
SPECULATIONS = ("ngram", "suffix")
GENERATION_CONFIGS = ("auto", "vllm")


@dataclass(frozen=True)
class EngineConfig:
    """The options of an engine. None leaves the choice to the engine, which reports it in `Engine.config`.

    Raises ConfigError, which names the field.
    """

    model: str
    """A packaged model's name, a folder, a GGUF file or a hub id: see `ingine.engine.store.model_store`."""
    dtype: str = "auto"
    """The dtype of weights and KV. auto: bfloat16 where it is fast."""
    quantization: str | None = None
    """int8: int8 weights with a scale for each row, multiplied by int8 activations. int4: 4-bit weights with
    a scale and a zero point for each 32 weights of a row, multiplied by int8 activations. Both run only on
    CPUs, and quantise any checkpoint at load."""
    kv_cache_dtype: str = "auto"
    """auto: same as `dtype`. int8: half of bfloat16's memory, with a scale for each token and head. int4: a
    little over a quarter, at a loss of quality that docs/operations.md states. fp8: e4m3 with the scales of
    int8, CUDA only."""
    device: str = "auto"
    """torch's name of a device. auto: cuda, else mps, else cpu."""
    max_model_len: int | None = None
    """The most tokens of one sequence, prompt and output together. None: the model's maximum length."""
    max_num_seqs: int | None = None
    """The most sequences of one step. None: chosen to suit the device."""
    max_num_batched_tokens: int | None = None
    """The token budget of one step. At least max_num_seqs, so that every running sequence gets a token."""
    block_size: int = 16
    """The number of tokens in one KV block."""
    kv_cache_bytes: int | None = None
    """KV memory in bytes, or text such as "2GiB". None: derived from `gpu_memory_utilization`, or a share of
    the host's memory that is available beside mapped weights."""
    gpu_memory_utilization: float = 0.9
    """The share of the GPU's memory that weights, the largest step, graphs and KV may use; CUDA only."""
    enable_prefix_caching: bool = True
    priority_ageing_s: float = 30.0
    """A sequence is as urgent as one of the next lower priority number that arrives this much later."""
    tensor_parallel_size: int = 1
    """The number of GPUs that share the model, one process each: `ingine.engine.communication.parallel`."""
    async_scheduling: bool | None = None
    """Schedule a step while the device computes the previous one. None: enabled on CUDA, except with
    speculation, which needs every token before the next step."""
    speculation: str | None = None
    """ngram: draft the tokens that followed the last tokens earlier in the sequence, where it pays. suffix:
    draft also from recent outputs of the same tenant."""
    num_speculative_tokens: int = 8
    """The most draft tokens of a sequence in a step."""
    suffix_decoding_max_cached_tokens: int = 65_536
    """The most tokens of recent outputs that suffix speculation keeps, of all tenants together; a token takes
    about 200 bytes. 0 keeps none."""
    suffix_decoding_across_tenants: bool = False
    """Draft from any tenant's outputs. The speed of a request may then reveal other tenants' outputs."""
    max_choices: int = MAX_CHOICES
    """The most choices of a request, its `n`."""
    generation_config: str = "auto"
    """The source of sampling parameters that a request does not give. auto: the model's
    generation_config.json. vllm: neutral values. Same as vLLM's option of this name."""
    seed: int = 0
    """Seeds the generator from which requests without a seed of their own get one."""

    def __post_init__(self):
        try:
            object.__setattr__(self, "kv_cache_bytes", parse_bytes(self.kv_cache_bytes))
        except ValueError as error:
            raise ConfigError(f"kv_cache_bytes {error}, not {self.kv_cache_bytes!r}") from None
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} must be a non-empty string, not {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization must be one of {', '.join(QUANTIZATIONS)}, or None, not {self.quantization!r}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache_dtype!r}"
            )
        if self.speculation is not None and self.speculation not in SPECULATIONS:
            raise ConfigError(
                f"speculation must be one of {', '.join(SPECULATIONS)}, or None, not {self.speculation!r}"
            )
        if self.generation_config not in GENERATION_CONFIGS:
            raise ConfigError(
                f"generation_config must be one of {', '.join(GENERATION_CONFIGS)}, "
                f"not {self.generation_config!r}"
            )
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                self._require_int(name, at_least=1)
        self._require_int("block_size", at_least=1)
        self._require_int("num_speculative_tokens", at_least=1)
        self._require_int("suffix_decoding_max_cached_tokens", at_least=0)
        self._require_int("tensor_parallel_size", at_least=1)
        self._require_int("max_choices", at_least=1)
        self._require_int("seed", at_least=0)
        for name in ("enable_prefix_caching", "suffix_decoding_across_tenants"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a bool, not {getattr(self, name)!r}")
        if self.async_scheduling is not None and not isinstance(self.async_scheduling, bool):
            raise ConfigError(f"async_scheduling must be a bool or None, not {self.async_scheduling!r}")
        if self.async_scheduling and self.speculation is not None:
            raise ConfigError(
                "async_scheduling and speculation exclude each other: a draft needs the last token"
            )
        self._require_number("gpu_memory_utilization", above=0, up_to=1)
        self._require_number("priority_ageing_s", above=0, up_to=1e9)
        budget = self.max_num_batched_tokens
        if budget is not None and self.max_num_seqs is not None and budget < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) must not be under max_num_seqs ({self.max_num_seqs})"
            )

    def _require_int(self, name: str, *, at_least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(f"{name} must be an int of at least {at_least}, not {value!r}")

    def _require_number(self, name: str, *, above: float, up_to: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value <= up_to:
            raise ConfigError(f"{name} must be a number over {above} and up to {up_to:g}, not {value!r}")


def numerics(config: EngineConfig, dtype: object, loaded: Sequence[str] = ()) -> str:
    """Name the settings on which a model's tokens depend. Engines with different names may choose different
    tokens.

    dtype: torch's, as the engine chose it. loaded: `Model.numerics`. Returns, for example, `bfloat16`,
    `bfloat16,int8,kv-int8` or `bfloat16,int4,by-importance,as-stored-168`. With several ranks each rounds its
    own part of a row, so the name has their number if activations or weights are quantised. It also has a
    `generation_config` other than the default, which decides the temperature of requests that give none.
    """
    size = config.tensor_parallel_size
    ranks = f"ranks-{size}" if size > 1 and (config.quantization is not None or loaded) else None
    kv_cache = None if config.kv_cache_dtype == "auto" else f"kv-{config.kv_cache_dtype}"
    sampling = None if config.generation_config == "auto" else f"generation-config-{config.generation_config}"
    named = (str(dtype).removeprefix("torch."), config.quantization, *loaded, ranks, kv_cache, sampling)
    return ",".join(filter(None, named))
