"""A GGUF file as the weights of a folder: loaded as it is, and what it gives is what its numbers say."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ingine.engine.build import make_runner
from ingine.engine.communication.parallel import SINGLE
from ingine.engine.config import EngineConfig
from ingine.engine.kernels import native
from ingine.engine.kernels.layers.stored import GGUFMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights, Product
from ingine.engine.kernels.native.weights import NativeWeights
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.gguf import convert_gguf, link_gguf
from ingine.engine.models.gguf_checkpoint import GGUFCheckpoint
from ingine.engine.models.gguf_file import GGUFFile
from ingine.engine.models.loader import load_model
from ingine.engine.run.device import resolve_limits
from ingine.engine.store.fingerprint import model_fingerprint
from ingine.errors import ConfigError
from tests.engine.marks import needs_native
from tests.engine.packed import PackedModel, PagedSequence
from tests.engine.test_gguf import loaded, tiny, write_gguf
from tests.engine.test_gguf_split import split_gguf

CPU = torch.device("cpu")
Q8_0 = gguf.GGMLQuantizationType.Q8_0
SMAPS = Path("/proc/self/smaps")
PROMPT = list(range(40, 77))


class CountedWeights(PlainWeights):
    def __init__(self):
        self.names: list[str] = []

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return True

    def pack_stored(
        self, parts: list[StoredMatrix], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> Product:
        self.names += [part.name for part in parts]
        return super().pack_stored(parts, bias, dtype)


def quantized_file(tmp_path: Path, kind: str, arch: str = "llama", **kwargs) -> Path:
    model = tiny(tmp_path, arch, **kwargs)
    return write_gguf(tmp_path / "m.gguf", model, arch, quantization=gguf.GGMLQuantizationType[kind])


def load(path: Path, **kernels) -> Decoder:
    return load_model(path, dtype=torch.float32, device=CPU, kernels=replace(REFERENCE, **kernels))


def logits(model: Decoder) -> torch.Tensor:
    return torch.cat(PackedModel(model).step((PagedSequence(PROMPT), len(PROMPT))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_a_model_computes_with_the_numbers_of_its_blocks(kind, arch, tied, tmp_path):
    file = quantized_file(tmp_path, kind, arch, tie_word_embeddings=tied)
    link_gguf(file, tmp_path / "linked")
    convert_gguf(file, tmp_path / "converted")
    weights = CountedWeights()
    linked, converted = load(tmp_path / "linked", weights=weights), load(tmp_path / "converted")
    assert torch.equal(logits(linked), logits(converted))
    # q, k, v, o, gate, up and down of each layer, and the output matrix where it is not the embedding.
    assert weights.names == [kind.lower()] * (2 * 7 + (not tied))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_0"])
def test_what_is_not_multiplied_in_blocks_is_read_as_numbers(kind, tmp_path):
    file = quantized_file(tmp_path, kind)
    link_gguf(file, tmp_path / "linked")
    convert_gguf(file, tmp_path / "converted")
    before, after = loaded(tmp_path / "converted"), loaded(tmp_path / "linked")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_lie_in_the_mapped_file(tmp_path):
    """A change of the file shows in the matrix, so nothing was copied."""
    file = quantized_file(tmp_path, "Q8_0")
    checkpoint = GGUFCheckpoint(GGUFFile.open(file))
    name = "model.layers.1.mlp.down_proj.weight"
    matrix, begin = checkpoint.matrix(name), checkpoint._file.tensors["blk.1.ffn_down.weight"].begin
    assert isinstance(matrix, GGUFMatrix) and matrix.data.dtype == torch.uint8
    with file.open("r+b") as writer:
        writer.seek(begin + 2)
        writer.write(b"\x11\x12\x13")
    assert matrix.data[0, 2:5].tolist() == [0x11, 0x12, 0x13]


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_0", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_the_dtype_is_what_the_model_had_most_likely(kind, dtype, tmp_path):
    link_gguf(quantized_file(tmp_path, kind), tmp_path / "linked")
    assert json.loads((tmp_path / "linked/config.json").read_text())["dtype"] == dtype


def test_a_model_in_several_files_is_linked_part_by_part(tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    link_gguf(file, tmp_path / "whole")
    expected = logits(load(tmp_path / "whole"))
    parts = split_gguf(file, 3)
    link_gguf(parts[1], tmp_path / "parts")
    names = [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.gguf")) == names
    assert torch.equal(logits(load(tmp_path / "parts")), expected)


def test_a_relative_name_is_linked_from_anywhere(tmp_path, monkeypatch):
    file = quantized_file(tmp_path, "Q8_0")
    monkeypatch.chdir(tmp_path)
    link_gguf(Path(file.name), tmp_path / "elsewhere" / "linked")
    assert (tmp_path / "elsewhere/linked/model.gguf").samefile(file)


def test_the_fingerprint_is_of_the_weights(tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    link_gguf(file, tmp_path / "linked")
    before = model_fingerprint(tmp_path / "linked")
    assert model_fingerprint(tmp_path / "linked") == before
    tensor = GGUFFile.open(file).tensors["blk.0.attn_q.weight"]
    with file.open("r+b") as writer:
        writer.seek(tensor.begin + tensor.num_bytes // 2)
        writer.write(b"\x55\xaa")
    assert model_fingerprint(tmp_path / "linked") != before


def test_a_file_that_is_gone_or_cut_off_is_named(tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    link_gguf(file, tmp_path / "linked")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.gguf is damaged"):
        load(tmp_path / "linked")
    file.unlink()
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        load(tmp_path / "linked")


def mappings(file: Path) -> list[tuple[str, int]]:
    """Mappings of this process: permissions, and KiB of resident pages."""
    found = re.findall(
        rf"^\S+ (\S+) .* {re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", SMAPS.read_text(), re.MULTILINE
    )
    return [(permissions, int(rss)) for permissions, rss in found]


@pytest.mark.skipif(not SMAPS.exists(), reason="reads what Linux tells of mappings")
def test_a_mapping_cannot_be_written_and_goes_with_its_matrix(tmp_path, recwarn):
    """A private one that could be written would count as memory that the process may ask for."""
    file = quantized_file(tmp_path, "Q8_0")
    checkpoint = GGUFCheckpoint(GGUFFile.open(file))
    matrix = checkpoint.matrix("model.layers.1.mlp.down_proj.weight")
    matrix.dense()
    assert {permissions for permissions, _ in mappings(file)} == {"r--s"}
    assert sum(rss for _, rss in mappings(file)) > 0
    del matrix
    assert mappings(file) == []
    assert not recwarn.list


@pytest.mark.parametrize("refusal", [OSError("Cannot allocate memory"), ValueError("mmap length is greater")])
def test_a_mapping_that_is_refused_is_told_with_the_file(refusal, tmp_path, monkeypatch):
    file = quantized_file(tmp_path, "Q8_0")
    link_gguf(file, tmp_path / "linked")

    def refuse(*_, **__):
        raise refusal

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ConfigError, match=rf"model\.gguf cannot be mapped into memory: {refusal}"):
        load(tmp_path / "linked")


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_file_that_changes_after_its_header_was_read_is_named(change, tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    checkpoint = GGUFCheckpoint(GGUFFile.open(file))
    if change == "shorter":
        os.truncate(file, 10_000)
    else:
        other = tmp_path / "other.gguf"
        other.write_bytes(file.read_bytes())
        other.rename(file)
    for read in (checkpoint.matrix, checkpoint.read):
        with pytest.raises(ConfigError, match=rf"{file} .*was exchanged or changed while it was read"):
            read("model.layers.1.mlp.down_proj.weight")


def test_safetensors_come_before_a_gguf_file_beside_them(tmp_path):
    """Some repositories have both: config.json and the tokenizer belong to the safetensors."""
    model = tiny(tmp_path, "llama")
    before, fingerprint = logits(load(model)), model_fingerprint(model)
    zeros = {"output_norm.weight": np.zeros(64, np.float32)}
    write_gguf(model / "model.gguf", model, "llama", tensors=zeros)
    assert torch.equal(logits(load(model)), before)
    assert model_fingerprint(model) == fingerprint


def test_a_gguf_file_in_a_folder_without_safetensors_is_loaded(tmp_path):
    model = tiny(tmp_path, "llama")
    before = logits(load(model))
    write_gguf(model / "model.gguf", model, "llama")
    (model / "model.safetensors").unlink()
    assert torch.equal(logits(load(model)), before)


def test_a_link_into_nowhere_is_told_with_where_it_leads(tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    link_gguf(file, tmp_path / "linked")
    file.unlink()
    with pytest.raises(ConfigError, match=rf"model\.gguf, a link to {file.resolve()}, does not exist"):
        load(tmp_path / "linked")


def test_what_is_linked_is_the_file_and_not_a_name_of_it(tmp_path):
    """Names of it that are links, such as a hub's, may go or lead elsewhere later."""
    file = quantized_file(tmp_path, "Q8_0")
    name = tmp_path / "name.gguf"
    name.symlink_to(file)
    link_gguf(name, tmp_path / "linked")
    assert (tmp_path / "linked/model.gguf").readlink() == file.resolve()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_file_that_was_replaced_is_not_loaded_with_what_was_made_of_another(parts, tmp_path):
    file = quantized_file(tmp_path, "Q8_0")
    files = split_gguf(file, parts) if parts > 1 else [file]
    link_gguf(files[0], tmp_path / "linked")
    load(tmp_path / "linked")
    os.utime(files[0])  # a copy of the same file has another time
    load(tmp_path / "linked")

    (tmp_path / "more").mkdir()
    more = {"general.name": "another"}
    other = write_gguf(tmp_path / "more/m.gguf", tiny(tmp_path), "llama", quantization=Q8_0, metadata=more)
    others = split_gguf(other, parts) if parts > 1 else [other]
    others[0].rename(files[0])  # as docs/operations.md advises
    says = rf"{files[0].resolve()} is another file than .* was made of: .*ingine pull"
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "linked")
    with pytest.raises(ConfigError, match=says):
        model_fingerprint(tmp_path / "linked")


@pytest.mark.parametrize(("key", "heads"), [("head_count", 3), ("head_count_kv", 8)])
def test_a_number_of_heads_that_contradicts_config_json_is_named(key, heads, tmp_path):
    model, name = tiny(tmp_path, "llama"), f"llama.attention.{key}"
    write_gguf(model / "model.gguf", model, "llama", quantization=Q8_0, metadata={name: heads})
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"model\.gguf: {name} is {heads}, config\.json says"):
        load(model)


@needs_native
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_tells_how_much_of_it_lies_in_mapped_files(tied, tmp_path, monkeypatch):
    file = quantized_file(tmp_path, "Q8_0", tie_word_embeddings=tied)
    link_gguf(file, tmp_path / "linked")
    matrices = [each for each in GGUFFile.open(file).tensors.values() if len(each.shape) == 2]
    model = load(tmp_path / "linked", weights=NativeWeights(native.library(), torch.float32, PlainWeights()))
    assert model.mapped_bytes == sum(matrix.num_bytes for matrix in matrices)
    assert load(tmp_path / "linked").mapped_bytes == 0

    told = []
    monkeypatch.setattr("ingine.engine.build.num_kv_blocks", lambda *_, **options: told.append(options) or 4)
    make_runner(resolve_limits(EngineConfig("m", max_num_batched_tokens=8), CPU, 32), model, SINGLE)
    assert told[0]["mapped_bytes"] == model.mapped_bytes
