"""plan(): who reads what in an epoch. Any shards, ranks, workers and batch size."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

main_wds = load("main-wds.py")
SHARDS = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 2)), min_size=1, max_size=20).filter(sum)
RANKS, WORKERS, BATCH = st.integers(1, 7), st.integers(0, 5), st.integers(1, 64)
EPOCH, SEED = st.integers(0, 3), st.integers(0, 99)
CASES = settings(deadline=None, max_examples=2000, database=None)
IMAGENET = [1000] * 1281 + [167]


def positions(lengths):
    """For each shard the positions of its samples among all."""
    ends = list(itertools.accumulate(lengths))
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def read(lengths, epoch, rank, ranks, workers, batch_size, seed=0):
    """A rank's batches as a DataLoader gets them: each worker batches what it reads, and the workers take turns.

    Without a seed they are those of validation.
    """
    workers, where = max(workers, 1), positions(lengths)  # 0: the process itself is worker 0 of 1
    queues = []
    for worker in range(workers):
        pieces = main_wds.plan(lengths, batch_size, rank, ranks, seed, epoch, worker, workers)
        assert all(0 <= first < last <= lengths[shard] for shard, first, last in pieces)
        samples = [i for shard, first, last in pieces for i in where[shard][first:last]]
        queues.append([samples[i : i + batch_size] for i in range(0, len(samples), batch_size)])
    steps = range(sum(map(len, queues)))
    assert [len(range(worker, len(steps), workers)) for worker in range(workers)] == list(map(len, queues))
    return [queues[step % workers][step // workers] for step in steps]


def sizes(total, rank, ranks, batch_size):
    """The sizes of the batches of main-orig.py's training loader."""
    sampler = DistributedSampler(range(total), ranks, rank)
    return [len(batch) for batch in BatchSampler(sampler, batch_size, drop_last=False)]


@CASES
@given(SHARDS, EPOCH, RANKS, WORKERS, BATCH, SEED)
def test_a_training_epoch_is_the_whole_set(lengths, epoch, ranks, workers, batch_size, seed):
    """Each rank has ceil(N/W) samples in DistributedSampler's batches; each sample comes, at most W-1 of them twice."""
    total, seen = sum(lengths), Counter()
    for rank in range(ranks):
        batches = read(lengths, epoch, rank, ranks, workers, batch_size, seed)
        assert [len(batch) for batch in batches] == sizes(total, rank, ranks, batch_size)
        assert sum(map(len, batches)) == math.ceil(total / ranks)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        seen.update(itertools.chain(*batches))
    if total >= ranks:
        assert sorted(seen) == list(range(total))
        assert max(seen.values()) <= 2 and seen.total() - total <= ranks - 1


@CASES
@given(SHARDS, RANKS, WORKERS, BATCH)
def test_validation_is_each_sample_once_in_order(lengths, ranks, workers, batch_size):
    """Over the ranks; within a rank the workers' ranges are in order, and without workers everything is."""
    whole, numbers = [], []
    for rank in range(ranks):
        batches = read(lengths, 0, rank, ranks, workers, batch_size, seed=None)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert all(batch == list(range(batch[0], batch[-1] + 1)) for batch in batches)
        if workers < 2:
            assert batches == sorted(batches)
        whole += sorted(itertools.chain(*batches))
        numbers.append(sum(map(len, batches)))
    assert whole == list(range(sum(lengths)))
    assert max(numbers) - min(numbers) <= 1


@CASES
@given(SHARDS, EPOCH, RANKS, WORKERS, BATCH, st.none() | SEED)
def test_at_most_two_partial_shards_per_worker(lengths, epoch, ranks, workers, batch_size, seed):
    for rank, worker in itertools.product(range(ranks), range(workers)):
        pieces = main_wds.plan(lengths, batch_size, rank, ranks, seed, epoch, worker, workers)
        whole = [(first, last) == (0, lengths[shard]) for shard, first, last in pieces]
        assert whole.count(False) <= 2 and all(whole[1:-1])
        assert all(first == 0 for _, first, _ in pieces[1:])  # it begins within a shard once at most


@CASES
@given(SHARDS, EPOCH, RANKS, SEED, st.data())
def test_the_shards_order_is_that_of_seed_and_epoch(lengths, epoch, ranks, seed, data):
    """Whatever the ranks, workers and batch size: laid end to end, their pieces are the same sequence of shards."""
    lines = []
    for _ in range(2):
        world_size, workers, batch_size = data.draw(RANKS), data.draw(st.integers(1, 5)), data.draw(BATCH)
        pieces = []
        for rank in range(world_size):
            rest = rank, world_size, seed, epoch
            share = [main_wds.plan(lengths, batch_size, *rest, worker, workers) for worker in range(workers)]
            batches = sum(math.ceil(sum(last - first for _, first, last in part) / batch_size) for part in share)
            for turn in range(workers):  # the worker whose turn is last has the last range
                pieces += share[(batches + turn) % workers]
        samples = [(shard, i) for shard, first, last in pieces for i in range(first, last)]
        lines.append(samples[: sum(lengths)])
    assert lines[0] == lines[1]


def order(seed, epoch=0, rank=0, ranks=1):
    return [shard for shard, _, _ in main_wds.plan([10] * 30, 8, rank, ranks, seed, epoch)]


def test_epochs_seeds_and_ranks_differ():
    assert order(None) == order(None, 1) == list(range(30)) and sorted(order(0)) == list(range(30))
    orders = [order(None)] + [order(seed, epoch) for epoch in range(5) for seed in range(5)]
    assert len(set(map(tuple, orders))) == 26
    state = random.getstate()
    assert order(3) == order(3) and random.getstate() == state  # it neither reads nor changes the common generator
    shares = [order(0, 0, rank, 3) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(30)) and len(set(map(tuple, shares))) == 3


def test_the_same_in_another_process():
    """plan() alone, cut out of the script, so that torch is not started for each hash seed."""
    text = (ROOT / "main-wds.py").read_text()
    function = text[text.index("\ndef plan(") :].partition("\n# ------")[0]
    call = "print(json.dumps([plan([3, 50, 0, 7] * 9, 4, rank, 3, 5, 1, 1, 2) for rank in range(3)]))"
    command = [sys.executable, "-c", f"import json, math, random\n{function}\n{call}"]
    expected = [main_wds.plan([3, 50, 0, 7] * 9, 4, rank, 3, 5, 1, 1, 2) for rank in range(3)]
    for hash_seed in ("0", "1", "random"):
        stdout = subprocess.run(command, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True).stdout
        assert [[tuple(piece) for piece in pieces] for pieces in json.loads(stdout)] == expected


@pytest.mark.parametrize("ranks, workers, skipped", [(8, 4, 0.02), (64, 8, 0.25)])
def test_what_imagenet_reads_in_vain(ranks, workers, skipped):
    """A worker reads its first shard from the start, and skips half of it on average."""
    everyone = itertools.product(range(ranks), range(workers))
    plans = [main_wds.plan(IMAGENET, 256, rank, ranks, 0, 0, worker, workers) for rank, worker in everyone]
    assert sum(first for pieces in plans for _, first, _ in pieces) < skipped * sum(IMAGENET)
