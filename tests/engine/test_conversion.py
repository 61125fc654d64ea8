"""A conversion of a GGUF file writes the same with any version of the libraries, under its version number."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ingine.engine.models.gguf import convert_gguf
from ingine.engine.store.fingerprint import model_fingerprint
from ingine.engine.store.model_store import CONVERSION
from ingine.engine.text.tokenizer import Tokenizer
from tests.engine.test_gguf import gguf_tensors, tiny, write_gguf
from tests.engine.test_gguf_metadata import sentencepiece_file

METADATA = {
    "llama.rope.freq_base": 283_461_213.0,
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 2.0,
    "general.sampling.temp": 0.7,
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.add_bos_token": True,
}
WRITTEN = (3, "4e07cda7a4dd3e39")
"""CONVERSION, and a digest of what is written under it."""


def file(tmp_path: Path) -> Path:
    """A file made without random numbers."""
    model = tiny(tmp_path)
    tensors = gguf_tensors(model, json.loads((model / "config.json").read_text()), "llama")
    counted = {
        name: (np.arange(tensor.size, dtype=np.float32) % 97 / 64).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
    return write_gguf(tmp_path / "m.gguf", model, "llama", metadata=METADATA, tensors=counted)


def test_another_conversion_has_another_number(tmp_path):
    """A change of what is written must increase CONVERSION, or old folders are used for ever; then this test.

    tokenizer.json is written by the tokenizers library: what it does with a text counts.
    """
    convert_gguf(file(tmp_path), tmp_path / "out")
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "out").iterdir()):
        digest.update(path.name.encode())
        if path.suffix == ".safetensors":
            for name, tensor in sorted(load_file(path).items()):
                digest.update(f"{name} {tensor.dtype}".encode() + tensor.numpy().tobytes())
        elif path.name != "tokenizer.json":
            digest.update(path.read_bytes())
    token_ids = Tokenizer.from_folder(tmp_path / "out").encode("I'll ab  1234.\n\n<|im_end|>日本 cab")
    digest.update(str(token_ids).encode())
    assert (CONVERSION, digest.hexdigest()[:16]) == WRITTEN


@pytest.mark.parametrize("write", [file, sentencepiece_file])
def test_nothing_that_is_written_depends_on_the_version_of_transformers(write, tmp_path, monkeypatch):
    """Machines with different versions serve one queue."""
    path = write(tmp_path)
    convert_gguf(path, tmp_path / "here")
    import transformers.tokenization_utils_base as theirs

    save = theirs.PreTrainedTokenizerBase.save_pretrained

    def save_as_a_newer_version(self, folder, **options):
        saved = save(self, folder, **options)
        config = Path(folder) / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"new_key": 1, "backend": "other"}))
        return saved

    monkeypatch.setattr(theirs.PreTrainedTokenizerBase, "save_pretrained", save_as_a_newer_version)
    convert_gguf(path, tmp_path / "there")
    assert model_fingerprint(tmp_path / "here") == model_fingerprint(tmp_path / "there")


@pytest.mark.parametrize("write", [file, sentencepiece_file])
def test_transformers_reads_the_tokenizer_as_we_do(write, tmp_path):
    convert_gguf(write(tmp_path), tmp_path / "out")
    ours, theirs = Tokenizer.from_folder(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("ab a", " b ab", "é 日本\n\n", "</s><|im_end|>a"):
        token_ids = ours.encode(text)
        assert token_ids == theirs(text).input_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.eos_token_ids == {theirs.eos_token_id}
