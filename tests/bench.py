#!/usr/bin/env python3
"""Measure the gain from shards: loading only, then training, from shards and from folders in turn.

    ./run bench                                  on ./data and ./shards, or on a sample made for it
    ./run bench --quick                          loading only, with few images: two minutes
    ./run bench --only loading -j 16             the loaders without a model, with 16 workers
    ./run bench --only loading --cold            from the disk: for data that does not fit in memory
    ./run bench --only training --steps 500 -a resnet50 -b 256 -j 16      on ImageNet: the first 500 steps of an epoch
    ./run bench --decode pil                     the same decoder for all: the effect of the shards only

Loading measures each way of reading by itself, `dummy` (a loader that neither reads nor decodes) and the ceiling
(decoding and augmenting the same bytes from memory in one process per worker, without a loader). Training runs
main-wds.py for one epoch in one process: from shards with its own decoder, and from folders with the original's, unless
--decode is given.

Each round measures all rows in turn; the first round is a warm-up. Ratios are taken within a round and printed as
median (minimum-maximum). Images/s include starting the workers; in training, they start with the wait for the first
batch. Each run is recorded in bench.json; bench.png is a chart.

--cold evicts the files that a run will read from memory; other caches, such as directory listings, stay. If a dataset
is larger than --images, a run reads randomly chosen files or whole shards; more --images are more representative then.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import Barrier

from sample import BATCH_SIZE, MARK, TRAINING

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INDEX = "_info.json"
DECODERS = {"orig": "pil", "wds": "tensor"}  # in training
V2 = "ceiling v2"  # the row that decodes to tensors and uses torchvision's own transforms
QUICK = 40  # training images per class in the sample of --quick
STOPPED = 128 + signal.SIGINT  # exit status after Ctrl-C
METER = r"\t{} +(\S+) \( *(\S+)\)"  # value (average)
STEP = re.compile(r"Epoch: \[\d+\]\[ *\d+/(\d+)\]" + "".join(map(METER.format, ("Time", "Data", "Loss", "Acc@1"))))

COLUMNS = [("first_batch", "11.2f", " s"), ("waiting", "8.1%", ""), ("train_loss", "12.3f", ""), ("acc1", "7.1f", "")]
Row = namedtuple("Row", "name dataset decode options")  # what is measured; the options are main-wds.py's
Result = namedtuple("Result", "part rows runs workers")  # of "loading" or "training"; runs are the records


def say(line=""):
    print(line, flush=True)


def fail(message):
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(2)


@functools.cache
def script():
    """main-wds.py as a module, for its loaders. It imports PyTorch, so it is imported only when needed."""
    if "main_wds" not in sys.modules:
        spec = importlib.util.spec_from_file_location("main_wds", os.path.join(ROOT, "main-wds.py"))
        sys.modules["main_wds"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["main_wds"])
    return sys.modules["main_wds"]


# ---------------------------------------------------------------------------- the data to measure


def prepare(wanted):
    """Make ./data or ./shards if missing, and return {dataset: folder} of the wanted datasets that exist."""
    if not os.path.lexists("data") and not os.path.exists(f"shards/{INDEX}"):
        say("no ./data here: making a small sample in ImageNet's format (./run clean deletes it)")
        call("tests/sample.py")
    if "wds" in wanted and os.path.exists("data") and not os.path.exists(f"shards/{INDEX}"):
        say("no shards in ./shards: making them from ./data")
        made = not os.path.lexists("shards")
        if made:
            os.mkdir("shards")
        try:
            call("makeshards.py", check=False)  # it prints its errors itself
        finally:
            if made and not os.listdir("shards"):
                os.rmdir("shards")
    found = {}
    if os.path.isdir("data/train"):
        found["orig"] = "data"
    if os.path.exists(f"shards/{INDEX}"):
        found["wds"] = "shards"
    for name, what in (("wds", "shards in ./shards"), ("orig", "folders of images in ./data")):
        if len(wanted) == 2 and name not in found:
            say(f"there are no {what}: measuring the other dataset alone")
    folders = {name: folder for name, folder in found.items() if name in wanted}
    if len(folders) == 2:
        check_same(folders)
    return folders or fail("neither ./data nor ./shards holds anything to measure")


def prepare_quick(wanted, scratch):
    """{dataset: folder} of a smaller sample than ./data's, made for this run only."""
    say(f"making a sample of {10 * QUICK} images in a temporary folder")
    folders = {"orig": f"{scratch}/data", "wds": f"{scratch}/shards"}
    call("tests/sample.py", "--data", folders["orig"], "--train", str(QUICK), "--val", "1", quiet=True)
    make_shards(folders["orig"], folders["wds"])
    return {name: folders[name] for name in folders if name in wanted}


def make_shards(data, shards, *options):
    """Write the training shards to a new folder. Returns the folder, or None if makeshards.py failed."""
    os.mkdir(shards)
    args = ["--data", data, "--shards", shards, "--splits", "train", *options]
    return shards if call("makeshards.py", *args, check=False, quiet=True) else None


def call(name, *args, check=True, quiet=False):
    """Run a script of the project, and return whether it succeeded.

    Ctrl-C reaches the script as well. Wait until it has stopped, then exit.
    """
    signals = []

    def note_signal(number, _):
        signals.append(number)

    command = [sys.executable, os.path.join(ROOT, name), *args]
    previous = signal.signal(signal.SIGINT, note_signal)
    done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None)
    signal.signal(signal.SIGINT, previous)
    if signals or done.returncode == STOPPED:
        if done.returncode <= 0:  # else the script has printed a line
            print("bench: stopped", file=sys.stderr)
        sys.exit(STOPPED)
    if check:
        done.check_returncode()
    return done.returncode == 0


def check_same(folders):
    classes = sorted(entry.name for entry in os.scandir(f"{folders['orig']}/train") if entry.is_dir())
    if read_index(folders["wds"]).get("classes", classes) != classes:
        fail("./shards were not made from ./data: their classes differ; --dataset wds or orig measures one of them")


def read_index(folder):
    with open(os.path.join(folder, INDEX)) as file:
        return json.load(file)


def training_entry(folder):
    """The entry of the training shards in the index."""
    return read_index(folder)["splits"].get("train") or fail(f"{folder}: its {INDEX} names no training shards")


def count_images(folders):
    """The number of training images, which must be the same in both datasets."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    samples = {}
    if "orig" in folders:
        samples["orig"] = sum(path.lower().endswith(IMG_EXTENSIONS) for path in paths_in(f"{folders['orig']}/train"))
    if "wds" in folders:
        samples["wds"] = training_entry(folders["wds"])["num_samples"]
    if len(set(samples.values())) > 1:
        fail(f"./shards and ./data hold {samples['wds']} and {samples['orig']} training images; write the shards again")
    return next(iter(samples.values()))


def paths_in(folder):
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            yield os.path.join(parent, name)


def drop_from_cache(paths):
    os.sync()  # pages that are not yet written can't be dropped
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------- loading


def loading_rows(folders, decode, resized):
    """Each dataset with each decoder, the resized shards if any, `dummy` and the ceilings."""
    option = {"orig": "--data", "wds": "--shards"}
    decoders = [decode] if decode else ["pil", "tensor"]
    last = decoders[-1]
    rows = []
    for name in decoders:
        for dataset, folder in folders.items():
            rows.append(Row(f"{dataset}/{name}", dataset, name, [option[dataset], folder]))
    if resized:
        size = training_entry(resized).get("plan", {}).get("resize")
        what = f"{size} px" if size else os.path.basename(os.path.abspath(resized))
        rows.append(Row(f"wds/{last}, {what}", "wds", last, ["--shards", resized]))
    rows.append(Row("dummy", "dummy", last, ["--dummy"]))
    for name in decoders:
        rows.append(Row(f"ceiling {name}", "ceiling", name, []))
    if "tensor" in decoders:
        rows.append(Row(V2, "ceiling", "tensor", []))
    return rows


def loading_args(row, rest, batch_size):
    """main-wds.py's options for a row, with what its main_worker() adds in a single process."""
    options = ["--workers", str(cores()), *rest, "--batch-size", str(batch_size), "--decode", row.decode]
    options += ["--dataset", "wds" if row.dataset == "wds" else "orig", *row.options]
    sys.argv[1:] = options
    args = script().parse_args()
    args.rank = 0
    args.world_size = 1
    args.distributed = False
    args.device = script().pick_device(0, 1, args)
    return args


def measure_loading(rows, rest, args):
    batch_size = args.batch_size or (16 if args.quick else 256)
    options = {row.name: loading_args(row, rest, batch_size) for row in rows}
    workers = options[rows[0].name].workers
    images = args.images or (QUICK * 5 if args.quick else 2000) * max(workers, 1)
    images += -images % (batch_size * max(workers, 1))  # the same number of whole batches for each worker
    say(f"\nloading: at least {images} images per run, {workers} workers, batches of {batch_size}; images/s:")
    files = read_files(options[rows[0].name], min(images, 2000))
    runs = []
    for i in range(args.repeats + 1):
        for row in rows:
            if row.dataset == "ceiling":
                run = decode_only(options[row.name], files, images, row.name == V2)
            else:
                run = load(options[row.name], images, args.cold)
            run |= {"batch_size": batch_size, "workers": workers}
            runs.append(record("loading", rows, row, i, run))
    return Result("loading", rows, runs, workers)


def load(args, images, cold):
    """One pass over a loader, up to that many images: batches as the workers return them, not yet on the device."""
    loader, names = make_loader(args, images)
    if cold:
        drop_from_cache(set(names))
    first = None
    count = 0
    start = time.perf_counter()
    for _, target in loader:
        count += len(target)
        seconds = time.perf_counter() - start
        first = first or seconds
        if count >= images:
            break
    return {"images": count, "seconds": seconds, "first_batch": first}


def make_loader(args, images):
    """(a loader of main-wds.py whose epoch has at least that many training images, the files that it reads)."""
    main_wds = script()
    with contextlib.redirect_stdout(None):  # without its lines about the dataset
        if args.dataset == "wds":
            urls, lengths = fit_epoch(*main_wds.find_shards(args.shards, "train")[:2], images)
            return shard_loader(args, urls, lengths), urls
        loader = main_wds.make_train_loader_orig(args)
    if args.dummy:
        return loader, []
    samples = loader.dataset.samples
    loader.dataset.samples, _ = fit_epoch(samples, [1] * len(samples), images)
    return loader, [path for path, _ in loader.dataset.samples]


def shard_loader(args, urls, lengths):
    """make_loader_wds() for these shards."""
    main_wds = script()
    options = {"workers": args.workers, "shuffle": args.shuffle, "reuse_memory": args.decode == "tensor"}
    dataset = main_wds.ShardDataset(urls, lengths, "", train_transform(args), args.batch_size, **options)
    workers = {"persistent_workers": True, "prefetch_factor": main_wds.PREFETCH} if args.workers else {}
    pin_memory = args.device.type == "cuda"
    return main_wds.DataLoader(dataset, None, num_workers=args.workers, pin_memory=pin_memory, **workers)


def train_transform(args):
    """From the bytes of an image file to what the workers return."""
    main_wds = script()
    return main_wds.v2.Compose([main_wds.DECODERS[args.decode], main_wds.make_transform(args, "train")])


def fit_epoch(items, lengths, images):
    """(items, lengths) of at least that many images: random items of a large dataset, or a small one repeated."""
    pairs = list(zip(items, lengths, strict=True))
    random.shuffle(pairs)
    chosen = []
    count = 0
    for item, length in pairs:
        if count >= images:
            break
        chosen.append((item, length))
        count += length
    return zip(*chosen * math.ceil(images / sum(lengths)), strict=True)


def read_files(args, count):
    """The bytes of up to that many training images, randomly chosen if there are more."""
    _, names = make_loader(args, count)
    names = dict.fromkeys(names)  # without repetitions
    return list(itertools.islice(read_images(args, names), count))


def read_images(args, names):
    """The bytes of each image in these image files or shards."""
    for name in names:
        with open(name, "rb") as file:
            if args.dataset == "orig":
                yield file.read()
                continue
            for sample in script().group_by_keys(script().tar_file_expander([{"url": name, "stream": file}])):
                (ending,) = script().IMAGES & sample.keys()
                yield sample[ending]


def decode_only(args, files, images, v2):
    """The ceiling: one process per worker, each decoding and augmenting images in memory."""
    workers = max(args.workers, 1)
    state = args, files, v2, Barrier(workers)
    with ProcessPoolExecutor(workers, initializer=begin_share, initargs=state) as pool:
        seconds = max(pool.map(decode_share, [range(i, images, workers) for i in range(workers)]))
    return {"images": images, "seconds": seconds, "first_batch": None}


def begin_share(*state):
    decode_share.state = state
    script().torch.set_num_threads(1)  # as in the loader's workers


def decode_share(share):
    """In a process of the pool: the seconds that its share takes, once all processes are ready."""
    args, files, v2, barrier = decode_share.state
    transform = v2_transform(args.image_size) if v2 else train_transform(args)
    barrier.wait()
    start = time.perf_counter()
    for i in share:
        transform(files[i % len(files)])
    return time.perf_counter() - start


def v2_transform(size):
    """Like main-wds.py's transform, but with torchvision's own crop and flip."""
    v2 = script().v2
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([script().decode_tensor, *crop, script().to_hwc])


def normalizing_time(args):
    """Microseconds per image for normalizing a batch of bytes on the device, the median of ten batches."""
    torch = script().torch
    images = torch.randint(256, (64, args.image_size, args.image_size, 3), dtype=torch.uint8)
    target = torch.zeros(64)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        ((normalized, _),) = script().to_device([(images, target)], args.device, args.memory_format)
        normalized[-1, -1, -1, -1].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[2:]) / len(images)


# ---------------------------------------------------------------------------- training


def measure_training(folders, rest, args):
    sample = os.path.exists(f"data/{MARK}")
    batch_size = args.batch_size or (BATCH_SIZE if sample else 256)
    rest = [*(TRAINING if sample else []), *rest, "--epochs", str(args.epochs), "--batch-size", str(batch_size)]
    samples = count_images(folders)
    rows = []
    for dataset in folders:
        decode = args.decode or DECODERS[dataset]
        options = ["--dataset", dataset, "--decode", decode]
        options += ["--data", os.path.abspath("data"), "--shards", os.path.abspath("shards")]
        rows.append(Row(f"{dataset}/{decode}", dataset, decode, options))
    say(f"\ntraining: {samples} images per epoch, main-wds.py {shlex.join(rest)}; images/s:")
    runs = []
    for i in range(args.repeats + 1):
        for row in rows:
            if args.cold:
                drop_from_cache(paths_in(folders[row.dataset]))
            run = train([*row.options, *rest], args.steps)
            epochs, steps = divmod(run["steps"], run.pop("total"))
            images = epochs * samples + steps * batch_size
            runs.append(record("training", rows, row, i, {"images": images, **run, "batch_size": batch_size}))
    return Result("training", rows, runs, None)


def train(rest, steps):
    """A run of main-wds.py, stopped after that many steps unless they are 0. `total` is the steps per epoch."""
    command = [sys.executable, os.path.join(ROOT, "main-wds.py"), "--print-freq", "1", *rest]
    times = []
    waits = []
    acc1 = None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        for line in process.stdout:
            if match := STEP.match(line):
                total = int(match[1])
                step, _, wait, _, _, loss, _, acc1 = map(float, match.groups()[1:])
                times.append(step)
                waits.append(wait)
            elif line.startswith(" * Acc@1"):
                acc1 = float(line.split()[2])
            if steps and len(times) == steps:
                process.terminate()
                break
        process.stdout.close()
        status = process.wait()
        if not times or (status and len(times) != steps):
            errors.seek(0)
            sys.stderr.write(errors.read())
            fail(f"this run ended with status {status}: {shlex.join(command)}")
    if not math.isfinite(loss):
        fail(f"the loss is {loss}: {shlex.join(command)}")
    run = {"seconds": sum(times), "first_batch": waits[0], "waiting": sum(waits) / sum(times)}
    return run | {"train_loss": loss, "acc1": acc1, "steps": len(times), "total": total}


# ---------------------------------------------------------------------------- the report


def record(part, rows, row, i, run):
    """The record of a run. Prints its images/s; a round is a line."""
    run["images_per_second"] = run["images"] / run["seconds"]
    if row is rows[0]:
        print(f"round {i}: " if i else "warm-up: ", end="")
    print(f"{row.name} {run['images_per_second']:.0f}", end="\n" if row is rows[-1] else "; ", flush=True)
    about = {"part": part, "row": row.name, "dataset": row.dataset, "decode": row.decode, "round": i, "warm_up": not i}
    return about | run


def values(result, row, key="images_per_second"):
    """A value of the row's runs, per round without the warm-up; empty if there is no such row."""
    return [run[key] for run in result.runs if run["row"] == row and not run["warm_up"]]


def ratios(result, row, base):
    """The row's images/s relative to the base's, per round."""
    return [a / b for a, b in zip(values(result, row), values(result, base), strict=False)]


def spread(numbers):
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"


def table(result, accuracy):
    """Print the median of each row's runs, and its ratio to the first row."""
    base = result.rows[0].name
    width = max(len(row.name) for row in result.rows)
    training = result.part == "training"
    columns = f"  waiting  train loss  {accuracy}" if training else ""
    say(f"\n{result.part:<{width}}  images/s  first batch{columns}  relative to {base}")
    for row in result.rows:
        line = f"{row.name:<{width}}  {statistics.median(values(result, row.name)):8.1f}"
        for key, form, unit in COLUMNS if training else COLUMNS[:1]:
            if row.dataset == "ceiling":
                line += f"{'-':>13}"
            else:
                line += f"{statistics.median(values(result, row.name, key)):{form}}{unit}"
        if training:
            line += " " * (len(accuracy) - 5)
        say(f"{line}  {spread(ratios(result, row.name, base)) if row.name != base else '1.00'}")


def explain(result, normalize, device):
    """Print what contributes to the gain, in sentences."""
    names = [row.name for row in result.rows]
    resized = next((name for name in names if ", " in name), None)
    say()
    if result.part == "training":
        if len(names) == 2:
            say(f"Training from {names[1]} is {spread(ratios(result, *names[::-1]))} times as fast as from {names[0]}.")
        return
    for row, base, words in (
        ("wds/tensor", "orig/pil", "Total"),
        ("wds/tensor", "orig/tensor", "Shards only"),
        ("wds/pil", "orig/pil", "Shards only, with Pillow"),
        ("orig/tensor", "orig/pil", "Decoder only"),
        (resized, str(resized).partition(",")[0], "Smaller images"),
    ):
        if row in names and base in names:
            say(f"{words}: {row} loads {spread(ratios(result, row, base))} times as fast as {base}.")
    row = next(row for row in ("wds/tensor", "wds/pil", "orig/tensor", "orig/pil") if row in names)
    share = ratios(result, row, f"ceiling {row.partition('/')[2]}")
    say(f"{row} reaches {spread(share)} of its ceiling, the same decoding without a loader,")
    if "tensor" in row:
        say(f"and {spread(ratios(result, row, V2))} of the ceiling with torchvision's own transforms.")
    if work := own_work(result):
        say(f"dummy, the loader's own work: {work:.0f} microseconds per image after the first batch.")
    if "tensor" in row:
        say(f"In tensor rows, workers return uint8. Normalizing on the {device}, not included above, takes")
        say(f"{normalize:.0f} microseconds per image.")


def own_work(result):
    """Microseconds per image of `dummy` after the first batch; 0 if there was only one batch."""
    times = []
    for run in result.runs:
        if run["row"] == "dummy" and not run["warm_up"]:
            images = max(run["images"] - run["batch_size"], 1)
            times.append((run["seconds"] - run["first_batch"]) / images)
    return 1e6 * statistics.median(times)


def machine():
    torch = script().torch
    decoder, _ = script().jpeg_decoder()  # of --decode tensor
    names = ["torch", "torchvision", "webdataset", "Pillow"]
    if decoder == "TorchCodec":
        names.append("torchcodec")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = {"cpu": cpu_name(), "cores": cores(), "gpu": gpu, "system": platform.system(), "decoder": decoder}
    return about | {"versions": {"Python": platform.python_version()} | {name: version(name) for name in names}}


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(about, repeats, cold):
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    hardware = f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}"
    files = "cold: files from the disk" if cold else "files in memory"
    return f"{hardware}; {packages}; tensor: {about['decoder']}; {files}; n = {repeats}"


# ---------------------------------------------------------------------------- the chart


def chart(path, results, footer):
    """Write horizontal bars of images/s, with a panel for loading and one for training."""
    try:
        import matplotlib
    except ImportError:
        say("no chart: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    bars = [[row for row in result.rows if row.dataset in ("orig", "wds")] for result in results]
    figure = Figure(figsize=(8, 1.7 + sum(0.9 + 0.42 * len(rows) for rows in bars)), dpi=150, layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=[len(rows) + 1 for rows in bars])[:, 0]
    for axes, result, rows in zip(panels, results, bars, strict=True):
        panel(axes, result, rows)
    figure.supxlabel("\n".join(textwrap.wrap(footer, 130)), fontsize=8, color="0.35", x=0.01, ha="left")
    figure.savefig(path)
    say(f"chart: {path}")


def panel(axes, result, rows):
    base = rows[0].name
    top = 0
    for y, row in enumerate(rows):
        rates = values(result, row.name)
        median = statistics.median(rates)
        right = max(rates)
        color = "#2f6db3" if row.dataset == "wds" else "#a9b1ba"
        whiskers = [[median - min(rates)], [right - median]]
        axes.barh(y, median, 0.66, xerr=whiskers, color=color, ecolor="0.15", capsize=3)
        ceilings = values(result, f"ceiling {row.decode}")
        if ceilings and row.name == f"{row.dataset}/{row.decode}":  # and not resized
            ceiling = statistics.median(ceilings)
            label = None if y else "ceiling: decoding alone, no loader"
            axes.vlines(ceiling, y - 0.4, y + 0.4, colors="#c8442e", linewidth=2.5, label=label)
            right = max(right, ceiling)
        times = "" if row.name == base else f"  ({statistics.median(ratios(result, row.name, base)):.2f} times)"
        axes.text(right, y, f"  {median:.0f}{times}", va="center", fontsize=11)
        top = max(top, right)
    what = f"Loading alone, {result.workers} workers" if result.part == "loading" else "Training"
    axes.set_title(f"{what}: images/s, and times {base}", loc="left", fontsize=13, fontweight="bold", pad=10)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=11)
    axes.set(xlim=(0, 1.3 * top), ylim=(len(rows) - 0.4, -0.6))
    axes.spines[["top", "right"]].set_visible(False)
    if result.part == "loading":
        axes.legend(loc="upper right", frameon=False, fontsize=10, borderaxespad=0)


# ---------------------------------------------------------------------------- options, main


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=formatter)
    parser.error = fail
    add = parser.add_argument
    add("--quick", action="store_true", help="loading only, with few images; on the sample, with a smaller sample")
    add("--only", choices=["loading", "training"], help="measure this part only")
    add(
        "--cold", action="store_true", help="before each run, evict its files from memory, as far as root is not needed"
    )
    add("--repeats", type=int, default=5, metavar="N", help="rounds after the warm-up (default: %(default)s)")
    add("--dataset", choices=["both", "wds", "orig"], default="both", help="(default: %(default)s)")
    add("--decode", choices=["tensor", "pil"], help="use this decoder only")
    add("--images", type=int, metavar="N", help="minimum for each loading run (default: 2000 per worker)")
    add("--resized", metavar="DIR", help="also measure these resized shards (default: for the sample, some are made)")
    add("--steps", type=int, default=0, metavar="N", help="stop training runs after N steps (default: whole epochs)")
    add("--epochs", type=int, default=1, metavar="N", help="per training run (default: %(default)s)")
    add("-b", "--batch-size", type=int, metavar="N", help="(default: 256, or 32 in training on the sample)")
    add("--out", default=".", metavar="DIR", help="folder for bench.json and bench.png (default: %(default)s)")
    add("--prepare", action="store_true", help="make ./data and ./shards if missing, and exit")
    parser.epilog = "All other arguments are passed to main-wds.py: -a, -j, --image-size, --lr, ... The default of -j"
    parser.epilog += " is the number of cores in loading, 4 in training, and 2 in training on the sample."
    args, rest = parser.parse_known_args()
    rest = [part for word in rest for part in word.split("=", 1)]
    check_args(args, rest)
    return args, rest


def check_args(args, rest):
    for name, low in (("repeats", 1), ("images", 1), ("batch_size", 1), ("epochs", 1), ("steps", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            fail(f"--{name.replace('_', '-')} {value}: it must be at least {low}")
    for name in ("--data", "--shards", "--index", "--dummy"):
        if name in rest:
            fail(f"{name}: bench measures ./data and ./shards, which may be links, and dummy data")
    if args.quick and args.only == "training":
        fail("--quick measures loading only; remove --only training")
    if args.cold and not hasattr(os, "posix_fadvise"):
        fail("--cold: this system can't evict files from memory (posix_fadvise); Linux can")
    if not os.path.isdir(args.out):
        fail(f"--out {args.out}: no such folder")
    if args.resized and not os.path.exists(os.path.join(args.resized, INDEX)):
        fail(f"--resized {args.resized}: no {INDEX} there; makeshards.py --resize writes such shards")


def measure(args, rest, wanted):
    """The results of loading and training, and the microseconds per image for normalizing."""
    nothing = not os.path.lexists("data") and not os.path.exists(f"shards/{INDEX}")
    sample = nothing or os.path.exists(f"data/{MARK}")
    results = []
    normalize = None
    loading_args(Row("", "dummy", "tensor", ["--dummy"]), rest, 1)  # refuses unknown options before making anything
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as scratch:  # on the disk that is measured
        folders = prepare_quick(wanted, scratch) if args.quick and sample else prepare(wanted)
        count_images(folders)
        if args.only != "training":
            if sample and len(folders) == 2 and not args.resized:
                args.resized = make_shards(folders["orig"], f"{scratch}/resized", "--resize", "256")
            rows = loading_rows(folders, args.decode, args.resized)
            results.append(measure_loading(rows, rest, args))
        if args.only != "loading" and not args.quick:
            results.append(measure_training(folders, rest, args))
    if args.only != "training":  # last, because it starts threads
        normalize = normalizing_time(loading_args(rows[0], rest, 64))
    return results, normalize


def main():
    args, rest = parse_args()
    command = f"./run bench {shlex.join(sys.argv[1:])}".rstrip()
    wanted = ["orig", "wds"] if args.dataset == "both" else [args.dataset]
    if args.prepare:
        sys.exit(0 if "wds" in prepare(wanted) else 1)
    try:
        results, normalize = measure(args, rest, wanted)
    except Exception as error:
        if type(error).__name__ != "DataError":
            raise
        fail(str(error).rpartition("DataError: ")[2].strip())  # after the traceback of the worker
    about = machine()
    footer = describe(about, args.repeats, args.cold)
    for result in results:
        table(result, "train Acc@1" if args.steps else "Acc@1")
        explain(result, normalize, about["gpu"] or "CPU")
    say(f"\n{footer}\ncommand: {command}")
    about = {"command": command, "machine": about, "cold": args.cold, "repeats": args.repeats}
    about |= {"normalizing_us_per_image": normalize, "runs": [run for result in results for run in result.runs]}
    with open(os.path.join(args.out, "bench.json"), "w") as file:
        json.dump(about, file, indent=1)
    say(f"records: {os.path.join(args.out, 'bench.json')}")
    chart(os.path.join(args.out, "bench.png"), results, footer)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a worker that was not forked: it needs main-wds.py's classes to unpickle its work
    script()
