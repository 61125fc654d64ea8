"""Tensor parallelism: one model on several GPUs, a process (a *rank*) each, started by `torchrun`.

Heads, MLP columns and the vocabulary are split over the ranks, as in Megatron-LM (Shoeybi et al., 2019): each
layer has two sums over all ranks. Rank 0 schedules and samples. Its messages to the other ranks go over gloo;
tensors go over NCCL, or over gloo where there is no GPU.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ingine.errors import ConfigError, EngineError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets for each process that it starts."""

HOST_TIMEOUT = timedelta(days=365)
"""A rank waits for its next message for as long as the engine is idle. It does not outlive rank 0: its
connection breaks when rank 0 ends."""

HEAD_BYTES = 64 << 10
"""Size of the first broadcast of a message, which is the only one if the message fits. A broadcast costs the
same for any size up to this and more."""

_LENGTH_BYTES = 8

# Older versions of torch have only the second name, which later versions warn about.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TensorParallel:
    """This process's rank, and the collective operations of all ranks.

    Every rank calls the same collectives in the same order. The collectives on tensors do no work on the host
    and may be captured in a CUDA graph. If a rank is gone, they raise RuntimeError over gloo and may wait
    forever over NCCL; `send`, `receive` and `agree_on_min` raise EngineError.
    """

    def __init__(self, rank: int, size: int, device: torch.device, host_group: ProcessGroup | None = None):
        self.rank, self.size, self.device = rank, size, device
        self._host_group = host_group

    @classmethod
    def join(cls, size: int, device: torch.device) -> Self:
        """Join the `size` ranks that torchrun has started, and wait for all of them.

        device: the kind of device. On CUDA a rank takes the GPU whose number is its local rank
        (`TensorParallel.device`), and makes it the current device of this thread. Raises ConfigError, with
        the command to use, if torchrun did not start exactly `size` processes or there are too few GPUs.
        """
        command = (
            f"torchrun --standalone --nproc-per-node {size} --no-python "
            f"ingine worker --tensor-parallel-size {size}"
        )
        if missing := [name for name in VARIABLES if name not in os.environ]:
            raise ConfigError(
                f"tensor_parallel_size is {size}, but this process was not started by torchrun "
                f"({', '.join(missing)} not set). Start it with: {command}"
            )
        if (world_size := os.environ["WORLD_SIZE"]) != str(size):
            raise ConfigError(
                f"tensor_parallel_size is {size}, but torchrun started {world_size} processes. "
                f"Start them with: {command}"
            )
        device = _own_device(device, int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda":
            # Connect now: a communicator that is made at first use cannot be made during a graph's capture.
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        return cls(dist.get_rank(), size, device, host_group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace the contiguous x by the sum of x over all ranks, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """Concatenate each rank's contiguous x [rows, n] in rank order into a contiguous [rows, width].

        Padding columns, which n * size may have beyond `width`, are left out: see `shard`.
        """
        if self.size == 1:
            return x
        rows, n = x.shape
        gathered = x.new_empty(self.size * rows, n)
        _all_gather(gathered, x)
        own = [shard(width, rank, self.size) for rank in range(self.size)]
        parts = gathered.view(self.size, rows, n)
        return torch.cat(
            [part[:, : each.stop - each.start] for part, each in zip(parts, own, strict=True)], 1
        )

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace the contiguous x by rank 0's x, and return it."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def send(self, message: object) -> None:
        """Send a message from rank 0 to all other ranks, whose `receive` returns it. It is pickled: ranks
        trust each other.
        """
        if self.size == 1:
            return
        payload = np.frombuffer(pickle.dumps(message, protocol=5), dtype=np.uint8)
        head = np.zeros(HEAD_BYTES, dtype=np.uint8)
        head[:_LENGTH_BYTES].view(np.int64)[0] = len(payload)
        first, rest = np.split(payload, [HEAD_BYTES - _LENGTH_BYTES])
        head[_LENGTH_BYTES : _LENGTH_BYTES + len(first)] = first
        self._broadcast_host(head)
        if len(rest):
            self._broadcast_host(rest.copy())  # torch takes no read-only array without a warning

    def receive(self) -> object:
        """Wait for the next message of rank 0 and return it; None after rank 0's `close`."""
        head = np.empty(HEAD_BYTES, dtype=np.uint8)
        self._broadcast_host(head)
        length = int(head[:_LENGTH_BYTES].view(np.int64)[0])
        payload = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(payload) < length:
            rest = np.empty(length - len(payload), dtype=np.uint8)
            self._broadcast_host(rest)
            payload = np.concatenate((payload, rest))
        return pickle.loads(payload)

    def agree_on_min(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self.size == 1:
            return value
        smallest = torch.tensor(value)
        with _lost_rank_is_an_engine_error():
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._host_group)
        return int(smallest)

    def close(self) -> None:
        """Leave the message group; rank 0 first tells the others to end. No method may be called after this.

        The process group of tensors stays until the process ends, which aborts it: NCCL's own shutdown waits
        for graphs that were captured with it, and for a rank that is gone.
        """
        if self.rank == 0:
            with suppress(EngineError):  # no other rank is left
                self.send(None)
        self.abort()

    def abort(self) -> None:
        """Leave the message group after a step that failed on this rank, since the other ranks may still wait
        for the rest of that step. Their `receive` and this rank's `send` raise EngineError from then on.
        """
        if self._host_group is not None:
            dist.destroy_process_group(self._host_group)
            self._host_group = None

    def _broadcast_host(self, array: np.ndarray) -> None:
        if self._host_group is None:
            raise EngineError("an earlier step failed, which has left the ranks out of step")
        with _lost_rank_is_an_engine_error():
            dist.broadcast(torch.from_numpy(array), src=0, group=self._host_group)


SINGLE = TensorParallel(0, 1, torch.device("cpu"))
"""The only rank of a model that runs in one process, on any device: every collective does nothing."""


def shard(total: int, rank: int, size: int) -> slice:
    """Return this rank's part of `total` rows or columns. All parts have one length, except that the last
    ones may be shorter or empty: 5 rows over 4 ranks are 2, 2, 1 and 0 rows.
    """
    length = -(-total // size)
    return slice(min(rank * length, total), min((rank + 1) * length, total))


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"tensor parallelism needs device cuda, or cpu; this is {device}")
    if device.index is not None:
        raise ConfigError(f"with tensor parallelism the device is cuda, not {device}: each rank has its own")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(f"rank {local_rank} of this machine has no GPU: there are {num_gpus}, one a rank")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _lost_rank_is_an_engine_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own for a connection that broke
        raise EngineError(f"another rank is gone: {str(error).partition('. ')[0]}") from error
