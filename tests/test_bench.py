"""The benchmark: what it measures, what it prints and writes. Its figures themselves are not looked at."""

import collections
import json
import math
import re
import shutil
import statistics
import zlib

import bench
import pytest
from conftest import run

LOADING = ["orig/pil", "wds/pil", "orig/tensor", "wds/tensor", "wds/tensor, 256 px", "dummy", "ceiling pil",
           "ceiling tensor", "ceiling v2"]  # fmt: skip
FAST = ["-a", "shufflenet_v2_x0_5", "-j2", "--image-size=32", "-b20"]
TINY = ["--images", "40", "--repeats", "1", *FAST]


def measure(folder, out, *args, **env):
    """(stdout, bench.json, whether there is a chart) of the benchmark in a folder with ./data and ./shards."""
    stdout, stderr = run("tests/bench.py", "--out", out, *args, cwd=folder, env=env)
    assert stderr == "" and not list(folder.glob(".bench-*")), stderr
    png = out / "bench.png"
    assert not png.exists() or (png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 10_000)
    return stdout, json.loads((out / "bench.json").read_text()), png.exists()


def error_of(folder, *args):
    stdout, stderr = run("tests/bench.py", *args, cwd=folder, status=2)
    assert re.fullmatch("bench: .+\n", stderr), stdout + stderr
    return stderr


def rows_of(report, part):
    return list(dict.fromkeys(run["row"] for run in report["runs"] if run["part"] == part))


def rates(report, part, row):
    runs = [run for run in report["runs"] if (run["part"], run["row"], run["warm_up"]) == (part, row, False)]
    assert [run["round"] for run in runs] == list(range(1, report["repeats"] + 1))
    return [run["images"] / run["seconds"] for run in runs]


def spread(report, part, row, base):
    """The median of the ratios, each of one round, as it is printed."""
    ratios = [a / b for a, b in zip(rates(report, part, row), rates(report, part, base), strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


@pytest.fixture(scope="module")
def report(small, tmp_path_factory):
    """Of loading the sample, each run of at least 100 images."""
    args = "--only", "loading", "--repeats", "2", "--images", "100", *FAST
    return measure(small, tmp_path_factory.mktemp("out"), *args)


def test_there_is_a_record_of_each_run(report):
    _, json, chart = report
    assert chart and json["repeats"] == 2 and json["command"].startswith("./run bench --out ")
    assert {"cpu", "cores", "gpu", "versions"} <= json["machine"].keys()
    order = [(run["part"], run["round"], run["row"]) for run in json["runs"]]
    assert order == [("loading", i, row) for i in range(3) for row in LOADING]
    for one in json["runs"]:
        assert one["images"] == 120, one  # the 100 asked for, in whole rounds of two workers' batches
        assert one["images_per_second"] == one["images"] / one["seconds"] > 0
        assert one["warm_up"] == (one["round"] == 0) and (one["batch_size"], one["workers"]) == (20, 2)
        assert (one["first_batch"] is None) == one["row"].startswith("ceiling")
        assert one["first_batch"] is None or 0 < one["first_batch"] < one["seconds"]


def check_table(stdout, json, part):
    for row in rows_of(json, part):
        line = rf"^{row} +{statistics.median(rates(json, part, row)):.1f} .*  (\S.*)$"
        ratio = re.search(line, stdout, re.M)
        assert ratio and ratio[1] == ("1.00" if row == "orig/pil" else spread(json, part, row, "orig/pil")), line


def test_what_is_printed_follows_from_the_records(report):
    stdout, json, _ = report
    check_table(stdout, json, "loading")
    for row, base in (
        ("wds/tensor", "orig/pil"),
        ("wds/tensor", "orig/tensor"),
        ("wds/pil", "orig/pil"),
        ("orig/tensor", "orig/pil"),
        ("wds/tensor, 256 px", "wds/tensor"),
    ):
        assert f": {row} loads {spread(json, 'loading', row, base)} times as fast as {base}.\n" in stdout
    assert f"wds/tensor reaches {spread(json, 'loading', 'wds/tensor', 'ceiling tensor')} of its ceiling" in stdout
    assert f"and {spread(json, 'loading', 'wds/tensor', 'ceiling v2')} of the ceiling with torchvision's own" in stdout
    assert f"takes\n{json['normalising_us_per_image']:.0f} microseconds per image" in stdout
    assert json["machine"]["decoder"] == bench.script().jpeg_decoder()[0]
    decoder = f"; tensor: {json['machine']['decoder']}; "
    for word in (json["machine"]["cpu"], json["machine"]["versions"]["torch"], decoder, "n = 2", json["command"]):
        assert word in stdout


def test_quick(tmp_path):
    """Where there is nothing it leaves nothing but its report."""
    stdout, json, chart = measure(tmp_path, tmp_path, "--quick", "--repeats", "1", "--images", "20", "--image-size=32")
    assert chart and rows_of(json, "loading") == LOADING and not rows_of(json, "training")
    assert "making a sample of 400 images in a temporary folder" in stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.png"}


def test_both_parts_with_one_decoder_of_files_that_are_cold(small, tmp_path):
    stdout, json, chart = measure(small, tmp_path, "--cold", "--decode", "pil", "--steps", "1", *TINY)
    pairs = ["orig/pil", "wds/pil"]
    assert rows_of(json, "loading") == [*pairs, "wds/pil, 256 px", "dummy", "ceiling pil"]
    assert rows_of(json, "training") == pairs and chart and json["cold"]
    assert "; cold: " in stdout and "Decoder only" not in stdout and "Normalizing" not in stdout
    check_table(stdout, json, "loading")
    check_table(stdout, json, "training")
    assert f"Shards only, with Pillow: wds/pil loads {spread(json, 'loading', *pairs[::-1])} times" in stdout
    ratio = spread(json, "training", *pairs[::-1])
    assert f"Training from wds/pil is {ratio} times as fast as from orig/pil.\n" in stdout
    last = json["runs"][-1]
    assert last["images"] == 20 and last["steps"] == 1 and 0 < last["waiting"] < 1 and 0 < last["train_loss"] < 20
    means = rf"{100 * last['waiting']:.1f}% +{last['train_loss']:.3f} +{last['acc1']:.1f}"
    assert re.search(rf"^wds/pil .* s +{means} +{re.escape(ratio)}$", stdout, re.M), stdout


def test_training_alone_and_without_matplotlib(small, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    args = "--only", "training", "--dataset", "wds", "--repeats", "1", *FAST
    stdout, json, chart = measure(small, tmp_path, *args, PYTHONPATH=str(tmp_path))
    assert not chart and "no chart: matplotlib is not installed" in stdout
    assert [run["row"] for run in json["runs"]] == ["wds/tensor", "wds/tensor"] and "times as fast" not in stdout


@pytest.mark.parametrize("missing, there", [("data", "wds"), ("shards", "orig")])
def test_one_dataset(missing, there, small, tmp_path):
    """Large: each run is over 40 of its 80 images. Other shards are named by what their index or folder says."""
    shutil.copytree(small, tmp_path / "copy")
    (tmp_path / "copy" / missing).rename(tmp_path / "resized")
    if missing == "shards":
        (tmp_path / "copy" / missing).touch()  # a file, so that no shards can be made
    resized = ["--resized", tmp_path / "resized"] if missing == "shards" else []
    stdout, stderr = run("tests/bench.py", "--only", "loading", *TINY, *resized, cwd=tmp_path / "copy")
    assert re.search(rf"^there are no .*\./{missing}: measuring the other dataset alone$", stdout, re.M), stdout
    json_ = json.loads((tmp_path / "copy" / "bench.json").read_text())
    more = ["wds/tensor, resized"] if resized else []
    ceilings = ["ceiling pil", "ceiling tensor", "ceiling v2"]
    assert rows_of(json_, "loading") == [f"{there}/pil", f"{there}/tensor", *more, "dummy", *ceilings]
    assert {run["images"] for run in json_["runs"]} == {40} and f"relative to {there}/pil\n" in stdout
    assert missing == "data" or "makeshards.py: " in stderr


def test_mistakes(small, tmp_path):
    for args, words in {
        ("--repeats", "0"): "--repeats 0: it must be at least 1",
        ("--quick", "--only", "training"): "--only training",
        ("--out", "nosuch"): "--out nosuch: no such folder",
        ("--resized", "."): "--resized .: no _info.json there",
        ("--only", "loading", "--nonsense"): "--nonsense",
        ("--data", "elsewhere"): "bench measures ./data and ./shards",
    }.items():
        assert words in error_of(small, *args)
    shutil.copytree(small, tmp_path / "copy")
    broken = next((tmp_path / "copy" / "data" / "train").glob("*/*"))
    broken.write_bytes(b"no image")
    assert f"{broken.name}: not a readable image" in error_of(
        tmp_path / "copy", "--dataset", "orig", "--only", "loading", *TINY, "--images", "80"
    )
    broken.unlink()
    assert "hold 80 and 79 training images" in error_of(tmp_path / "copy", "--only", "loading", *TINY)
    broken.parent.rename(broken.parent.parent / "n80000001")
    assert "classes differ" in error_of(tmp_path / "copy", "--only", "loading", *TINY)


# ---------------------------------------------------------------------------- what a run reads


def checksum(data):
    return bench.script().torch.tensor(zlib.crc32(data))


def unchanged(image):
    return image


@pytest.fixture(params=["orig", "wds"])
def dataset(request, small, monkeypatch):
    """Makes load() read the small dataset, and returns (args, what it has read): {checksum: times}."""
    monkeypatch.setattr("sys.argv", ["bench.py"])
    option, folder = {"orig": ("--data", "data"), "wds": ("--shards", "shards")}[request.param]
    row = bench.Row("", request.param, "tensor", [option, str(small / folder)])
    args, counts = bench.loading_args(row, ["-j", "2", "--no-accel"], 7), collections.Counter()
    monkeypatch.setitem(bench.script().DECODERS, "tensor", checksum)
    monkeypatch.setattr(bench.script(), "make_transform", lambda args, split: unchanged)
    monkeypatch.setattr(bench.script().DataLoader, "__iter__", lambda self: watch(self, counts))
    return args, counts


original_iter = bench.script().DataLoader.__iter__


def watch(loader, counts):
    for images, target in original_iter(loader):
        counts.update(images.tolist())
        yield images, target


@pytest.mark.parametrize("images, times", [(80, 1), (81, 2), (200, 3)])
def test_a_small_dataset_is_repeated(images, times, dataset):
    args, counts = dataset
    read = bench.load(args, images, cold=False)["images"]
    assert images <= read < images + 7 and sum(counts.values()) == read
    assert len(counts) <= 80 and max(counts.values()) <= times


def test_of_a_large_dataset_a_part_is_read(dataset):
    args, counts = dataset
    seen = set()
    for _ in range(10):
        counts.clear()
        images = bench.load(args, 20, cold=False)["images"]
        assert 20 <= images < 27 and sum(counts.values()) == images and max(counts.values()) == 1
        seen |= counts.keys()
    assert len(seen) > 30  # another part each time


def test_cold_drops_what_the_run_reads(dataset, small, monkeypatch):
    args, _ = dataset
    dropped = []
    monkeypatch.setattr(bench.os, "posix_fadvise", lambda file, *_: dropped.append(bench.os.fstat(file).st_ino))
    bench.load(args, 80, cold=False)
    assert not dropped
    bench.load(args, 80, cold=True)
    files = small.glob("data/train/*/*" if args.dataset == "orig" else "shards/*train*.tar")
    assert sorted(dropped) == sorted(path.stat().st_ino for path in files)


def test_the_ceiling_is_over_the_same_files(dataset):
    args, _ = dataset
    files = bench.read_files(args, 100)
    assert len(set(files)) == len(files) == 80
    assert len(bench.read_files(args, 30)) == 30
    for v2 in (False, True):
        run = bench.decode_only(args, files[:10], 35, v2)
        assert run["images"] == 35 and run["seconds"] > 0 and math.isfinite(run["seconds"])
