"""A model split over two ranks, which are processes here: the same logits as whole, and what becomes of the
other when one is killed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ingine.engine.communication.parallel import SINGLE, VARIABLES, TensorParallel, shard
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.loader import SPLIT_DIM, load_weights
from ingine.errors import ConfigError
from tests.engine.marks import needs_interpreter
from tests.engine.parallel_ranks import (
    CPU,
    ENGINES,
    MESSAGES,
    NUM_TOKENS,
    ONLY_CHOICE,
    PROMPT,
    REGEX,
    few_requests,
    generate,
    generate_constrained,
    requests,
)
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},  # has biases of queries, keys and values
    "qwen3": {"vocab_size": VOCAB_SIZE + 1},  # has norms of query and key heads
}


def make_model_with_all_biases(path: Path) -> Path:
    """A Llama whose output projection has a bias too, which is added to a sum over the ranks."""
    make_tiny_model(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name]:
        rows = len(tensors[name])
        tensors[name.replace("weight", "bias")] = torch.linspace(-1, 1, rows)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the results of two ranks, and their models."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, options in MODELS.items():
        make_tiny_model(folder / "models" / name, name.partition("-")[0], **options)
    make_model_with_all_biases(folder / "models" / "llama-biases")
    subprocess.run([sys.executable, "-m", "tests.engine.parallel_ranks", folder], cwd=ROOT, check=True)
    assert json.loads((folder / "computed.json").read_text()) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@torch.inference_mode()
def hf_greedy(path: Path, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The tokens that transformers generates, and its logits [len(prompt) + NUM_TOKENS, vocab_size]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    token_ids = torch.tensor([prompt])
    whole = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return whole[0, len(prompt) :].tolist(), model(whole).logits[0]


# --------------------------------------------------------------------------------------- what ranks exchange


def test_collectives(ranks):
    for found in ranks:
        found = found["collectives"]
        assert found["all_reduce"].tolist() == [[12, 14], [16, 18]]
        assert found["all_reduce bfloat16"].tolist() == [[12, 14], [16, 18]]
        assert found["all_gather"].tolist() == [[1, 2, 11, 12], [3, 4, 13, 14]]
        assert found["all_gather, cut"].tolist() == [[1, 2, 11], [3, 4, 13]]
        assert found["broadcast"].tolist() == [5, 6]
        assert found["agree_on_min"] == 6


def test_messages_of_any_size_arrive(ranks):
    for sent, received in zip(MESSAGES, ranks[1]["messages"], strict=True):
        np.testing.assert_equal(received, sent)


def test_a_single_process_exchanges_nothing():
    x = torch.ones(2, 3)
    assert SINGLE.all_reduce(x) is SINGLE.all_gather(x, 3) is SINGLE.broadcast(x) is x
    assert SINGLE.agree_on_min(5) == 5
    SINGLE.send("nobody listens")
    SINGLE.close()


# ---------------------------------------------------------------------------------------------- a split model


@pytest.mark.parametrize("name", [*MODELS, "llama-biases"])
def test_two_ranks_have_the_logits_of_transformers(folder, ranks, name):
    """The logits of all positions are equal: a prompt in two chunks, then greedy tokens, which are thus equal
    too."""
    first, second = (found["logits"][name] for found in ranks)
    assert torch.equal(first, second)
    token_ids, logits = hf_greedy(folder / "models" / name, PROMPT)
    assert first[len(PROMPT) - 1 : -1].argmax(dim=-1).tolist() == token_ids
    torch.testing.assert_close(first, logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_of_two_ranks_generates_what_one_of_one_does(folder, ranks, name):
    """Greedy outputs are also those of transformers."""
    made, num_preemptions = ranks[0]["engines"][name]
    assert made == generate(folder / "models" / name, SINGLE, requests(), **ENGINES[name])[0]
    assert (num_preemptions > 0) == ("num_blocks" in ENGINES[name])
    for (prompt, params), token_ids in zip(requests(), made, strict=True):
        assert len(token_ids) == params.max_tokens
        if params.temperature == 0:
            assert token_ids == hf_greedy(folder / "models" / name, prompt)[0]


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
def test_two_ranks_obey_grammars_and_bad_words_as_one_does(folder, ranks, is_async):
    """Rank 0 alone has the masks. Tokens that it chooses by them reach the other rank, or the next ones of
    the free request would differ too."""
    made = ranks[0]["constrained"][is_async]
    alone = generate_constrained(folder / "models" / "llama", SINGLE, async_scheduling=is_async)
    assert (
        made.keys()
        == alone.keys()
        == {("grammar", 0), ("grammar", 1), ("forced", 0), ("word", 0), ("free", 0)}
    )
    for key, (token_ids, text, logprobs) in made.items():
        assert (token_ids, text) == alone[key][:2], key
        assert len(logprobs) == len(token_ids) * (key[0] != "forced")
        np.testing.assert_allclose(logprobs, alone[key][2], atol=1e-4)
    choices = [made["grammar", index][1] for index in range(2)]
    assert choices[0] != choices[1]
    assert all(re.fullmatch(REGEX, text) and "b" not in text for text in choices)
    assert made["forced", 0][1] == ONLY_CHOICE
    assert "a" not in made["word", 0][1] and "zz" not in made["word", 0][1]


@needs_interpreter
def test_steps_that_two_ranks_replay_give_what_one_computes(folder, ranks):
    """Sampling and the tokens' broadcast are in the graph; with penalties they come after it. Only rank 0
    samples.
    """
    path = folder / "models" / "llama"
    expected = [generate(path, SINGLE, few, max_num_seqs=3)[0] for few in few_requests()]
    made, num_choices = ranks[0]["replayed"]
    assert made == expected
    assert num_choices > 0 == ranks[1]["replayed"][1]


@pytest.mark.parametrize("name", [*MODELS, "llama-biases"])
def test_the_ranks_parts_make_up_the_checkpoint(folder, name):
    def tensors(parallel: TensorParallel) -> dict[str, torch.Tensor]:
        model = load_weights(
            folder / "models" / name, dtype=torch.float32, device=CPU, kernels=REFERENCE, parallel=parallel
        )
        return model.checkpoint_tensors()

    parts = [tensors(TensorParallel(rank, 2, CPU)) for rank in range(2)]
    for tensor_name, whole in tensors(SINGLE).items():
        dim, found = SPLIT_DIM.get(tensor_name.split(".")[-2]), [part[tensor_name] for part in parts]
        if tensor_name.endswith("o_proj.bias"):  # that the sum of the ranks has it once
            assert torch.equal(found[0], whole) and not found[1].any()
        elif dim is None:
            assert torch.equal(found[0], whole) and torch.equal(found[1], whole)
        else:
            found = torch.cat(found, dim)
            assert torch.equal(found.narrow(dim, 0, whole.shape[dim]), whole)
            assert found.shape[dim] - whole.shape[dim] == (
                VOCAB_SIZE % 2 if whole.shape[0] == VOCAB_SIZE else 0
            )


@pytest.mark.parametrize(
    ("total", "size", "lengths"), [(6, 2, [3, 3]), (5, 2, [3, 2]), (5, 4, [2, 2, 1, 0]), (1, 2, [1, 0])]
)
def test_shards_cover_everything_once(total, size, lengths):
    shards = [range(total)[shard(total, rank, size)] for rank in range(size)]
    assert [index for part in shards for index in part] == list(range(total))
    assert [len(part) for part in shards] == lengths


def test_kv_memory_is_of_the_rank_s_own_heads(folder):
    path = folder / "models" / "llama"
    whole, part = (
        load_weights(path, dtype=torch.float32, device=CPU, kernels=REFERENCE, parallel=parallel)
        for parallel in (SINGLE, TensorParallel(1, 2, CPU))
    )
    assert part.bytes_per_block(16) == whole.bytes_per_block(16) // 2
    allocated = sum(cache.nbytes for layer in part.allocate_kv_caches(3, 16) for cache in layer)
    assert allocated == 3 * part.bytes_per_block(16)


# ----------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("size", "number"), [(3, "4 attention heads"), (4, "2 key/value heads")])
def test_a_model_that_cannot_be_split_so_is_refused(folder, size, number):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {size}: {number} .* this model: 1, 2$"):
        load_weights(
            folder / "models" / "llama",
            dtype=torch.float32,
            device=CPU,
            kernels=REFERENCE,
            parallel=TensorParallel(0, size, CPU),
        )


def test_a_vocabulary_of_the_wrong_size_is_refused_although_its_parts_would_fit(folder, tmp_path):
    path = make_tiny_model(tmp_path, vocab_size=VOCAB_SIZE)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 1}))
    with pytest.raises(ConfigError, match=r"weight is .* says"):
        load_weights(
            path, dtype=torch.float32, device=CPU, kernels=REFERENCE, parallel=TensorParallel(0, 2, CPU)
        )


def test_without_torchrun_the_error_has_the_command(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"RANK, LOCAL_RANK, .* torchrun .*--nproc-per-node 2 .* ingine worker"
    ):
        TensorParallel.join(2, CPU)


def test_another_number_of_processes_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=r"torchrun started 4 processes.* --nproc-per-node 2 "):
        TensorParallel.join(2, CPU)


@pytest.mark.parametrize(
    ("device", "error"), [("mps", "needs device cuda, or cpu; this is"), ("cuda:1", "is cuda, not")]
)
def test_a_device_that_ranks_cannot_have_is_refused(monkeypatch, device, error):
    for name in VARIABLES:
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{error} {device}"):
        TensorParallel.join(2, torch.device(device))


# -------------------------------------------------------------------------------------------- who is killed


def test_a_follower_ends_with_rank_0_and_not_by_a_signal(folder):
    """It waits for a message when rank 0 is killed."""
    assert json.loads((folder / "kill-rank-0" / "ended.json").read_text()) == {"rank 0": -9, "follower": 1}
    assert "another rank is gone" in (folder / "kill-rank-0" / "error-1").read_text()


def test_rank_0_s_next_step_raises_when_a_follower_was_killed(folder):
    assert json.loads((folder / "kill-a-follower" / "ended.json").read_text()) == {
        "rank 0": 1,
        "follower": -9,
    }
    error = (folder / "kill-a-follower" / "error-0").read_text()
    # In the message, or, if that still went out, in the sum: there gloo itself says so.
    assert error.startswith(("EngineError('another rank is gone", "RuntimeError"))
    assert any(reason in error for reason in ("Connection closed by peer", "Connection reset", "Broken pipe"))


def test_no_step_follows_one_that_failed_on_rank_0(folder):
    """After the failure the follower waits for logits: a next step would get the sums of the failed one."""
    folder = folder / "fail-a-step"
    first, second = json.loads((folder / "errors.json").read_text())
    assert first == "RuntimeError('out of memory')"
    assert second.startswith("EngineError('an earlier step failed")
    assert json.loads((folder / "ended.json").read_text()) == [0, 1]


def test_no_step_follows_one_that_was_lost_before_the_next_was_sampled(folder):
    folder = folder / "lose-a-step"
    lost, sent = json.loads((folder / "errors.json").read_text())
    assert "a step was lost in flight" in lost
    assert sent.startswith("EngineError('an earlier step failed")
    assert json.loads((folder / "ended.json").read_text()) == [0, 1]
