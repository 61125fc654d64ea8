"""The stand-in for CUDA graphs keeps what a graph keeps, and refuses what a capture refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.engine.marks import needs_interpreter
from tests.engine.tape import Tape


def test_a_replay_sees_what_its_inputs_hold_by_then():
    x, weight = torch.arange(6.0).view(2, 3), torch.ones(4, 3)

    def step() -> torch.Tensor:
        hidden = F.linear(x, weight).relu_()
        total = torch.zeros(2)
        total += hidden[:, 1:].sum(dim=-1)  # in place, through a view
        return total.view(1, 2)

    tape = Tape.capture(step)
    before = tape.result
    assert before.tolist() == [[9, 36]]
    x.copy_(torch.ones(2, 3))
    tape.replay()
    tape.replay()
    assert before.tolist() == [[9, 9]], "in the tensor that the capture returned"


@torch.inference_mode()
def test_under_inference_mode_too():
    x = torch.arange(4.0)
    tape = Tape.capture(lambda: x.to(torch.float64).reshape(2, 2).t().contiguous() @ torch.ones(2).double())
    x.mul_(2)
    tape.replay()
    assert tape.result.tolist() == [4, 8]


def test_numbers_and_branches_are_those_of_the_capture():
    x, factor = torch.ones(1), 2
    host = np.array([5.0], dtype=np.float32)

    def step() -> torch.Tensor:
        return x * factor + torch.from_numpy(host.copy()) if factor > 1 else x

    tape = Tape.capture(step)
    x.fill_(10)
    factor, host[0] = 0, 7
    tape.replay()
    assert tape.result.item() == 25


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: [0, 1, 2][x.long()[1]],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
)
def test_what_waits_for_the_device_is_refused(wait, is_inference):
    x = torch.tensor([0.0, 1.0])
    with torch.inference_mode(is_inference):
        wait(x)
        with pytest.raises(RuntimeError, match="in a capture"):
            Tape.capture(lambda: wait(x))
        wait(x)


@needs_interpreter
def test_triton_kernels_are_replayed_with_the_numbers_they_were_launched_with():
    import triton
    import triton.language as tl

    from ingine.engine.kernels.layers.triton_ops import TritonOps

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=generator)
    tape = Tape.capture(lambda: TritonOps().silu_mul(x + 1).sum(dim=0))
    x.normal_(generator=generator)
    tape.replay()
    torch.testing.assert_close(tape.result, TritonOps().silu_mul(x + 1).sum(dim=0))

    @triton.jit
    def add_kernel(x_ptr, number, SIZE: tl.constexpr):
        index = tl.arange(0, SIZE)
        tl.store(x_ptr + index, tl.load(x_ptr + index) + number)

    total, number = torch.zeros(4), 3
    tape = Tape.capture(lambda: add_kernel[(1,)](total, number, SIZE=4))
    number = 100
    tape.replay()
    assert total.tolist() == [6] * 4


@needs_interpreter
@torch.inference_mode()
def test_a_whole_decode_step_is_replayed_at_other_positions(tmp_path):
    """The model, its logits and sampling, of two sequences and a row of padding."""
    from ingine.engine.kernels.attention import AttentionMetadata
    from ingine.engine.kernels.sampling import cuda as device_sampling
    from ingine.engine.kernels.select import triton_kernels
    from ingine.engine.models.loader import load_model
    from ingine.sampling_params import SamplingParams
    from tests.tiny_models import make_tiny_model

    model = load_model(
        make_tiny_model(tmp_path, "qwen3"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=triton_kernels(),
    )
    kv_caches = model.allocate_kv_caches(num_blocks=4, block_size=4)
    block_tables = torch.tensor([[1, 3], [2, 0], [0, 0]], dtype=torch.int32)
    params = [SamplingParams(temperature=0), SamplingParams(top_p=0.8), SamplingParams(temperature=0)]
    input_ids, positions = torch.tensor([5, 9, 0]), torch.tensor([0, 0, 0])
    slot_mapping, seq_lens = torch.tensor([4, 8, -1]), torch.tensor([1, 1, 0], dtype=torch.int32)
    rows = torch.from_numpy(device_sampling.pack_params(params, np.float32([0, 0.5, 0])))
    query_start_loc = torch.arange(4, dtype=torch.int32)

    def step() -> torch.Tensor:
        metadata = AttentionMetadata(
            slot_mapping,
            block_tables,
            seq_lens,
            query_start_loc,
            num_decodes=3,
            query_lens=[1, 1, 1],
            kv_lens=[],
        )
        hidden = model.forward(input_ids, positions, kv_caches, metadata)
        return device_sampling.choose(model.compute_logits(hidden), rows)

    tape = Tape.capture(step)
    replayed = []
    for position in range(6):
        positions[:2] = position
        seq_lens[:2] = position + 1
        slot_mapping[:2] = block_tables[:2, position // 4] * 4 + position % 4
        rows[1, 4] = position / 6
        tape.replay()
        expected = step()
        assert tape.result[:2].tolist() == expected[:2].tolist()
        input_ids[:2] = expected[:2]
        replayed += expected[:2].tolist()
    assert len(set(replayed)) > 6, "tokens that say something"
