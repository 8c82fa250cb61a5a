"""Both training scripts, run as a user runs them: output, repeatability, checkpoints, evaluation, learning."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load, run, summary
from torchvision import models

FAST = ["-a", "shufflenet_v2_x0_5", "-j", "1", "-b", "16", "--epochs", "1", "--lr", "0.01"]
WDS = [*FAST, "--image-size", "32"]
NUMBER = r" *\d+\.\d+"
TRAIN_LINE = rf"Epoch: \[0\]\[ *\d+/5\]\tTime {NUMBER} \({NUMBER}\)\tData {NUMBER} \({NUMBER}\)"
METERS = (
    rf"\tLoss \d\.\d{{4}}e[+-]\d\d \(\d\.\d{{4}}e[+-]\d\d\)\tAcc@1 {NUMBER} \({NUMBER}\)\tAcc@5 {NUMBER} \({NUMBER}\)"
)
BEGIN = ["=> creating model 'shufflenet_v2_x0_5'", "Using device: cpu", "using CPU, this will be slow"]
HEAD = {  # what is printed before the first step
    "main-orig.py": [*BEGIN, "=> val: 30 images, 10 classes", "=> train: 80 images, 10 classes"],
    "main-wds.py": [
        *BEGIN,
        f"=> decoding JPEGs with {load('main-wds.py').jpeg_decoder()[0]}",
        "=> val: 30 images in 1 shards, 10 classes",
        "=> train: 80 images in 3 shards, 10 classes",
    ],
}


def losses(stdout):
    return re.findall(r"Loss (\S+) \((\S+)\)", stdout)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_output_and_repeatability(script, small, tmp_path):
    args = [*FAST, "data"] if script == "main-orig.py" else WDS
    args = [str(small / "data") if arg == "data" else arg for arg in args] + ["--seed", 3, "-p", 1]
    if script == "main-wds.py":
        args += ["--shards", small / "shards"]
    stdout, stderr = run(script, *args, cwd=tmp_path)
    assert stderr == ""
    *head, val, train = HEAD[script]
    lines = stdout.splitlines()
    assert lines[: len(head)] == head
    assert sorted(lines[len(head) : len(head) + 2]) == sorted([val, train])
    lines = lines[len(head) + 2 :]
    assert len(lines) == 5 + 2 + 1
    assert all(re.fullmatch(TRAIN_LINE + METERS, line) for line in lines[:5]), stdout
    assert [line.partition("]")[2].partition("]")[0] for line in lines[:5]] == [f"[{i}/5" for i in range(1, 6)]
    assert all(re.fullmatch(rf"Test: \[\d/2\]\tTime {NUMBER} \({NUMBER}\)" + METERS, line) for line in lines[5:7])
    assert re.fullmatch(r" \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", lines[7])
    again, _ = run(script, *args, cwd=tmp_path)
    assert losses(again) == losses(stdout)
    args[args.index("--seed") + 1] = 4
    other, _ = run(script, *args, cwd=tmp_path)
    assert losses(other) != losses(stdout)


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Two folders with the checkpoint of one epoch and of two, and the arguments that made them."""
    args = [*WDS, "--shards", small / "shards", "--seed", 1]
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for epochs, folder in enumerate(folders, 1):
        args[args.index("--epochs") + 1] = epochs
        run("main-wds.py", *args, cwd=folder)
    return *folders, args


def test_checkpoint(runs):
    one, _, _ = runs
    state = torch.load(one / "checkpoint.pth.tar", weights_only=True)
    assert set(state) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "scheduler"}
    assert (state["epoch"], state["arch"], type(state["best_acc1"])) == (1, "shufflenet_v2_x0_5", float)
    models.get_model("shufflenet_v2_x0_5").load_state_dict(state["state_dict"])
    assert (one / "model_best.pth.tar").read_bytes() == (one / "checkpoint.pth.tar").read_bytes()


@pytest.mark.parametrize("form", ["ours", "module", "features"])
def test_resume(form, runs, tmp_path):
    """One epoch and a second after --resume is two epochs, to the bit; also from forms that pytorch/examples writes."""
    one, two, args = runs
    state = torch.load(one / "checkpoint.pth.tar", weights_only=True)
    if form == "module":  # as DistributedDataParallel and DataParallel name the weights, and a distributed run the best
        state["state_dict"] = {f"module.{name}": value for name, value in state["state_dict"].items()}
        state["best_acc1"] = torch.tensor(state["best_acc1"])
    if form == "features":  # as DataParallel around AlexNet's and VGG's features names them
        state["state_dict"] = {name.replace(".", ".module.", 1): value for name, value in state["state_dict"].items()}
    torch.save(state, tmp_path / "given.pth.tar")
    stdout, _ = run("main-wds.py", *args, "--resume", "given.pth.tar", cwd=tmp_path)
    assert "=> loaded checkpoint 'given.pth.tar' (epoch 1)" in stdout
    assert "Epoch: [1]" in stdout and "Epoch: [0]" not in stdout
    resumed, unbroken = (torch.load(path / "checkpoint.pth.tar", weights_only=True) for path in (tmp_path, two))
    assert resumed["scheduler"] == unbroken["scheduler"]
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_evaluate_is_the_same_from_folders_and_shards(small, tmp_path):
    """--evaluate of one checkpoint: main-orig.py, and main-wds.py from folders and from shards with both decoders."""
    run("main-orig.py", small / "data", *FAST, "--seed", 1, cwd=tmp_path)
    args = [*FAST, "--resume", "checkpoint.pth.tar", "--evaluate"]
    stdout, _ = run("main-orig.py", small / "data", *args, cwd=tmp_path)
    assert "Epoch" not in stdout
    expected, loss = summary(stdout), float(losses(stdout)[-1][1])
    folders = ["--data", small / "data", "--shards", small / "shards"]
    for dataset, decode in (("orig", "pil"), ("wds", "pil"), ("orig", "tensor"), ("wds", "tensor")):
        stdout, _ = run("main-wds.py", *args, *folders, "--dataset", dataset, "--decode", decode, cwd=tmp_path)
        if decode == "pil":  # the same pixels, in another order over the batches
            assert summary(stdout) == expected
        assert float(losses(stdout)[-1][1]) == pytest.approx(loss, rel=1e-4 if decode == "pil" else 0.02)


def test_pretrained_takes_the_weights_api(small, tmp_path):
    """Weights of our own under the file name that torchvision would download to."""
    net = models.get_model("shufflenet_v2_x0_5")
    torch.nn.init.constant_(net.fc.bias[:1], 100)  # always class 0: 3 of the 30 validation images
    weights = models.get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / weights.url.rpartition("/")[2])
    env = {"TORCH_HOME": str(tmp_path)}
    stdout, _ = run("main-orig.py", small / "data", *FAST, "--pretrained", "--evaluate", cwd=tmp_path, env=env)
    assert "=> using pre-trained model 'shufflenet_v2_x0_5'" in stdout
    assert summary(stdout)[0][0] == 10


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_amp(script, small, tmp_path):
    """--amp computes the same in bfloat16, from the first step on; its checkpoint holds float32, and fits either."""
    args = [*FAST, small / "data"] if script == "main-orig.py" else [*WDS, "--shards", small / "shards"]
    first = {}
    for amp in ([], ["--amp"]):
        stdout, _ = run(script, *args, "--seed", 1, "-p", 1, *amp, cwd=tmp_path)
        first[bool(amp)] = float(losses(stdout)[0][0])
    assert first[True] != first[False] and first[True] == pytest.approx(first[False], rel=0.05)
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    results = [
        summary(run(script, *args, "--resume", "checkpoint.pth.tar", "--evaluate", *amp, cwd=tmp_path)[0])[0]
        for amp in ([], ["--amp"])
    ]
    assert results[0] == pytest.approx(results[1], abs=10)  # of 30 images three may fall to the other side


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_dummy_needs_no_data(script, tmp_path):
    command = [sys.executable, str(ROOT / script), "--dummy", *FAST, "-p", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    lines = [process.stdout.readline() for _ in range(6)]
    process.kill()
    process.wait()
    process.stdout.close()
    train_size = load("main-orig.py").TRAIN_SIZE
    assert any(re.match(rf"Epoch: \[0\]\[ +2/{-(-train_size // 16)}\]", line) for line in lines), lines


def test_both_datasets_learn(sample, tmp_path):
    """Two epochs on the whole sample, over two seeds: chance is 10 percent."""
    acc1 = {}
    for dataset in ("orig", "wds"):
        for seed in (1, 2):
            args = ["--dataset", dataset, "--seed", seed, "--data", sample / "data", "--shards", sample / "shards"]
            args += ["-b", 32, "--lr", 0.02, "--image-size", 48, "-j", 2, "--epochs", 2]
            stdout, _ = run("main-wds.py", *args, cwd=tmp_path)
            acc1[dataset, seed] = summary(stdout)[-1][0]
    mean = {dataset: (acc1[dataset, 1] + acc1[dataset, 2]) / 2 for dataset in ("orig", "wds")}  # a run swings by 20
    assert min(mean.values()) > 25 and abs(mean["orig"] - mean["wds"]) < 20, acc1
