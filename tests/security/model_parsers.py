"""The property for any bytes in a model's files: parsing gives a model, or one of our errors that names a
file.

`python -m tests.security.model_parsers` answers each line of JSON on its standard input with one, with limits
of memory and of writes. The suite and `fuzz_model_files` use it.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 768 << 20
"""Memory that one file may take in addition to the libraries. The largest that are read whole have 64 MiB."""
FILE_BYTES = 64 << 20
"""The longest file that a child may write."""
CPU_S = 30
"""Processor time for one model. A hang without any ends at the caller's time limit."""
VALID = "valid"


def parse_gguf(folder: Path) -> None:
    from ingine.engine.models.gguf import convert_gguf

    out = folder / "converted"
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert_gguf(folder / "model.gguf", out)
    finally:
        assert not (folder / "converted.partial").exists(), "half a conversion is left"
    parse_weights(out)


def parse_config(folder: Path) -> None:
    from ingine.engine.models.config import ModelConfig

    ModelConfig.from_folder(folder)
    parse_weights(folder)


def parse_weights(folder: Path) -> None:
    import torch

    from ingine.engine.kernels.select import REFERENCE
    from ingine.engine.models.loader import load_weights
    from ingine.engine.store.fingerprint import model_fingerprint

    load_weights(folder, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)
    model_fingerprint(folder)


def parse_quantized(folder: Path) -> None:
    """Parse, and pack the weights too: only weights that were quantised before are packed without being made
    dense."""
    import torch

    from ingine.engine.kernels.select import REFERENCE
    from ingine.engine.models.loader import load_model

    load_model(folder, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)
    parse_weights(folder)


def parse_tokenizer(folder: Path) -> None:
    from ingine.engine.text.tokenizer import load_tokenizer

    load_tokenizer(folder)


def parse_generation_config(folder: Path) -> None:
    from ingine.engine.store.generation_config import read_sampling_defaults
    from ingine.sampling_params import SamplingParams

    SamplingParams(**read_sampling_defaults(folder))


def parse_template(folder: Path) -> None:
    from ingine.engine.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and tokenizer.has_chat_template:
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])


PARSERS: dict[str, Callable[[Path], None]] = {
    "gguf": parse_gguf,
    "safetensors": parse_weights,
    "config": parse_config,
    "quantized": parse_quantized,
    "tokenizer": parse_tokenizer,
    "template": parse_template,
    "generation_config": parse_generation_config,
}


@dataclass(frozen=True)
class Outcome:
    kind: str
    """`valid`, the name of one of our errors, or a description of the fault."""
    message: str
    is_finding: bool
    cpu_s: float = 0.0


def attempt(parser: str, folder: Path) -> Outcome:
    """Parse the files in `folder`. Anything but a model or one of our errors is a finding, and so is running
    out of memory."""
    from ingine.errors import IngineError

    try:
        PARSERS[parser](folder)
    except IngineError as error:
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        out_of_memory = any(isinstance(each, MemoryError) or "allocate" in str(each) for each in causes)
        return Outcome(type(error).__name__, str(error), out_of_memory)
    except BaseException as error:
        return Outcome(type(error).__name__, traceback.format_exc(), True)
    return Outcome(VALID, "", False)


class Child:
    """A process that parses, with limits. It is replaced if it dies or hangs."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._process: subprocess.Popen | None = None

    def attempt(self, parser: str, folder: Path, *, file_bytes: int = FILE_BYTES) -> Outcome:
        process = self._process or self._start()
        timer = threading.Timer(self._timeout_s, process.kill)
        timer.start()
        process.stdin.write(json.dumps([parser, str(folder), file_bytes]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        hung = not timer.is_alive()
        timer.cancel()
        if answer:
            outcome = Outcome(*json.loads(answer))
            if outcome.is_finding:
                self.close()  # its memory may not have been released
            return outcome
        status = process.wait()
        self._process = None
        reason = f"it took over {self._timeout_s} s" if hung else f"the process ended with {status}"
        return Outcome("dead", reason, True)

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"  # the time for imports does not count
        return self._process


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print, which is no answer
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    import ingine.engine.models.gguf  # noqa: F401

    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        parser, folder, file_bytes = json.loads(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, FILE_BYTES))
        began = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(began) + CPU_S, resource.RLIM_INFINITY))
        outcome = attempt(parser, Path(folder))
        answer = [outcome.kind, outcome.message[-4000:], outcome.is_finding, time.process_time() - began]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
