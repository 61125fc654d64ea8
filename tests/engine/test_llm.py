"""The offline face: what vLLM's users know, and what they get when something is wrong."""

import sys

import pytest

from ingine import LLM, RequestOutput, SamplingParams
from ingine.engine.request import EngineRequest
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ConfigError, InvalidRequest, ModelNotFound
from tests.engine.chat_families import FAMILIES
from tests.engine.driving import greedy
from tests.tiny_models import make_tokenizer

PROMPT = list(range(60, 90))


@pytest.fixture(scope="module")
def llm(llama) -> LLM:
    return LLM(str(llama.path), dtype="float32", max_num_seqs=4, block_size=4)


def test_one_prompt(llm, llama):
    [output] = llm.generate({"prompt_token_ids": PROMPT}, greedy(8, logprobs=1))
    assert isinstance(output, RequestOutput) and output.finished
    assert output.prompt is None and output.prompt_token_ids == PROMPT
    [completion] = output.outputs
    assert completion.token_ids == llama.hf_greedy(PROMPT, 8)
    assert completion.text == llama.tokenizer.decode(completion.token_ids)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert [entry["token_id"] for entry in completion.logprobs] == completion.token_ids
    assert output.usage == {"num_prompt_tokens": 30, "num_cached_tokens": 0, "num_output_tokens": 8}
    timings = output.timings
    assert timings.arrival_time <= timings.first_token_time <= timings.finished_time


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["a long prompt, so that it is not the first to finish", "b", {"prompt_token_ids": [1, 2]}, "a"]
    outputs = llm.generate(prompts, [greedy(length) for length in (20, 1, 3, 2)])
    assert [output.prompt for output in outputs] == [prompts[0], "b", None, "a"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 1, 3, 2]
    assert len({output.request_id for output in outputs}) == 4


def test_a_repeated_prompt_is_found_in_the_cache(llm):
    [first] = llm.generate("once more, with feeling", greedy(4))
    [second] = llm.generate("once more, with feeling", greedy(4))
    assert second.num_cached_tokens > first.num_cached_tokens
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_chat_with_one_conversation_or_several(llm, llama):
    one = [{"role": "user", "content": "Hi"}]
    two = [{"role": "system", "content": "Be brief."}, *one]
    [alone] = llm.chat(one, greedy(4))
    both = llm.chat([one, two], greedy(4))
    assert alone.prompt_token_ids == llama.tokenizer.encode_chat(one)
    assert [output.prompt_token_ids for output in both] == [
        llama.tokenizer.encode_chat(messages) for messages in (one, two)
    ]
    assert both[0].outputs[0].token_ids == alone.outputs[0].token_ids


def test_chat_with_all_that_a_template_takes(llm, monkeypatch):
    tokenizer = Tokenizer.from_transformers(make_tokenizer(FAMILIES["qwen3"]))
    monkeypatch.setattr(llm.engine, "tokenizer", tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi<|im_end|>"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "So"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    options = {"add_generation_prompt": False, "continue_final_message": True, "allow_special_tokens": True}
    [output] = llm.chat(
        messages, greedy(1), tools=tools, chat_template_kwargs={"enable_thinking": False}, **options
    )
    expected = Conversation(messages, tools, {"enable_thinking": False}, **options)
    assert output.prompt_token_ids == tokenizer.encode_chat(expected)
    [safe] = llm.chat(messages[:1], greedy(1))
    assert safe.prompt_token_ids == tokenizer.encode_chat(messages[:1])
    assert safe.prompt_token_ids.count(tokenizer.encode("<|im_end|>")[0]) == 1


@pytest.mark.parametrize(
    "prompts", [PROMPT, [PROMPT], tuple(PROMPT), {"prompt_token_ids": PROMPT, "prompt": "x"}]
)
def test_a_prompt_may_be_token_ids(llm, llama, prompts):
    [output] = llm.generate(prompts, greedy(4))
    assert output.prompt_token_ids == PROMPT
    assert output.outputs[0].token_ids == llama.hf_greedy(PROMPT, 4)


def test_a_prompt_may_be_a_text_in_a_dict(llm, llama):
    [output] = llm.generate({"prompt": "Hi", "multi_modal_data": None}, greedy(4))
    assert (output.prompt, output.prompt_token_ids) == ("Hi", llama.tokenizer.encode("Hi"))


@pytest.mark.parametrize("params", [{}, {"max_tokens": None}, {"max_tokens": 10**9}], ids=repr)
def test_without_max_tokens_the_output_is_as_long_as_the_models_length_leaves(llm, params):
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, ignore_eos=True, **params))
    assert len(output.outputs[0].token_ids) == llm.engine.max_model_len - len(PROMPT)
    assert output.outputs[0].finish_reason == "length"


def test_max_tokens_of_a_billion_reserves_nothing(llm):
    engine = llm.engine
    engine.add(EngineRequest("one", PROMPT, SamplingParams(temperature=0, max_tokens=10**9, ignore_eos=True)))
    engine.step()
    stats, block_size = engine.stats(), engine.config.block_size
    assert stats.num_blocks - stats.num_free_blocks <= -(-(len(PROMPT) + 1) // block_size)
    engine.abort("one")


def test_vllms_arguments_are_accepted_where_they_mean_nothing(llm):
    params = SamplingParams(n=1, temperature=0, max_tokens=2, stop=None, skip_special_tokens=True)
    [output] = llm.generate(["a"], params, use_tqdm=True, lora_request=None, priority=None)
    assert output.finished
    conversation = [{"role": "user", "content": "Hi"}]
    arguments = {"chat_template": None, "add_generation_prompt": True, "chat_template_content_format": "auto"}
    assert llm.chat(conversation, params, **arguments, tools=None)[0].finished


def test_vllms_arguments_are_refused_where_they_would_change_something(llm):
    with pytest.raises(InvalidRequest, match="lora_request is not supported"):
        llm.generate("a", greedy(1), lora_request="x")
    with pytest.raises(InvalidRequest, match="chat_template is not supported"):
        llm.chat([{"role": "user", "content": "Hi"}], greedy(1), chat_template="{{ messages }}")
    with pytest.raises(TypeError, match="'progres'"):
        llm.generate("a", greedy(1), progres=True)


def test_vllms_options_are_accepted_where_they_mean_nothing(llama):
    options = {"trust_remote_code": True, "enforce_eager": False, "tokenizer": None, "max_num_seqs": 1}
    assert LLM(str(llama.path), dtype="float32", **options).engine.config.max_num_seqs == 1
    with pytest.raises(ConfigError, match="tokenizer is not supported"):
        LLM(str(llama.path), tokenizer="another")


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == [] and llm.chat([]) == []


def test_progress_goes_to_the_terminal_and_nowhere_else(llm, capsys, monkeypatch):
    llm.generate(["a", "b"], greedy(2))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate(["a", "b"], greedy(2), use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], greedy(2))
    out, err = capsys.readouterr()
    assert out == "" and "2/2 prompts" in err


@pytest.mark.parametrize(
    ("prompts", "params", "code", "says"),
    [
        (7, None, "invalid_type", "prompts must be a list, not int"),
        ([7.5], None, "invalid_type", "a prompt is a str, a list of token ids"),
        ([{"prompt": 7}], None, "invalid_type", "a prompt is a str, a list of token ids"),
        ([{}], None, "invalid_type", "a prompt is a str, a list of token ids"),
        ([{"prompt": "a", "multi_modal_data": {"image": 1}}], None, "invalid_parameter", "multi_modal_data"),
        ([[7, "x"]], None, "invalid_token_id", "the prompt"),
        ({"prompt_token_ids": "abc"}, None, "invalid_type", "prompt_token_ids must be a list, not str"),
        ("", None, "empty_prompt", "no tokens"),
        (["a", "b"], [SamplingParams()], "invalid_parameter", "1 sampling_params for 2 prompts"),
        ("a", {"temperature": 0}, "invalid_type", "sampling_params must be a list, not dict"),
        (["a", {"prompt_token_ids": [999]}], None, "invalid_token_id", "999"),
    ],
)
def test_wrong_prompts_and_params_are_refused_before_anything_runs(llm, prompts, params, code, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        llm.generate(prompts, params)
    assert error.value.code == code
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    "messages", [["Hi"], [[{"role": "user"}]], [[{"role": "user", "content": 7}]]], ids=str
)
def test_wrong_messages_are_refused(llm, messages):
    with pytest.raises(InvalidRequest):
        llm.chat(messages)


def test_unknown_options_and_models_are_refused(llama):
    with pytest.raises(ConfigError, match="unknown option max_seqs; there are async_scheduling, block_size"):
        LLM(str(llama.path), max_seqs=4)
    with pytest.raises(ModelNotFound):
        LLM("no-such-model")


def test_several_ranks_are_refused_where_nobody_would_follow(llama):
    with pytest.raises(ConfigError, match="tensor_parallel_size: only `ingine worker`"):
        LLM(str(llama.path), tensor_parallel_size=2)


def test_an_interrupted_call_leaves_the_engine_usable(llm, llama, monkeypatch):
    step = llm.engine.step
    steps_left = iter(range(3))

    def interrupted_step():
        if next(steps_left, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c", "d", "e", "f"], greedy(20))
    monkeypatch.undo()
    assert not llm.engine.has_unfinished
    llm.engine.check_integrity()
    [output] = llm.generate({"prompt_token_ids": PROMPT}, greedy(8))
    assert output.outputs[0].token_ids == llama.hf_greedy(PROMPT, 8)


def test_a_truncated_prompt_has_its_last_tokens(llm, llama):
    long = "abcdefghij" * 1000
    outputs = llm.generate([long, "Hi"], [greedy(3, truncate_prompt_tokens=5), greedy(3)])
    assert [output.prompt_token_ids for output in outputs] == [
        llama.tokenizer.encode("fghij"),
        llama.tokenizer.encode("Hi"),
    ]
    [chat] = llm.chat([{"role": "user", "content": long}], greedy(3, truncate_prompt_tokens=-1))
    assert len(chat.prompt_token_ids) == llm.engine.max_model_len - 3
    with pytest.raises(InvalidRequest) as refused:
        llm.generate(long, greedy(3))
    assert refused.value.code == "prompt_too_long"


def test_vllm_s_names_of_an_output(llm):
    [output] = llm.generate({"prompt_token_ids": PROMPT}, greedy(8, logprobs=0))
    [completion] = output.outputs
    assert completion.finished() and output.metrics is output.timings
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry["logprob"] for entry in completion.logprobs)
    )
    [plain] = llm.generate({"prompt_token_ids": PROMPT}, greedy(8))
    assert plain.outputs[0].cumulative_logprob is None
