"""The fingerprint of a model: the same for the same model, another for any that generates other tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingine.engine.store.fingerprint import model_fingerprint
from ingine.engine.store.model_store import resolve_model
from ingine.errors import ConfigError
from tests.engine.test_gguf import tiny, write_gguf
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def model(original, tmp_path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(file: Path, **changes) -> None:
    """None takes a key out."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | changes
    removed = {key for key, value in changes.items() if value is None}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))


def test_it_is_16_hex_digits_and_the_same_each_time(original, model):
    fingerprint = model_fingerprint(original)
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert model_fingerprint(original) == model_fingerprint(model) == fingerprint
    assert model_fingerprint(str(original)) == fingerprint


def test_the_same_weights_in_shards_give_the_same(original, tmp_path):
    sharded = make_tiny_model(tmp_path, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert model_fingerprint(sharded) == model_fingerprint(original)


def test_the_order_of_tensors_in_the_file_does_not_matter(original, model):
    """safetensors sorts by size and name, other writers do not."""
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    encoded = json.dumps(header).encode()
    reordered = len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]
    (model / "model.safetensors").write_bytes(reordered)
    assert model_fingerprint(model) == model_fingerprint(original)


def test_other_random_weights_give_another(original, tmp_path):
    assert model_fingerprint(make_tiny_model(tmp_path, seed=1)) != model_fingerprint(original)


@pytest.mark.parametrize("changed", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_changed_matrix_gives_another(changed, original, model):
    weights = load_file(model / "model.safetensors")
    save_file(weights | {changed: weights[changed] * 1.01}, model / "model.safetensors")
    assert model_fingerprint(model) != model_fingerprint(original)


def test_the_middle_of_a_large_matrix_counts(original, model):
    """Its first rows are those of rare bytes, which a fine-tune may leave as they were."""
    name = "model.embed_tokens.weight"
    weights = load_file(model / "model.safetensors")
    weights[name][129] += 1
    save_file(weights, model / "model.safetensors")
    assert model_fingerprint(model) != model_fingerprint(original)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: weight.bfloat16() for name, weight in weights.items()},
        lambda weights: {name: weight[None] for name, weight in weights.items()},
        lambda weights: {f"{name}.x": weight for name, weight in weights.items()},
        lambda weights: weights | {"lm_head.bias": torch.zeros(3)},
    ],
    ids=["types", "shapes", "names", "one more"],
)
def test_what_the_header_says_of_the_weights_counts(change, original, model):
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors")
    assert model_fingerprint(model) != model_fingerprint(original)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}),
        ("config.json", {"eos_token_id": 7}),
        ("generation_config.json", {"temperature": 0.6}),
        ("generation_config.json", {"eos_token_id": [7, 8]}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}),
        ("special_tokens_map.json", {"bos_token": "<|endoftext|>"}),
    ],
    ids=str,
)
def test_what_changes_tokens_gives_another(file, changes, original, model):
    edit(model / file, **changes)
    assert model_fingerprint(model) != model_fingerprint(original)


def test_a_changed_chat_template_gives_another(original, model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    changed = model_fingerprint(model)
    template.unlink()
    assert len({changed, model_fingerprint(model), model_fingerprint(original)}) == 3


@pytest.mark.parametrize("missing", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_not_there_counts(missing, original, model):
    (model / missing).unlink()
    assert model_fingerprint(model) != model_fingerprint(original)


def test_a_tokenizer_in_other_files_counts(model):
    (model / "tokenizer.json").unlink()
    fingerprints = {model_fingerprint(model)}
    for content in (b"one", b"two"):
        (model / "tokenizer.model").write_bytes(content)
        fingerprints.add(model_fingerprint(model))
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"transformers_version": "4.40.0"}),
        ("config.json", {"_name_or_path": "/home/me/model"}),
        ("config.json", {"torch_dtype": "bfloat16", "dtype": None}),
        ("generation_config.json", {"transformers_version": "4.40.0", "_from_model_config": None}),
        ("tokenizer_config.json", {"name_or_path": "/home/me/model"}),
    ],
    ids=str,
)
def test_who_wrote_a_file_and_where_does_not_count(file, changes, original, model):
    edit(model / file, **changes)
    assert model_fingerprint(model) == model_fingerprint(original)


def test_files_that_nobody_reads_do_not_count(original, model):
    (model / "README.md").write_text("words")
    (model / "pytorch_model.bin").write_bytes(b"weights")
    (model / "tokenizer.model").write_bytes(b"beside a tokenizer.json")
    assert model_fingerprint(model) == model_fingerprint(original)


def test_a_gguf_file_has_that_of_what_it_is_converted_to(tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "one.gguf", tiny(tmp_path), "llama")
    first = resolve_model(str(file))
    second = resolve_model(str(shutil.copy(file, tmp_path / "two.gguf")))
    assert first != second
    assert model_fingerprint(first) == model_fingerprint(second)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes that a process reads")
def test_a_large_model_is_not_read_whole(model):
    """16 GB in 300 tensors; a file with nothing in it takes no room on the disk."""
    size = 56 << 20
    header = {
        f"model.layers.{index}.weight": {
            "dtype": "BF16",
            "shape": [4096, size // 8192],
            "data_offsets": [index * size, (index + 1) * size],
        }
        for index in range(300)
    }
    encoded = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + 300 * size)
    before = _bytes_read()
    model_fingerprint(model)
    assert _bytes_read() - before < 8 << 20


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_it_loads_nothing_heavy(original):
    code = (
        "import sys\nfrom ingine.engine.store.fingerprint import model_fingerprint\n"
        "print(model_fingerprint(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(original)], capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.stdout.splitlines() == [model_fingerprint(original), "[]"], done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "header of 0 bytes"),
        (b"not this" * 9, "header of"),
        ((2).to_bytes(8, "little") + b"[]", "list"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "data_offsets"),
        ((9).to_bytes(8, "little") + b'{"a": 1}}', "Extra data"),
        ((28).to_bytes(8, "little") + b'{"a":{"data_offsets":[9,0]}}', "end before"),
    ],
)
def test_damaged_weights_are_named(content, says, model):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.safetensors is damaged.*{says}"):
        model_fingerprint(model)


def test_a_truncated_file_is_named(model):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged.*cut off"):
        model_fingerprint(model)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused(missing, model):
    (model / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        model_fingerprint(model)
