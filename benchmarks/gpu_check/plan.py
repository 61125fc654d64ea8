"""The plans: what runs, how large, and for how long, on a GPU or tiny on a CPU. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Qwen2 decoder: tied embedding, biases of queries, keys and values."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 1e6


@dataclass(frozen=True)
class Plan:
    device: str
    dtype: str
    seconds: Mapping[str, float]
    """Time for each part, its start included, plus what earlier parts have left. Cells that have not begun by
    then are listed as skipped; a part that does not end is killed shortly after."""
    total_s: float
    """Time after which no part runs, whatever is left."""

    # Exactness of the kernels
    num_attention_cases: int
    longest_prompt: int
    """Longest prompt of the random schedules for attention, in tokens."""
    num_rows: int
    """Rows of layer operations and sampling."""
    vocab_size: int
    """Vocabulary size for the check of sampling."""

    # Exactness of the engine
    architectures: tuple[str, ...]
    num_tiny_layers: int
    prompt_lengths: tuple[int, ...]
    """Prompts longer than `shared_prefix` begin with the same tokens."""
    shared_prefix: int
    num_new_tokens: int
    small_blocks: int
    """Tokens of a KV block: few, so that sequences have several blocks, and little memory makes them wait."""

    # Speed
    shape: Shape
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    first: tuple[tuple[int, int], ...]
    """Batches and contexts that are measured first, since time may run out."""
    block_size: int
    num_batched_tokens: int
    """Maximum of a step."""
    num_warm_up_steps: int
    num_timed_steps: int
    compared: tuple[int, int]
    """Batch and context at which KV formats, block sizes and settings are compared."""
    hosted: tuple[int, ...]
    """Batches for an engine in a process of its own, at the context of `compared`."""
    traced: tuple[int, ...]
    """Batches for which a step is traced, at the context of `compared`."""
    streams: tuple[int, ...]
    """Numbers of streams for the comparison with Hugging Face, with prompts as long as the context of
    `compared`."""
    num_stream_tokens: int
    bandwidth_bytes: int
    """Memory that is read to measure the bandwidth."""


FULL = Plan(
    device="cuda",
    dtype="bfloat16",
    seconds={
        **{"kernels": 120, "engine": 70, "speed": 90, "process": 35},
        **{"hf": 40, "settings": 45, "trace": 25},
    },
    total_s=440,
    num_attention_cases=16,
    longest_prompt=400,
    num_rows=64,
    vocab_size=151_936,
    architectures=("llama", "qwen2", "qwen3", "mistral"),
    num_tiny_layers=2,
    prompt_lengths=(1, 4, 33, 43, 40, 41, 40),
    shared_prefix=32,
    num_new_tokens=24,
    small_blocks=16,
    shape=Shape(
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=151_936,
    ),
    batches=(1, 8, 32, 64, 128, 256),
    contexts=(128, 1024, 4096),
    first=((1, 1024), (32, 1024), (256, 1024)),
    block_size=16,
    num_batched_tokens=2048,
    num_warm_up_steps=8,
    num_timed_steps=64,
    compared=(32, 1024),
    hosted=(32, 256),
    traced=(1, 32, 256),
    streams=(1, 32),
    num_stream_tokens=64,
    bandwidth_bytes=4 << 30,
)
"""The shape is Qwen2.5-1.5B's. The whole run must stay under eight minutes, which leaves 40 s for `make`
before, and for tables and plot after."""

DRY = Plan(
    device="cpu",
    dtype="float32",
    seconds=dict.fromkeys(("kernels", "engine", "speed", "process", "hf", "settings", "trace"), 60),
    total_s=440,
    num_attention_cases=2,
    longest_prompt=9,
    num_rows=2,
    vocab_size=300,
    architectures=("qwen2",),
    num_tiny_layers=1,
    prompt_lengths=(2, 4, 4),
    shared_prefix=3,
    num_new_tokens=4,
    small_blocks=2,
    shape=Shape(
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=96,
    ),
    batches=(1, 2),
    contexts=(5,),
    first=((2, 5),),
    block_size=16,
    num_batched_tokens=6,
    num_warm_up_steps=1,
    num_timed_steps=2,
    compared=(2, 5),
    hosted=(2,),
    traced=(1, 2),
    streams=(1, 2),
    num_stream_tokens=3,
    bandwidth_bytes=1 << 20,
)
"""Everything is as small as possible, since a program takes milliseconds in Triton's interpreter."""
