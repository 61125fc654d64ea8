"""Chooses questions and output lengths that fit into a model's length."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ingine.demo.prompts import QUESTIONS
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ConfigError

MAX_MODEL_LEN = 1024
MIN_OUTPUT_TOKENS, MIN_QUESTIONS = 16, 12
"""With less, the jobs could end before a worker is killed."""
KILL_AFTER_NUM_TOKENS = 500


@dataclass(frozen=True)
class Plan:
    max_model_len: int
    is_chat: bool
    """False for a model without a chat template, which continues the question's text instead."""
    max_tokens: dict[str, int]
    """Output tokens of each question that is asked, by its number."""

    @property
    def kill_after_num_tokens(self) -> int:
        return min(KILL_AFTER_NUM_TOKENS, sum(self.max_tokens.values()) // 4)

    def as_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        return cls(**json.loads(line))


def plan_for(folder: Path) -> Plan:
    """Plan for the model in `folder`, which is in Hugging Face's format.

    Raises ConfigError if the model's length is too small.
    """
    tokenizer = Tokenizer.from_folder(folder)
    longest = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", MAX_MODEL_LEN)
    max_model_len = min(MAX_MODEL_LEN, longest)
    max_tokens = {}
    for number, question in enumerate(QUESTIONS):
        room = max_model_len - _prompt_tokens(tokenizer, question.text)
        if room >= MIN_OUTPUT_TOKENS:
            max_tokens[str(number)] = min(room, question.max_tokens)
    if len(max_tokens) < MIN_QUESTIONS:
        raise ConfigError(
            f"this model takes {longest} tokens, and the demo's questions do not fit: name a longer one "
            "with --model"
        )
    return Plan(max_model_len, tokenizer.has_chat_template, max_tokens)


def _prompt_tokens(tokenizer: Tokenizer, text: str) -> int:
    if tokenizer.has_chat_template:
        return len(tokenizer.encode_chat([{"role": "user", "content": text}]))
    return len(tokenizer.encode(text))
