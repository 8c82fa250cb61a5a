"""Both training scripts: output, repeatability, checkpoints, evaluation, learning."""

import itertools
import re
import signal

import pytest
import torch
from commands import SMALL_MODEL, checkpoint, data_of, load, run, summary
from torchvision import models

FAST = ["-a", "shufflenet_v2_x0_5", "-j", 1, "-b", 16, "--epochs", 1, "--lr", 0.01]
WDS = [*FAST, "--image-size", 32]
VALUES = r"%s  *\d+\.\d+\S* \( *\d+\.\d+\S*\)"  # of a meter: the last one and the average
TRAIN_LINE = "\t".join(
    [r"Epoch: \[0\]\[(\d)/5\]", *(VALUES % name for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))]
)
VAL_LINE = "\t".join([r"Test: \[(\d)/2\]", *(VALUES % name for name in ("Time", "Loss", "Acc@1", "Acc@5"))])


def losses(stdout):
    """[(loss, average)] of each printed line."""
    return [(float(loss), float(average)) for loss, average in re.findall(r"Loss (\S+) \((\S+)\)", stdout)]


def test_output(script, small, tmp_path):
    stdout, stderr = run(script, *FAST, *data_of(script, small / "data", small / "shards"), "-p", 1, cwd=tmp_path)
    assert stderr == ""
    *head, last = stdout.splitlines()
    assert any(re.match("=> train: 80 images.*, 10 classes$", line) for line in head)
    assert any(re.match("=> val: 30 images.*, 10 classes$", line) for line in head)
    printed = head[-7:]
    assert [re.fullmatch(TRAIN_LINE, line)[1] for line in printed[:5]] == list("12345")
    assert [re.fullmatch(VAL_LINE, line)[1] for line in printed[5:]] == list("12")
    assert re.fullmatch(r" \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", last)


@pytest.mark.parametrize("script", [pytest.param("main-orig.py", marks=pytest.mark.slow), "main-wds.py"])
def test_same_seed_same_losses(script, small, tmp_path):
    found = []
    for seed in (3, 3, 4):
        args = [*FAST, *data_of(script, small / "data", small / "shards"), "--seed", seed, "-p", 1]
        stdout, _ = run(script, *args, cwd=tmp_path)
        found.append(losses(stdout))
    assert len(found[0]) == 7
    assert found[0] == found[1] != found[2]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Two folders, with the checkpoints of one epoch and of two, and the arguments of the second run."""
    folders = []
    for epochs in (1, 2):
        args = [*WDS, "--shards", small / "shards", "--seed", 1, "--epochs", epochs]
        folders.append(tmp_path_factory.mktemp("epochs"))
        run("main-wds.py", *args, cwd=folders[-1])
    return *folders, args


def test_checkpoint(runs):
    one, _, _ = runs
    state = checkpoint(one)
    assert set(state) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "scheduler"}
    assert (state["epoch"], state["arch"], type(state["best_acc1"])) == (1, "shufflenet_v2_x0_5", float)
    models.get_model("shufflenet_v2_x0_5").load_state_dict(state["state_dict"])
    assert (one / "model_best.pth.tar").read_bytes() == (one / "checkpoint.pth.tar").read_bytes()


@pytest.mark.parametrize("form", ["module", "features"])
def test_resume_from_pytorch_examples(form, runs, tmp_path):
    """A second epoch, resumed from a checkpoint as pytorch/examples writes it, gives the bits of an unbroken run."""
    one, two, args = runs
    state = checkpoint(one)
    weights = state["state_dict"]
    if form == "module":  # of DistributedDataParallel and DataParallel; best_acc1 is a tensor in a distributed run
        state["state_dict"] = {f"module.{name}": value for name, value in weights.items()}
        state["best_acc1"] = torch.tensor(state["best_acc1"])
    else:  # of DataParallel around the features of AlexNet and VGG
        state["state_dict"] = {name.replace(".", ".module.", 1): value for name, value in weights.items()}
    torch.save(state, tmp_path / "given.pth.tar")
    stdout, _ = run("main-wds.py", *args, "--resume", "given.pth.tar", cwd=tmp_path)
    assert "Epoch: [1]" in stdout and "Epoch: [0]" not in stdout
    resumed = checkpoint(tmp_path)
    unbroken = checkpoint(two)
    assert resumed["scheduler"] == unbroken["scheduler"]
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_evaluate_is_the_same_from_folders_and_shards(small, tmp_path):
    """--evaluate of one checkpoint: main-orig.py, and main-wds.py from folders and from shards with both decoders."""
    run("main-orig.py", small / "data", *FAST, "--seed", 1, cwd=tmp_path)
    args = [*FAST, "--resume", "checkpoint.pth.tar", "--evaluate"]
    stdout, _ = run("main-orig.py", small / "data", *args, cwd=tmp_path)
    assert "Epoch" not in stdout
    expected = summary(stdout)
    loss = losses(stdout)[-1][1]
    folders = ["--data", small / "data", "--shards", small / "shards"]
    accuracies = {}
    found = {}
    for dataset, decode in itertools.product(("orig", "wds"), ("pil", "tensor")):
        stdout, _ = run("main-wds.py", *args, *folders, "--dataset", dataset, "--decode", decode, cwd=tmp_path)
        accuracies[dataset, decode] = summary(stdout)
        found[dataset, decode] = losses(stdout)[-1][1]
    assert accuracies["orig", "pil"] == accuracies["wds", "pil"] == expected
    assert accuracies["orig", "tensor"] == accuracies["wds", "tensor"]
    # the same pixels, in another order over the batches
    assert found["orig", "pil"] == pytest.approx(loss, rel=1e-4)
    assert found["wds", "pil"] == pytest.approx(loss, rel=1e-4)
    assert found["wds", "tensor"] == pytest.approx(found["orig", "tensor"], rel=1e-4)
    assert found["orig", "tensor"] == pytest.approx(loss, rel=0.02)  # almost the same pixels


@pytest.mark.slow
def test_pretrained(small, tmp_path):
    """Weights of our own, in the file that torchvision would download, are used."""
    model = models.get_model("shufflenet_v2_x0_5")
    torch.nn.init.constant_(model.fc.bias[:1], 100)  # always class 0, which 3 of the 30 validation images have
    weights = models.get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / weights.url.rpartition("/")[2])
    env = {"TORCH_HOME": str(tmp_path)}
    stdout, _ = run("main-orig.py", small / "data", *FAST, "--pretrained", "--evaluate", cwd=tmp_path, env=env)
    assert summary(stdout)[0][0] == 10


@pytest.mark.slow
def test_amp(script, small, tmp_path):
    """--amp computes the same in bfloat16. Its checkpoint holds float32 and can be evaluated with and without --amp."""
    args = [*FAST, *data_of(script, small / "data", small / "shards"), "--seed", 1, "-p", 1]
    plain, _ = run(script, *args, cwd=tmp_path)
    amp, _ = run(script, *args, "--amp", cwd=tmp_path)
    first = losses(plain)[0][0]
    assert losses(amp)[0][0] != first and losses(amp)[0][0] == pytest.approx(first, rel=0.05)
    assert {value.dtype for value in checkpoint(tmp_path)["state_dict"].values()} == {torch.float32, torch.int64}
    args += ["--resume", "checkpoint.pth.tar", "--evaluate"]
    plain, _ = run(script, *args, cwd=tmp_path)
    amp, _ = run(script, *args, "--amp", cwd=tmp_path)
    assert summary(plain)[0] == pytest.approx(summary(amp)[0], abs=10)  # three of 30 images may differ


def test_dummy_needs_no_data(script, start):
    steps = -(-load(script).TRAIN_SIZE // 16)
    run = start("--dummy", *SMALL_MODEL[:2], "-j", 1, "-b", 16, "-p", 1, script=script)
    run.until(rf"^Epoch: \[0\]\[ +2/{steps}\]").kill(signal.SIGKILL).finish(-signal.SIGKILL, lines=None)


@pytest.mark.slow
def test_both_datasets_learn(sample, tmp_path):
    """The accuracy after an epoch on the whole sample: chance is 10 percent, and four runs had 34 to 48."""
    for dataset in ("orig", "wds"):
        args = ["--dataset", dataset, "--seed", 1, "--data", sample / "data", "--shards", sample / "shards"]
        args += ["-b", 32, "--lr", 0.02, "--image-size", 32, "-j", 2, "--epochs", 1]
        stdout, _ = run("main-wds.py", *args, cwd=tmp_path)
        assert summary(stdout)[-1][0] > 20, dataset
