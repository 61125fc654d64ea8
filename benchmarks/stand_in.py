"""A worker whose engine costs nothing, for measurements of all other parts.

Everything else is the `ingine worker` program, with its settings. Benchmarks start it through
`StandInWorker`, as a process of its own. With STAND_IN_PROFILE set to a path, cProfile's figures of its
event loop's thread are written there at the end.
"""

import cProfile
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Self

from redis import Redis

from ingine.contract.keys import Keys
from ingine.engine.limits import RequestLimits
from ingine.engine.outputs import EngineStats, FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.worker.child import Child

PROFILE_VARIABLE = "STAND_IN_PROFILE"
WORDS = tuple(f" w{number:03d}" for number in range(500))
"""The texts of token ids 0 to 499; the token at position p has the id p modulo 500."""


class _Sequence:
    __slots__ = ("max_tokens", "num_prompt_tokens", "position", "seq_id")

    def __init__(self, seq_id: str, num_prompt_tokens: int, position: int, max_tokens: int):
        self.seq_id = seq_id
        self.num_prompt_tokens = num_prompt_tokens
        self.position = position
        self.max_tokens = max_tokens

    def next_output(self) -> SeqOutput:
        token_ids, text = [], ""
        if self.position < self.max_tokens:
            token_id = self.position % len(WORDS)
            token_ids, text = [token_id], WORDS[token_id]
            self.position += 1
        ended = FinishReason.LENGTH if self.position >= self.max_tokens else None
        return self.output(token_ids, text, ended)

    def output(self, token_ids: list[int], text: str, finish_reason: FinishReason | None) -> SeqOutput:
        return SeqOutput(
            self.seq_id,
            self.position,
            token_ids,
            text,
            self.num_prompt_tokens,
            num_cached_tokens=0,
            finish_reason=finish_reason,
        )


class StandInEngine:
    """The part of an `Engine` that a worker uses. A step returns a prepared token for each running sequence.

    The token at a position depends on the position alone, so a resumed sequence goes on as it would have.
    """

    tokenizer = None
    max_model_len = 1 << 30
    numerics = "none"
    limits = RequestLimits(max_model_len, num_kv_tokens=max_model_len, vocab_size=1 << 31)

    def __init__(self, max_num_seqs: int, step_s: float = 0.0):
        """step_s: minimum duration of a step. 0 means as fast as its outputs are read."""
        self.config = SimpleNamespace(max_num_seqs=max_num_seqs)
        self._step_s = step_s
        self._running: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def add(self, request: EngineRequest) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        self._num_prompt_tokens += num_prompt_tokens
        seq = _Sequence(
            request.seq_id,
            num_prompt_tokens,
            len(request.output_token_ids),
            request.params.max_tokens or self.max_model_len,
        )
        self._waiting.append(seq)
        self._admit()

    def abort(self, seq_id: str) -> SeqOutput | None:
        seq = self._running.pop(seq_id, None)
        if seq is None:
            seq = next((waiting for waiting in self._waiting if waiting.seq_id == seq_id), None)
            if seq is None:
                return None
            self._waiting.remove(seq)
        self._admit()
        return seq.output([], "", FinishReason.ABORT)

    def step(self, *, alone: str | None = None) -> list[SeqOutput]:
        if self._step_s:
            time.sleep(self._step_s)
        seqs = list(self._running.values()) if alone is None else [self._running[alone]]
        outputs = [seq.next_output() for seq in seqs]
        for output in outputs:
            self._num_output_tokens += len(output.token_ids)
            if output.finish_reason:
                del self._running[output.seq_id]
        self._admit()
        return outputs

    def drain(self) -> list[SeqOutput]:
        return []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._running)

    @property
    def running_seq_ids(self) -> list[str]:
        return list(self._running)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=1,
            num_free_blocks=1,
            kv_usage=0.0,
            prefix_cache_hit_tokens=0,
            prefix_cache_query_tokens=0,
            num_preemptions=0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            seq = self._waiting.popleft()
            self._running[seq.seq_id] = seq


class StandInWorker:
    """Runs this file as another process: entering waits until it is ready, leaving drains it."""

    def __init__(
        self,
        redis_url: str,
        folder: Path,
        *,
        script: Sequence[str] = (__file__,),
        profile: Path | None = None,
        **settings: object,
    ):
        """settings: fields of WorkerSettings. The log is a file in `folder`.

        script: another program to run, with its arguments, for a benchmark with an engine of its own.
        """
        self._url, self._log, self._script = redis_url, folder / "worker.log", script
        given = {"worker_id": "stand-in", "http_port": -1, **settings}
        given |= {"redis_url": redis_url}
        self._env = dict(os.environ) | {f"INGINE_{name.upper()}": str(value) for name, value in given.items()}
        if profile:
            self._env[PROFILE_VARIABLE] = str(profile)

    def __enter__(self) -> Self:
        with self._log.open("wb") as output:
            self._child = Child([sys.executable, *self._script], output=output, env=self._env)
        self.pid = self._child.pid
        with Redis.from_url(self._url) as redis:
            while not redis.exists(Keys().workers):
                if not self._child.running:
                    raise RuntimeError(f"the worker ended by itself:\n{self._log.read_text()}")
                time.sleep(0.02)
        return self

    def __exit__(self, *_) -> None:
        self._child.stop(timeout_s=30)


def main() -> None:
    import ingine.cli.worker
    from ingine.worker.hosting.engine_thread import EngineThread
    from ingine.worker.served_model import ServedModel
    from ingine.worker.settings import load_settings

    def build_engine(settings):
        engine = EngineThread(lambda: StandInEngine(settings.max_num_seqs or 64))
        return engine, ServedModel(frozenset({"stand-in"}), "stand-in", engine.numerics)

    ingine.cli.worker.build_engine = build_engine
    settings = load_settings()
    if path := os.environ.get(PROFILE_VARIABLE):
        profile = cProfile.Profile()
        profile.runcall(ingine.cli.worker.run_worker, settings)
        profile.dump_stats(path)
    else:
        ingine.cli.worker.run_worker(settings)


if __name__ == "__main__":
    main()
