"""Moving batches to the device, and choosing the device, as far as they can be tested without a GPU."""

import argparse

import pytest
import torch
from commands import Batches, args_of, load, summary
from torch.profiler import ProfilerActivity, profile

main_wds = load("main-wds.py")
BATCHES = 5


@pytest.fixture
def args():
    return argparse.Namespace(
        device=torch.device("cpu"), memory_format=torch.contiguous_format, amp=False, print_freq=100, rank=0,
        distributed=False, no_accel=False, gpu=None, multiprocessing_distributed=False,
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_uint8_images_are_normalized(memory_format):
    batches = [(torch.full((2, 4, 4, 3), i, dtype=torch.uint8), torch.tensor([i, i])) for i in range(BATCHES)]
    found = list(main_wds.to_device(batches, torch.device("cpu"), memory_format))
    assert len(found) == BATCHES
    for i, (images, target) in enumerate(found):
        pixel = (i / 255 - torch.tensor(main_wds.MEAN)) / torch.tensor(main_wds.STD)
        assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=memory_format)
        assert torch.allclose(images, pixel.view(1, 3, 1, 1).expand(2, 3, 4, 4), atol=1e-6)
        assert target.tolist() == [i, i]


def test_pick_device(script, args, monkeypatch):
    """On a machine with two GPUs, one with Apple's GPU, and one without."""
    module = load(script)
    selected = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", selected.append)

    def pick(local_rank, kind="cuda", count=2, ngpus_per_node=1, **options):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        args_of_rank = argparse.Namespace(**{**vars(args), **options})
        return str(module.pick_device(local_rank, ngpus_per_node, args_of_rank))

    assert [pick(0), pick(1), pick(2), pick(0, gpu=1)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert selected == [0, 1, 0, 1]
    assert pick(1, gpu=0, multiprocessing_distributed=True) == "cuda:1"
    assert pick(0, count=0) == "cpu"
    assert pick(0, no_accel=True) == "cpu"
    assert pick(0, "mps", count=1) == "mps:0"
    assert pick(0, "mps", count=1, distributed=True) == "cpu"
    with pytest.raises(module.DataError, match="--gpu 2: this machine has 2 GPUs"):
        pick(0, gpu=2)
    with pytest.raises(module.DataError, match="4 processes on this node, but it has 2 GPUs"):
        pick(1, ngpus_per_node=4, distributed=True)
    assert pick(1, ngpus_per_node=4, distributed=True, count=1) == "cuda:0"


def count_reads(module, steps, args):
    """How many values train() copies from tensors to Python numbers, each of which waits for the device."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = Batches([(torch.rand(2, 3, 4, 4), torch.tensor([1, 2]))] * steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        module.train(batches, model, torch.nn.CrossEntropyLoss(), optimizer, 0, args.device, args)
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::item")


def test_only_printed_steps_wait_for_the_device(script, args, capsys):
    """Of these steps only the first is printed."""
    module = load(script)
    assert count_reads(module, BATCHES, args) == count_reads(module, 1, args) > 0
    assert capsys.readouterr().out.count("Epoch: [0]") == 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_gpu_option_without_a_gpu(script, start, folders, shards):
    args = [arg for arg in args_of(script, folders, shards) if arg != "--no-accel"]
    out, _ = start(*args, "--gpu", 3, script=script).finish()
    assert "=> --gpu 3 is ignored" in out and len(summary(out)) == 1
