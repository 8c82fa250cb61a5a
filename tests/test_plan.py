"""What each worker of each rank reads in an epoch: for any shards, ranks, workers, batch sizes, stops and changes."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from commands import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

main_wds = load("main-wds.py")
plan = main_wds.plan
SHARDS = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 2)), min_size=1, max_size=20).filter(sum)
RANKS = st.integers(1, 7)
WORKERS = st.integers(0, 5)
BATCH_SIZE = st.integers(1, 64)
EPOCH = st.integers(0, 3)
SEED = st.integers(0, 99)
many_examples = settings(deadline=None, max_examples=500, database=None, suppress_health_check=[HealthCheck.too_slow])


def whole(lengths):
    """The samples of a whole epoch."""
    return [range(length) for length in lengths]


def batches_of_rank(lengths, epoch, rank, world_size, workers, batch_size, seed):
    """A rank's batches of sample numbers as a DataLoader returns them. seed=None is the plan for validation.

    The samples are numbered over all shards. Each worker batches what it reads, and the workers take turns.
    """
    workers = max(workers, 1)  # with 0 the main process reads as the only worker
    offsets = [0, *itertools.accumulate(lengths)]
    queues = []
    for worker in range(workers):
        samples = []
        for shard, numbers in plan(whole(lengths), batch_size, rank, world_size, seed, epoch, worker, workers):
            assert 0 <= numbers[0] <= numbers[-1] < lengths[shard]
            samples += [offsets[shard] + number for number in numbers]
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
        pieces = plan(whole(lengths), batch_size, rank, ranks, seed, epoch, worker, workers)
        assert all(numbers == range(lengths[shard]) for shard, numbers in pieces[1:-1])
        assert all(numbers[0] == 0 for _, numbers in pieces[1:])  # only its first shard has samples to skip


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
                pieces = plan(whole(lengths), batch_size, rank, ranks, seed, epoch, worker, workers)
                parts.append([(shard, number) for shard, numbers in pieces for number in numbers])
            batches = sum(math.ceil(len(part) / batch_size) for part in parts)
            for i in range(workers):  # the worker whose turn is last has the last range
                samples += parts[(batches + i) % workers]
        sequences.append(samples[: sum(lengths)])  # without those that are read twice
    assert sequences[0] == sequences[1]


def test_each_seed_and_epoch_has_its_own_order():
    def shard_order(seed, epoch):
        return tuple(shard for shard, _ in plan(whole([10] * 30), 8, 0, 1, seed, epoch))

    orders = {shard_order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert shard_order(None, 0) == shard_order(None, 1) == tuple(range(30))


# ---------------------------------------------------------------------------- an epoch of several runs

OPTIONS = st.fixed_dictionaries(
    {
        "ranks": st.integers(1, 4),
        "workers": st.integers(0, 3),
        "batch_size": st.integers(1, 20),
        "shuffle": st.sampled_from([0, 1, 2, 7, 30, 1000]),
        "seed": st.integers(0, 2),
    }
)
RUNS = st.lists(st.tuples(OPTIONS, st.integers(0, 12)), min_size=1, max_size=5)  # options and steps of each


@pytest.fixture(scope="module", autouse=True)
def no_files():
    """read_shard() yields samples of the class that is their number over all shards, which starts with the `url`."""

    def read_shard(url, length, numbers):
        for number in numbers:
            yield {"__url__": "", "__key__": str(url + number), "jpg": b"", "cls": b"%d" % (url + number)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_wds, "read_shard", read_shard)
        yield


def no_image(_):
    return torch.tensor(0)


def dataset_of_rank(lengths, rank, ranks, **options):
    urls = list(itertools.accumulate(lengths, initial=0))
    return main_wds.ShardDataset(urls, lengths, "", no_image, rank=rank, world_size=ranks, **options)


def batches_of(dataset):
    """The batches from the dataset's position on, as lists of sample numbers: those of its workers in turn."""
    workers = dataset.workers
    infos = [SimpleNamespace(id=worker, num_workers=workers) for worker in range(workers)] or [None]
    iterators = [iter(dataset) for _ in infos]
    with pytest.MonkeyPatch.context() as patch:
        for worker in itertools.cycle(range(len(infos))):
            patch.setattr(main_wds, "get_worker_info", lambda worker=worker: infos[worker])
            batch = next(iterators[worker], None)
            if batch is None:
                break
            yield batch[1].tolist()
        for worker, iterator in enumerate(iterators):
            patch.setattr(main_wds, "get_worker_info", lambda worker=worker: infos[worker])
            assert next(iterator, None) is None, "a worker had batches left after its last turn"


def run(lengths, epoch, options, steps, position):
    """(for each rank its batches, the position after that many steps or at the end of the epoch)."""
    by_rank = []
    ends = []
    for rank in range(options["ranks"]):
        dataset = dataset_of_rank(lengths, rank, **options)
        dataset.set_epoch(epoch)
        if position:
            dataset.load_state_dict(position)
        first = dataset.position["step"]
        last = min(first + steps, len(dataset))
        by_rank.append(list(itertools.islice(batches_of(dataset), last - first)))
        ends.append((len(dataset), dataset.state_dict(last)))
        assert len(by_rank[-1]) == last - first
    assert ends == ends[:1] * len(ends)  # on all ranks
    return by_rank, ends[0][1]


@settings(many_examples, max_examples=1000)
@given(SHARDS, EPOCH, RUNS)
def test_epoch_of_several_runs(lengths, epoch, runs):
    """Each sample is used once but for at most ranks - 1 repeats in each run; ranks have batches of the same sizes.

    Ranks, workers, batch size, buffer and seed change after any number of steps. The last run goes to the end.
    """
    position = None
    numbers = Counter()
    for i, (options, steps) in enumerate(runs):
        steps = sum(lengths) if i == len(runs) - 1 else steps
        by_rank, position = run(lengths, epoch, options, steps, position)
        sizes = [list(map(len, batches)) for batches in by_rank]
        assert sizes == sizes[:1] * len(sizes)
        assert all(size == options["batch_size"] for size in sizes[0][:-1])
        numbers.update(itertools.chain(*itertools.chain(*by_rank)))
    assert numbers.keys() == set(range(sum(lengths)))
    assert numbers.total() - len(numbers) <= sum(options["ranks"] - 1 for _, options in position["runs"])
    assert len(position["runs"]) <= len(runs)
    options, _ = runs[0]
    assert run(lengths, epoch, options, sum(lengths), position)[0] == [[]] * options["ranks"]  # nothing is left


@settings(many_examples, max_examples=200)
@given(SHARDS, EPOCH, RUNS, st.integers(0, 12))
def test_same_options_give_the_same_batches(lengths, epoch, runs, steps):
    """Also after changes, and however often a run is stopped."""
    position = None
    for options, taken in runs:
        _, position = run(lengths, epoch, options, taken, position)
    whole, end = run(lengths, epoch, options, sum(lengths), position)
    first, position = run(lengths, epoch, options, steps, position)
    rest, position = run(lengths, epoch, options, sum(lengths), position)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole
    assert position == end
