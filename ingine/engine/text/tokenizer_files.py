"""Reads the tokenizer in a model's folder from tokenizer.json, which contains all of it. So transformers is
not imported, which takes longer than loading the weights of a small model."""

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
"""Files of which transformers needs at least one to build a tokenizer."""
_COPIED = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that use tokenizer.json as it is, and have no special tokens of their own."""
ADD_PREFIX_SPACE = {"GPT2Tokenizer": False, "LlamaTokenizer": True, "Qwen2Tokenizer": False}
"""Classes of transformers that take vocabulary, merges and post-processor from tokenizer.json, and build the
rest themselves. If `add_prefix_space` has the value given here, the result equals the file."""


ChatTemplates = str | dict[str, str] | None
"""The chat template, or several by name: `default`, and `tool_use` for conversations with tools."""


@dataclass(frozen=True)
class TokenizerFiles:
    core: CoreTokenizer
    special_tokens: dict[str, str]
    """By role, such as {"eos_token": "</s>"}. Roles without a token are left out."""
    chat_template: ChatTemplates


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """Read the tokenizer in a folder. Returns None if transformers has to load it, because the folder has
    other files, or files that leave something to the tokenizer classes of transformers. Values of wrong types
    are left to transformers too, which reports what is wrong with them.

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
    except (TypeError, KeyError, AttributeError):  # values of wrong types
        return None
    content = read_tokenizer_bytes(core_file)
    try:
        with panics_as_errors():
            core = CoreTokenizer.from_buffer(content)
    except Exception:  # the tokenizers library raises plain Exceptions
        return None
    if not expected <= {token.content for token in core.get_added_tokens_decoder().values()}:
        return None  # transformers would add them
    if config.get("split_special_tokens") or config.get("fix_mistral_regex"):
        return None  # transformers would change how text is split
    if _depends_on_its_class(config, named, core):
        return None
    return TokenizerFiles(core, special_tokens, chat_template)


def _depends_on_its_class(config: dict[str, Any], named: dict[str, str | None], core: CoreTokenizer) -> bool:
    """Whether the class that the config names may have other special tokens, or split text differently."""
    if config.get("tokenizer_class") in GENERIC_CLASSES:
        return False
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in ADD_PREFIX_SPACE or not {"bos_token", "eos_token"} <= named.keys():
        return True
    if name == "LlamaTokenizer" and (core.normalizer is not None or config.get("legacy")):
        return True  # Llama 2's files add the space before a text in a normalizer; the class has none
    return config.get("add_prefix_space") not in (None, ADD_PREFIX_SPACE[name])


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Map each role to its token, or to None if the config says that there is no such token."""
    named = dict(config)
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and legacy.exists():
        named |= read_json(legacy)
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    own = [role for role, token in named.items() if role.endswith("_token") and isinstance(token, str | dict)]
    return {role: _content(named[role]) for role in dict.fromkeys((*ROLES, *own)) if role in named}


def _declared_tokens(config: dict[str, Any]) -> list[str]:
    """List the tokens that tokenizer_config.json requires besides those with a role."""
    declared = list(config.get("added_tokens_decoder", {}).values())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(tokens := config.get(key), list):
            declared += tokens
    return [_content(token) for token in declared]


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplates:
    """Return the only chat template, or all by name. A separate file takes precedence over the config."""
    file = folder / TEMPLATE
    if file.exists():
        return read_text(file, MAX_TEMPLATE_BYTES)
    template = config.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return template


@contextmanager
def checked_copies(folder: Path) -> Iterator[Path]:
    """Copy the files from which transformers builds a tokenizer into a folder that exists during the block.

    transformers opens any file that a folder, or a path in a file, refers to. The copies have been read
    within size limits and contain no such paths.

    Raises ConfigError; UnsupportedModel for a tokenizer that is code.
    """
    with tempfile.TemporaryDirectory(prefix="ingine-tokenizer-") as copies:
        for path in sorted({path for pattern in _COPIED for path in folder.glob(pattern)}):
            Path(copies, path.name).write_bytes(read_tokenizer_bytes(path))
        if (template := folder / TEMPLATE).exists():
            Path(copies, TEMPLATE).write_bytes(read_bytes(template, MAX_TEMPLATE_BYTES))
        for name, choose in ((CONFIG, _without_code_and_paths), ("config.json", _only_class_keys)):
            if (path := folder / name).exists():
                Path(copies, name).write_text(json.dumps(choose(read_json(path), path)), encoding="utf-8")
        yield Path(copies)


def _without_code_and_paths(config: dict[str, Any], path: Path) -> dict[str, Any]:
    own = config.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    if own:
        raise UnsupportedModel(
            f"unsupported: {path} needs a tokenizer with its own code (auto_map: {own!r:.100}). "
            "Such code is never run here"
        )
    return {key: value for key, value in config.items() if not key.endswith(("_file", "_files"))}


def _only_class_keys(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Keep the keys by which transformers chooses a tokenizer's class. From others, such as the number of
    layers, it would build lists of any length.
    """
    chosen_by = ("model_type", "tokenizer_class", "transformers_version")
    return {key: value for key, value in config.items() if key in chosen_by}
