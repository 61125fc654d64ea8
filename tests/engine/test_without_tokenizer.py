"""A model whose folder has no tokenizer: token ids in and out, and text is refused by name."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ingine import LLM, SamplingParams
from ingine.cli.main import app
from ingine.engine.limits import RequestLimits
from ingine.engine.store.fingerprint import model_fingerprint
from ingine.engine.text.tokenizer import Tokenizer, load_tokenizer
from ingine.errors import ConfigError, ErrorCode, InvalidRequest
from tests.tiny_models import ARCHITECTURES, make_tiny_model, make_tokenizer

PROMPT = list(range(40, 77))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def without_tokenizer(path: Path, arch: str = "llama", *, keep: tuple[str, ...] = ()) -> Path:
    make_tiny_model(path, arch)
    for name in TOKENIZER_FILES:
        if name not in keep:
            (path / name).unlink()
    return path


def make_llm(path: Path) -> LLM:
    return LLM(str(path), dtype="float32", max_num_seqs=2, kv_cache_bytes=1 << 20)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    return make_llm(without_tokenizer(tmp_path_factory.mktemp("tokenless"), "qwen2"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_token_ids_go_in_and_come_out(arch, tmp_path):
    path = without_tokenizer(tmp_path, arch)
    params = SamplingParams(max_tokens=12, temperature=0)
    [output] = make_llm(path).generate({"prompt_token_ids": PROMPT}, params)
    prompt = torch.tensor([PROMPT])
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert output.outputs[0].token_ids == expected[0, len(PROMPT) :].tolist()
    assert output.outputs[0].text == ""


@pytest.mark.parametrize("keep", [(), ("tokenizer_config.json",), ("chat_template.jinja",)], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_without_a_vocabulary_has_no_tokenizer(arch, keep, tmp_path, caplog):
    path = without_tokenizer(tmp_path, arch, keep=keep)
    assert load_tokenizer(path) is None
    [record] = caplog.records
    assert "tokenizer.json" in record.message and str(path) in record.message
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(path)


def test_a_tokenizer_that_is_there_is_loaded_without_a_warning(tmp_path, caplog):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).decode([40]) != ""
    assert not caplog.records


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_half_a_tokenizer_is_an_error_not_none(arch, tmp_path):
    """vocab.json without merges.txt: text would be cut in another way than the model was trained with."""
    path = without_tokenizer(tmp_path, arch)
    (path / "vocab.json").write_text(json.dumps(make_tokenizer().get_vocab()))
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(path)


def test_a_tokenizer_with_an_empty_vocabulary_is_named(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="vocabulary is damaged"):
        load_tokenizer(tmp_path)


def test_a_text_is_refused_and_the_message_says_what_is_missing(llm):
    for ask in (
        lambda: llm.generate("Hi"),
        lambda: llm.chat([{"role": "user", "content": "Hi"}]),
    ):
        with pytest.raises(InvalidRequest, match=r"tokenizer\.json.*token ids") as error:
            ask()
        assert error.value.code == ErrorCode.INVALID_PARAMETER


def test_a_stop_string_is_refused_since_there_is_no_text_to_find_it_in(llm):
    prompt = {"prompt_token_ids": PROMPT}
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        llm.generate(prompt, SamplingParams(stop=("x",)))
    [output] = llm.generate(prompt, SamplingParams(stop_token_ids=(3,), max_tokens=2, temperature=0))
    assert output.finished


def test_who_validates_in_another_process_refuses_the_same(llm):
    limits = RequestLimits(**asdict(llm.engine.limits))
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        limits.validate(PROMPT, SamplingParams(stop=("x",)))


def test_the_command_says_it_in_a_sentence(tmp_path):
    path = without_tokenizer(tmp_path)
    run = CliRunner().invoke(app, ["generate", "--model", str(path), "Hi"])
    assert isinstance(run.exception, InvalidRequest)  # which `ingine` prints in a line
    assert "tokenizer.json" in str(run.exception)


def test_such_a_model_has_a_fingerprint(tmp_path):
    assert len(model_fingerprint(without_tokenizer(tmp_path))) == 16
