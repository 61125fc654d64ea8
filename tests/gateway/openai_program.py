"""What OpenAI's Python client makes of a gateway. Runs in an environment that has the client.

Arguments: base URL, API key, model. Prints one JSON object.
"""

import json
import sys

import openai

base_url, api_key, model = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY = {"model": model, "temperature": 0}
found: dict[str, object] = {"version": openai.__version__}

found["models"] = [each.id for each in client.models.list()]

raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, max_completion_tokens=24, **GREEDY)
whole = raw.parse()
found["request_id"], found["id"] = raw.headers["x-request-id"], whole.id
found["text"], found["reason"] = whole.choices[0].message.content, whole.choices[0].finish_reason
found["usage"] = whole.usage.completion_tokens

with client.chat.completions.create(
    messages=MESSAGES, max_tokens=24, stream=True, stream_options={"include_usage": True}, logprobs=True,
    top_logprobs=2, **GREEDY
) as stream:  # fmt: skip
    chunks = list(stream)
deltas = [choice for chunk in chunks for choice in chunk.choices]
found["stream_text"] = "".join(choice.delta.content or "" for choice in deltas)
found["stream_reasons"] = [choice.finish_reason for choice in deltas if choice.finish_reason]
found["stream_usage"] = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
found["num_logprobs"] = sum(len(choice.logprobs.content) for choice in deltas if choice.logprobs)

with client.chat.completions.stream(messages=MESSAGES, max_tokens=24, **GREEDY) as helper:
    found["helper_text"] = helper.get_final_completion().choices[0].message.content

several = client.chat.completions.create(
    messages=MESSAGES, max_tokens=8, n=3, stream=True, model=model, temperature=1.0, seed=5
)
texts = {0: "", 1: "", 2: ""}
for chunk in several:
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
same = client.chat.completions.create(
    messages=MESSAGES, max_tokens=8, n=3, model=model, temperature=1.0, seed=5
)
found["choices_streamed"] = list(texts.values())
found["choices_whole"] = [choice.message.content for choice in same.choices]

found["completion"] = client.completions.create(prompt="hi", max_tokens=8, **GREEDY).choices[0].text
found["completion_stream"] = "".join(
    chunk.choices[0].text
    for chunk in client.completions.create(prompt="hi", max_tokens=8, stream=True, **GREEDY)
)

ASKED = {"input": "hi", "max_output_tokens": 24, **GREEDY}
whole = client.responses.create(**ASKED)
found["response_text"], found["response_status"] = whole.output_text, whole.status
streamed = list(client.responses.create(stream=True, **ASKED))
found["response_stream"] = "".join(e.delta for e in streamed if e.type == "response.output_text.delta")
with client.responses.stream(**ASKED) as helper:
    found["response_helper"] = helper.get_final_response().output_text

background = client.responses.create(background=True, **ASKED)
events = list(client.responses.retrieve(background.id, stream=True))
found["background_text"] = events[-1].response.output_text
found["background_whole"] = client.responses.retrieve(background.id).output_text
half = events[len(events) // 2].sequence_number
rest = client.responses.retrieve(background.id, stream=True, starting_after=half)
found["rest"] = [event.sequence_number for event in rest]
found["expected_rest"] = [each.sequence_number for each in events if each.sequence_number > half]
long = client.responses.create(background=True, input="hi", model=model)
found["cancelled"] = client.responses.cancel(long.id).status


def error_of(call) -> dict:
    try:
        call()
    except openai.APIStatusError as error:
        return {"kind": type(error).__name__, "code": error.code, "param": error.param, "type": error.type}
    return {}


found["errors"] = {
    "model": error_of(lambda: client.chat.completions.create(messages=MESSAGES, model="no-such-model")),
    "field": error_of(
        lambda: client.chat.completions.create(messages=MESSAGES, model=model, extra_body={"no_such": 1})
    ),
    "long": error_of(lambda: client.completions.create(prompt="hi " * 2000, max_tokens=8, model=model)),
    "key": error_of(lambda: client.with_options(api_key="wrong").models.list()),
}
print(json.dumps(found))
