"""Fuzz jobs: a worker and a listing client decode them."""

from random import Random

from benchmarks.fuzz.mutations import packed_case
from tests.security.wire_properties import FULL_JOB, check_job

CHAT = {name: value for name, value in FULL_JOB.items() if name != "prompt"}
CHAT |= {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
TOKENS = FULL_JOB | {"prompt": [1, 2, 3]}


def cases(rng: Random) -> bytes:
    return packed_case(rng, rng.choice((FULL_JOB, CHAT, TOKENS)))


def check(case: bytes) -> str:
    return "refused" if check_job(case) is None else "valid"
