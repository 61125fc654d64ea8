"""Checks the exactness of each kernel on the device, against the textbook formula or the reference in
torch."""

import torch

from benchmarks.gpu_check import attention_checks, layer_checks, sampling_checks, stored_checks
from benchmarks.gpu_check.cells import Cells
from benchmarks.gpu_check.plan import Plan


def run(plan: Plan, cells: Cells) -> None:
    device = torch.device(plan.device)
    layer_checks.run(plan, device, cells)
    sampling_checks.run(plan, device, cells)
    attention_checks.run(plan, device, cells)
    stored_checks.run(plan, device, cells)
