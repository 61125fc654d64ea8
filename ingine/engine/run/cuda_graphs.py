"""Captures CUDA graphs: the only part of the engine that is specific to CUDA."""

from collections.abc import Callable

import torch

from ingine.engine.run.graphs import Capture, Replay


def capture_for(device: torch.device) -> Capture | None:
    """Return the function that captures graphs on `device`; None if the device has no graphs."""
    return _CudaCapture() if device.type == "cuda" else None


class _CudaCapture:
    """Captures graphs that share one pool of memory: one graph runs at a time, and its results are read
    before the next one runs.
    """

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        step()  # compiles kernels and allocates workspaces, which must not happen during a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Capture only this thread: NCCL's own thread queries its events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay
