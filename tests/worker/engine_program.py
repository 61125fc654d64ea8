"""A program for `EngineProcess` whose steps fail as ids or tenants of their sequences say; a worker with it.

python -m tests.worker.engine_program engine MODEL
python -m tests.worker.engine_program worker MODEL      (settings: INGINE_ variables)
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from ingine.engine.text.tokenizer import Tokenizer
from ingine.worker.hosting.engine_child import serve_engine
from ingine.worker.hosting.engine_process import EngineProcess
from tests.served_models import TINY

HELD_UP_S = 600


def start(model: str) -> EngineProcess:
    command = [sys.executable, "-m", "tests.worker.engine_program", "engine", model]
    return EngineProcess(command, lambda: Tokenizer.from_folder(Path(model)))


def build(model: str):
    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine

    engine = Engine(
        EngineConfig(model, dtype="float32", device="cpu", max_num_seqs=8, kv_cache_bytes=8 << 20)
    )
    step = engine.step

    def step_or_fail(*, alone: str | None = None):
        if sum(seq_id.startswith("broken") for seq_id in engine.running_seq_ids) > 1:
            raise RuntimeError("the model broke")
        for seq_id in [alone] if alone else engine.running_seq_ids:
            fail_as_told(seq_id)
            fail_as_told(engine._requests.seqs_of(seq_id)[0].tenant)
        return step(alone=alone)

    engine.step = step_or_fail
    return engine


def fail_as_told(seq_id: str) -> None:
    if seq_id.startswith("poison"):
        raise RuntimeError("the model broke")
    if seq_id.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    if seq_id.startswith("hang"):
        ctypes.PyDLL(None).sleep(HELD_UP_S)  # a PyDLL's functions keep the interpreter


def run_worker(model: str) -> None:
    import ingine.cli.worker
    from ingine.engine.store.fingerprint import model_fingerprint
    from ingine.worker.served_model import ServedModel
    from ingine.worker.settings import load_settings

    served = ServedModel(TINY.names, model_fingerprint(Path(model)), TINY.numerics)
    ingine.cli.worker.build_engine = lambda settings: (start(model), served)
    ingine.cli.worker.run_worker(load_settings())


if __name__ == "__main__":
    role, model = sys.argv[1:]
    if not model:
        fail_as_told("deadly")
    if role == "engine":
        serve_engine(lambda: build(model))
    else:
        run_worker(model)
