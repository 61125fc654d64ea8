"""Fuzz the output and error files of a batch, which an earlier run or another program has left."""

import json
import tempfile
from pathlib import Path
from random import Random

from benchmarks.fuzz.batch_lines import WORDS
from benchmarks.fuzz.mutations import JSON, changed, damaged
from benchmarks.fuzz.running import outcome
from ingine.errors import ConfigError
from ingine.producer.batch_files import RowFile
from ingine.producer.openai.batch_format import is_cut

BODY = {"choices": [{"finish_reason": "length"}]}
ROW = {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, "body": BODY}, "error": None}


def cases(rng: Random) -> bytes:
    rows = [changed(rng, ROW, JSON) if rng.random() < 0.7 else ROW for _ in range(rng.randrange(4))]
    lines = []
    for row in rows:
        try:
            lines.append(json.dumps(row).encode() + b"\n")
        except (ValueError, RecursionError):
            lines.append(b"\n")
    raw = b"".join(lines)
    return damaged(rng, raw, (*WORDS, b"\n")) if rng.random() < 0.5 else raw


def check(case: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(case)
        with RowFile(path) as file:
            whole = path.read_bytes()
            assert case.startswith(whole) and (not whole or whole.endswith(b"\n"))
            rows, result = outcome(lambda: list(file.rows()), ConfigError)
            for row in rows or ():
                assert {row["id"]: row["custom_id"]} and is_cut(row) in (True, False)
            file.write(ROW)
        assert path.read_bytes().splitlines()[-1] == json.dumps(ROW).encode()
    return result
