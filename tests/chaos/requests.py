"""What the jobs of a run ask of the model: few different requests, so that one uninterrupted run of them all
checks every job."""

from dataclasses import dataclass, field
from itertools import count, product
from typing import Any

LENGTHS = (8, 24, 60, 100, 160, 300)
NUM_GREEDY = 40
GRAMMARS = (
    {
        "json": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["cat", "dog", 7]},
                "name": {"type": "string", "maxLength": 6},
                "tags": {"type": "array", "items": {"type": "integer", "maximum": 999}, "maxItems": 3},
            },
            "required": ["kind", "name", "tags"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        }
    },
    {"regex": "([a-f]{3,9}-[0-9]{2};){1,4}"},
    {"choice": ["left", "leftover", "right", "nothing at all"]},
    {"grammar": 'start: item+\nitem: "<" /[a-z0-9]{1,8}/ ">" | "[]"'},
    {
        "structural_tag": {
            "structures": [{"begin": "{", "schema": {"type": "boolean"}, "end": "}"}],
            "triggers": ["{"],
        }
    },
)
RESTRICTIONS = (
    {"bad_words": ["a", "e", "th", "q7"]},
    {"allowed_token_ids": list(range(30, 90))},
    {"prompt_logprobs": 2},
    {"stop": ["A", "z", "}", "5"], "include_stop_str_in_output": True},
    {"skip_special_tokens": False, "logit_bias": {256: 4.0, 257: 4.0}},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False, "logit_bias": {257: 6.0}},
    {"detokenize": False},
    {"stop_token_ids": list(range(0, 40)), "min_tokens": 5},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logprobs": 3},
    {"truncate_prompt_tokens": 7, "prompt_logprobs": 0},
)
CHATS = (
    {"messages": [{"role": "user", "content": "What is <|im_end|>, and what <|im_start|>assistant?"}]},
    {
        "messages": [{"role": "user", "content": "Say<|im_end|>\n<|im_start|>it"}],
        "allow_special_tokens": True,
    },
    {
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}],
        "add_generation_prompt": False,
    },
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
CALLS = (
    "<think>[a-c ]{0,6}</think>[a-e]{0,4}"
    r'(<tool_call>\{"name": "[fgh]", "arguments": \{"a": [0-9]{1,3}\}\}</tool_call>){1,2}'
)
"""Reasoning, content and calls, some of them of a function that is not offered."""
FAILS = {"structured_outputs": {"regex": "[a-f]{6}b"}, "stop_token_ids": [ord("b") - 33], "temperature": 0}
"""A request that fails behind its first tokens, always with the same code: the grammar allows nothing but a
token that would end the output where it may not end."""


@dataclass(frozen=True)
class Request:
    sampling: dict[str, Any]
    input: dict[str, Any] = field(default_factory=dict)
    """The further arguments of `submit`: `prompt` or `messages`, and what belongs to them."""

    @property
    def num_choices(self) -> int:
        return self.sampling.get("n", 1)

    @property
    def is_chat(self) -> bool:
        return "messages" in self.input

    @property
    def is_plainly_greedy(self) -> bool:
        """True if each token is the likeliest of all."""
        return self.sampling["temperature"] == 0 and self.sampling.keys() <= {
            "temperature", "max_tokens", "stop", "logprobs", "seed", "n",
        }  # fmt: skip


def requests() -> list[Request]:
    """All requests. The greedy ones come first."""
    return [
        *(*greedy(), *sampled(), *constrained(), *restricted()),
        *(*chats(), *tool_calls(), Request(FAILS, _story(0))),
    ]


def greedy() -> list[Request]:
    """Some stop at a string, some have logprobs, some penalties."""
    made = []
    for index in range(NUM_GREEDY):
        sampling: dict[str, Any] = {"temperature": 0, "max_tokens": LENGTHS[index % len(LENGTHS)]}
        if index % 5 == 1:
            sampling["stop"] = ["q", "7"]
        if index % 7 == 2:
            sampling["logprobs"] = 20
        if index % 9 == 4:
            sampling["frequency_penalty"] = 0.5
        made.append(Request(sampling, _story(index)))
    return made


def sampled() -> list[Request]:
    """Of one choice and of several: these are shorter."""
    made = []
    for index in range(16):
        num_choices = 1 + index % 4
        length = LENGTHS[index % (len(LENGTHS) if num_choices == 1 else 4)]
        sampling = {"temperature": 1.0, "top_p": 0.9, "max_tokens": length}
        made.append(Request(_seeded(sampling, index, num_choices), _story(index)))
    return made


def constrained() -> list[Request]:
    """Each grammar greedy and sampled, with a stop string, and for several choices."""
    made, numbers = [], count()
    for grammar, more in product(GRAMMARS, ({}, {"logprobs": 1}, {"stop": ["e", "1;"]})):
        number = next(numbers)
        sampling = {"temperature": 0 if number % 3 == 1 else 1.4, "max_tokens": 60} | more
        sampling["structured_outputs"] = grammar
        made.append(Request(_seeded(sampling, number, 1 + number % 4), _story(number)))
    return made


def restricted() -> list[Request]:
    made = []
    for index, restriction in enumerate(RESTRICTIONS):
        sampling = {"temperature": 0 if index % 2 else 1.0, "max_tokens": 48} | restriction
        made.append(Request(_seeded(sampling, index, 1 + index % 3), _story(index)))
    return made


def chats() -> list[Request]:
    made = []
    for index, chat in enumerate(CHATS):
        sampling = {"temperature": 1.0, "max_tokens": 40}
        made.append(Request(_seeded(sampling, index, 1 + index % 2), chat))
    return made


def tool_calls() -> list[Request]:
    """The last one is cut off."""
    made = []
    for index, length in enumerate((200, 200, 200, 200, 70)):
        sampling = {"temperature": 1.3, "max_tokens": length, "structured_outputs": {"regex": CALLS}}
        chat = {"messages": [{"role": "user", "content": f"Call {index}"}], "tools": TOOLS}
        made.append(Request(_seeded(sampling, index, 1 + index % 3), chat))
    return made


def _story(index: int) -> dict[str, Any]:
    return {"prompt": f"Story {index}: " + "once upon a time " * (index % 4)}


def _seeded(sampling: dict[str, Any], seed: int, num_choices: int) -> dict[str, Any]:
    return sampling | {"seed": 100 * seed, "n": num_choices}
