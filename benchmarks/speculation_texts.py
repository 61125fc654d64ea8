"""Requests for the measurement of speculation: kinds with much, little and no similarity between requests."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

Request = tuple[list[dict[str, str]], dict[str, Any]]
"""A conversation, and its sampling parameters."""

GREEDY = {"temperature": 0}

CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Dublin", "Accra",
    "Hanoi", "Turin", "Leeds", "Perth", "Delhi", "Miami", "Sofia", "Riga",
)  # fmt: skip
TASKS = (
    "move to another city", "learn to play the guitar", "plant a vegetable garden", "start a small bakery",
    "repair an old bicycle", "train for a marathon", "write a short novel", "renovate a kitchen",
    "prepare for a job interview", "organise a street party", "save money for a house",
    "teach a dog to sit", "build a bookshelf", "plan a long hike", "set up a home office",
    "host a dinner for eight",
)  # fmt: skip
THINGS = (
    "lighthouse", "river", "clockmaker", "violin", "bridge", "orchard", "desert", "library",
    "storm", "painter", "island", "train", "fox", "mountain", "baker", "market",
)  # fmt: skip
NAMES = ("cost_of", "value_of", "charge", "fee_of", "add_up", "result_of", "sum_up", "bill")

CALL = (
    '{"thought": "The user wants a forecast, so I call the weather tool for the city that is named.", '
    '"tool": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": 1}}'
)
CODE = """\
def read_prices(path, currency):
    prices = {}
    with open(path) as file:
        for line in file:
            name, amount = line.split(",")
            prices[name.strip()] = float(amount)
    return prices


def total(prices, names):
    amount = 0.0
    for name in names:
        if name in prices:
            amount += prices[name]
    return amount
"""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool_calls() -> Iterator[Request]:
    """Requests whose prompt has an example of the call that is the answer."""
    begin = [
        {"role": "system", "content": "You answer with one JSON object that calls a tool."},
        user("What is the weather in Paris?"),
        {"role": "assistant", "content": CALL},
    ]
    for city in CITIES:
        yield [*begin, user(f"What is the weather in {city}?")], GREEDY


def tool_code() -> Iterator[Request]:
    """Requests whose answer is code that resembles other answers and is not in the prompt."""
    for city in CITIES:
        yield [user(f"Find the weather in {city} tomorrow with a call of a tool.")], GREEDY


def plans() -> Iterator[Request]:
    for task in TASKS:
        yield [user(f"Give me a step-by-step plan to {task}.")], GREEDY


def edits_of_one_file() -> Iterator[Request]:
    """Requests to rename something. A weak model changes little, so its answers copy the prompt."""
    for name in NAMES:
        task = f"Repeat this code word for word, but call the function `total` `{name}`:"
        yield [user(f"{task}\n```python\n{CODE}```")], GREEDY


def copies() -> Iterator[Request]:
    """Requests to copy a function of Python's `textwrap` or `inspect`, each another one, which only its
    prompt has."""
    functions = [
        function
        for module in (textwrap, inspect)
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if 250 < len(inspect.getsource(function)) < 600
    ]
    for function in functions[:16]:
        code = inspect.getsource(function)
        yield [user(f"Repeat this code word for word:\n```python\n{code}```")], GREEDY


def free_text() -> Iterator[Request]:
    for seed, thing in enumerate(THINGS):
        yield [user(f"Tell me a story about a {thing}.")], {"temperature": 1.0, "seed": seed}


TEXTS: dict[str, Callable[[], Iterator[Request]]] = {
    "tool calls as in the prompt": tool_calls,
    "code as in other answers": tool_code,
    "plans": plans,
    "edits of one file": edits_of_one_file,
    "copies of the prompt": copies,
    "free text, temperature 1": free_text,
}
