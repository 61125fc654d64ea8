"""The tokenizer in a GGUF file, written as Hugging Face's tokenizer files.

Byte-level BPE is built here: how a text is cut before its pieces are merged is only named in the file
(`tokenizer.ggml.pre`), and a wrong guess gives subtly different tokens. SentencePiece has no such choice, so
transformers' own conversion does for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ingine.errors import ConfigError, UnsupportedModel

CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF: never part of a text, and part of it but never cut."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
)


@dataclass(frozen=True)
class _Pretokenizer:
    regex: str | None = None
    """Cuts the text; None for GPT-2's, which the byte-level step has in it."""
    single_digits: bool = False
    """Cuts out every digit first."""
    nfc: bool = False
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken as it is."""
    add_bos: bool = False
    """What llama.cpp assumes where the file does not say."""


_PRETOKENIZERS = {
    "default": _Pretokenizer(),
    "gpt-2": _Pretokenizer(),
    "smollm": _Pretokenizer(single_digits=True),
    "llama3": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-bpe": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "tekken": _Pretokenizer(_TEKKEN, ignore_merges=True, add_bos=True),
    "qwen2": _Pretokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Pretokenizer(_QWEN2, nfc=True),
}


def save_tokenizer(metadata: dict[str, Any], gguf_path: Path, folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template, if the file has one, to `folder`."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_tokenizer(metadata)
    elif kind == "llama":
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    else:
        raise UnsupportedModel(f"unsupported GGUF tokenizer: {kind}. Those that work: gpt2, llama")
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _byte_level_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    # Files from before llama.cpp wrote this name were made with GPT-2's rule.
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRETOKENIZERS:
        raise UnsupportedModel(
            f"unsupported GGUF pre-tokenizer: {name}. Those that work: {', '.join(_PRETOKENIZERS)}"
        )
    pre = _PRETOKENIZERS[name]
    try:
        tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    except KeyError as error:
        raise ConfigError(f"the GGUF file lacks the metadata {error}") from None

    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre.ignore_merges,
        )
    )
    tokenizer.normalizer = normalizers.NFC() if pre.nfc else None
    tokenizer.pre_tokenizer = _split(pre)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    tokenizer.add_special_tokens(_added(tokens, types, CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, USER_DEFINED, special=False))

    ids = {
        role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "unknown", "padding")
    }
    bos, eos, unk, pad = (None if token_id is None else tokens[token_id] for token_id in ids.values())
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad
    )


def _split(pre: _Pretokenizer) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.regex is None))
    return pre_tokenizers.Sequence(steps)


def _added(tokens: list[str], types: list[int], wanted: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ == wanted
    ]
