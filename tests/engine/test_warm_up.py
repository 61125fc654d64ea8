"""Steps before the first one that counts; KV gets what the largest of them leaves."""

import pytest
import torch

from ingine import device
from ingine.config import EngineConfig
from ingine.device import num_kv_blocks, resolve_limits
from ingine.errors import ConfigError
from ingine.parallel import SINGLE
from ingine.warm_up import run_steps

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_tokens"),
    [(4, 64, 160, 64), (8, 8, 160, 8), (2, 100, 20, 38)],
    ids=["one long prompt", "one token each", "no more than sequences hold"],
)
def test_the_last_step_has_all_tokens_and_samples_for_all_sequences(
    llama, monkeypatch, max_num_seqs, max_num_batched_tokens, max_model_len, num_tokens
):
    config = EngineConfig(
        "tiny",
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    rows: dict[str, list[int]] = {"forward": [], "compute_logits": []}
    for name in rows:
        method = getattr(llama.decoder, name)

        def watched(first, *rest, name=name, method=method):
            rows[name].append(len(first))
            return method(first, *rest)

        monkeypatch.setattr(llama.decoder, name, watched)
    run_steps(config, llama.decoder, SINGLE)
    prompts = [
        length for length in (2, 4, 8, 16, 32, 64, 128) if length <= min(num_tokens, max_model_len - 1)
    ]
    assert rows == {"forward": [*prompts, num_tokens], "compute_logits": [1] * len(prompts) + [max_num_seqs]}


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
