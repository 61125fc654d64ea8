"""The tokenizer in a model's folder, read from tokenizer.json: all of it is there, and importing transformers
takes longer than loading the weights of a small model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as CoreTokenizer

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is, and have no special tokens of their own."""


@dataclass(frozen=True)
class TokenizerFiles:
    core: CoreTokenizer
    special_tokens: dict[str, str]
    """By role, those that there are: {"eos_token": "</s>"}."""
    chat_template: str | None


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """None where transformers has to be asked: for a folder of other files, or of files that leave something
    to its tokenizer classes. Damaged files are such a case, too: transformers says what is wrong with them.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = _named_tokens(folder, config)
        chat_template = _chat_template(folder, config)
        core = CoreTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # of a missing or damaged file; the tokenizers library raises plain ones
        return None
    special_tokens = {role: token for role, token in named.items() if token is not None}
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    if not added.issuperset([*special_tokens.values(), *_declared_tokens(config)]):
        return None  # transformers would add them
    if config.get("split_special_tokens") or config.get("fix_mistral_regex"):
        return None  # transformers would change how text is cut
    if (
        config.get("tokenizer_class") not in GENERIC_CLASSES
        and not {"bos_token", "eos_token"} <= named.keys()
    ):
        return None  # the class has its own
    return TokenizerFiles(core, special_tokens, chat_template)


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Role to token, None for one that is said not to be there."""
    named = dict(config)
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and legacy.exists():
        named |= json.loads(legacy.read_text(encoding="utf-8"))
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
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template
