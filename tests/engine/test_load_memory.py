"""A process that loads a model takes little more memory than the weights that it keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, NUM_LAYERS, VOCAB_SIZE = 1536, 8960, 4, 32768
EMBEDDING_BYTES = VOCAB_SIZE * HIDDEN * 2
LAYER_BYTES = (2 * HIDDEN + 2 * 256 + 3 * INTERMEDIATE) * HIDDEN * 2
"""Bytes of a layer in bfloat16. glibc keeps matrices of this size for itself after they are freed."""

LOAD = """
import sys, threading, time, torch
from pathlib import Path
from ingine.engine.kernels.select import select_kernels
from ingine.engine.models.loader import load_model

def anonymous():
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * 4096

def watch():
    global peak
    while not is_loaded.wait(0.005):
        peak = max(peak, anonymous())

device = torch.device("cpu")
kernels = select_kernels(device, torch.bfloat16)
before = peak = anonymous()
is_loaded = threading.Event()
watching = threading.Thread(target=watch)
watching.start()
model = load_model(Path(sys.argv[1]), dtype=torch.bfloat16, device=device, kernels=kernels)
is_loaded.set()
watching.join()
print(max(peak, anonymous()) - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("larger")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCAB_SIZE, HIDDEN), "model.norm": (HIDDEN,)}
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        for name, rows in {"q": HIDDEN, "k": 256, "v": 256, "o": HIDDEN}.items():
            shapes[f"{layer}.self_attn.{name}_proj"] = (rows, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}"] = (HIDDEN,)
    weights = {
        f"{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of memory on Linux")
def test_loading_takes_little_more_than_the_weights(folder):
    done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True)
    peak, kept = map(int, done.stdout.split())
    weights = NUM_LAYERS * LAYER_BYTES + EMBEDDING_BYTES
    assert weights <= kept < 1.05 * weights
    # The tied matrix is there as it was read, too, while it is packed.
    assert peak < 1.1 * (weights + EMBEDDING_BYTES)
