"""Workers as child programs: ready on entry, ended on exit, with an error if they do not start."""

import sys

import pytest
import redis

from ingine.contract.keys import Keys
from ingine.errors import IngineError
from ingine.worker.child import Child
from ingine.worker.identity import name_of
from ingine.worker.local import LocalWorkers
from tests.tiny_models import make_tiny_model
from tests.waiting import wait_until


def test_they_are_ready_when_entered_and_leave_the_queue(tmp_path, redis_url, queue):
    model = make_tiny_model(tmp_path / "model")
    names = ["first", "second"]
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        with LocalWorkers(names, redis_url=redis_url, queue=queue, folder=tmp_path, model=model) as workers:
            assert sorted(map(name_of, client.hkeys(Keys(queue).workers))) == names
            workers.kill("first")
            workers.require_running(["second"])
            with pytest.raises(IngineError, match="first ended by itself"):
                workers.require_running(names)
        assert list(map(name_of, client.hkeys(Keys(queue).workers))) == ["first"]  # it was killed


def test_one_that_does_not_start_shows_the_end_of_its_log(tmp_path, redis_url, queue):
    settings = {"redis_url": redis_url, "queue": queue, "folder": tmp_path}
    with (
        pytest.raises(IngineError, match="no-such-model"),
        LocalWorkers(["w"], model="no-such-model", **settings),
    ):
        pass


def test_a_child_that_ignores_sigterm_is_killed(tmp_path):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with (tmp_path / "output").open("wb") as output:
        child = Child([sys.executable, "-c", stubborn], output=output)
    wait_until((tmp_path / "output").read_bytes, what="the child's first line")
    child.stop(timeout_s=0.2)
    assert not child.running
    child.stop()


def test_a_child_that_has_ended_can_be_stopped(tmp_path):
    with (tmp_path / "output").open("wb") as output:
        child = Child([sys.executable, "-c", "pass"], output=output)
    wait_until(lambda: not child.running)
    child.stop()
