"""Defaults of a request: the model's sampling parameters, by vLLM's rule, and its length."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ingine import LLM, SamplingParams
from ingine.cli.main import app
from ingine.engine.limits import RequestLimits
from ingine.engine.models.gguf import convert_gguf
from ingine.engine.store.generation_config import read_sampling_defaults
from ingine.errors import ConfigError
from tests.engine.test_gguf import tiny, write_gguf

OWN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.05}


def write(folder: Path, **values) -> Path:
    content = {"do_sample": True, "eos_token_id": 1} | values
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def opinionated(llama, tmp_path_factory) -> Path:
    """The tiny model as one whose makers recommend greedy sampling of at most 5 tokens."""
    folder = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(llama.path, folder)
    return write(folder, temperature=0.0, max_new_tokens=5)


def test_the_file_names_what_vllm_takes_from_it(tmp_path):
    assert read_sampling_defaults(write(tmp_path, max_new_tokens=2048, num_beams=4, **OWN)) == OWN | {
        "max_tokens": 2048
    }


def test_null_and_a_missing_file_say_nothing(tmp_path):
    assert read_sampling_defaults(tmp_path) == {}
    assert read_sampling_defaults(write(tmp_path, temperature=None)) == {}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"top_p": 3}, r"generation_config\.json: top_p: .*generation_config=vllm"),
        ({"max_new_tokens": "many"}, r"max_new_tokens: "),
        ({"temperature": "hot"}, "temperature: "),
    ],
)
def test_a_wrong_value_is_named(tmp_path, values, says):
    with pytest.raises(ConfigError, match=says):
        read_sampling_defaults(write(tmp_path, **values))


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_file_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_sampling_defaults(tmp_path)


def test_a_gguf_file_recommends_its_own(tmp_path):
    metadata = {f"general.sampling.{key}": value for key, value in {"temp": 0.7, "top_p": 0.95}.items()}
    metadata |= {"general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.05}
    model = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", metadata=metadata)
    convert_gguf(model, tmp_path / "out")
    own = {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    assert read_sampling_defaults(tmp_path / "out") == own
    convert_gguf(write_gguf(tmp_path / "n.gguf", tmp_path / "model", "llama"), tmp_path / "silent")
    assert read_sampling_defaults(tmp_path / "silent") == {}


def test_what_a_request_gives_goes_first_even_at_its_default():
    limits = RequestLimits(100, 100, 100, sampling_defaults={"temperature": 0.7, "top_k": 20})
    given = SamplingParams(temperature=1.0, seed=3)
    assert limits.with_defaults(given) == SamplingParams(temperature=1.0, seed=3, top_k=20)
    assert limits.with_defaults(SamplingParams()) == SamplingParams(temperature=0.7, top_k=20)
    neutral = RequestLimits(100, 100, 100)
    assert neutral.with_defaults(given) is given


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(2048, 2048), (2049, None), (3000, None)])
def test_a_default_that_contradicts_what_is_given_is_dropped(min_tokens, max_tokens):
    limits = RequestLimits(9000, 9000, 100, sampling_defaults={"top_k": 20, "max_tokens": 2048})
    params = limits.with_defaults(SamplingParams(min_tokens=min_tokens))
    assert (params.top_k, params.min_tokens, params.max_tokens) == (20, min_tokens, max_tokens)
    assert SamplingParams(**params.model_dump(exclude_defaults=True)) == params


def test_llm_without_params_takes_the_models_own_and_explicit_params_stay_as_they_are(opinionated, llama):
    llm = LLM(str(opinionated), dtype="float32", max_num_seqs=2, block_size=4)
    prompt = {"prompt_token_ids": [*range(60, 90)]}
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=5)
    [own] = llm.generate(prompt)
    assert own.outputs[0].token_ids == llama.hf_greedy(prompt["prompt_token_ids"], 5)
    [explicit] = llm.generate(prompt, SamplingParams(seed=1, max_tokens=7, ignore_eos=True))
    assert len(explicit.outputs[0].token_ids) == 7
    assert explicit.outputs[0].token_ids[:5] != own.outputs[0].token_ids  # drawn at temperature 1


def test_generation_config_vllm_ignores_the_file(opinionated):
    llm = LLM(str(opinionated), dtype="float32", max_num_seqs=2, block_size=4, generation_config="vllm")
    assert llm.get_default_sampling_params() == SamplingParams()
    write(opinionated, top_p=3)
    try:
        LLM(str(opinionated), dtype="float32", max_num_seqs=2, generation_config="vllm")
        with pytest.raises(ConfigError, match="top_p"):
            LLM(str(opinionated), dtype="float32", max_num_seqs=2)
    finally:
        write(opinionated, temperature=0.0, max_new_tokens=5)


def test_an_unknown_generation_config_is_refused(llama):
    with pytest.raises(ConfigError, match="generation_config must be one of auto, vllm"):
        LLM(str(llama.path), generation_config="folder")


def test_generate_takes_the_models_own_unless_an_option_says_otherwise(opinionated):
    def token_ids(*options: str) -> list[int]:
        run = CliRunner().invoke(app, ["generate", "Hi", "--json", "--model", str(opinionated), *options])
        assert run.exit_code == 0, run.output
        return json.loads(run.stdout.splitlines()[-1])["outputs"][0]["token_ids"]

    own = token_ids()
    assert len(own) <= 5
    assert token_ids("--temperature", "0", "--max-tokens", "5") == own
    assert token_ids("--temperature", "1", "--seed", "1") != own
