"""A system under test without a model: a real child process that answers as the real ones do."""

import os
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.rivals.protocol import Loaded, Request, serve
from benchmarks.rivals.stepping import Stepping


class FakeSteps:
    """Gives one token per request and step. Certain numbers of tokens make it misbehave."""

    RAISES, DIES, HANGS, LOSES_A_TOKEN = 1001, 1002, 1003, 1004

    def __init__(self, token_id: int):
        self._token_id = token_id
        self._left: dict[int, int] = {}

    def add(self, index: int, request: Request) -> None:
        print(f"libraries print what they like: {index}")
        if request.num_tokens == self.RAISES:
            raise RuntimeError("no more memory")
        if request.num_tokens == self.DIES:
            os._exit(7)
        while request.num_tokens == self.HANGS:
            time.sleep(1)
        self._left[index] = request.num_tokens

    def step(self) -> Iterator[tuple[int, list[int]]]:
        for index in list(self._left):
            self._left[index] -= 1
            if self._left[index] == 0:
                del self._left[index]
            yield index, [self._token_id]


def load(model: str, options: dict[str, Any]) -> Loaded:
    if "refuse" in options:
        raise ValueError(options["refuse"])
    return Loaded(
        Stepping(FakeSteps(options.get("token_id", 5))),
        versions={"fake": "1"},
        settings={**options, "pid": os.getpid()},
    )


if __name__ == "__main__":
    serve(load)
