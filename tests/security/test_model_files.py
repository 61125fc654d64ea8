"""Models made by an attacker: no file runs code, waits, fills memory or disk, or ends in a traceback.

The parser is a process with limits of memory, of the size of files, and of time.
"""

import builtins
import json
import os
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingine.cli import main as cli
from ingine.engine.files.bounded_files import MAX_JSON_VALUES
from ingine.engine.models import gguf as conversion
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.gguf_header import read_gguf_header
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ConfigError, UnsupportedModel
from tests.security.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    FORMATS,
    INT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Elements,
    GGUFBytes,
    Tensor,
    string,
    tiny_gguf,
)
from tests.security.model_parsers import VALID, Child, Outcome
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child(HANGS_S)
    yield child
    child.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1)


@pytest.fixture
def model(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def refused(outcome: Outcome, says: str, kind: str = "ConfigError") -> None:
    assert not outcome.is_finding, outcome
    assert outcome.kind == kind, outcome
    assert says in outcome.message
    assert len(outcome.message) < 2000


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------------ code of a model


@pytest.fixture
def marker(model, monkeypatch) -> Path:
    """A file that appears if code from the model's folder runs."""
    marker = model.parent / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (model / f"{name}.py").write_text(code)
    monkeypatch.setattr(builtins, "input", lambda question="": "y")  # to any question
    return marker


OWN_CONFIG = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
OWN_TOKENIZER = {"AutoTokenizer": ["tokenization_own.Own", None]}


def test_an_architecture_that_is_code_is_refused_by_name(model, marker):
    edit(model / "config.json", architectures=["OwnForCausalLM"], model_type="own", auto_map=OWN_CONFIG)
    with pytest.raises(UnsupportedModel, match=r"OwnForCausalLM.*configuration_own\.Own.*never run"):
        ModelConfig.from_folder(model)
    assert not marker.exists()


@pytest.mark.parametrize("rope", [None, {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}])
def test_an_architecture_of_ours_is_read_by_our_code(rope, model, marker):
    """This includes cases where transformers supplies a default, or the frequencies of YaRN."""
    config = json.loads((model / "config.json").read_text()) | {"auto_map": OWN_CONFIG}
    if rope is None:
        del config["rms_norm_eps"]
    else:
        config["rope_parameters"] = rope | {"original_max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_folder(model).num_layers == 1
    assert not marker.exists()


@pytest.mark.parametrize("auto_map", [OWN_TOKENIZER, OWN_TOKENIZER["AutoTokenizer"]], ids=["map", "list"])
@pytest.mark.parametrize("tokenizer_class", ["Own", "LlamaTokenizer", "AutoTokenizer", None, "os.system"])
def test_a_tokenizer_that_is_code_is_refused_by_name(tokenizer_class, auto_map, model, marker):
    edit(model / "tokenizer_config.json", tokenizer_class=tokenizer_class, auto_map=auto_map)
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json.*tokenization_own\.Own.*never run"):
        Tokenizer.from_folder(model)
    assert not marker.exists()


def test_a_tokenizer_that_needs_no_code_is_read_by_ours(model, marker):
    edit(model / "tokenizer_config.json", auto_map=OWN_TOKENIZER)
    assert Tokenizer.from_folder(model).encode("ab")
    assert not marker.exists()


@pytest.mark.parametrize(
    "tokenizer_class", ["Own", "AutoTokenizer", "os.system", "../x", 7, ["Own"]], ids=repr
)
def test_a_tokenizer_class_that_does_not_exist_runs_nothing(tokenizer_class, model, marker):
    edit(model / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    try:
        assert Tokenizer.from_folder(model).encode("ab")
    except ConfigError as error:
        assert str(model) in str(error)
    assert not marker.exists()


def test_what_lies_beside_a_gguf_file_has_no_say_in_its_tokenizer(model, marker):
    edit(model / "tokenizer_config.json", tokenizer_class="Own", auto_map=OWN_TOKENIZER)
    (model / "model.gguf").write_bytes(tiny_gguf(sentencepiece=True).encode())
    conversion.convert_gguf(model / "model.gguf", model / "out")
    assert not marker.exists()


def test_the_commands_ask_nothing_and_exit_with_2(model, marker, monkeypatch, capfd):
    edit(model / "tokenizer_config.json", tokenizer_class="Own", auto_map=OWN_TOKENIZER)
    for command in (["generate", "Hi", "--model", str(model)], ["worker", "--model", str(model)]):
        assert run_command(command, monkeypatch, capfd).startswith("ingine: unsupported: ")
    assert not marker.exists()


def run_command(arguments: list[str], monkeypatch, capfd) -> str:
    """Run a command, check its exit status, and return the last line of its standard error."""
    monkeypatch.setattr(sys, "argv", ["ingine", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


# -------------------------------------------------------------------------------- what is no regular file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def enormous(path: Path) -> None:
    """Write a sparse file, which takes no space on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


INSTEAD = {kind.__name__: kind for kind in (fifo, endless, folder, enormous)}
READ_BY = {
    "config.json": "config",
    "generation_config.json": "generation_config",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "chat_template.jinja": "tokenizer",
    "added_tokens.json": "tokenizer",
    "model.safetensors": "safetensors",
    "model.safetensors.index.json": "safetensors",
    "model.gguf": "gguf",
}


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("name", READ_BY)
def test_what_is_no_regular_file_of_some_length_is_not_read(name, instead, model, child):
    (model / name).unlink(missing_ok=True)
    if name == "special_tokens_map.json":
        config = json.loads((model / "tokenizer_config.json").read_text())
        del config["eos_token"]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    if name == "added_tokens.json":  # only transformers reads it
        edit(model / "tokenizer_config.json", tokenizer_class="Unheard")
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    INSTEAD[instead](model / name)
    refused(child.attempt(READ_BY[name], model), name)


@pytest.mark.parametrize("parser", ["config", "tokenizer"])
def test_a_folder_of_links_is_read_as_a_hub_s_cache_is(parser, model, child):
    links = model.parent / "snapshots" / "main"
    links.mkdir(parents=True)
    for file in model.iterdir():
        (links / file.name).symlink_to(f"../../{model.name}/{file.name}")
    assert child.attempt(parser, links).kind == VALID


def test_a_tokenizer_is_made_of_what_was_checked_alone(model, child):
    """transformers opens other files that a file names: `vocab_file` of old configs, and versions."""
    secret = model.parent / "secret.json"
    secret.write_text("{}")
    os.mkfifo(model / "tokenizer.5.json")
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Unheard",
        vocab_file=str(secret),
        tokenizer_file="/dev/zero",
        fast_tokenizer_files=["tokenizer.5.json"],
    )
    assert child.attempt("tokenizer", model).kind == VALID


# -------------------------------------------------------------------------------------------------- JSON


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


DEEP = {"deep": nested(900), "very deep": nested(100_000), "deep maps": '{"a":' * 500 + "1" + "}" * 500}


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("config.json", "config"),
        ("generation_config.json", "generation_config"),
        ("generation_config.json", "config"),
        ("tokenizer_config.json", "tokenizer"),
        ("model.safetensors.index.json", "safetensors"),
    ],
)
def test_json_that_is_nested_too_deep_is_named(name, parser, depth, model, child):
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    content = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(content | {"key": 0}).replace('"key": 0', f'"key": {DEEP[depth]}'))
    refused(child.attempt(parser, model), f"{name} cannot be read: it is nested")


@pytest.mark.parametrize("value", ["[]", "{}", "[0.5]"])
def test_json_of_many_small_values_is_bounded_by_their_number(value, model, child):
    """2 bytes in the file may take up to 200 in memory."""
    file = model / "tokenizer_config.json"
    original = file.read_text().rstrip().removesuffix("}")
    for share, kind in ((0.4, VALID), (2, "ConfigError")):
        values = ",".join([value] * int(share * MAX_JSON_VALUES))
        file.write_text(f'{original}, "x": [{values}]}}')
        outcome = child.attempt("tokenizer", model)
        assert outcome.kind == kind and not outcome.is_finding, outcome
    assert f"more than {MAX_JSON_VALUES} values" in outcome.message


def test_a_tokenizer_of_many_small_values_is_bounded_likewise(model, child):
    """Its library would keep even unused values, at 32 bytes each."""
    text = (model / "tokenizer.json").read_text().rstrip().removesuffix("}")
    (model / "tokenizer.json").write_text(text + ', "junk": [' + "[]," * (20 << 20) + "[]]}")
    refused(child.attempt("tokenizer", model), "tokenizer.json cannot be read: it has more than")


def test_of_a_key_that_is_there_twice_the_last_counts_as_in_transformers(model):
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ', "rms_norm_eps": 0.25}')
    assert ModelConfig.from_folder(model).rms_norm_eps == 0.25


LARGE = 10**30
WRONG_SIZES = [0, -1, 10**9, 10**12, LARGE, True, "7", 1.5, None, [], {}, float("nan"), float("inf")]
SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
]


def test_sizes_that_no_model_has_are_refused_before_anything_of_that_size_is_made(model, child):
    """The decoder, transformers and a table of positions would each use such sizes."""
    original = (model / "config.json").read_text()
    for name in SIZES:
        for wrong in WRONG_SIZES:
            if (name, wrong) in [("num_key_value_heads", None), ("head_dim", None)]:
                continue  # then the others determine it
            if name == "max_position_embeddings" and wrong == 10**9:
                continue  # it is no size
            for without in (None, "rms_norm_eps"):  # only transformers has its default
                config = json.loads(original) | {name: wrong}
                config.pop(without, None)
                (model / "config.json").write_text(json.dumps(config))
                refused(child.attempt("config", model), "config.json")


PLAUSIBLE = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 4096,
}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_sizes_that_the_weights_do_not_have_allocate_nothing(name, model, child):
    edit(model / "config.json", **{name: PLAUSIBLE[name]})
    says = "weights are missing" if name == "num_hidden_layers" else "config.json says"
    refused(child.attempt("config", model), says)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": LARGE**9},
        {"rope_theta": 10**400},
        {"rope_type": "linear", "factor": 1e-9},
        {"rope_type": "linear", "factor": 10**400},
        {"rope_type": ["linear"]},
        {"rope_type": "x" * 100_000},
        {"rope_type": "yarn", "factor": 1e300},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": "fast"},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": float("nan")},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": "1" * 9000},
        {"rope_type": "llama3", "factor": 1e-320, "low_freq_factor": 1, "high_freq_factor": 10**400},
    ],
    ids=lambda rope: str(rope)[:60],
)
def test_numbers_of_positions_that_are_none_are_named(rope, model, child):
    edit(model / "config.json", rope_parameters={"rope_theta": 10_000.0} | rope)
    outcome = child.attempt("config", model)
    assert outcome.kind in ("ConfigError", "UnsupportedModel") and not outcome.is_finding, outcome
    assert len(outcome.message) < 2000


@pytest.mark.parametrize("name", ["architectures", "layer_types", "eos_token_id"])
def test_a_long_list_of_wrong_values_is_one_error(name, model, child):
    edit(model / "config.json", **{name: [0.5] * 100_000})
    refused(child.attempt("config", model), f"config.json: {name}")


def test_an_end_token_that_no_vocabulary_has_is_none(model):
    edit(model / "config.json", eos_token_id=[-1, 7, 259, LARGE])
    edit(model / "generation_config.json", eos_token_id=-1)
    assert ModelConfig.from_folder(model).eos_token_ids == (7,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LARGE, "1", [], {}, True], ids=repr)
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_wrong_sampling_defaults_are_named(name, value, model, child):
    edit(model / "generation_config.json", **{name: value})
    refused(child.attempt("generation_config", model), f"generation_config.json: {name}")


# ------------------------------------------------------------------------------------------- safetensors


WEIGHT_MAPS = {
    "out of the folder": {"w": "../model.safetensors"},
    "absolute": {"w": "/etc/passwd.safetensors"},
    "a folder below": {"w": "a/b.safetensors"},
    "no safetensors": {"w": "config.json"},
    "no name": {"w": ""},
    "a NUL": {"w": "a\0.safetensors"},
    "too long": {"w": "a" * 100_000 + ".safetensors"},
    "half a character": {"w": "\ud800.safetensors"},
    "a number": {"w": 7},
    "a list": ["model.safetensors"],
    "nothing": {},
    "one that is not there": {"w": "b.safetensors"},
}


@pytest.mark.parametrize("weight_map", WEIGHT_MAPS)
def test_an_index_names_files_of_its_own_folder_alone(weight_map, model, child):
    shutil.copy(model / "model.safetensors", model.parent)
    (model / "model.safetensors").unlink()
    content = {"metadata": {}, "weight_map": WEIGHT_MAPS[weight_map]}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(child.attempt("safetensors", model), "safetensors")


def weights(header: object, content: bytes = bytes(64), length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + content


def tensor(begin: object = 0, end: object = 64, dtype: object = "F32", shape: object = (16,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "a header of 2^60": weights({"a": tensor()}, length=1 << 60),
    "a header of 2^63": weights({"a": tensor()}, length=1 << 63),
    "a header beyond the file": weights({"a": tensor()}, length=1 << 20),
    "nested": weights('{"a":' + nested(50_000) + "}"),
    "half a character": weights('{"\\ud800":' + json.dumps(tensor()) + "}"),
    "an overlap": weights({"a": tensor(), "b": tensor()}),
    "a part of another": weights({"a": tensor(), "b": tensor(8, 16, shape=[2])}),
    "a hole": weights({"a": tensor(0, 16, shape=[4]), "b": tensor(32, 64, shape=[8])}),
    "the end before the beginning": weights({"a": tensor(64, 0)}),
    "beyond the file": weights({"a": tensor(0, 1 << 40, shape=[1 << 38])}),
    "an offset of 2^70": weights({"a": tensor(1 << 70, (1 << 70) + 64)}),
    "a negative offset": weights({"a": tensor(-64, 0)}),
    "half an offset": weights({"a": tensor(0.5, 64)}),
    "a product that overflows": weights({"a": tensor(shape=[1 << 62, 4, 4])}),
    "many sizes": weights({"a": tensor(shape=[1 << 62] * 1000)}),
    "another size": weights({"a": tensor(shape=[17])}),
    "a negative size": weights({"a": tensor(shape=[-4, -4])}),
    "sizes that are true": weights({"a": tensor(0, 4, shape=[True])}, bytes(4)),
    "no sizes": weights({"a": tensor(shape="16")}),
    "no type": weights({"a": tensor(dtype=["F32"])}),
    "an unheard type": weights({"a": tensor(dtype="F31")}),
    "no tensor": weights({"a": None}),
    "more than the tensors": weights({"a": tensor()}, bytes(65)),
    "a list": weights([tensor()]),
    "nothing": b"",
}


@pytest.mark.parametrize("content", HEADERS)
def test_a_header_of_safetensors_is_checked_before_it_is_believed(content, model, child):
    (model / "model.safetensors").write_bytes(HEADERS[content])
    kind = "UnsupportedModel" if content == "an unheard type" else "ConfigError"
    refused(child.attempt("safetensors", model), "model.safetensors", kind)


# -------------------------------------------------------------------------------------------------- GGUF


def tensors(*shapes: tuple[int, ...], offset: Callable[[int], int] = lambda number: 0) -> GGUFBytes:
    made = [Tensor(f"t{number}", shape, offset(number)) for number, shape in enumerate(shapes)]
    return GGUFBytes((("general.architecture", STRING, "llama"),), tuple(made), tail=bytes(1 << 16))


def value(kind: int, raw: object) -> GGUFBytes:
    return GGUFBytes((("general.architecture", STRING, "llama"), ("x", kind, raw)))


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


GGUF_FILES = {
    "2^40 elements of a tensor": tensors((1 << 40,)),
    "2^40 elements of an array": value(ARRAY, array(UINT8, 1 << 40)),
    "2^40 strings": value(ARRAY, array(STRING, 1 << 40)),
    "2^40 arrays": value(ARRAY, array(ARRAY, 1 << 40)),
    "2^63 elements": value(ARRAY, array(UINT64, 1 << 63)),
    "a string of 2^63": value(STRING, struct.pack("<Q", 1 << 63)),
    "a key of 2^63": GGUFBytes(num_keys=1).encode()[:24] + struct.pack("<Q", 1 << 63),
    "2^63 keys": GGUFBytes(num_keys=1 << 63),
    "2^63 tensors": GGUFBytes(num_tensors=1 << 63),
    "2^32 empty keys": GGUFBytes(num_keys=1 << 32, tail=bytes(1 << 16)),
    "400 tensors at one offset": tensors(*[(4096,)] * 400),
    "two tensors that overlap": tensors((64,), (64,), offset=lambda number: 32 * number),
    "a tensor beyond the file": tensors((16,), offset=lambda number: 1 << 20),
    "an offset that overflows": tensors((16,), offset=lambda number: (1 << 64) - 32),
    "an offset between multiples": tensors((16,), offset=lambda number: 4),
    "dimensions that overflow": tensors((1 << 63, 1 << 63, 4)),
    "a negative dimension": tensors(((1 << 64) - 4, 4)),
    "five dimensions": tensors((1, 1, 1, 1, 1)),
    "no dimension": tensors(()),
    "2^32 dimensions": GGUFBytes(tensors=(Tensor("t", (1,), 0, num_dimensions=(1 << 32) - 1),)),
    "a type that there is not": GGUFBytes(tensors=(Tensor("t", (32,), 0, kind=999),)),
    "half a block": GGUFBytes(tensors=(Tensor("t", (31,), 0, kind=8),), tail=bytes(1 << 10)),
    "two tensors of one name": GGUFBytes(
        tensors=(Tensor("t", (4,), 0), Tensor("t", (4,), 32)), tail=bytes(99)
    ),
    "a key that is there twice": GGUFBytes((("x", UINT32, 1), ("x", UINT32, 1))),
    "arrays in arrays": value(ARRAY, array(ARRAY, 1) * 100_000),
    "a type of value that there is not": value(99, b""),
    "a truth of 2": value(BOOL, b"\2"),
    "no UTF-8": value(STRING, string(b"\xff\xfe")),
    "an alignment of 0": tiny_gguf().with_value("general.alignment", UINT32, 0),
    "an alignment of 3": tiny_gguf().with_value("general.alignment", UINT32, 3),
    "an alignment of 2^31": tiny_gguf().with_value("general.alignment", UINT32, 1 << 31),
    "an alignment that is text": tiny_gguf().with_value("general.alignment", STRING, "32"),
    "big endian": GGUFBytes(version=3 << 24),
    "a future version": GGUFBytes(version=4),
}


@pytest.mark.parametrize("content", GGUF_FILES)
def test_a_gguf_header_is_checked_before_it_is_believed(content, tmp_path, child):
    file = GGUF_FILES[content]
    (tmp_path / "model.gguf").write_bytes(file if isinstance(file, bytes) else file.encode())
    refused(child.attempt("gguf", tmp_path), "model.gguf is damaged or not a GGUF file")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_no_memory_is_taken_for_what_a_gguf_file_claims_and_has_not(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IQ", STRING, 32 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="it ends within a"):
            read_gguf_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


VALUES = {
    "uint8": (UINT8, 200),
    "uint32 0": (UINT32, 0),
    "uint32": (UINT32, 2**32 - 1),
    "int32": (INT32, -5),
    "uint64": (UINT64, 2**64 - 1),
    "float32": (FLOAT32, 0.5),
    "float32 nan": (FLOAT32, float("nan")),
    "float64": (FLOAT64, -1e300),
    "bool": (BOOL, 1),
    "string": (STRING, "text"),
    "empty string": (STRING, ""),
    "strings": (ARRAY, Elements(STRING, ["a", "b"])),
    "numbers": (ARRAY, Elements(UINT32, [1, 2])),
    "no elements": (ARRAY, Elements(FLOAT32, [])),
}


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["bytes", "sentencepiece"])
def test_every_value_of_metadata_with_every_other_type(sentencepiece, tmp_path, child):
    """A harmless value may be accepted, and the result can then be loaded."""
    file, tried = tiny_gguf(sentencepiece=sentencepiece), 0
    assert child_says(child, tmp_path, file).kind == VALID
    for key, *_ in file.metadata:
        for kind, wrong in VALUES.values():
            outcome = child_says(child, tmp_path, file.with_value(key, kind, wrong))
            assert not outcome.is_finding, (key, kind, wrong, outcome)
            assert outcome.kind != "ConfigError" or "model.gguf" in outcome.message, outcome
            tried += outcome.kind != VALID
    assert tried > 150
    assert set(FORMATS) > {kind for kind, _ in VALUES.values()} - {STRING, ARRAY}


def child_says(child: Child, folder: Path, file: GGUFBytes, **limits: int) -> Outcome:
    (folder / "model.gguf").write_bytes(file.encode())
    return child.attempt("gguf", folder, **limits)


LONG = {
    "a long token": ("tokenizer.ggml.tokens", ARRAY, Elements(STRING, ["<unk>", "a" * (1 << 20)])),
    "a long template": ("tokenizer.chat_template", STRING, "a" * (2 << 20)),
    "a long name": ("llama." + "a" * 2000, UINT32, 1),
}


@pytest.mark.parametrize("entry", LONG)
def test_texts_that_work_would_grow_with_are_bounded(entry, tmp_path, child):
    """Merges are found by cutting each token in two at each position."""
    key, kind, long = LONG[entry]
    refused(
        child_says(child, tmp_path, tiny_gguf(sentencepiece=True).with_value(key, kind, long)), "model.gguf"
    )


def test_two_tensors_for_one_place_are_refused(tmp_path, child):
    file = tiny_gguf()
    last = file.tensors[-1]
    twin = Tensor("foo.0.ffn_down.weight", last.shape, last.offset + len(last.content), last.content)
    outcome = child_says(child, tmp_path, GGUFBytes(file.metadata, (*file.tensors, twin)))
    refused(outcome, "foo.0.ffn_down.weight", "UnsupportedModel")


@pytest.mark.parametrize("file_bytes", [10, 1000, 20_000])
def test_a_disk_that_is_full_leaves_no_half_conversion(file_bytes, tmp_path, child):
    """The disk is full while writing the config, the tokenizer or the weights."""
    outcome = child_says(child, tmp_path, tiny_gguf(), file_bytes=file_bytes)
    refused(outcome, "model.gguf: its folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_weights_for_which_there_is_no_room_are_not_begun(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(tiny_gguf().encode())
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(conversion, "save_file", pytest.fail)
    with pytest.raises(
        ConfigError, match=r"model\.gguf.*the weights take \d+ bytes, and there are 1000 left"
    ):
        conversion.convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_pull_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(GGUF_FILES["400 tensors at one offset"].encode())
    os.mkfifo(tmp_path / "fifo.gguf")
    for name, says in (("bad.gguf", "t1 begins within t0"), ("fifo.gguf", "no folder or GGUF file")):
        assert says in run_command(["pull", str(tmp_path / name)], monkeypatch, capfd)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", None, "model.safetensors does not exist"),
        ("model.safetensors", b"\x08" + bytes(15), "model.safetensors is damaged"),
        ("tokenizer.json", b"{}", "no usable tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds no JSON object"),
        ("config.json", b"{}", "config.json names no architecture"),
    ],
)
def test_pull_refuses_a_folder_that_no_worker_could_load(name, content, says, model, monkeypatch, capfd):
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_bytes(content)
    assert says in run_command(["pull", str(model)], monkeypatch, capfd)


def test_pull_warns_of_sampling_defaults_that_a_worker_may_ignore(model, monkeypatch, capfd):
    (model / "generation_config.json").write_bytes(b'{"temperature": -1}')
    monkeypatch.setattr(sys, "argv", ["ingine", "pull", str(model)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert not ended.value.code
    assert out.strip() == str(model)
    assert "generation_config.json: temperature" in err and "start with generation_config=vllm" in err
