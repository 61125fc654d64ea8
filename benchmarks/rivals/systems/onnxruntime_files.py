"""The model for onnxruntime-genai, made of a Hugging Face folder by its own builder without a hub.

    python -m benchmarks.rivals.systems.onnxruntime_files MODEL FOLDER KIND

KIND is how weights are stored: int8 or int4.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BUILDER = "onnxruntime_genai.models.builder"


def make(model: str, folder: Path, kind: str) -> None:
    """`folder` appears whole or not at all."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", BUILDER, "-i", model, "-o", unfinished, "-p", kind]
        subprocess.run([*command, "-e", "cpu", "-c", cache], check=True, stdout=sys.stderr)
    unfinished.rename(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
