"""The program for `start_time.py`: makes an `LLM`, generates one token, and prints the time of each part.

python first_token.py MODEL PROMPT BEGAN    (BEGAN: time.time() just before this process was started)
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class Parts:
    """Records the seconds of consecutive parts."""

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self._until = began

    def done(self, part: str) -> None:
        """Record the time since the previous part as that of `part`."""
        now = time.time()
        self.seconds[part], self._until = now - self._until, now

    def ending(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that `part` ends when it returns."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.done(part)
            return result

        return timed


def main(model: str, prompt: str, began: str) -> None:
    parts = Parts(float(began))
    parts.done("interpreter")
    import torch  # noqa: F401

    parts.done("import torch")
    import ingine.engine.build
    from ingine import LLM, SamplingParams

    parts.done("import ingine")
    ingine.engine.build.load_model = parts.ending("weights", ingine.engine.build.load_model)
    ingine.engine.build.load_tokenizer = parts.ending("tokenizer", ingine.engine.build.load_tokenizer)
    llm = LLM(model)
    parts.done("the rest of the engine")
    llm.generate(prompt, SamplingParams(max_tokens=1))
    parts.done("first step")
    heavy = [name for name in ("transformers", "torch._dynamo", "sympy") if name in sys.modules]
    print(json.dumps({"parts": parts.seconds, "heavy_imports": heavy}))


if __name__ == "__main__":
    main(*sys.argv[1:])
