"""Writes the tokenizer of a GGUF file as Hugging Face's tokenizer files.

Byte-level BPE is built here: the file only names the rule that splits a text before its pieces are merged
(`tokenizer.ggml.pre`), and a wrong rule gives subtly different tokens. SentencePiece has no such rule, so
transformers' own conversion is used for it.
"""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ingine.engine.files.model_files import MAX_TEMPLATE_BYTES
from ingine.engine.models.gguf_file import GGUFFile
from ingine.engine.text.panics import panics_as_errors
from ingine.errors import ConfigError, IngineError, UnsupportedModel

logger = logging.getLogger(__name__)

SAVED_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_TOKEN_CHARS = 1024
"""Limit for a token, which is split at each position to find the merges that it comes from."""
CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF: tokens that are never part of a text, and tokens of a text that are never split."""

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
    """Splits the text; None: GPT-2's rule, which the byte-level step includes."""
    single_digits: bool = False
    """Whether every digit is split off first."""
    nfc: bool = False
    ignore_merges: bool = False
    """Whether a piece that is a token is taken without merges."""
    add_bos: bool = False
    """llama.cpp's default if the file does not say."""


_PRETOKENIZERS = {
    "gpt-2": _Pretokenizer(),
    "smollm": _Pretokenizer(single_digits=True),
    "llama3": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-bpe": _Pretokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    "tekken": _Pretokenizer(_TEKKEN, ignore_merges=True, add_bos=True),
    "qwen2": _Pretokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Pretokenizer(_QWEN2, nfc=True),
}


_END_OF_TURN = {
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<|eot|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>", "</s>"),
}
"""Texts of the tokens that end a turn in known families, as in llama.cpp."""

_NOT_IMPLEMENTED = (
    *("add_sep_token", "precompiled_charsmap", "remove_extra_whitespaces", "suppress_tokens"),
    *("normalizer.lowercase", "normalizer.strip_accents"),
)
"""Metadata under `tokenizer.ggml` that changes the tokens of a text if it is set."""


def end_token_ids(file: GGUFFile) -> list[int]:
    """Return the ids that end an output: those that the file names, and end-of-turn tokens of known families.

    Files of chat models often name only the end token of the base model, with which they would never stop.
    """
    named = [file.token_id(role) for role in ("eos", "eot", "eom")]
    known = [
        token_id
        for token_id, (token, kind) in enumerate(zip(file.tokens, file.token_types, strict=False))
        if kind == CONTROL and token in _END_OF_TURN
    ]
    return list(dict.fromkeys(token_id for token_id in (*named, *known) if token_id is not None))


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template, if the file has one, to `folder`.

    If the file has no tokenizer, nothing is written. Raises ConfigError, UnsupportedModel.
    """
    for key in _NOT_IMPLEMENTED:
        if file.metadata.get(f"tokenizer.ggml.{key}"):
            raise UnsupportedModel(f"unsupported GGUF metadata: tokenizer.ggml.{key}")
    kind = file.value("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return
    if kind not in _MAKERS:
        raise UnsupportedModel(
            f"unsupported GGUF tokenizer: {kind!r:.100}. Those that work: {', '.join(_MAKERS)}"
        )
    if not file.tokens:
        raise ConfigError(f"{file.path} lacks the metadata tokenizer.ggml.tokens")
    chat_template = file.value("tokenizer.chat_template", str)
    if chat_template is not None and len(chat_template.encode()) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{file.path}: tokenizer.chat_template has more than {MAX_TEMPLATE_BYTES} bytes")
    if (longest := max(map(len, file.tokens))) > MAX_TOKEN_CHARS:
        raise ConfigError(f"{file.path}: a token of {longest} characters; {MAX_TOKEN_CHARS} are the limit")
    try:
        with panics_as_errors():
            tokenizer = _MAKERS[kind](file)
            core = tokenizer.backend_tokenizer.to_str(pretty=True)
    except IngineError:
        raise
    except Exception as error:  # the libraries check little, so damage causes errors of any type
        raise ConfigError(f"{file.path}: its tokenizer cannot be built: {error}") from error
    # `save_pretrained` is not used: versions of transformers write different keys, and each key affects the
    # model's fingerprint.
    _write_text(folder / "tokenizer.json", core)
    special_tokens = {role: tokenizer.special_tokens_map.get(role) for role in SAVED_ROLES}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_text(folder / "tokenizer_config.json", json.dumps(config | special_tokens, indent=2) + "\n")
    if chat_template is not None:
        _write_text(folder / "chat_template.jinja", chat_template)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _byte_level_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    pre = _pretokenizer(file)
    tokens, types = file.tokens, file.token_types
    if not (merges := file.values("tokenizer.ggml.merges", str)):
        raise ConfigError(f"{file.path} lacks the metadata tokenizer.ggml.merges")
    if wrong := [merge for merge in merges if merge.count(" ") != 1]:
        raise ConfigError(f"{file.path}: {wrong[0]!r:.100} in tokenizer.ggml.merges is no pair of tokens")
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
    tokenizer.add_special_tokens(_added(tokens, types, CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, USER_DEFINED, special=False))

    ids = {role: file.token_id(role) for role in ("bos", "eos", "unknown", "padding")}
    bos, eos, unk, pad = (None if token_id is None else tokens[token_id] for token_id in ids.values())
    add_bos = bos is not None and file.value("tokenizer.ggml.add_bos_token", bool, pre.add_bos)
    add_eos = eos is not None and file.value("tokenizer.ggml.add_eos_token", bool, False)
    if add_bos or add_eos:
        before, after = ([bos] if add_bos else []), ([eos] if add_eos else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad
    )


def _pretokenizer(file: GGUFFile) -> _Pretokenizer:
    name = file.value("tokenizer.ggml.pre", str)
    if name in (None, "default"):  # written before llama.cpp had this key
        logger.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre): GPT-2's rule is taken. If it "
            "is another, answers are worse; a newer conversion of the model says it",
            file.path,
        )
        return _Pretokenizer()
    if name not in _PRETOKENIZERS:
        raise UnsupportedModel(
            f"unsupported GGUF pre-tokenizer: {name!r:.100}. Those that work: {', '.join(_PRETOKENIZERS)}"
        )
    return _PRETOKENIZERS[name]


def _sentencepiece_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory(prefix="ingine-tokenizer-") as folder:
        # In a folder of its own: transformers would also read other files beside the GGUF file.
        Path(folder, "model.gguf").symlink_to(file.path.absolute())
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file="model.gguf", trust_remote_code=False, local_files_only=True
        )
    if not file.value("tokenizer.ggml.add_space_prefix", bool, True):  # transformers ignores it
        core = tokenizer.backend_tokenizer
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    return tokenizer


_MAKERS = {"gpt2": _byte_level_tokenizer, "llama": _sentencepiece_tokenizer}
"""Builds a tokenizer, by `tokenizer.ggml.model`."""


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
