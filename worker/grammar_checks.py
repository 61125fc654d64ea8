"""Whether a job's grammar can be enforced: found in a process that can be killed, and remembered."""

import hashlib
from collections import OrderedDict

from ingine.engine.grammar.tools import ToolConstraint
from ingine.engine.limits import RequestLimits
from ingine.engine.text.tokenizer import Definition
from ingine.structured_outputs import StructuredOutputsParams
from ingine.worker.hosting.pipe import pack
from ingine.worker.hosting.prompt_process import Kind, PromptProcess

CPU_S, CPU_S_PER_BYTE = 2.0, 20e-6
"""Processor time that compiling a grammar may take. Usual ones take milliseconds."""

MAX_KNOWN = 4096
"""Grammars that were found good of late, at some 100 bytes each."""


class GrammarChecks:
    """Compiles each grammar once in a process of its own, before the engine does."""

    def __init__(self, definition: Definition, limits: RequestLimits):
        self._process = PromptProcess(definition, limits, max_in_flight=1)
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether `check` would return at once."""
        return _digest(params) in self._known

    async def check(
        self, tenant: str, params: StructuredOutputsParams, constraint: ToolConstraint | None = None
    ) -> None:
        """Compile a grammar. Raises InvalidRequest as `GrammarCompiler.compile` does, or NoPromptProcess.

        constraint: the one that `params` are of, whose functions are named in errors.
        """
        digest, given = _digest(params), params.given()
        if digest not in self._known:
            asked: list[dict] = [given]
            if constraint is not None:
                asked.append({name: schema.given() for name, schema in constraint.schemas.items()})
            cpu_s = CPU_S + CPU_S_PER_BYTE * len(pack(*asked))
            await self._process.read(tenant, cpu_s, *asked, kind=Kind.GRAMMAR)
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    @property
    def start_error(self) -> str | None:
        """The reason why the process cannot be started, see `PromptProcess.start_error`."""
        return self._process.start_error

    async def close(self) -> None:
        """What is not checked by now is never answered."""
        await self._process.close()


def _digest(params: StructuredOutputsParams) -> bytes:
    return hashlib.blake2b(repr(params.given()).encode(), digest_size=16).digest()
