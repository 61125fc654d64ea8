"""The tokenizer in a model's folder, read from tokenizer.json: all of it is there, and importing transformers
takes longer than loading the weights of a small model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as CoreTokenizer

from ingine.engine.files.bounded_files import read_bytes, read_text
from ingine.engine.files.model_files import MAX_TEMPLATE_BYTES, read_json, read_tokenizer_bytes
from ingine.engine.text.panics import panics_as_errors
from ingine.errors import UnsupportedModel

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
VOCABULARIES = (
    *(TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece*.model"),
    *("tekken.json", "*.tiktoken", "tiktoken.model"),
)
"""Files of which transformers needs one for a tokenizer."""
_COPIED = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is, and have no special tokens of their own."""
ADD_PREFIX_SPACE = {"GPT2Tokenizer": False, "LlamaTokenizer": True, "Qwen2Tokenizer": False}
"""Classes that take vocabulary, merges and post-processor from tokenizer.json and make the rest themselves,
as in the file if `add_prefix_space` is what it is here."""


@dataclass(frozen=True)
class TokenizerFiles:
    core: CoreTokenizer
    special_tokens: dict[str, str]
    """By role, those that there are: {"eos_token": "</s>"}."""
    chat_template: str | None


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """None where transformers has to be asked: for a folder of other files, or of files that leave something
    to its tokenizer classes. So it is for values of other types: transformers says what is wrong with them.

    Raises ConfigError for a file that cannot be read.
    """
    config_file, core_file = folder / CONFIG, folder / TOKENIZER
    if not config_file.exists() or not core_file.exists():
        return None
    config = read_json(config_file)
    try:
        named = _named_tokens(folder, config)
        special_tokens = {role: token for role, token in named.items() if token is not None}
        expected = {*special_tokens.values(), *_declared_tokens(config)}
        chat_template = _chat_template(folder, config)
    except (TypeError, KeyError, AttributeError):  # of other types
        return None
    content = read_tokenizer_bytes(core_file)
    try:
        with panics_as_errors():
            core = CoreTokenizer.from_buffer(content)
    except Exception:  # the tokenizers library raises plain ones
        return None
    if not expected <= {token.content for token in core.get_added_tokens_decoder().values()}:
        return None  # transformers would add them
    if config.get("split_special_tokens") or config.get("fix_mistral_regex"):
        return None  # transformers would change how text is cut
    if _leaves_more_to_its_class(config, named, core):
        return None
    return TokenizerFiles(core, special_tokens, chat_template)


def _leaves_more_to_its_class(
    config: dict[str, Any], named: dict[str, str | None], core: CoreTokenizer
) -> bool:
    """Whether the class that the config names may have other special tokens, or cut text in another way."""
    if config.get("tokenizer_class") in GENERIC_CLASSES:
        return False
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in ADD_PREFIX_SPACE or not {"bos_token", "eos_token"} <= named.keys():
        return True
    if name == "LlamaTokenizer" and (core.normalizer is not None or config.get("legacy")):
        return True  # files of Llama 2 have the space before a text in a normalizer, the class has none
    return config.get("add_prefix_space") not in (None, ADD_PREFIX_SPACE[name])


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Role to token, None for one that is said not to be there."""
    named = dict(config)
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and legacy.exists():
        named |= read_json(legacy)
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    own = [role for role, token in named.items() if role.endswith("_token") and isinstance(token, str | dict)]
    return {role: _content(named[role]) for role in dict.fromkeys((*ROLES, *own)) if role in named}


def _declared_tokens(config: dict[str, Any]) -> list[str]:
    """Tokens that tokenizer_config.json wants to be there besides those that have a role."""
    declared = list(config.get("added_tokens_decoder", {}).values())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(tokens := config.get(key), list):
            declared += tokens
    return [_content(token) for token in declared]


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The only one, or the one named `default`. A file of its own goes before what the config says."""
    file = folder / TEMPLATE
    if file.exists():
        return read_text(file, MAX_TEMPLATE_BYTES)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


@contextmanager
def checked_copies(folder: Path) -> Iterator[Path]:
    """A folder with copies of what transformers makes a tokenizer from, for as long as the block.

    transformers opens what a folder, or a path in a file, leads it to. Here that is only what has been read
    within its bounds. Raises ConfigError; UnsupportedModel for a tokenizer that is code.
    """
    with tempfile.TemporaryDirectory(prefix="ingine-tokenizer-") as copies:
        for path in sorted({path for pattern in _COPIED for path in folder.glob(pattern)}):
            Path(copies, path.name).write_bytes(read_tokenizer_bytes(path))
        if (template := folder / TEMPLATE).exists():
            Path(copies, TEMPLATE).write_bytes(read_bytes(template, MAX_TEMPLATE_BYTES))
        for name, choose in ((CONFIG, _without_code_and_paths), ("config.json", _only_the_kind)):
            if (path := folder / name).exists():
                Path(copies, name).write_text(json.dumps(choose(read_json(path), path)), encoding="utf-8")
        yield Path(copies)


def _without_code_and_paths(config: dict[str, Any], path: Path) -> dict[str, Any]:
    own = config.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    if own:
        raise UnsupportedModel(
            f"unsupported: {path} wants a tokenizer that is its own code (auto_map: {own!r:.100}). "
            "Such code is never run here"
        )
    return {key: value for key, value in config.items() if not key.endswith(("_file", "_files"))}


def _only_the_kind(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What transformers chooses a tokenizer's class by. Of the layers it would make a list."""
    chosen_by = ("model_type", "tokenizer_class", "transformers_version")
    return {key: value for key, value in config.items() if key in chosen_by}
