"""Chat templates with the features of the families that they are named for, and tokenizers for them."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "chat_templates"
FAMILIES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
WRITE_ARGUMENTS_AS_TEXT = {"deepseek-r1"}
READ_PARTS = {"mistral", "glm4.5", "gemma3"}

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜end▁of▁sentence｜>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|observation|>"),
    *("<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>"),
]
ORDINARY = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "\n\n",
]
"""Added tokens that are not special."""


@cache
def byte_level(template: str) -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's: bytes, and merges of some of them."""
    merges = [("<", "|"), ("|", ">"), ("e", "n"), ("en", "d"), ("Ġ", "a"), ("<|", "im"), ("i", "m")]
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab += ["<|", "|>", "en", "end", "Ġa", "im", "<|im"]
    core = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocab)}, [*merges[:5], merges[6], merges[5]])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _finished(core, template)


@cache
def legacy_sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the text and behind each special token."""
    return sentencepiece(template, is_legacy=True)


@cache
def sentencepiece(template: str, *, is_legacy: bool = False) -> PreTrainedTokenizerFast:
    """As Mistral's first ones: a space before the text, and bytes for characters without a token."""
    vocab = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab += ["▁", *map(chr, range(33, 127)), "▁a", "<|"]
    core = Tokenizer(
        models.BPE(
            {token: n for n, token in enumerate(["<unk>", *vocab])},
            [("▁", "a"), ("<", "|")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if is_legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(core, template)


def _finished(core: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
    )
