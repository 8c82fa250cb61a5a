"""The way of the batches to the device, as far as that shows without a GPU."""

import argparse

import pytest
import torch
from conftest import load

main_wds = load("main-wds.py")
BATCHES = 5


@pytest.fixture
def args():
    values = {"device": torch.device("cpu"), "memory_format": torch.contiguous_format, "amp": False}
    return argparse.Namespace(**values, print_freq=100, rank=0, distributed=False, ngpus_per_node=1)


def batches():
    """uint8 batches (2, 4, 4, 3) as workers hand them over: all pixels of number i are i, and so are its classes."""
    images = torch.arange(BATCHES, dtype=torch.uint8)[:, None, None, None, None].expand(BATCHES, 2, 4, 4, 3)
    return list(zip(images, torch.arange(BATCHES)[:, None].expand(BATCHES, 2), strict=True))


@pytest.fixture
def device_loader(args, monkeypatch):
    monkeypatch.setattr(main_wds.signal, "signal", lambda *_: None)  # the tests' own process keeps its handlers
    return lambda batches: main_wds.DeviceLoader(batches, main_wds.Run(args, None))


def test_bytes_become_what_the_original_normalises(args, device_loader):
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    for i, (images, target) in enumerate(device_loader(loader)):
        expected = (i / 255 - torch.tensor(main_wds.MEAN)) / torch.tensor(main_wds.STD)
        assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32 and images.is_contiguous()
        assert torch.allclose(images[1, :, 2, 3], expected, atol=1e-6) and target.tolist() == [i, i]
    assert i == BATCHES - 1
    args.memory_format = torch.channels_last
    assert next(iter(device_loader(loader)))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_which_device(script, args, monkeypatch):
    """As torch.accelerator tells of a machine with two GPUs, one with Apple's, and one with none."""
    module, chosen = load(script), []

    def pick(local_rank, kind="cuda", count=2, **more):
        for name, value in {"no_accel": False, "gpu": None, "multiprocessing_distributed": False, **more}.items():
            setattr(args, name, value)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(count))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        return str(module.pick_device(local_rank, args))

    assert [pick(0), pick(1), pick(2), pick(0, gpu=1)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert chosen == [0, 1, 0, 1]
    assert pick(1, gpu=0, multiprocessing_distributed=True) == "cuda:1"
    assert [pick(0, count=0), pick(0, no_accel=True), pick(0, "mps", 1, distributed=True)] == ["cpu"] * 3
    assert pick(0, "mps", 1, distributed=False) == "mps:0"
    with pytest.raises(module.DataError, match="--gpu 2: this machine has 2 GPUs, numbered from 0"):
        pick(0, gpu=2)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_a_step_reads_nothing_from_the_device(script, args, monkeypatch, capsys):
    """Loss and accuracy are read when they are printed, here at the first of the steps alone."""
    module, reads = load(script), []
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    optimizer, criterion = torch.optim.SGD(net.parameters(), 0.1), torch.nn.CrossEntropyLoss()
    given = [(torch.rand(2, 3, 4, 4), torch.tensor([1, 2])) for _ in range(BATCHES)]
    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)
        note = lambda tensor, *rest, plain=plain: (reads.append(len(reads)), plain(tensor, *rest))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, note)

    def steps():
        for batch in given:
            counts.append(len(reads))
            yield batch
        counts.append(len(reads))

    counts = []
    train_loader = type("Loader", (), {"__len__": lambda self: BATCHES, "__iter__": lambda self: steps()})()
    module.train(train_loader, net, criterion, optimizer, 0, args.device, args)
    assert counts[1] > counts[0] and counts[1:] == [counts[1]] * BATCHES
    assert capsys.readouterr().out.count("Epoch: [0]") == 1
