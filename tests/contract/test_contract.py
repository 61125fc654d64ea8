"""The scripts against the model, on fakeredis and on a real server.

`python -m tests.contract` searches longer.
"""

import fakeredis
import pytest
import redis.asyncio
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.contract.machine import Contract


def fake_contract() -> type[Contract]:
    def connect():
        return fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(), version=(7,), protocol=2)

    return type("FakeContract", (Contract,), {"make_redis": staticmethod(connect), "real": False})


def real_contract(url: str) -> type[Contract]:
    def connect():
        return redis.asyncio.from_url(url, protocol=2)

    return type("RealContract", (Contract,), {"make_redis": staticmethod(connect)})


def told(num_sequences: int, num_calls: int) -> settings:
    return settings(max_examples=num_sequences, stateful_step_count=num_calls)


@pytest.mark.parametrize("size", [(6, 25), pytest.param((20, 40), marks=pytest.mark.wide)], ids=str)
def test_a_fake_server_does_what_the_model_says(size):
    run_state_machine_as_test(fake_contract(), settings=told(*size))


@pytest.mark.parametrize("size", [(40, 25), pytest.param((100, 40), marks=pytest.mark.wide)], ids=str)
def test_a_real_server_does_what_the_model_says(redis_url, size):
    run_state_machine_as_test(real_contract(redis_url), settings=told(*size))
