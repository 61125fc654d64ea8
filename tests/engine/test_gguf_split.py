"""GGUF models in several files, as llama.cpp's `gguf-split` writes them."""

import re
from pathlib import Path

import gguf
import pytest
import torch

from ingine.engine.models.gguf import convert_gguf
from ingine.engine.store.model_store import resolve_model
from ingine.errors import ConfigError
from tests.engine.test_gguf import add_metadata, loaded, tiny, write_gguf, written


def split_gguf(file: Path, count: int) -> list[Path]:
    """Metadata in the first part, tensors spread over all; `file` itself is gone."""
    reader = gguf.GGUFReader(file)
    tensors = list(reader.tensors)
    paths = [file.with_name(f"{file.stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    add_metadata(writer, name, field.contents())
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        written(writer, path)
    file.unlink()
    return paths


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny(tmp_path)


@pytest.fixture
def parts(tmp_path, model) -> list[Path]:
    return split_gguf(write_gguf(tmp_path / "Tiny.gguf", model, "llama"), 3)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("number", [0, 2])
def test_any_part_stands_for_the_model(number, parts, model, tmp_path):
    convert_gguf(parts[number], tmp_path / "out")
    before, after = loaded(model), loaded(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_part_is_named_and_nothing_is_left(number, parts, cache):
    parts[number].unlink()
    named = parts[0] if number != 0 else parts[1]
    with pytest.raises(
        ConfigError, match=re.escape(f"{parts[number]} is missing: the model Tiny has 3 parts")
    ):
        resolve_model(str(named))
    assert not list(cache.glob("models/*Tiny*"))


def test_one_folder_serves_all_parts_until_one_changes(parts, cache):
    folder = resolve_model(str(parts[0]))
    assert resolve_model(str(parts[1])) == folder
    parts[2].write_bytes(parts[2].read_bytes() + b"more")
    assert resolve_model(str(parts[0])) != folder


def test_a_part_under_another_name_says_what_it_is(parts, tmp_path, cache):
    alone = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"part 1 of 3.*-00001-of-00003\.gguf"):
        resolve_model(str(alone))
    assert not [path for path in cache.glob("models/*") if path.suffix != ".lock"]


def test_parts_in_the_wrong_order_are_refused(parts, tmp_path):
    aside = parts[1].rename(tmp_path / "aside")
    parts[2].rename(parts[1])
    aside.rename(parts[2])
    with pytest.raises(
        ConfigError, match=rf"{re.escape(parts[1].name)}: the file says that it is part 3 of 3"
    ):
        convert_gguf(parts[0], tmp_path / "out")


def test_a_part_of_another_model_is_refused(parts, tmp_path):
    other = split_gguf(write_gguf(tmp_path / "Other.gguf", tmp_path / "model", "llama"), 2)
    other[1].replace(parts[1])
    with pytest.raises(ConfigError, match="part 2 of 2"):
        convert_gguf(parts[0], tmp_path / "out")


def test_a_part_that_comes_twice_is_refused(parts, tmp_path):
    """Its number was changed, so only the tensors tell."""
    reader = gguf.GGUFReader(parts[1])
    writer = gguf.GGUFWriter(parts[2], "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    written(writer, parts[2])
    with pytest.raises(ConfigError, match="is in another part of the model too"):
        convert_gguf(parts[0], tmp_path / "out")


def test_a_truncated_part_is_named(parts, tmp_path):
    parts[1].write_bytes(parts[1].read_bytes()[:200])
    with pytest.raises(ConfigError, match=rf"{re.escape(parts[1].name)} is damaged"):
        convert_gguf(parts[0], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
