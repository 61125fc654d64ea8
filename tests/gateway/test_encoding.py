"""JSON that every client can read."""

import json
import math

import pytest

from ingine.gateway.encoding import UNLIKELY, encode_json
from tests.gateway.test_completions import ASKED, CHAT
from tests.gateway.test_errors import assert_error


@pytest.mark.parametrize("value", [{"a": [1, "\u00e9\n", None, 0.5]}, {"a": "\ud800"}, {"\udfff": "\u00e9"}])
def test_what_is_read_is_what_was_encoded(value):
    encoded = encode_json(value)
    assert json.loads(encoded.decode()) == value and b"\n" not in encoded


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_lacks(number):
    def fail(name: str) -> None:
        raise AssertionError(name)

    encoded = encode_json({"logprob": number, "top": [(number, "\ud800")]})
    assert json.loads(encoded, parse_constant=fail) == {"logprob": UNLIKELY, "top": [[UNLIKELY, "\ud800"]]}


async def test_an_error_may_quote_half_a_character(http, worker):
    raw = json.dumps(ASKED | {"\ud800": 1})
    response = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert assert_error(response, 400, "unsupported_parameter")["param"] == "\ud800"


async def test_a_response_may_repeat_half_a_character(http, worker):
    raw = json.dumps({"model": "tiny", "input": "hi", "background": True, "metadata": {"a": "\ud800"}})
    response = await http.post("/v1/responses", content=raw, headers={"content-type": "application/json"})
    assert response.json()["metadata"] == {"a": "\ud800"}
