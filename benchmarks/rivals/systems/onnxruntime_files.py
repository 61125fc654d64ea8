"""Makes the model for onnxruntime-genai from a Hugging Face folder, with its own builder and without a hub.

    python -m benchmarks.rivals.systems.onnxruntime_files MODEL FOLDER KIND

KIND is the format of the weights: int8 or int4.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BUILDER = "onnxruntime_genai.models.builder"


def make(model: str, folder: Path, kind: str) -> None:
    """Make `folder`, atomically."""
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
