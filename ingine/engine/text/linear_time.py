"""Recognises tokenizers whose time is proportional to the length of the text, whatever the text.

A tokenizer.json is a small program: it may have regular expressions that backtrack without end, replacements
that each double the text, or words of any length that are looked up piece by piece. This module lists parts
that do none of that.
"""

import json
from typing import Any

from tokenizers import Tokenizer as CoreTokenizer
from tokenizers.models import BPE, Unigram

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
LINEAR_PATTERNS = frozenset({
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _SIGNS + _REST,  # Llama 3
    _CONTRACTIONS + _WORDS + r"|\p{N}" + _SIGNS + _REST,  # Qwen 2
})  # fmt: skip
"""Regular expressions from the pre-tokenizers of published models that were measured on worst-case texts
(`benchmarks/prompt_cost.py`). No other expression is assumed to be harmless."""

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer")
_PRE_TOKENIZERS = (
    *("ByteLevel", "Digits", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("Punctuation", "CharDelimiterSplit", "UnicodeScripts"),
)
MAX_PREPENDED = 16


def takes_linear_time(core: CoreTokenizer) -> bool:
    """Whether `core` is known to take linear time. False if it is not known."""
    if not isinstance(core.model, (BPE, Unigram)):
        return False
    steps = [*_steps(core.normalizer, "normalizers"), *_steps(core.pre_tokenizer, "pretokenizers")]
    return all(map(_is_linear, steps))


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer, with those of nested Sequences in one flat list."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    steps = []
    while waiting:
        step = waiting.pop()
        if step.get("type") == "Sequence":
            waiting += step[name]
        else:
            steps.append(step)
    return steps


def _is_linear(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Prepend", "prepend": prepended}:
            return len(prepended) <= MAX_PREPENDED
        case {"type": "Replace", "pattern": {"String": replaced}, "content": content}:
            return len(content) <= len(replaced)  # else several of them may double the text again and again
        case {"type": "Split", "pattern": {"String": _}}:
            return True
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return pattern in LINEAR_PATTERNS
    return step.get("type") in (*_NORMALIZERS, *_PRE_TOKENIZERS)
