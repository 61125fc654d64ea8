"""Steps before the first one that counts; KV gets what the largest of them leaves."""

from types import SimpleNamespace

import pytest
import torch

from ingine.engine.communication.parallel import SINGLE
from ingine.engine.config import EngineConfig
from ingine.engine.run import device
from ingine.engine.run.device import num_kv_blocks, resolve_limits
from ingine.engine.run.warm_up import allocate_for, make_steps, run_steps, warm_up
from ingine.errors import ConfigError

CPU = torch.device("cpu")
MIB = 1 << 20
CONFIG = EngineConfig("tiny", block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=160)


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
    steps = make_steps(config, llama.decoder.config.vocab_size)
    run_steps(steps, allocate_for(steps, config, llama.decoder), config, llama.decoder, SINGLE)
    prompts = [
        length for length in (2, 4, 8, 16, 32, 64, 128) if length <= min(num_tokens, max_model_len - 1)
    ]
    assert rows == {"forward": [*prompts, num_tokens], "compute_logits": [1] * len(prompts) + [max_num_seqs]}


def test_what_the_warm_up_s_own_kv_takes_is_no_part_of_a_step(llama, monkeypatch):
    """Without a GPU the test supplies its counters: allocated memory is first read once that KV exists."""
    asked = []

    def answering(name: str, answer: int | None = None):
        return lambda *_: (asked.append(name), answer)[1]

    monkeypatch.setattr(llama.decoder, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr("ingine.engine.run.warm_up.allocate_for", answering("KV"))
    monkeypatch.setattr("ingine.engine.run.warm_up.run_steps", answering("steps"))
    answers = {"reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 130}
    for name, answer in (answers | {"synchronize": None}).items():
        monkeypatch.setattr(torch.cuda, name, answering(name, answer))
    assert warm_up(CONFIG, llama.decoder, SINGLE) == 30
    before, after = ["reset_peak_memory_stats", "memory_allocated"], ["synchronize", "max_memory_allocated"]
    assert asked == ["KV", *before, "steps", *after]


def test_a_step_that_does_not_fit_names_what_to_lower(llama, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llama.decoder, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr("ingine.engine.run.warm_up.allocate_for", too_much)
    with pytest.raises(ConfigError, match=r"lower max_num_batched_tokens \(64\) or max_num_seqs \(4\)"):
        warm_up(CONFIG, llama.decoder, SINGLE)


def test_a_step_has_its_memory_before_kv_does(monkeypatch):
    monkeypatch.setattr(device, "_spare_bytes", lambda device, share, mapped: 100 * MIB)
    config = resolve_limits(EngineConfig("tiny"), CPU, model_max_len=1 << 20)
    assert num_kv_blocks(config, CPU, MIB) == 100
    assert num_kv_blocks(config, CPU, MIB, step_bytes=30 * MIB) == 70
    with pytest.raises(ConfigError, match="no room for KV"):
        num_kv_blocks(config, CPU, MIB, step_bytes=100 * MIB)


def test_weights_in_mapped_files_are_not_memory_to_spare(monkeypatch):
    """The kernel counts their pages as available, since it can drop them; each step would read them again."""
    monkeypatch.setattr(device, "available_host_bytes", lambda: 1000 * MIB)
    config = resolve_limits(EngineConfig("tiny"), CPU, model_max_len=1 << 20)
    assert num_kv_blocks(config, CPU, MIB) == 250
    assert num_kv_blocks(config, CPU, MIB, mapped_bytes=600 * MIB, step_bytes=30 * MIB) == 70
    with pytest.raises(ConfigError, match="no room for KV"):
        num_kv_blocks(config, CPU, MIB, mapped_bytes=1001 * MIB)


def test_a_size_that_was_asked_for_is_what_it_is():
    config = resolve_limits(EngineConfig("tiny", kv_cache_bytes=10 * MIB), CPU, model_max_len=1 << 20)
    assert num_kv_blocks(config, CPU, MIB, step_bytes=30 * MIB) == 10
