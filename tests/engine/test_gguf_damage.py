"""GGUF files that are damaged or nonsense: each ends in an error that names the file and what is wrong."""

from pathlib import Path

import numpy as np
import pytest

from ingine.engine.files.model_files import read_json
from ingine.engine.models.gguf import convert_gguf
from ingine.engine.models.gguf_file import shortest_float
from ingine.engine.store.model_store import resolve_model
from ingine.errors import ConfigError
from tests.engine.test_gguf import TOKENS, TYPES, tiny, write_gguf
from tests.engine.test_gguf_metadata import sentencepiece_file

GGML = "tokenizer.ggml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"split.no": "text"}, r"split\.no is 'text'"),
        ({"split.count": [1, 2]}, r"split\.count is \[1, 2\]"),
        ({"llama.block_count": 2**32 - 1}, "block_count is 4294967295"),
        ({"llama.block_count": 0}, "num_hidden_layers"),
        ({"llama.attention.head_count": "two"}, "head_count is 'two'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"llama.rope.freq_base": True}, "freq_base is True"),
        ({f"{GGML}.model": [1]}, r"ggml\.model is \[1\]"),
        ({f"{GGML}.pre": ["smollm"]}, r"ggml\.pre is \['smollm'\]"),
        ({f"{GGML}.tokens": "text"}, r"ggml\.tokens is 'text'"),
        ({f"{GGML}.tokens": [1, 2]}, r"element 0 of tokenizer\.ggml\.tokens is 1"),
        ({f"{GGML}.tokens": [*TOKENS, "more"]}, "262 tokens, and an embedding of 261 rows"),
        ({f"{GGML}.token_type": 3}, r"ggml\.token_type is 3"),
        ({f"{GGML}.token_type": [1]}, "1 token types for 261 tokens"),
        ({f"{GGML}.merges": [1.5]}, r"element 0 of tokenizer\.ggml\.merges is 1\.5"),
        ({f"{GGML}.merges": ["a b", "ab"]}, "'ab' in tokenizer.ggml.merges is no pair"),
        ({f"{GGML}.merges": ["a b c"]}, "'a b c' in tokenizer.ggml.merges is no pair"),
        ({f"{GGML}.merges": ["a unheard-of"]}, "tokenizer cannot be built: .*unheard-of"),
        ({f"{GGML}.add_bos_token": "yes", f"{GGML}.bos_token_id": 3}, r"add_bos_token is 'yes'"),
        ({f"{GGML}.bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"tokenizer.chat_template": ["{{ a }}"]}, "chat_template is"),
        ({"general.sampling.temp": "hot"}, "sampling.temp is 'hot'"),
    ],
    ids=str,
)
def test_metadata_of_another_type_or_range_are_named(metadata, says, model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, "llama", metadata=metadata)
    with pytest.raises(ConfigError, match=says):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_token_id_beyond_the_tokens_is_named_though_the_embedding_has_the_row(model, tmp_path):
    short = {f"{GGML}.tokens": TOKENS[:257], f"{GGML}.token_type": TYPES[:257], f"{GGML}.merges": ["a b"]}
    write_gguf(tmp_path / "m.gguf", model, "llama", metadata=short | {f"{GGML}.bos_token_id": 258})
    with pytest.raises(ConfigError, match="bos_token_id is 258, and there are 257 tokens"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"foo": np.zeros(4, np.float32)}, "'foo' has no place"),
        ({"token_embd.weight": np.zeros(64, np.float32)}, "token_embd.weight is no matrix"),
        ({"rope_freqs.weight": np.zeros(0, np.float32)}, "rotary frequencies"),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, "rotary frequencies"),
    ],
    ids=["name", "matrix", "no divisors", "divisors of zero"],
)
def test_tensors_of_another_name_or_shape_are_named(tensors, says, model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, "llama", tensors=tensors)
    with pytest.raises(ConfigError, match=says):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"scores": None}, "cannot be built: 'scores'"),
        ({"add_space_prefix": "no"}, "add_space_prefix is 'no'"),
    ],
    ids=str,
)
def test_a_damaged_sentencepiece_tokenizer_is_named(metadata, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        convert_gguf(sentencepiece_file(tmp_path, **metadata), tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["x-00001-of-00000", "x-00000-of-00000", "x-00000-of-00002", "x-00003-of-00002"]
)
def test_a_part_that_its_own_name_rules_out_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / f"{name}.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=rf"{name}\.gguf: there is no part \d of \d"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    "written", [1e-05, 1e-06, 0.7, 10_000.0, 1_000_000.0, 5_000_001.0, 0.123456789, 1e11]
)
def test_a_number_stored_in_32_bits_is_the_one_that_was_written(written):
    stored = float(np.float32(written))
    read = shortest_float(stored)
    assert np.float32(read) == np.float32(written)
    assert read == written or len(repr(read)) < len(repr(written))


@pytest.mark.parametrize("written", [0.123456789012, 1e300, 283_461_213.0])
def test_a_number_stored_in_64_bits_is_not_rounded(written):
    assert shortest_float(written) == written


def test_a_rotary_base_is_no_more_than_its_last_bit_away(model, tmp_path):
    """283461213 is 283461216 in 32 bits, and any number that is stored so is the same to llama.cpp."""
    write_gguf(tmp_path / "m.gguf", model, "llama", metadata={"llama.rope.freq_base": 283_461_213.0})
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    base = read_json(tmp_path / "out" / "config.json")["rope_parameters"]["rope_theta"]
    assert np.float32(base) == np.float32(283_461_213)
