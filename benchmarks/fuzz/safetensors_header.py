"""Fuzz a safetensors file's header, which has the locations of tensors."""

import json
from random import Random

from benchmarks.fuzz.mutations import JSON, changed, damaged
from benchmarks.fuzz.running import file_of, outcome
from ingine.engine.files.safetensors_header import read_header
from ingine.errors import ConfigError

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def cases(rng: Random) -> bytes:
    header = json.dumps(changed(rng, HEADER, JSON) if rng.random() < 0.7 else HEADER).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(32)
    return (
        damaged(rng, raw, (b"\x00", b"\xff" * 8, b"[", b"{", b'"', b"\\ud800")) if rng.random() < 0.4 else raw
    )


def check(case: bytes) -> str:
    with file_of(case) as path:
        header, result = outcome(lambda: read_header(path), ConfigError)
    for tensor in (header or {}).values():
        assert 8 <= tensor.begin <= tensor.end <= len(case)
    return result
