"""Fair shares of the engine: which of the jobs that a worker holds goes first, within a priority.

The engine orders sequences by arrival and priority. So for the engine a job arrives as much later as its
tenant has tokens under way here already: of a flood only the first competes with another tenant's first.
"""

from worker.jobs import JobTable, RunningJob

SECONDS_PER_TOKEN = 0.01
"""How much later for each token. By default 3,000 tokens outweigh one step of priority."""


def fair_arrival(job: RunningJob, jobs: JobTable) -> float:
    """Since when the job counts as waiting, in seconds since the epoch; never before its tenant's others."""
    others = [
        held for held in jobs if held.tenant == job.tenant and held.entry.priority == job.entry.priority
    ]
    num_tokens = sum(held.num_tokens for held in others)
    delay_s = num_tokens * SECONDS_PER_TOKEN / job.queue.weights.get(job.tenant, 1.0)
    return max([job.submitted + delay_s, *(held.arrival for held in others)])
