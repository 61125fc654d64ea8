"""Tiny random models in Hugging Face folders: real files for the real loader, made in a second."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

ARCHITECTURES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
EOS_TOKEN_ID = VOCAB_SIZE - 1
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    path: Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    num_layers: int = 2,
    max_position_embeddings: int = 512,
    sliding_window: int | None = None,
    tie_word_embeddings: bool = False,
    rope_parameters: dict | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a random model and a byte-level tokenizer in `path`; the same arguments give the same bytes.

    Its greedy output wanders through the vocabulary, so that a wrong token anywhere shows.
    """
    config = ARCHITECTURES[arch](
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        **_window(arch, sliding_window),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Transformers starts with matrices of deviation 0.02, norms of 1 and biases of 0: such a
                # model hardly uses its context, and hides a lost bias or norm.
                if "norm" in name:
                    weight.uniform_(0.5, 1.5)
                else:
                    weight.normal_(std=0.15)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(chat_template).save_pretrained(path)
    return path


def add_tokens(path: Path, texts: Sequence[str], special_texts: Sequence[str] = ()) -> None:
    """Give the tokenizer in `path` tokens of these texts, behind its others. The model has to have room."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(texts))
    tokenizer.add_tokens(list(special_texts), special_tokens=True)
    tokenizer.save_pretrained(path)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, then the special tokens.

    It has no merges, so tokens equal bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


def smollm2_path() -> Path:
    """The folder of the real default model, which is downloaded and converted on first use."""
    from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


def _window(arch: str, sliding_window: int | None) -> dict:
    if arch == "mistral":
        return {"sliding_window": sliding_window}
    if sliding_window is not None and arch in ("qwen2", "qwen3"):
        # The second of two layers has a sliding window, the first has none: the mixture is what can go wrong.
        return {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    return {}
