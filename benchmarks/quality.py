"""Measures the loss of quality by int8 and int4: `python benchmarks/quality.py`.

In windows of 1,024 tokens of each text, every variant predicts each next token from the true ones before it:
perplexity, the likeliest token, and the Kullback-Leibler divergence from what float32 predicts. Then 32
prompts cut from the text are continued greedily. Beside int4 there are other ways to four bits, with the bits
that a weight of the layers takes; with `--ggml` llama.cpp's Q4_K is among them. The weights are moved off the
grid that they come on first (`four_bits.py`).

One text is always there: Python's language reference, out of the standard library. Prose in the public
domain can be had from Debian: `apt-get download dict-devil`, `dpkg -x dict-devil*.deb .`, and
`zcat -f < usr/share/dictd/devil.dict.dz > devil.txt`.
"""

import argparse
import hashlib
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from four_bits import METHODS, Rounded, q4_k_of, save_off_grid
from machine import machine
from torch import Tensor

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.attention import AttentionMetadata
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat
from ingine.engine.kernels.select import Kernels, select_kernels
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams

CPU = torch.device("cpu")
WINDOW, BLOCK_SIZE = 1024, 16
NUM_PROMPTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 32, 41, 64
REFERENCE, BASELINE = "float32", "bfloat16"


class ButTheOutputMatrix(WeightFormat):
    """Applies `inner` to all matrices except the output matrix of a tied model."""

    name = "but-the-output-matrix"

    def __init__(self, inner: WeightFormat, output_matrix: WeightFormat):
        self._inner, self._output_matrix = inner, output_matrix

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self._inner.pack(weight, bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        return self._output_matrix.pack_tied(weight)


class Variant(NamedTuple):
    dtype: torch.dtype
    kernels: Kernels
    bits_a_weight: float
    """Bits per weight of the layers, scales and zeros included; with four bits, without the values'
    projection."""


def variants(ggml: Path | None) -> dict[str, Variant]:
    def bfloat16(bits: float = 16, **options: str) -> Variant:
        return Variant(torch.bfloat16, select_kernels(CPU, torch.bfloat16, **options), bits)

    plain, int8 = bfloat16(), bfloat16(8, quantization="int8")
    but_the_output = ButTheOutputMatrix(int8.kernels.weights, plain.kernels.weights)
    found = {
        REFERENCE: Variant(torch.float32, select_kernels(CPU, torch.float32), 32),
        BASELINE: plain,
        "int8 KV": bfloat16(kv_cache_dtype="int8"),
        "int4 KV": bfloat16(kv_cache_dtype="int4"),
        "int8 weights": int8,
        "int8 weights but the output matrix": int8._replace(
            kernels=replace(int8.kernels, weights=but_the_output)
        ),
        "int8 weights and KV": bfloat16(8, quantization="int8", kv_cache_dtype="int8"),
        "int4 weights": bfloat16(5, quantization="int4"),
    }
    methods = METHODS if ggml is None else METHODS | q4_k_of(ggml)
    for name, (rounding, bits) in methods.items():
        weights = Rounded(name, rounding, plain.kernels.weights)
        found[name] = Variant(torch.bfloat16, replace(plain.kernels, weights=weights), bits)
    return found


class Scores:
    """The scores of one variant on one text, with a row for each counted token."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._likeliest: list[Tensor] = []
        self._divergences: list[Tensor] = []

    def add(self, logprobs: Tensor, reference: Tensor, next_ids: Tensor) -> None:
        self._losses.append(-logprobs.gather(1, next_ids[:, None])[:, 0])
        self._likeliest.append(logprobs.argmax(dim=1))
        self._divergences.append((reference.exp() * (reference - logprobs)).sum(dim=1))

    def report(self, reference: "Scores", baseline: "Scores") -> dict[str, float]:
        losses, likeliest = torch.cat(self._losses), torch.cat(self._likeliest)
        excess = torch.stack([(a - b).mean() for a, b in zip(self._losses, baseline._losses, strict=True)])
        return {
            "perplexity": losses.mean().exp().item(),
            "perplexity_over_bfloat16": excess.mean().exp().item(),
            # Windows are assumed to be independent; neighbouring tokens are not.
            "standard_error": (excess.std() / math.sqrt(len(excess))).item(),
            "same_token_as_float32": _share_equal(likeliest, torch.cat(reference._likeliest)),
            "same_token_as_bfloat16": _share_equal(likeliest, torch.cat(baseline._likeliest)),
            "divergence_from_float32": torch.cat(self._divergences).mean().item(),
        }


def _share_equal(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def logprobs_of(model: Decoder, token_ids: list[int]) -> Tensor:
    """float32 [T - 1, vocab_size]: log probabilities at all tokens but the first, from the tokens before."""
    length = len(token_ids) - 1
    metadata = AttentionMetadata(
        slot_mapping=torch.arange(length),
        block_tables=torch.arange(-(-length // BLOCK_SIZE), dtype=torch.int32)[None],
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        num_decodes=0,
        query_lens=[length],
        kv_lens=[length],
    )
    kv_caches = model.allocate_kv_caches(WINDOW // BLOCK_SIZE, BLOCK_SIZE)
    hidden = model(torch.tensor(token_ids[:-1]), torch.arange(length), kv_caches, metadata)
    return model.compute_logits(hidden).float().log_softmax(dim=1)


def predict(models: dict[str, Decoder], token_ids: list[int]) -> dict[str, Scores]:
    scores = {name: Scores() for name in models}
    for last in range(WINDOW, len(token_ids) + 1, WINDOW):
        window = token_ids[last - WINDOW : last]
        reference = logprobs_of(models[REFERENCE], window)
        for name, model in models.items():
            logprobs = reference if name == REFERENCE else logprobs_of(model, window)
            scores[name].add(logprobs, reference, torch.tensor(window[1:]))
        print(f"\r{last} of {len(token_ids)} tokens", end="", flush=True)
    print()
    return scores


def continue_greedily(models: dict[str, Decoder], token_ids: list[int]) -> dict[str, list[list[int]]]:
    starts = range(0, len(token_ids) - NUM_PROMPT_TOKENS, len(token_ids) // NUM_PROMPTS)[:NUM_PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    outputs = {}
    for name, model in models.items():
        engine = Engine(EngineConfig(DEFAULT_MODEL, kv_cache_bytes=2**29), model=model)
        for index, start in enumerate(starts):
            engine.add(EngineRequest(str(index), token_ids[start : start + NUM_PROMPT_TOKENS], params))
        outputs[name] = [[] for _ in starts]
        while engine.has_unfinished:
            for output in engine.step():
                outputs[name][int(output.seq_id)] += output.token_ids
    return outputs


def agreement(outputs: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    """The number of identical continuations, and the mean number of tokens before they diverge."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(outputs, others, strict=True)
    ]
    return {
        "same": sum(count == NUM_OUTPUT_TOKENS for count in equal),
        "of": len(equal),
        "mean_equal_tokens": sum(equal) / len(equal),
    }


def measure(models: dict[str, Decoder], token_ids: list[int]) -> dict[str, dict]:
    scores = predict(models, token_ids)
    outputs = continue_greedily(models, token_ids)
    return {
        name: scores[name].report(scores[REFERENCE], scores[BASELINE])
        | {f"greedy_{other}": agreement(outputs[name], outputs[other]) for other in (REFERENCE, BASELINE)}
        for name in models
    }


def print_table(figures: dict[str, dict]) -> None:
    print(f"{'':36}bits  perplexity   over bf16        same as f32  bf16   divergence  greedy as f32, bf16")
    for name, row in figures.items():
        greedy = [f"{row[key]['same']:2}/{row[key]['of']}" for key in ("greedy_float32", "greedy_bfloat16")]
        print(
            f"{name:36}{row['bits_a_weight']:4}"
            f"  {row['perplexity']:8.3f}  {row['perplexity_over_bfloat16']:8.4f} "
            f"+- {row['standard_error']:.4f}  {row['same_token_as_float32']:10.2%}"
            f"{row['same_token_as_bfloat16']:8.2%}{row['divergence_from_float32']:11.5f}"
            f"     {', '.join(greedy)}"
        )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, action="append", default=[], help="Measure on this file too.")
    parser.add_argument("--tokens", type=int, default=32_768, help="Most tokens of each text.")
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base.so, for its Q4_K.")
    parser.add_argument("--json", type=Path, help="Write the figures here too.")
    options = parser.parse_args()

    texts = {"Python's language reference (pydoc_data.topics)": "\n\n".join(map(topics.get, sorted(topics)))}
    texts |= {path.name: path.read_text(errors="replace") for path in options.text}
    path = resolve_model(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_folder(path)
    token_ids_of = {name: tokenizer.encode(text)[: options.tokens] for name, text in texts.items()}
    if short := [name for name, token_ids in token_ids_of.items() if len(token_ids) < 2 * WINDOW]:
        parser.error(f"{', '.join(short)}: fewer than two windows of {WINDOW} tokens")
    chosen = variants(options.ggml)
    with tempfile.TemporaryDirectory() as folder:
        off_grid = Path(folder, "model")
        save_off_grid(path, off_grid)
        models = {
            name: load_model(off_grid, dtype=variant.dtype, device=CPU, kernels=variant.kernels)
            for name, variant in chosen.items()
        }
    report = {
        "model": f"{path.name}, weights out of a Q4_1 GGUF file, moved off its grid, brought to bfloat16",
        "kernels": {
            name: f"attention {model.kernels.attention.name}, weights {model.kernels.weights.name}"
            for name, model in models.items()
        },
        "window": WINDOW,
        "texts": {},
    }
    for name, text in texts.items():
        token_ids = token_ids_of[name]
        figures = {
            variant: {"bits_a_weight": chosen[variant].bits_a_weight} | row
            for variant, row in measure(models, token_ids).items()
        }
        print(f"\n{name}: {len(token_ids)} tokens")
        print_table(figures)
        report["texts"][name] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": len(token_ids),
            "variants": figures,
        }
    report["machine"] = machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
