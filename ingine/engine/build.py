"""Builds the parts of an engine: the model, its KV caches, and the model runner."""

from typing import Any

import torch

from ingine.engine.communication.parallel import SINGLE, TensorParallel
from ingine.engine.config import EngineConfig
from ingine.engine.kernels.select import select_kernels
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.interface import Model
from ingine.engine.models.loader import load_model
from ingine.engine.run.cuda_graphs import capture_for
from ingine.engine.run.device import num_kv_blocks, parse_device, select_device, select_dtype
from ingine.engine.run.graphs import DecodeGraphs
from ingine.engine.run.model_runner import ModelRunner
from ingine.engine.run.warm_up import warm_up
from ingine.engine.store.generation_config import read_sampling_defaults
from ingine.engine.store.model_store import resolve_model
from ingine.engine.text.tokenizer import Tokenizer, load_tokenizer


def join_others(config: EngineConfig) -> TensorParallel:
    """Join the ranks that share the model. Raises ConfigError if there are several and torchrun did not start
    this process.
    """
    if config.tensor_parallel_size == 1:
        return SINGLE
    return TensorParallel.join(config.tensor_parallel_size, parse_device(config.device))


def load(
    config: EngineConfig, tokenizer: Tokenizer | None, parallel: TensorParallel
) -> tuple[Model, Tokenizer | None, dict[str, Any]]:
    """Load the model. Returns it with its tokenizer, and with its sampling defaults as fields of
    SamplingParams.

    The tokenizer is None if the model has none, and on ranks other than 0, which do not need it.
    """
    device = select_device(config.device) if parallel.size == 1 else parallel.device
    path = resolve_model(config.model)
    model_config = ModelConfig.from_folder(path)
    dtype = select_dtype(config.dtype, device, model_config.dtype)
    sampling_defaults = {} if config.generation_config == "vllm" else read_sampling_defaults(path)
    kernels = select_kernels(
        device,
        dtype,
        head_dim=model_config.head_dim,
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=config.quantization,
        block_size=config.block_size,
    )
    model = load_model(path, dtype=dtype, device=device, kernels=kernels, parallel=parallel)
    if tokenizer is None and parallel.rank == 0:
        tokenizer = load_tokenizer(path)
    return model, tokenizer, sampling_defaults


@torch.inference_mode()
def make_runner(config: EngineConfig, model: Model, parallel: TensorParallel) -> tuple[ModelRunner, int]:
    """Build the model runner. Returns it with the number of its KV blocks. `config` has been through
    `resolve_limits`.

    KV blocks get the memory that the largest step leaves, so that step is run first to measure it.
    """
    capture = capture_for(model.device) if model.kernels.attention.can_be_captured else None
    step_bytes = warm_up(config, model, parallel)
    if capture is not None:
        step_bytes *= 2  # graphs keep memory of their own, at most as much as the largest step takes
    num_blocks = num_kv_blocks(
        config,
        model.device,
        model.bytes_per_block(config.block_size),
        step_bytes=step_bytes,
        mapped_bytes=model.mapped_bytes,
    )
    num_blocks = parallel.agree_on_min(num_blocks)
    kv_caches = model.allocate_kv_caches(num_blocks, config.block_size)
    tokens = torch.full((config.max_num_batched_tokens,), -1, dtype=torch.int64, device=model.device)
    graphs = None
    if capture is not None:
        graphs = DecodeGraphs(
            model,
            kv_caches,
            tokens,
            max_num_seqs=config.max_num_seqs,
            max_blocks=min(-(-config.max_model_len // config.block_size), num_blocks),
            capture=capture,
            parallel=parallel,
        )
    runner = ModelRunner(model, kv_caches, config.block_size, tokens=tokens, graphs=graphs, parallel=parallel)
    return runner, num_blocks
