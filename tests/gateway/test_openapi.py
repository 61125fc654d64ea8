"""The gateway's description of itself agrees with what it serves."""

import jsonschema
import pytest

from ingine.gateway.app import ROUTES
from ingine.gateway.openapi import describe
from tests.gateway.test_completions import ASKED, CHAT

UNDESCRIBED = {"/metrics", "/openapi.json"}


def test_every_path_and_method_is_described():
    described = {
        (path, method.upper()) for path, methods in describe()["paths"].items() for method in methods
    }
    served = {
        (route.path.replace(":path}", "}"), method)
        for route in ROUTES
        if route.path not in UNDESCRIBED
        for method in route.methods - {"HEAD"}
    }
    assert described == served


async def test_it_is_served(http):
    assert (await http.get("/openapi.json")).json() == describe()


def schema_of(path: str) -> dict:
    body = describe()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return body | {"components": describe()["components"]}


@pytest.mark.parametrize(
    ("path", "body", "is_valid"),
    [
        (CHAT, ASKED, True),
        (CHAT, ASKED | {"temperature": 0.5, "stop": None, "stream": True, "tools": []}, True),
        (CHAT, {"messages": []}, False),
        (CHAT, ASKED | {"temperature": "hot"}, False),
        (CHAT, ASKED | {"messages": [{"content": "x"}]}, False),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1}, True),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, False),
        ("/v1/responses", {"model": "tiny", "input": "a", "background": True}, True),
        ("/v1/responses", {"model": "tiny"}, False),
    ],
)
def test_bodies_are_described(path, body, is_valid):
    assert jsonschema.Draft202012Validator(schema_of(path)).is_valid(body) == is_valid
