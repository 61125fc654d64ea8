"""Measure how long costly jobs hold the worker's event loop: `python benchmarks/admission_cost.py`.

    [--source PATH]... [--rounds 5] [--only KIND]... [--json PATH]

A real worker on a real server gets one job at a time, the worst of its kind that the queue's limits let
in (`worst_jobs.py`), from its entry to its end. Meanwhile a task of the worker's loop records for how long
it was not scheduled. Other work on the machine can only make that longer, so the minimum of the rounds is
reported, with the median beside it. A job that does not end within 20 s is abandoned, and its worker killed;
if the worker does not even answer, 20 s count. "nothing" is a worker without a job.

Sources (folders with the packages ingine and worker) take turns. The model is tiny and random, so
computing costs nothing; its tokenizer is that of SmolLM2, and its longest sequence 131,072 tokens. The
exit status is 1 if the last source's least is over the goal of 50 ms for any kind.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgpack
import typer
from machine import machine
from redis import Redis
from worst_jobs import DUPLICATE, KINDS, JobMaker

from ingine.worker.embedded import EmbeddedServer

sys.path.append(str(Path(__file__).parents[1]))  # the tests' tiny models are in no package
from tests.tiny_models import make_tiny_model, smollm2_path

GOAL_MS = 50.0
PATIENCE_S = 20.0
MAX_MODEL_LEN = 131_072
LOG_TOKENS = 16_384
RESUMED = "a resumption with log probabilities"
"""The name of the job kind that resumes a log of `LOG_TOKENS` tokens."""
NOTHING = "nothing"
STREAM, GROUP = "ingine:{default}:jobs:normal", "workers"
HERE = Path(__file__).parent


class WatchedWorker:
    """A worker of one source, with a server of its own. A worker that a job hangs is killed and replaced."""

    def __init__(self, stack: ExitStack, source: Path, model: Path, folder: Path):
        folder.mkdir()
        server = stack.enter_context(EmbeddedServer(folder / "server"))
        self.redis = Redis.from_url(server.url)
        self._folder, self._log = folder, folder / "worker.log"
        self._env = os.environ | {
            "PYTHONPATH": str(source),
            "INGINE_REDIS_URL": server.url,
            "INGINE_MODEL": str(model),
            "INGINE_HTTP_PORT": "-1",
            "INGINE_KV_CACHE_BYTES": "256MiB",
            "INGINE_RESULT_TTL_S": "5",
            "INGINE_LOG_LEVEL": "warning",
        }
        stack.callback(lambda: self._popen.kill())
        self._maker = JobMaker()
        self._number = 0
        self._start()

    def _start(self) -> None:
        self.redis.flushall()
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(HERE / "watched_worker.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=self._env, cwd=self._folder, text=True,
            )  # fmt: skip
        while not self.redis.exists("ingine:{default}:workers"):
            if self._popen.poll() is not None:
                raise RuntimeError(f"the worker ended by itself:\n{self._log.read_text()}")
            time.sleep(0.05)
        # Warm up: imports, compilation and caches.
        self.measure("a small job")
        self.measure("4,096 messages")

    def measure(self, kind: str) -> dict[str, float]:
        self.look()
        began = time.monotonic()
        if kind == NOTHING:
            time.sleep(0.5)
        else:
            self._submit(kind)
        while self.redis.xlen(STREAM):
            seconds = time.monotonic() - began
            if seconds > PATIENCE_S or self._popen.poll() is not None:
                found = self._look_at_last() or {"longest_ms": seconds * 1000, "cpu_ms": seconds * 1000}
                return found | {"seconds": seconds, "ended": False}
            time.sleep(0.01)
        seconds = time.monotonic() - began
        return self.look() | {"seconds": seconds, "ended": True}

    def _submit(self, kind: str) -> None:
        self._number += 1
        job_id = f"job-{self._number}"
        if kind == DUPLICATE:
            self.redis.xadd(STREAM, self._maker.entry("a small job", job_id))
        if kind == RESUMED:
            self._leave_behind(job_id)
        else:
            self.redis.xadd(STREAM, self._maker.entry(kind, job_id))

    def look(self) -> dict[str, float]:
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        return json.loads(self._popen.stdout.readline())

    def _look_at_last(self) -> dict[str, float] | None:
        """Query a worker that may hang, then kill and replace it. Returns None if it did not answer."""
        killer = threading.Timer(5.0, self._popen.kill)
        killer.start()
        try:
            return self.look()
        except (json.JSONDecodeError, BrokenPipeError):
            return None
        finally:
            killer.cancel()
            self._popen.kill()
            self._popen.wait()
            self._start()

    def _leave_behind(self, job_id: str) -> None:
        """Write the state that a worker leaves when it dies in the middle of a long output."""
        top = [[number, -float(number)] for number in range(20)]
        logprobs = [{"token_id": 7, "logprob": -1.0, "top": top, "bytes": [97], "top_bytes": [[97]] * 20}]
        pipe = self.redis.pipeline(transaction=False)
        for position in range(1, LOG_TOKENS + 1):
            event = {
                "type": "tokens",
                "position": position,
                "token_ids": [7],
                "text": "a",
                "logprobs": logprobs,
            }
            pipe.xadd(
                f"ingine:{{default}}:tokens:{job_id}", {"event": msgpack.packb(event)}, id=f"{position}-0"
            )
            if position % 1000 == 0:
                pipe.execute()
        pipe.execute()
        self.look()
        sampling = {"temperature": 0.0, "logprobs": 20, "max_tokens": LOG_TOKENS + 1, "ignore_eos": True}
        raw = msgpack.packb({"id": job_id, "prompt": "a", "sampling": sampling})
        entry = self.redis.time()[0] * 1000 + 60_000
        record = {
            "status": "queued",
            "attempt": 1,
            "position": LOG_TOKENS,
            "deaths": 0,
            "worker": "",
            "entry": f"{entry}-0",
        }
        self.redis.hset(f"ingine:{{default}}:job:{job_id}", mapping=record)
        self.redis.xadd(STREAM, {"job": raw}, id=f"{entry}-0")


def main(
    source: Annotated[list[str] | None, typer.Option(help="What to measure, as NAME=FOLDER.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each kind is measured.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Measure only kinds whose names begin so.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    sources = dict(each.split("=", 1) for each in source or [f"here={HERE.parent}"])
    kinds = [kind for kind in (NOTHING, *KINDS, RESUMED) if not only or kind.startswith(tuple(only))]
    measured: dict[str, dict[str, list[dict]]] = {kind: {name: [] for name in sources} for kind in kinds}
    with TemporaryDirectory(prefix="ingine-admission-") as folder, ExitStack() as stack:
        model = make_model(Path(folder))
        workers = {
            name: WatchedWorker(stack, Path(path).resolve(), model, Path(folder, name))
            for name, path in sources.items()
        }
        for kind in kinds:
            for number in range(1 if kind == RESUMED else rounds):
                for name in list(workers)[:: -1 if number % 2 else 1]:
                    measured[kind][name].append(workers[name].measure(kind))
            print_row(kind, measured[kind])
    *_, last = sources
    missed = [kind for kind in kinds if least(measured[kind][last]) > GOAL_MS]
    print(f"over {GOAL_MS:.0f} ms: {', '.join(missed) or 'none'}")
    if json_path:
        report = {"machine": machine(), "goal_ms": GOAL_MS, "rounds": rounds, "missed": missed}
        report["longest_ms"] = {
            kind: {
                name: {
                    "least": round(least(each), 1),
                    "median": round(statistics.median(one["longest_ms"] for one in each), 1),
                    "cpu_ms": round(min(one["cpu_ms"] for one in each), 1),
                    "seconds": round(min(one["seconds"] for one in each), 3),
                    "ended": all(one["ended"] for one in each),
                }
                for name, each in by_source.items()
            }
            for kind, by_source in measured.items()
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(missed))


def make_model(folder: Path) -> Path:
    """Make a tiny model with a real tokenizer, and room for long sequences."""
    from tokenizers import Tokenizer

    path, real = folder / "model", smollm2_path()
    vocab_size = Tokenizer.from_file(str(real / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    make_tiny_model(path, vocab_size=vocab_size, num_layers=1, max_position_embeddings=MAX_MODEL_LEN)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
        if (real / name).exists():
            (path / name).write_bytes((real / name).read_bytes())
    return path


def least(measured: list[dict]) -> float:
    return min(each["longest_ms"] for each in measured)


def print_row(kind: str, by_source: dict[str, list[dict]]) -> None:
    cells = [
        f"{name} {least(each):8.1f} ms{'' if all(one['ended'] for one in each) else ', no end'}"
        for name, each in by_source.items()
    ]
    print(f"{kind:36} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
