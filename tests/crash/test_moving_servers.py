"""Streams and real workers go on while the server itself moves: in a cluster, and behind Sentinel."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ingine.contract.keys import all_partitions
from ingine.producer import Client, JobHandle
from ingine.worker.local import LocalWorkers
from tests.crash.conftest import LEASE_S, LONG
from tests.servers import cluster, watched_pair
from tests.waiting import HANGS_S, wait_until

PROMPTS = [f"Once upon a time there were {n} of them" for n in range(8)]

Uninterrupted = Callable[[list[str]], list[tuple[list[int], str]]]


def local_workers(url: str, queue: str, folder: Path, model: Path) -> LocalWorkers:
    return LocalWorkers(
        ["a", "b"],
        redis_url=url,
        queue=queue,
        folder=folder,
        num_threads=1,
        model=model,
        dtype="float32",
        lease_s=LEASE_S,
    )


def follow_while(client: Client, handles: list[JobHandle], disturb: Callable[[], None]):
    """Token ids and text of each job, from consumers that follow from the start."""
    begun = [False] * len(handles)

    def consume(n: int) -> tuple[list[int], str]:
        token_ids, text = [], ""
        for chunk in handles[n].stream():
            begun[n] = True
            token_ids += chunk.token_ids
            text += chunk.text
        return token_ids, text

    with ThreadPoolExecutor(len(handles)) as pool:
        consuming = [pool.submit(consume, n) for n in range(len(handles))]
        wait_until(lambda: all(begun), what="the first token of each")
        disturb()
        return [future.result(timeout=HANGS_S) for future in consuming]


def test_a_cluster_whose_slots_move(
    tmp_path: Path, queue: str, tiny_model: Path, uninterrupted: Uninterrupted
):
    with cluster(tmp_path / "cluster") as three, Client(three.url, queue=queue) as client:
        client.set_partitions(4)

        def disturb() -> None:
            for keys in all_partitions(queue, 4):
                three.move(keys.settings)
            moved.append(sum(client.queue_info().running.values()))

        moved: list[int] = []
        with local_workers(three.url, queue, tmp_path, tiny_model):
            handles = client.submit_many({"prompt": prompt, **LONG} for prompt in PROMPTS)
            assert follow_while(client, handles, disturb) == uninterrupted(PROMPTS)
        assert moved[0] > 0, "all was over before the slots had moved"
        info = client.queue_info()
        assert (sum(info.waiting.values()), sum(info.running.values()), info.num_dead) == (0, 0, 0)


@pytest.mark.parametrize("how", ["is killed", "hands over"])
def test_a_primary_that(tmp_path: Path, queue: str, tiny_model: Path, uninterrupted: Uninterrupted, how: str):
    with watched_pair(tmp_path / "pair") as pair, Client(pair.url, queue=queue) as client:
        if how == "hands over":
            pair.skip_without_hand_over()
        old = pair.primary
        disturb = pair.kill_primary if how == "is killed" else pair.change_places
        with local_workers(pair.url, queue, tmp_path, tiny_model):
            handles = client.submit_many({"prompt": prompt, **LONG} for prompt in PROMPTS)
            assert follow_while(client, handles, disturb) == uninterrupted(PROMPTS)
        assert pair.primary is not old
        info = client.queue_info()
        assert (sum(info.waiting.values()), sum(info.running.values()), info.num_dead) == (0, 0, 0)
