"""The short form of `make chaos`: the same run, some seconds of it, with a seed that never changes."""

from rich.console import Console

from tests.chaos.run import Run
from tests.chaos.table import show

SEED = 7


async def test_nothing_is_lost_when_everything_breaks(tmp_path):
    run = Run(SEED, tmp_path / "run", duration_s=15, num_jobs=60, poison_every=0, cluster=False)
    report = await run.run()
    show(report, Console(width=110))
    assert report.kept, [*report.failures, *report.findings.violations]
    assert report.counts["server: kill_server"] and report.counts["worker killed: kill -9"]
