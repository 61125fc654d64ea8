"""Runs systems in turns, round by round, so that noise on the machine affects all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rivals.child import ROOT, SystemFailed
from benchmarks.rivals.lineup import RUN_TIMEOUT_S, Lineup
from benchmarks.rivals.page_cache import evict
from benchmarks.rivals.plan import LOAD, REFERENCE, System
from benchmarks.rivals.protocol import Request
from benchmarks.rivals.summary import Figures, agreement, latencies, over_rounds, throughput
from benchmarks.rivals.workloads import ARRIVALS, START_COLD, WORKLOADS, arriving
from ingine.engine.text.tokenizer import Tokenizer


@dataclass
class Result:
    """The result of one system on one workload."""

    system: str
    workload: str
    rounds: list[Figures] = field(default_factory=list)
    error: str | None = None
    """The reason if rounds are missing."""

    def as_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "workload": self.workload,
            "figures": over_rounds(self.rounds),
            "rounds": self.rounds,
            "error": self.error,
        }


class Run:
    """Measures workloads into `results`. show: called with a line of text for each round."""

    def __init__(
        self,
        lineup: Lineup,
        systems: Sequence[System],
        tokenizer: Tokenizer,
        num_rounds: int,
        show: Callable[[str], None],
        *,
        requests_per_s: float | None,
    ):
        self._lineup, self._systems, self._tokenizer = lineup, systems, tokenizer
        self._num_rounds, self._show = num_rounds, show
        self.requests_per_s = requests_per_s
        """Rate of arrivals; None until known."""
        self.results: list[Result] = []

    def measure(self, workload: str) -> None:
        if workload in WORKLOADS:
            self._measure_requests(workload, lambda n: WORKLOADS[workload].requests(self._tokenizer, n))
        elif workload == ARRIVALS:
            mixed = WORKLOADS["mixed"].requests(self._tokenizer, 0)
            self._measure_requests(workload, lambda _: arriving(mixed, self._arrival_rate(len(mixed))))
        else:
            self._lineup.close_all()  # they would keep the files in memory that are to be read from disk
            self._in_turns(workload, lambda system, _: self._start(workload, system))

    def _arrival_rate(self, num_requests: int) -> float:
        """The given rate of arrivals, or a share of the reference's rate with all requests at once. Raises
        SystemFailed."""
        if self.requests_per_s is None:
            mixed = (row for row in self.results if (row.system, row.workload) == (REFERENCE, "mixed"))
            rounds = [figures for row in mixed for figures in row.rounds]
            if not rounds:
                raise SystemFailed(f"the rate is a share of {REFERENCE}'s in `mixed`, which is unknown")
            self.requests_per_s = LOAD * num_requests / over_rounds(rounds)["wall_s"]["median"]
        return self.requests_per_s

    def _measure_requests(self, workload: str, requests_of: Callable[[int], list[Request]]) -> None:
        """Measure a workload. requests_of: a round's number -> its requests."""
        first_token_ids: dict[tuple[str, int], list[int]] = {}

        def measure(system: System, round_number: int) -> Figures:
            requests = requests_of(round_number)
            answer = self._lineup.run(system, requests)
            first_token_ids[system.name, round_number] = answer["first_token_ids"]
            times = answer["token_times_s"]
            arriving = any(request.arrival_s for request in requests)
            return throughput(times) | (latencies(requests, times) if arriving else {})

        results = self._in_turns(workload, measure)
        for result in results:
            for round_number, figures in enumerate(result.rounds):
                of_all = (first_token_ids.get((other.system, round_number)) for other in results)
                reference = next(ids for ids in of_all if ids)
                own = first_token_ids[result.system, round_number]
                figures["first_token_agreement"] = agreement(own, reference)

    def _start(self, workload: str, system: System) -> Figures:
        """Measure from the start of a process to the first token of a request that waits for it."""
        request = WORKLOADS["1x41"].requests(self._tokenizer, 0)[0]._replace(num_tokens=1)
        self._lineup.prepare(system)
        if workload == START_COLD:
            evict([ROOT / system.venv, *self._lineup.files_of_all])
        begun = time.perf_counter()
        child = self._lineup.start(system)
        try:
            self._lineup.load(system, child)
            child.run([request], timeout_s=RUN_TIMEOUT_S)
            return {"first_token_s": time.perf_counter() - begun}
        finally:
            child.close()

    def _in_turns(self, workload: str, measure: Callable[[System, int], Figures]) -> list[Result]:
        """Run each system once per round, starting with another one each time.

        A failure ends a system's rounds.
        """
        systems = [system for system in self._systems if workload in system.max_rounds]
        results = {system.name: Result(system.name, workload) for system in systems}
        for round_number in range(self._num_rounds):
            first = round_number % max(1, len(systems))
            for system in [*systems[first:], *systems[:first]]:
                result = results[system.name]
                if result.error or round_number >= system.max_rounds[workload]:
                    continue
                try:
                    result.rounds.append(measure(system, round_number))
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in result.rounds[-1].items())
                except SystemFailed as error:
                    result.error = shown = str(error)
                self._show(f"{workload:10} round {round_number + 1}  {system.name:16} {shown}")
        self.results += results.values()
        return list(results.values())
