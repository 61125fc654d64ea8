"""What an engine is built from. Imports no torch: a flag is checked before anything heavy is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from ingine.byte_sizes import parse_bytes
from ingine.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8", "int4", "fp8")
QUANTIZATIONS = ("int8", "int4")
SPECULATIONS = ("ngram", "suffix")
GENERATION_CONFIGS = ("auto", "vllm")


@dataclass(frozen=True)
class EngineConfig:
    """Raises ConfigError naming the field. None leaves the choice to the engine; `Engine.config` tells it."""

    model: str
    """A packaged model's name, a folder, a GGUF file or a hub id: see `ingine.engine.store.model_store`."""
    dtype: str = "auto"
    """Of weights and KV. auto: bfloat16 where it is fast."""
    quantization: str | None = None
    """int8: weights in int8, a scale a row, multiplied by activations in int8. int4: weights in four bits, a
    scale and a zero for each 32 of a row, likewise; both CPU only, and made from any checkpoint."""
    kv_cache_dtype: str = "auto"
    """auto: as `dtype`. int8: half of bfloat16's memory, a scale a token and head. int4: a good quarter, for
    a loss of quality that docs/operations.md states. fp8: as int8, in e4m3, CUDA only."""
    device: str = "auto"
    """torch's name. auto: cuda, else mps, else cpu."""
    max_model_len: int | None = None
    """Most tokens of one sequence, prompt and output together. None: what the model was made for."""
    max_num_seqs: int | None = None
    """Most sequences of one step. None: fits the device."""
    max_num_batched_tokens: int | None = None
    """The token budget of one step. Not under max_num_seqs: a running sequence always gets a token."""
    block_size: int = 16
    """Tokens of one KV block."""
    kv_cache_bytes: int | None = None
    """KV memory; text such as "2GiB" is taken too. None: from `gpu_memory_utilization`, or a share of the
    host's available memory beside mapped weights."""
    gpu_memory_utilization: float = 0.9
    """Share of the whole GPU's memory that weights, the largest step, graphs and KV may take; CUDA only."""
    enable_prefix_caching: bool = True
    priority_ageing_s: float = 30.0
    """How much earlier a sequence must have come to be as urgent as one of the next better priority."""
    tensor_parallel_size: int = 1
    """GPUs that share the model, a process each: see `ingine.engine.communication.parallel`."""
    async_scheduling: bool | None = None
    """Schedule a step while the device computes the one before. None: on CUDA, but not with speculation,
    which asks for every token before the next step."""
    speculation: str | None = None
    """ngram: guess that what followed the last tokens before follows again, where it pays. suffix: likewise,
    also from recent outputs of the same tenant."""
    num_speculative_tokens: int = 8
    """Most tokens guessed of a sequence in a step."""
    suffix_decoding_max_cached_tokens: int = 65_536
    """Tokens of recent outputs that are kept for that, of all tenants together, at most; some 200 bytes each.
    0: none."""
    suffix_decoding_across_tenants: bool = False
    """Guess from any tenant's outputs. The speed of one's requests may then tell what others got."""
    generation_config: str = "auto"
    """Where sampling parameters come from that a request does not give. auto: the model's
    generation_config.json. vllm: neutral values. As vLLM's option of the same name."""
    seed: int = 0
    """Where the seeds of requests that bring none are drawn from."""

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
    """What decides a model's tokens: two engines that differ in this may choose different ones.

    dtype: torch's, as the engine chose it. loaded: `Model.numerics`. Returns such as `bfloat16`,
    `bfloat16,int8,kv-int8` or `bfloat16,int4,by-importance,as-stored-168`. Of several ranks each rounds its
    own part of a row, so their number is named where activations or weights are rounded. A
    `generation_config` other than the default is named too: it decides the temperature of silent requests.
    """
    size = config.tensor_parallel_size
    ranks = f"ranks-{size}" if size > 1 and (config.quantization is not None or loaded) else None
    kv_cache = None if config.kv_cache_dtype == "auto" else f"kv-{config.kv_cache_dtype}"
    sampling = None if config.generation_config == "auto" else f"generation-config-{config.generation_config}"
    named = (str(dtype).removeprefix("torch."), config.quantization, *loaded, ranks, kv_cache, sampling)
    return ",".join(filter(None, named))
