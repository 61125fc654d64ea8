"""Capturing CUDA graphs: all of the engine that no other device has."""

from collections.abc import Callable

import torch

from ingine.engine.run.graphs import Capture, Replay


def capture_for(device: torch.device) -> Capture | None:
    """What captures graphs on `device`; None where there are none."""
    return _CudaCapture() if device.type == "cuda" else None


class _CudaCapture:
    """All graphs share a pool of memory: one runs at a time, and what it leaves is read before the next."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        step()  # compiles kernels and makes workspaces, which must not happen within a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL's own thread looks after its events meanwhile, which is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay
