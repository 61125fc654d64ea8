"""One line an event, for people or for machines."""

import io
import json
import logging

import pytest

from ingine.connect.url import redact
from ingine.worker.logs import JsonFormatter, TextFormatter, log_event


@pytest.fixture
def logged():
    """`logged(formatter)`: what one event and one failure look like."""

    def run(formatter: logging.Formatter) -> str:
        stream = io.StringIO()
        logger = logging.Logger("worker.test")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        log_event(logger, logging.INFO, "job begun", job_id="a", ms=12.345, note="two words", nothing=None)
        return stream.getvalue()

    return run


def test_text_is_one_line_of_pairs(logged):
    line = logged(TextFormatter())
    assert line.endswith('INFO    job begun job_id=a ms=12.3 note="two words"\n') and line.count("\n") == 1


def test_json_is_one_object(logged):
    fields = json.loads(logged(JsonFormatter()))
    assert fields.pop("time")
    assert fields == {
        "level": "info",
        "event": "job begun",
        "job_id": "a",
        "ms": 12.345,
        "note": "two words",
        "nothing": None,
    }


def test_a_value_cannot_forge_a_line(logged):
    stream = io.StringIO()
    logger = logging.Logger("worker.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter())
    logger.addHandler(handler)
    log_event(logger, logging.INFO, "entry buried", reason="x\nINFO job finished")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@host:6379/1", "redis://:***@host:6379/1"),
        ("rediss://me:secret@host/1?db=1", "rediss://me:***@host/1"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
    ],
)
def test_a_password_is_never_shown(url, shown):
    assert redact(url) == shown


HOSTILE = "a\x1b[2J\x9b31m\u202e\x7f\r\n12:00:00.000 ERROR   forged"


@pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
def test_no_line_of_a_log_is_another_s(formatter):
    stream = io.StringIO()
    logger = logging.Logger("worker.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter())
    logger.addHandler(handler)
    log_event(logger, logging.INFO, "entry buried", reason=HOSTILE, error=HOSTILE)
    logger.warning("no kernels: %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("failed: %s", HOSTILE)
    logged = stream.getvalue()
    lines = [line for line in logged.splitlines() if not line.startswith(" ")]  # those of a traceback do
    assert len(lines) == 3 and not any(line.startswith("12:00:00.000") for line in lines)
    assert "forged" in logged and logged.replace("\n", "").isprintable()
