"""The blocking client repeats the asyncio client: its methods' signatures, docstrings and arguments."""

import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from types import GenericAlias
from typing import Any

import pytest

from ingine.producer import AsyncClient, AsyncJobHandle, Client, JobHandle

PAIRS = ((AsyncClient, Client), (AsyncJobHandle, JobHandle))
BLOCKING = {**dict(PAIRS), AsyncGenerator: Generator}
"""Type of the asyncio client -> type of the blocking client."""


def public_methods(kind: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]


METHODS = [
    pytest.param(asyncio_kind, blocking_kind, name, id=f"{blocking_kind.__name__}.{name}")
    for asyncio_kind, blocking_kind in PAIRS
    for name in public_methods(asyncio_kind)
    if name != "aclose"
]
OF_METHODS = pytest.mark.parametrize(("asyncio_kind", "blocking_kind", "name"), METHODS)


@pytest.mark.parametrize(("asyncio_kind", "blocking_kind"), PAIRS)
def test_both_have_the_same_methods(asyncio_kind: type, blocking_kind: type):
    expected = {name.replace("aclose", "close") for name in public_methods(asyncio_kind)}
    assert set(public_methods(blocking_kind)) == expected != set()


def in_blocking(annotation: Any) -> Any:
    if isinstance(annotation, GenericAlias):
        arguments = map(in_blocking, annotation.__args__)
        if annotation.__origin__ is AsyncGenerator:
            arguments = (*arguments, None)  # the return type, which only a Generator has
        return GenericAlias(in_blocking(annotation.__origin__), tuple(arguments))
    return BLOCKING.get(annotation, annotation)


def assert_same_parameters(theirs: Callable, ours: Callable) -> None:
    found = inspect.signature(ours).parameters
    assert list(found.values()) == list(inspect.signature(theirs).parameters.values())
    assert next(iter(found)) == "self"


@OF_METHODS
def test_a_methods_signature_and_docstring(asyncio_kind: type, blocking_kind: type, name: str):
    theirs, ours = getattr(asyncio_kind, name), getattr(blocking_kind, name)
    assert_same_parameters(theirs, ours)
    expected = in_blocking(inspect.signature(theirs).return_annotation)
    assert inspect.signature(ours).return_annotation == expected != inspect.Signature.empty
    assert inspect.getdoc(ours) == inspect.getdoc(theirs) is not None
    assert not hasattr(ours, "__wrapped__")  # so a type checker reads the same signature


def test_both_are_made_with_the_same_arguments():
    assert_same_parameters(AsyncClient.__init__, Client.__init__)


class Recorder:
    """Replaces an asyncio client or handle, and records the arguments of each call."""

    def __init__(self, kind: type):
        self._kind = kind
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self._kind, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            _, *given = inspect.signature(method).bind(self, *args, **kwargs).arguments.items()
            self.calls.append((name, dict(given)))
            return _nothing() if inspect.iscoroutinefunction(method) else _no_items()

        return record


async def _nothing() -> list:
    return []


async def _no_items() -> AsyncGenerator:
    for item in ():
        yield item


@OF_METHODS
def test_a_method_passes_on_every_argument(asyncio_kind: type, blocking_kind: type, name: str, monkeypatch):
    _, *parameters = inspect.signature(getattr(asyncio_kind, name)).parameters.values()
    given = {each.name: object() for each in parameters if each.kind is not each.VAR_KEYWORD}
    expected = dict(given)
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        given["max_tokens"] = object()
        expected["sampling_fields"] = {"max_tokens": given["max_tokens"]}
    recorder = Recorder(asyncio_kind)
    with Client("redis://127.0.0.1:1/0") as client, monkeypatch.context() as patched:
        patched.setattr(client, "_client", recorder)
        face = client if blocking_kind is Client else JobHandle(client, recorder)
        answer = getattr(face, name)(**given)
        if isinstance(answer, Generator):
            assert list(answer) == []
    assert recorder.calls == [(name, expected)]
