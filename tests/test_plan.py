"""plan(): what each worker of each rank reads in an epoch, for any shards, ranks, workers and batch size."""

import itertools
import math
from collections import Counter

from commands import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

plan = load("main-wds.py").plan
SHARDS = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 2)), min_size=1, max_size=20).filter(sum)
RANKS = st.integers(1, 7)
WORKERS = st.integers(0, 5)
BATCH_SIZE = st.integers(1, 64)
EPOCH = st.integers(0, 3)
SEED = st.integers(0, 99)
many_examples = settings(deadline=None, max_examples=500, database=None, suppress_health_check=[HealthCheck.too_slow])


def batches_of_rank(lengths, epoch, rank, world_size, workers, batch_size, seed):
    """A rank's batches of sample numbers as a DataLoader returns them. seed=None is the plan for validation.

    The samples are numbered over all shards. Each worker batches what it reads, and the workers take turns.
    """
    workers = max(workers, 1)  # with 0 the main process reads as the only worker
    offsets = [0, *itertools.accumulate(lengths)]
    queues = []
    for worker in range(workers):
        samples = []
        for shard, first, last in plan(lengths, batch_size, rank, world_size, seed, epoch, worker, workers):
            assert 0 <= first < last <= lengths[shard]
            samples += range(offsets[shard] + first, offsets[shard] + last)
        queues.append([samples[i : i + batch_size] for i in range(0, len(samples), batch_size)])
    batches = []
    for turn in itertools.count():
        queue = queues[turn % workers]
        if not queue:
            break
        batches.append(queue.pop(0))
    assert not any(queues), "a worker ran out of batches before its last turn"
    return batches


def batch_sizes_of_sampler(total, rank, world_size, batch_size):
    """The batch sizes of main-orig.py's training loader."""
    sampler = DistributedSampler(range(total), world_size, rank)
    return [len(batch) for batch in BatchSampler(sampler, batch_size, drop_last=False)]


@many_examples
@given(SHARDS, EPOCH, RANKS, WORKERS, BATCH_SIZE, SEED)
def test_training_reads_each_sample(lengths, epoch, ranks, workers, batch_size, seed):
    """In DistributedSampler's batch sizes, and at most W-1 samples are read twice."""
    total = sum(lengths)
    counts = Counter()
    for rank in range(ranks):
        batches = batches_of_rank(lengths, epoch, rank, ranks, workers, batch_size, seed)
        assert [len(batch) for batch in batches] == batch_sizes_of_sampler(total, rank, ranks, batch_size)
        counts.update(itertools.chain(*batches))
    assert counts.total() == math.ceil(total / ranks) * ranks
    if total >= ranks:
        assert sorted(counts) == list(range(total))
        assert max(counts.values()) <= 2


@many_examples
@given(SHARDS, RANKS, WORKERS, BATCH_SIZE)
def test_validation_reads_each_sample_once(lengths, ranks, workers, batch_size):
    """Each rank gets a range of the samples, and without workers in order."""
    samples = []
    per_rank = []
    for rank in range(ranks):
        batches = batches_of_rank(lengths, 0, rank, ranks, workers, batch_size, seed=None)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert all(batch == list(range(batch[0], batch[-1] + 1)) for batch in batches)
        if workers < 2:
            assert batches == sorted(batches)
        samples += sorted(itertools.chain(*batches))
        per_rank.append(sum(len(batch) for batch in batches))
    assert samples == list(range(sum(lengths)))
    assert max(per_rank) - min(per_rank) <= 1


@many_examples
@given(SHARDS, EPOCH, RANKS, WORKERS, BATCH_SIZE, st.none() | SEED)
def test_worker_reads_at_most_two_partial_shards(lengths, epoch, ranks, workers, batch_size, seed):
    for rank, worker in itertools.product(range(ranks), range(workers)):
        pieces = plan(lengths, batch_size, rank, ranks, seed, epoch, worker, workers)
        is_whole = [(first, last) == (0, lengths[shard]) for shard, first, last in pieces]
        assert all(is_whole[1:-1])
        assert all(first == 0 for _, first, _ in pieces[1:])  # only its first shard has samples to skip


@many_examples
@given(SHARDS, EPOCH, SEED, st.data())
def test_order_depends_on_seed_and_epoch_only(lengths, epoch, seed, data):
    """Laid end to end, the pieces of all workers are the same sequence, whatever the number of ranks and workers."""
    sequences = []
    for _ in range(2):
        ranks = data.draw(RANKS)
        workers = data.draw(st.integers(1, 5))
        batch_size = data.draw(BATCH_SIZE)
        samples = []
        for rank in range(ranks):
            parts = []
            for worker in range(workers):
                pieces = plan(lengths, batch_size, rank, ranks, seed, epoch, worker, workers)
                parts.append([(shard, i) for shard, first, last in pieces for i in range(first, last)])
            batches = sum(math.ceil(len(part) / batch_size) for part in parts)
            for i in range(workers):  # the worker whose turn is last has the last range
                samples += parts[(batches + i) % workers]
        sequences.append(samples[: sum(lengths)])  # without those that are read twice
    assert sequences[0] == sequences[1]


def test_each_seed_and_epoch_has_its_own_order():
    def shard_order(seed, epoch):
        return tuple(shard for shard, _, _ in plan([10] * 30, 8, 0, 1, seed, epoch))

    orders = {shard_order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert shard_order(None, 0) == shard_order(None, 1) == tuple(range(30))
