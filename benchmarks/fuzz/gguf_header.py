"""Fuzz a GGUF file's header: metadata and tensor locations."""

from random import Random

from benchmarks.fuzz.mutations import damaged
from benchmarks.fuzz.running import file_of, outcome
from ingine.engine.models.gguf_header import read_gguf_header
from ingine.errors import ConfigError
from tests.security.gguf_bytes import tiny_gguf

WORDS = (b"\x00", b"\xff\xff\xff\xff", b"\x09\x00\x00\x00", b"\x00\x00\x00\x00\x00\x00\x00\x40", b"GGUF")
FILES = tuple(tiny_gguf(sentencepiece=sentencepiece).encode() for sentencepiece in (False, True))
DAMAGED_BYTES = 12_000
"""Only this many bytes at the start are damaged: the rest of a header is one token after another, and what
follows it is never read."""


def cases(rng: Random) -> bytes:
    raw, end = rng.choice(FILES), rng.randrange(1, DAMAGED_BYTES)
    return damaged(rng, raw[:end], WORDS) + raw[end:] if rng.random() < 0.95 else raw


def check(case: bytes) -> str:
    with file_of(case) as path:
        header, result = outcome(lambda: read_gguf_header(path), ConfigError)
    for tensor in header.tensors.values() if header else ():
        assert tensor.path == path and 0 <= tensor.begin <= len(case)
    return result
