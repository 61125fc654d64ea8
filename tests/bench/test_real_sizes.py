"""The benchmark of real sizes: its models are valid, and its figures are correct.

Only small shapes are used.
"""

import math
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.real_sizes.folders import write_folder
from benchmarks.real_sizes.gguf_models import FLOAT16_FIELDS, MIXES, kind_of, random_blocks, write_gguf
from benchmarks.real_sizes.lineup import entries
from benchmarks.real_sizes.memory import PeakAnonymous, memory_of
from benchmarks.real_sizes.rates import rates
from benchmarks.real_sizes.shapes import SHAPES, Shape, tensors
from benchmarks.rivals.protocol import Request
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.models.gguf_file import GGUFFile
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams

TINY = Shape("tiny", 256, 512, 2, 4, 2, 300, tied=True, max_position_embeddings=512)
Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer with bytes, one merge, and an end token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate([*alphabet, "th"])}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", FLOAT16_FIELDS, ids=lambda kind: kind.name)
def test_random_blocks_have_the_deviation_that_was_asked_for_and_no_mean(kind):
    elements, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = random_blocks(np.random.default_rng(0), kind, 50_000 // elements, 0.02)
    values = gguf.dequantize(blocks.reshape(-1), kind)
    assert values.std() == pytest.approx(0.02, rel=0.25)
    assert abs(values.mean()) < 0.003  # codes of Q4_0 are -8 to 7


@pytest.mark.parametrize(
    ("model", "mix", "least_gb", "most_gb"),
    [
        ("1.5b", "Q4_K_M", 0.9, 1.2),
        ("1.5b", "Q8_0", 1.5, 1.8),
        ("7b", "Q4_K_M", 4.3, 4.9),
        ("7b", "Q4_0", 4.2, 4.6),
    ],
)
def test_files_are_as_large_as_published_ones_of_that_type(model, mix, least_gb, most_gb):
    shape = SHAPES[model]
    num_bytes = 0
    for spec in tensors(shape):
        elements, size = gguf.GGML_QUANT_SIZES[kind_of(spec, mix, shape)]
        assert spec.shape[-1] % elements == 0
        num_bytes += math.prod(spec.shape) // elements * size
    assert least_gb < num_bytes / 1e9 < most_gb


def test_a_k_file_has_finer_types_where_llama_cpp_has_them():
    shape = SHAPES["7b"]
    kinds = {spec.gguf_name: kind_of(spec, "Q4_K_M", shape) for spec in tensors(shape)}
    finer = [n for n in range(28) if kinds[f"blk.{n}.ffn_down.weight"] is Kind.Q6_K]
    assert finer == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == (Kind.Q6_K, Kind.Q4_K)
    assert kinds["blk.0.attn_q.weight"] is Kind.Q4_K
    assert kinds["blk.0.attn_q.bias"] is Kind.F32


@pytest.mark.parametrize("mix", MIXES)
def test_a_gguf_file_is_one_that_ingine_generates_from(mix, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, mix, tokenizer=tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    file = GGUFFile.open(path)
    assert len(file.tokens) == TINY.vocab_size
    assert file.tensor("blk.1.attn_output.weight").tensor_type is kind_of(
        next(spec for spec in tensors(TINY) if spec.gguf_name == "blk.1.attn_output.weight"), mix, TINY
    )
    assert len(_generated(path, 6)) == 6


def test_a_folder_is_one_that_transformers_and_ingine_read_alike(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real_sizes.folders.SHARD_BYTES", 1 << 20)
    folder = tmp_path / "tiny"
    write_folder(folder, TINY, tokenizer=tokenizer)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert _generated(folder, 6, dtype="float32") == generated[0, 3:].tolist()


def _generated(path: Path, num_tokens: int, dtype: str = "auto") -> list[int]:
    engine = Engine(EngineConfig(model=str(path), dtype=dtype, max_num_seqs=1, kv_cache_bytes=1 << 20))
    engine.add(
        EngineRequest("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    )
    made = []
    while len(made) < num_tokens:
        for output in engine.step():
            made += output.token_ids
    return made


def test_prefill_ends_with_the_last_first_token_and_decoding_is_what_comes_after():
    requests = [Request([0] * 10, 3), Request([0] * 30, 3)]
    figures = rates(requests, [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert figures == {
        "wall_s": 4.0,
        "prefill_s": 2.0,
        "tokens_per_s": 1.5,
        "prefill_tokens_per_s": 20.0,
        "decode_tokens_per_s": 1.5,
    }


def test_without_a_token_after_prefill_there_is_no_rate_of_decoding():
    assert "decode_tokens_per_s" not in rates([Request([0], 1)], [[0.5]])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_anonymous_memory_and_that_of_files_are_told_apart(tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 30_000_000)
    code = f"""
import mmap, sys
print("begun", flush=True)
sys.stdin.readline()
held = bytearray(50_000_000)
del held
held = b"y" * 20_000_000
file = open({str(tmp_path / "weights")!r}, "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(mapped[place] for place in range(0, len(mapped), 4096))
print("held", flush=True)
sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        before = memory_of(process.pid)
        with PeakAnonymous(process.pid) as peak:
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        after = memory_of(process.pid)
        process.stdin.close()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["anonymous_bytes"] == pytest.approx(20e6, abs=3e6)
    assert grown["file_bytes"] == pytest.approx(30e6, abs=3e6)
    assert after["anonymous_bytes"] <= peak.num_bytes <= after["peak_resident_bytes"]


def test_every_entry_is_of_a_model_that_there_is_and_7b_is_in_4_bits_alone():
    of_all = entries(list(SHAPES))
    assert len({(entry.model, entry.name) for entry in of_all}) == len(of_all)
    assert {entry.weights for entry in of_all if entry.model == "7b"} == {"Q4_K_M", "Q4_0"}
    for entry in of_all:
        by_file = [
            other.engine for other in of_all if (other.model, other.weights) == (entry.model, entry.weights)
        ]
        assert entry.weights == "bf16" or by_file == ["ingine", "llama.cpp"]
