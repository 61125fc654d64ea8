"""Makes the model's graph for OpenVINO from a Hugging Face folder, without a hub.

    python -m benchmarks.rivals.systems.openvino_files MODEL FOLDER KIND

KIND is the format of the weights: f32 (also for a pipeline in bfloat16), int8 or int4. Compressed graphs are
made from the folder in f32, which is made first, in the same place.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import nncf
import openvino
from optimum.intel import OVModelForCausalLM

COMPRESSION = {
    "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
    "int4": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 64, "ratio": 1.0},
}
"""Arguments of `nncf.compress_weights`, without data. Groups have 64 weights, since 128 does not divide
SmolLM2's rows. In int4 NNCF leaves the embedding and the output matrix in int8."""
GRAPH = "openvino_model.xml"


def make(model: str, folder: Path, kind: str) -> None:
    """Make `folder`, atomically."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if kind == "f32":
        _export(model, unfinished)
    else:
        exported = folder.with_name("openvino-f32")
        make(model, exported, "f32")
        _compress(exported, unfinished, kind)
    unfinished.rename(folder)


def _export(model: str, folder: Path) -> None:
    graph = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False, trust_remote_code=False
    )
    graph.save_pretrained(folder)
    convert = Path(sys.executable).with_name("convert_tokenizer")
    subprocess.run([convert, model, "--with-detokenizer", "-o", folder], check=True, stdout=sys.stderr)


def _compress(exported: Path, folder: Path, kind: str) -> None:
    graph = openvino.Core().read_model(exported / GRAPH)
    compressed = nncf.compress_weights(graph, **COMPRESSION[kind])
    openvino.save_model(compressed, folder / GRAPH, compress_to_fp16=False)
    for file in exported.iterdir():
        if not file.name.startswith("openvino_model."):
            shutil.copy(file, folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
