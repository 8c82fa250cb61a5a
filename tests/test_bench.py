"""The benchmark: which rows it measures, what it prints and records, which files it reads. And Ctrl-C."""

import collections
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
from pathlib import Path

import bench
import pytest
from commands import run, wait_until
from make_data import TRAIN, noise, write_folders

IMAGES = sum(TRAIN)  # of the dataset that the tests of the loaders read
CEILINGS = ["ceiling pil", "ceiling tensor", "ceiling v2"]
LOADING = ["orig/pil", "wds/pil", "orig/tensor", "wds/tensor", "wds/tensor, 256 px", "dummy", *CEILINGS]
FAST = ["-a", "shufflenet_v2_x0_5", "-j2", "--image-size=32", "-b20"]
TINY = ["--images", "40", "--repeats", "1", *FAST]


def measure(folder, out, *args, **env):
    """(stdout, bench.json, whether there is a chart) of the benchmark in a folder with ./data and ./shards."""
    stdout, stderr = run("tests/bench.py", "--out", out, *args, cwd=folder, env=env)
    assert stderr == "" and not list(folder.glob(".bench-*"))
    png = out / "bench.png"
    assert not png.exists() or (png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 10_000)
    return stdout, json.loads((out / "bench.json").read_text()), png.exists()


def error_of(folder, *args):
    _, stderr = run("tests/bench.py", *args, cwd=folder, status=2)
    assert re.fullmatch("bench: .+\n", stderr), stderr
    return stderr


def rows_of(report, part):
    return list(dict.fromkeys(run["row"] for run in report["runs"] if run["part"] == part))


def rates(report, part, row):
    """Images/s of a row, per round without the warm-up."""
    runs = [run for run in report["runs"] if (run["part"], run["row"]) == (part, row) and not run["warm_up"]]
    assert [run["round"] for run in runs] == list(range(1, report["repeats"] + 1))
    return [run["images"] / run["seconds"] for run in runs]


def spread(report, part, row, base):
    """The ratios of two rows, each within a round, as the report prints them: median (minimum-maximum)."""
    ratios = [a / b for a, b in zip(rates(report, part, row), rates(report, part, base), strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def check_table(stdout, report, part):
    for row in rows_of(report, part):
        median = statistics.median(rates(report, part, row))
        line = re.search(rf"^{row} +{median:.1f} .*  (\S.*)$", stdout, re.M)
        assert line, row
        assert line[1] == ("1.00" if row == "orig/pil" else spread(report, part, row, "orig/pil"))


# ---------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two rounds of loading with --quick, at least 100 images per run."""
    folder = tmp_path_factory.mktemp("quick")
    found = measure(folder, folder, "--quick", "--repeats", "2", "--images", "100", *FAST)
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.png"}  # the sample is deleted
    return found


@pytest.mark.slow
def test_each_run_is_recorded(report):
    _, found, chart = report
    assert chart and found["repeats"] == 2 and found["command"].startswith("./run bench --out ")
    assert {"cpu", "cores", "gpu", "versions"} <= found["machine"].keys()
    order = [(run["part"], run["round"], run["row"]) for run in found["runs"]]
    assert order == [("loading", i, row) for i in range(3) for row in LOADING]
    for one in found["runs"]:
        assert one["images"] == 120, one  # 100 rounded up to whole batches of 20 for each of two workers
        assert one["images_per_second"] == one["images"] / one["seconds"] > 0
        assert (one["warm_up"], one["batch_size"], one["workers"]) == (one["round"] == 0, 20, 2)
        if one["row"] in CEILINGS:
            assert one["first_batch"] is None
        else:
            assert 0 < one["first_batch"] < one["seconds"]


@pytest.mark.slow
def test_printed_figures_match_the_records(report):
    stdout, found, _ = report
    check_table(stdout, found, "loading")
    for row, base in (
        ("wds/tensor", "orig/pil"),
        ("wds/tensor", "orig/tensor"),
        ("wds/pil", "orig/pil"),
        ("orig/tensor", "orig/pil"),
        ("wds/tensor, 256 px", "wds/tensor"),
    ):
        assert f": {row} loads {spread(found, 'loading', row, base)} times as fast as {base}.\n" in stdout
    for ceiling in ("ceiling tensor", "ceiling v2"):
        assert f"{spread(found, 'loading', 'wds/tensor', ceiling)} of " in stdout
    assert f"\n{found['normalizing_us_per_image']:.0f} microseconds per image" in stdout
    about = found["machine"]
    assert about["decoder"] == bench.script().jpeg_decoder()[0]
    for text in (about["cpu"], about["versions"]["torch"], about["decoder"], "n = 2", found["command"]):
        assert text in stdout


@pytest.mark.slow
def test_both_parts_with_one_decoder_and_cold_files(small, tmp_path):
    stdout, found, chart = measure(small, tmp_path, "--cold", "--decode", "pil", "--steps", "1", *TINY)
    assert rows_of(found, "loading") == ["orig/pil", "wds/pil", "wds/pil, 256 px", "dummy", "ceiling pil"]
    assert rows_of(found, "training") == ["orig/pil", "wds/pil"]
    assert chart and found["cold"] and "; cold: " in stdout
    check_table(stdout, found, "loading")
    check_table(stdout, found, "training")
    ratio = spread(found, "training", "wds/pil", "orig/pil")
    assert f"Training from wds/pil is {ratio} times as fast as from orig/pil.\n" in stdout
    last = found["runs"][-1]
    assert (last["images"], last["steps"]) == (20, 1)
    assert 0 < last["waiting"] < 1 and 0 < last["train_loss"] < 20
    means = rf"{100 * last['waiting']:.1f}% +{last['train_loss']:.3f} +{last['acc1']:.1f}"
    assert re.search(rf"^wds/pil .* s +{means} +{re.escape(ratio)}$", stdout, re.M), stdout


@pytest.mark.slow
def test_shards_only_and_without_matplotlib(small, tmp_path):
    (tmp_path / "shards").symlink_to(small / "shards")
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    stdout, found, chart = measure(tmp_path, tmp_path, "--only", "loading", *TINY, PYTHONPATH=str(tmp_path))
    assert not chart and "matplotlib" in stdout
    assert "./data: measuring the other dataset alone\n" in stdout
    assert rows_of(found, "loading") == ["wds/pil", "wds/tensor", "dummy", *CEILINGS]
    assert {run["images"] for run in found["runs"]} == {40}  # of 80


@pytest.mark.slow
def test_folders_and_resized_shards(small, tmp_path):
    """./shards is a file, so that makeshards.py fails. The row of the resized shards has their folder's name."""
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "other").symlink_to(small / "shards")
    (tmp_path / "shards").touch()
    args = ["--only", "loading", "--resized", tmp_path / "other", *TINY]
    stdout, stderr = run("tests/bench.py", *args, cwd=tmp_path)
    assert stderr.startswith("makeshards.py: ")
    assert "./shards: measuring the other dataset alone\n" in stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert rows_of(found, "loading") == ["orig/pil", "orig/tensor", "wds/tensor, other", "dummy", *CEILINGS]
    assert {run["images"] for run in found["runs"]} == {40}


BAD_OPTIONS = ["--repeats 0", "--quick --only training", "--out nosuch", "--resized .", "--data elsewhere"]


@pytest.mark.parametrize("options", [*BAD_OPTIONS, "--only loading --nonsense"])
def test_bad_options(options, tmp_path):
    """The last one is named, and no sample is made."""
    assert re.findall(r"--\w+", options)[-1] in error_of(tmp_path, *options.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_unreadable_image_and_differing_datasets(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "copy")
    image = next((folder / "data/train").glob("*/*"))
    image.write_bytes(b"no image")
    args = ["--only", "loading", *TINY]
    assert image.name in error_of(folder, "--dataset", "orig", *args, "--images", "80")
    image.unlink()
    assert "80 and 79 training images" in error_of(folder, *args)
    image.parent.rename(image.parent.parent / "n80000001")
    assert "classes differ" in error_of(folder, *args)


# ---------------------------------------------------------------------------- which files a run reads


@pytest.fixture(params=["orig", "wds"])
def args(request, shards, tmp_path, monkeypatch):
    """The options of a loading run from shards, or from folders of the same images. Each image is a class."""
    options = ["--shards", str(shards)]
    if request.param == "orig":
        names = [f"{i:02}" for i in range(IMAGES)]
        options = ["--data", str(write_folders(tmp_path / "data", train=1, val=0, classes=names))]
    monkeypatch.setattr("sys.argv", ["bench.py"])  # which loading_args() changes
    row = bench.Row("", request.param, "tensor", options)
    return bench.loading_args(row, ["-j", "2", "--image-size", "32", "--no-accel"], 7)


def read_epoch(args, images):
    """{class: how often it occurs} in the epoch from which a run takes that many images."""
    loader, _ = bench.make_loader(args, images)
    counts = collections.Counter()
    for _, target in loader:
        counts.update(target.tolist())
    return counts


@pytest.mark.parametrize("images, times", [(IMAGES, 1), (IMAGES + 1, 2), (200, 3)])
def test_small_dataset_is_repeated(images, times, args):
    assert read_epoch(args, images) == dict.fromkeys(range(IMAGES), times)
    assert images <= bench.load(args, images, cold=False)["images"] < images + 7


def test_large_dataset_is_read_in_random_parts(args):
    random.seed(0)
    seen = set()
    for _ in range(5):
        counts = read_epoch(args, 20)
        assert 20 <= counts.total() < IMAGES
        assert set(counts.values()) == {1}
        seen |= counts.keys()
    assert len(seen) > 30
    assert 20 <= bench.load(args, 20, cold=False)["images"] < 27


def test_cold_evicts_the_files_of_the_run(args, monkeypatch):
    evicted = []

    def evict(file, offset, length, advice):
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        evicted.append(os.fstat(file).st_ino)

    monkeypatch.setattr("os.posix_fadvise", evict)
    bench.load(args, IMAGES, cold=False)
    assert evicted == []
    bench.load(args, IMAGES, cold=True)
    if args.dataset == "orig":
        files = Path(args.data).glob("train/*/*")
    else:
        files = Path(args.shards).glob("imagenet-train-*.tar")
    assert sorted(evicted) == sorted(path.stat().st_ino for path in files)


def test_ceiling_decodes_the_same_images(args):
    files = bench.read_files(args, 100)
    assert sorted(files) == sorted(map(noise, range(IMAGES)))
    part = bench.read_files(args, 30)
    assert len(set(part)) == len(part) == 30 and set(part) < set(files)
    for v2 in (False, True):
        result = bench.decode_only(args, files[:10], 35, v2)
        assert result["images"] == 35 and 0 < result["seconds"] < math.inf


# ---------------------------------------------------------------------------- Ctrl-C


PREPARE = ["--dataset", "wds", "--prepare"]  # as ./run does before training


def interrupt(run, folder, pattern):
    """Ctrl-C, a SIGINT to all processes, once a file matches the pattern. Returns the only line on stderr."""
    wait_until(lambda: list(folder.glob(pattern)), run.output)
    run.kill(signal.SIGINT, group=True)
    _, (line,) = run.finish(status=130, lines=1)
    return line


@pytest.mark.parametrize(
    "script, options", [("sample.py", ["--train", 2000]), pytest.param("bench.py", PREPARE, marks=pytest.mark.slow)]
)
def test_ctrl_c_while_the_sample_is_written(script, options, start, tmp_path):
    run = start(*options, script=f"tests/{script}")
    assert interrupt(run, tmp_path, ".sample-*/train/*/*.JPEG") == "sample: stopped"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "err"}


@pytest.mark.slow
def test_ctrl_c_while_the_shards_are_written(start, folders, tmp_path):
    """A FIFO without a reader in place of the shard's temporary file stops the worker that opens it."""
    (tmp_path / "data").symlink_to(folders)
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "shards/imagenet-train-000000.tar.tmp")
    run = start(*PREPARE, script="tests/bench.py")
    assert interrupt(run, tmp_path / "shards", ".train.json").startswith("makeshards.py: ")
    assert list((tmp_path / "shards").iterdir()) == []
