#!/usr/bin/env python3
"""Train main-wds.py from shards and from folders in turn, several times, and print a table that compares them.

    ./run bench                                                 on ./data and ./shards, or on a sample made for it
    ./run bench --repeats 7 --epochs 1 -a resnet50 -j 16        with other arguments for main-wds.py
    ./run bench --steps 500 -a resnet50 -b 256 -j 16            on ImageNet: the first 500 steps of an epoch
    ./run bench --decode pil                                    the shards' share alone: one decoder for both

"wds" reads shards with main-wds.py's own decoder, "orig" reads folders with the original's, unless --decode is given.
Each run is a process of its own. Images/s are those of whole epochs, training included, from the first batch's wait to
the last step; validation and the start of Python are not in it. One run of each is a warm-up and not counted.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version

import torch
from sample import BATCH_SIZE, MARK, TRAINING
from torchvision.datasets.folder import IMG_EXTENSIONS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DECODERS = {"wds": "tensor", "orig": "pil"}
METER = r"\t{} +(\S+) \( *(\S+)\)"  # value (average)
STEP = re.compile(r"Epoch: \[\d+\]\[ *\d+/(\d+)\]" + "".join(map(METER.format, ("Time", "Data", "Loss", "Acc@1"))))


def say(line):
    print(line, flush=True)


def fail(message):
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- what there is to measure


def prepare(wanted):
    """Make what is missing of ./data and ./shards, and return which of the wanted datasets there are."""
    python, tests = sys.executable, os.path.join(ROOT, "tests")
    if not os.path.lexists("data") and not os.path.exists("shards/_info.json"):
        say("no ./data here: making a small sample in ImageNet's format (./run clean takes it away)")
        subprocess.run([python, os.path.join(tests, "sample.py")], check=True)
    if "wds" in wanted and os.path.exists("data") and not os.path.exists("shards/_info.json"):
        say("no shards in ./shards: making them from ./data")
        made = not os.path.lexists("shards")
        if made:
            os.mkdir("shards")
        try:
            subprocess.run([python, os.path.join(ROOT, "makeshards.py")], check=False)  # it says itself what is wrong
        finally:
            if made and not os.listdir("shards"):
                os.rmdir("shards")
    there = {"wds": os.path.exists("shards/_info.json"), "orig": os.path.isdir("data/train")}
    for name, folder in (("wds", "shards in ./shards"), ("orig", "folders of images in ./data")):
        if len(wanted) == 2 and not there[name]:
            say(f"there are no {folder}: measuring the other dataset alone")
    datasets = [name for name in wanted if there[name]]
    if len(datasets) == 2:
        check_same()
    return datasets or fail("neither ./data nor ./shards holds anything to measure")


def check_same():
    with open("shards/_info.json") as file:
        index = json.load(file)
    folders = sorted(entry.name for entry in os.scandir("data/train") if entry.is_dir())
    if index.get("classes", folders) != folders:
        fail("./shards are not the shards of ./data: their classes differ; --dataset wds or orig measures one of them")


# ---------------------------------------------------------------------------- one run


def train(dataset, rest, steps):
    """One run of main-wds.py: {"steps", "time", "wait", "first" in seconds, "loss", "acc1", "total"}."""
    command = [sys.executable, os.path.join(ROOT, "main-wds.py"), "--dataset", dataset, "--print-freq", "1"]
    command += ["--data", os.path.abspath("data"), "--shards", os.path.abspath("shards")]
    if "--decode" not in " ".join(rest):
        command += ["--decode", DECODERS[dataset]]
    times, waits, acc1 = [], [], None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command + rest, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        for line in process.stdout:
            if match := STEP.match(line):
                total, (time, _, wait, _, _, loss, _, acc1) = int(match[1]), map(float, match.groups()[1:])
                times.append(time)
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
            fail(f"this run ended with status {status}: {shlex.join(command + rest)}")
    if not math.isfinite(loss):
        fail(f"the loss is {loss}: {shlex.join(command + rest)}")
    run = {"time": sum(times), "wait": sum(waits), "first": waits[0], "loss": loss, "acc1": acc1}
    return run | {"steps": len(times), "total": total}


def images_of(run, samples, batch_size):
    """Images that the run trained on: of whole epochs, or of its --steps."""
    epochs, rest = divmod(run["steps"], run["total"])
    return epochs * samples + rest * batch_size


# ---------------------------------------------------------------------------- the table


def samples_in(dataset):
    if dataset == "wds":
        with open("shards/_info.json") as file:
            return json.load(file)["splits"]["train"]["num_samples"]
    names = (name for _, _, files in os.walk("data/train", followlinks=True) for name in files)
    return sum(name.lower().endswith(IMG_EXTENSIONS) for name in names)


def table(runs, decode, accuracy):
    """Print the medians of each dataset's runs, and the ratio of the pairs."""
    say("")
    say(f"dataset  decoder  images/s  first batch  waiting  train loss  {accuracy}")
    for dataset, results in runs.items():
        median = {key: statistics.median(run[key] for run in results) for key in results[0]}
        say(
            f"{dataset:<7}  {decode or DECODERS[dataset]:<7}  {median['rate']:8.1f}  {median['first']:9.2f} s  "
            f"{100 * median['wait'] / median['time']:5.1f} %  {median['loss']:10.3f}  {median['acc1']:5.1f}"
        )
    if len(runs) == 2:
        ratios = sorted(a["rate"] / b["rate"] for a, b in zip(runs["wds"], runs["orig"], strict=True))
        say("")
        say(
            f"wds/orig {statistics.median(ratios):.2f} times as many images/s "
            f"(median of {len(ratios)} pairs run in turn, {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def machine():
    names = ("torch", "torchvision", "webdataset", "Pillow")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{cpu_name()}, {os.cpu_count()} cores, {gpu_name()}; Python {platform.python_version()}, {packages}"


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="counted runs of each (%(default)s)")
    parser.add_argument("--dataset", choices=["both", "wds", "orig"], default="both", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="stop each run after N steps (whole epochs)")
    parser.add_argument("-b", "--batch-size", type=int, metavar="N", help="256, on the sample 32")
    parser.add_argument("--epochs", type=int, metavar="N", default=1, help="of each run (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make what is missing and stop")
    parser.epilog = "All other arguments go to main-wds.py: -a, -j, --image-size, --lr, --decode, ..."
    return parser.parse_known_args()


def main():
    args, rest = parse_args()
    if args.repeats < 1:
        fail(f"--repeats {args.repeats}: it must be at least 1")
    rest = [part for word in rest for part in word.split("=", 1)]
    wanted = ["wds", "orig"] if args.dataset == "both" else [args.dataset]
    datasets = prepare(wanted)
    if args.prepare:
        sys.exit("wds" not in datasets)
    sample = os.path.exists(f"data/{MARK}")
    if sample:
        rest = TRAINING + rest
    batch_size = args.batch_size or (BATCH_SIZE if sample else 256)
    rest += ["--epochs", str(args.epochs), "--batch-size", str(batch_size)]
    samples = {dataset: samples_in(dataset) for dataset in datasets}
    if len(set(samples.values())) > 1:
        fail(f"./shards and ./data hold {samples['wds']} and {samples['orig']} training images; make the shards anew")
    runs = {dataset: [] for dataset in datasets}
    say(f"{sum(samples.values()) // len(samples)} training images; main-wds.py {shlex.join(rest)}")
    for i in range(args.repeats + 1):
        for dataset in datasets:
            run = train(dataset, rest, args.steps)
            run["rate"] = images_of(run, samples[dataset], batch_size) / run["time"]
            say(f"{'run ' + str(i) if i else 'warm-up'}: {dataset} {run['rate']:.1f} images/s")
            if i:
                runs[dataset].append(run)
    decode = dict(itertools.pairwise(rest)).get("--decode")
    table(runs, decode, "train Acc@1" if args.steps else "Acc@1")
    say(f"{machine()}; n = {args.repeats}")
    say(f"command: ./run bench {shlex.join(sys.argv[1:])}".rstrip())


if __name__ == "__main__":
    main()
