"""KV gets what the largest step leaves."""

import pytest
import torch

from ingine import device
from ingine.config import EngineConfig
from ingine.device import num_kv_blocks, resolve_limits
from ingine.errors import ConfigError
from ingine.memory_profile import run_largest_step
from ingine.parallel import SINGLE

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_tokens"),
    [(4, 64, 160, 64), (8, 8, 160, 8), (2, 100, 20, 38)],
    ids=["one long prompt", "one token each", "no more than sequences hold"],
)
def test_the_largest_step_has_all_tokens_and_samples_for_all_sequences(
    llama, monkeypatch, max_num_seqs, max_num_batched_tokens, max_model_len, num_tokens
):
    config = EngineConfig(
        "tiny",
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    seen, decoder = [], llama.decoder
    forward, compute_logits = decoder.forward, decoder.compute_logits
    monkeypatch.setattr(
        decoder, "forward", lambda ids, *rest: (seen.append(len(ids)), forward(ids, *rest))[1]
    )
    monkeypatch.setattr(
        decoder, "compute_logits", lambda hidden: (seen.append(len(hidden)), compute_logits(hidden))[1]
    )
    run_largest_step(config, decoder, SINGLE)
    assert seen == [num_tokens, max_num_seqs]


def test_a_step_has_its_memory_before_kv_does(monkeypatch):
    monkeypatch.setattr(device, "_spare_bytes", lambda device, share: 100 * MIB)
    config = resolve_limits(EngineConfig("tiny"), CPU, model_max_len=1 << 20)
    assert num_kv_blocks(config, CPU, MIB) == 100
    assert num_kv_blocks(config, CPU, MIB, step_bytes=30 * MIB) == 70
    with pytest.raises(ConfigError, match="no room for KV"):
        num_kv_blocks(config, CPU, MIB, step_bytes=100 * MIB)


def test_a_size_that_was_asked_for_is_what_it_is():
    config = resolve_limits(EngineConfig("tiny", kv_cache_bytes=10 * MIB), CPU, model_max_len=1 << 20)
    assert num_kv_blocks(config, CPU, MIB, step_bytes=30 * MIB) == 10
