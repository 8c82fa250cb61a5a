"""README.md: its commands run, the messages that it lists appear, and what it refers to exists."""

import argparse
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from commands import RESUME, ROOT, error_of, load, run, run_command, summary, torchrun, wait_until
from make_data import noise, read_tar, tar, write_shards
from test_run import copy_project

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", README, re.M))
FAST = "-a shufflenet_v2_x0_5 -b 16 -j 1 --epochs 1 --no-accel"
MESSAGES = re.findall(r"^\| `([^`]+)`(?:,| \|)", SECTIONS["Troubleshooting"], re.M)


# ---------------------------------------------------------------------------- the commands


def commands():
    """{command: whether it is marked as needing other hardware}, in the order of the text."""
    found = {}
    for line in README.splitlines():
        names = r"(?:\./run|ln|mkdir|srun|venv/bin/torchrun|python|diff)\b"
        spans = [line.strip()] if re.match(rf"    {names}", line) else re.findall(rf"`({names} ?[^`]*)`", line)
        for command in spans:
            found[command] = found.get(command, False) or "†" in line or command.startswith("srun")
    return found


NOT_RUN = {"./run", "./run test", "./run test --all"}  # the list of commands, and what runs these tests
NOT_RUN |= {"diff main-orig.py main-wds.py"}  # its exit status is 1; ./run diff shows the same
ELSEWHERE = {  # commands that take long; test_run.py, test_bench.py and test_peers() run them at a smaller size
    "./run bench",
    "./run bench --cold",
    "./run bench --quick",
    "./run bench --only loading --resized DIR",
    "./run bench --only loading --cold --decode tensor --images 1300 -b 64",
    "./run bench -j 16 -b 256 --images 8192 -a resnet18 --image-size 224 --amp --lr 0.05",
    "python tests/peers.py",
}
PREPARED = {  # what a command needs, as shell commands
    "./run makeshards.py --index": "mkdir theirs && for i in 0 1 2; do cp shards/imagenet-train-00000$i.tar "
    "theirs/imagenet1k-train-000$i.tar; done",
    "./run makeshards.py --data ./pets": "cp -r data/. pets",
    "./run makeshards.py --data ./data --shards DIR": "mkdir resized",
    "./run main-wds.py -a resnet50 --evaluate": "cp checkpoint.pth.tar model_best.pth.tar",
}


def trains(command):
    return re.search("main-|multi|single", command) and "--help" not in command


def adapted(command):
    """The command for a smaller dataset and model. argparse takes the last of two equal options."""
    command = re.sub(r"\{(0+)\.\.\d+\}", lambda match: f"{{{match[1]}..{match[1][:-1]}2}}", command)
    command = command.replace("--resize N --quality Q", "--resize 64 --quality 90").replace(
        "--shards DIR", "--shards ."
    )
    if re.match(r"\./run makeshards(?!.*--(verify|index))", command):
        command += " --maxcount 20"
    if trains(command):
        command += f" {FAST}" + (" --image-size 32" if "orig.py" not in command else "")
    return command


@pytest.mark.slow
def test_commands(tmp_path):
    """The commands run in their order, as typed, in a copy of the project that has only the images."""
    project, weights = copy_project(tmp_path), tmp_path / "torch/hub/checkpoints"
    run("tests/sample.py", "--train", 6, "--val", 2, "--data", tmp_path / "imagenet", cwd=tmp_path)
    weights.mkdir(parents=True)
    env = {"PYTHON": sys.executable, "TORCH_HOME": str(tmp_path / "torch"), "PYTHONWARNINGS": "ignore"}
    torchvision = load("main-wds.py").models
    url = torchvision.get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1.url
    torch.save(torchvision.get_model("shufflenet_v2_x0_5").state_dict(), weights / url.rpartition("/")[2])
    assert commands().keys() >= NOT_RUN | ELSEWHERE  # none that the README no longer has
    done = []
    for command, marked in commands().items():
        if marked or command in NOT_RUN or command in ELSEWHERE:
            continue
        text = adapted(command).replace("/data/imagenet", str(tmp_path / "imagenet"))
        text = re.sub("^python ", f"'{sys.executable}' ", text)
        before = next((words for start, words in PREPARED.items() if command.startswith(start)), "true")
        stdout, _ = run_command(["bash", "-euc", f"{before}\n{text}"], cwd=project, env=env)
        if trains(command):
            is_done = "--resume" in command and "--evaluate" not in command  # an epoch before, and no more now
            assert len(summary(stdout)) == (0 if is_done else 1), f"{text}\n{stdout}"
        done.append(command)
    assert len(done) >= 17, done
    for name in ("ln -s /data/imagenet ./data", "./run makeshards.py", "./run multi -a resnet50", "./run diff"):
        assert name in done


@pytest.mark.slow
def test_peers(small, tmp_path):
    """peers.py finds the images that the shards hold. The other loaders are not installed here."""
    peers = load("tests/peers.py")
    args = argparse.Namespace(data=str(small / "data"), shards=str(small / "shards"), images=100)
    plan = peers.make_plan(args)
    assert len(plan["samples"]) >= 100 and len(plan["urls"]) == len(plan["lengths"]) == 6
    assert {path for path, _ in plan["samples"]} == {str(path) for path in (small / "data/train").glob("*/*")}
    assert "--shards" in run("tests/peers.py", "--help", cwd=tmp_path)[0]


@pytest.mark.parametrize("ranks", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_own_training_loop(ranks, tmp_path):
    """The README's script, smaller, is stopped after its first checkpoint and continued on another number of ranks.

    Next to main-wds.py and nothing else, it uses each sample once per epoch, but for one that two ranks repeat.
    """
    (code,) = re.findall(r"^```python\n(import importlib\n.*?)^```", README, re.M | re.S)
    loss = "            loss = cross_entropy("
    assert code.count(loss) == 1
    # in a single write, also if stdout is unbuffered: two ranks share it
    used = '            os.write(1, f"used {epoch} {step} {target.tolist()}\\n".encode())\n'
    code = code.replace(loss, used + loss).replace("resnet18", "shufflenet_v2_x0_5").replace("(224)", "(64)")
    (tmp_path / "own.py").write_text(code)
    shutil.copy(ROOT / "main-wds.py", tmp_path)
    write_shards(tmp_path / "shards", noise, train=[400, 297], validation=[45])
    launchers = [torchrun() if number == 2 else [] for number in ranks]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    with open(tmp_path / "out", "w") as out:
        command = [sys.executable, *launchers[0], "own.py"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, env=env)
        wait_until(lambda: (tmp_path / "own.pt").exists() or process.poll() is not None, process.poll)
        process.terminate()
        process.wait()
    before = [samples for (_, step), samples in used_samples((tmp_path / "out").read_text()) if step <= 10]
    assert [len(samples) for samples in before] == [30] * 10 * ranks[0]
    stdout, stderr = run_command([sys.executable, *launchers[1], "own.py"], cwd=tmp_path, env=env)
    assert "IterableDataset" not in stderr  # PyTorch warns if a loader yields more batches than its len()
    epochs = {0: before, 1: []}
    for (epoch, _), samples in used_samples(stdout):
        epochs[epoch].append(samples)
    for batches in epochs.values():
        numbers = [number for samples in batches for number in samples]
        assert set(numbers) == set(range(697)) and len(numbers) <= 697 + 1
    assert re.findall(r"^epoch (\d): \d+ of (\d+) correct$", stdout, re.M) == [("0", "45"), ("1", "45")]


def used_samples(stdout):
    """[((epoch, step), the numbers of a batch's samples)]"""
    found = []
    for line in re.findall(r"^used (.*)$", stdout, re.M):
        epoch, step, *samples = map(int, re.findall(r"\d+", line))
        found.append(((epoch, step), samples))
    return found


def test_commands_for_other_hardware():
    """They name what is missing here, and the Slurm script is valid bash."""
    marked = [command for command, mark in commands().items() if mark]
    assert len(marked) >= 5 and all(re.search("8|gpu|HOST|srun", command) for command in marked), marked
    script = re.search(r"^    #!/bin/bash\n(?:    .*\n)+", README, re.M)[0].replace("\n    ", "\n")
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_server_with_a_token(tmp_path):
    """The command with curl sends the line of token.txt; with another token it is an error."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    recipe = re.search(r"`'(pipe:curl [^']+)'", README)[1]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.headers["Authorization"] == "Bearer abc":
                return super().do_GET()
            return self.send_error(401)

    main_wds, server = load("main-wds.py"), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_shards(tmp_path / "imagenet", train=[1])
    (tmp_path / "token.txt").write_text("Authorization: Bearer abc\n")
    address = recipe.replace("https://HOST", f"http://127.0.0.1:{server.server_port}").replace(
        "@token", f"@{tmp_path}/token"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(main_wds, "PAUSES", ())
        (url,), lengths, *_ = main_wds.find_shards(address, "train")
        assert [sample["jpg"] for sample in main_wds.read_shard(url, 1, range(1))] == [b"0"] and lengths == [1]
        (tmp_path / "token.txt").write_text("Authorization: Bearer xyz\n")
        with pytest.raises(main_wds.DataError, match="pipe:curl"):
            list(main_wds.read_shard(url, 1, range(1)))
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------- the messages


def shards_error(*args):
    return lambda folder: error_of("makeshards.py", *args, cwd=folder)


def wds_error(*args):
    return lambda folder: error_of("main-wds.py", *FAST.split(), "--image-size", 32, *args, cwd=folder)


def after(change, then):
    """A function that changes the folder and then makes the mistake."""

    def make(folder):
        change(folder)
        return then(folder)

    return make


def empty_an_image(folder):
    next((folder / "data/train/n90000001").iterdir()).write_bytes(b"")


def flatten(folder, split="train"):
    shutil.rmtree(folder / "data" / split)
    (folder / "data" / split).mkdir()
    (folder / "data" / split / "a.JPEG").write_bytes(b"")


def rewrite(folder, change):
    """Replace the members [(name, bytes)] of the first training shard by what change() makes of them."""
    path = folder / "shards/imagenet-train-000000.tar"
    path.write_bytes(tar(change(read_tar(path))))


def truncate(folder):
    path = folder / "shards/imagenet-train-000000.tar"
    path.write_bytes(path.read_bytes()[:-40_000])


def break_images(members):
    return [(name, b"no image" if name.endswith("jpg") else data) for name, data in members]


def write_checkpoint(folder, **state):
    """A checkpoint of a new model, with other entries if given."""
    main_wds = load("main-wds.py")
    net = main_wds.models.get_model("shufflenet_v2_x0_5")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    new = {"epoch": 0, "arch": "shufflenet_v2_x0_5", "state_dict": net.state_dict(), "best_acc1": 0.0}
    new |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**new, **state}, folder / "checkpoint.pth.tar")


def fail_once(folder):
    """stderr of a run whose `pipe:` command fails the first time."""
    command = "if mkdir once 2>&-; then exit 7; fi; cat shards/{}"
    return run("main-wds.py", *FAST.split(), "--image-size", 32, "--shards", f"pipe:{command}", cwd=folder)[1]


def warning(folder):
    many = 4 * (os.cpu_count() or 1)
    return run(
        "main-wds.py", *FAST.split(), "--image-size", 32, "-j", many, "--evaluate", cwd=folder,
        env={"PYTHONWARNINGS": "default"},
    )[1].replace(f"create {many} worker", "create 4 worker")  # fmt: skip


MISTAKES = {
    "must hold a folder of images for each class": after(flatten, shards_error("--shards", "empty")),
    "images outside class folders": after(functools.partial(flatten, split="val"), shards_error("--shards", "empty")),
    "can't be read as an image (…); fix it, then run this again": after(
        empty_an_image, shards_error("--shards", "empty")
    ),
    "…/_info.json: can't be read (…)": wds_error("--shards", "empty"),
    "can't be read (… samples, but … in its index)": after(
        lambda folder: rewrite(folder, lambda members: members[:-2]), wds_error()
    ),
    "can't be read (…)": after(truncate, wds_error()),
    "…: sample …: not a readable image": after(lambda folder: rewrite(folder, break_images), wds_error()),
    "retrying in 1 s": fail_once,
    "not a checkpoint of this script": wds_error("--resume", "data/.sample"),
    "the position was saved with other shards, or by an earlier version": after(
        functools.partial(write_checkpoint, position={"step": 1, "shards": ""}), wds_error(*RESUME)
    ),
    "This DataLoader will create 4 worker processes": warning,
}
SHOWN_ELSEWHERE = {  # by test_resume.py, test_distributed.py and test_machines.py
    "; it must be the same",
    "EADDRINUSE",
    "Connection closed by peer",
    "terminated with signal SIGKILL",
    "DataLoader worker (pid …) is killed by signal: Killed",
    "No space left on device",
}


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the small dataset and its shards, and the folder `empty`."""
    for name in ("data", "shards"):
        shutil.copytree(small / name, tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "message", [pytest.param(text, marks=pytest.mark.slow) if MISTAKES[text] is warning else text for text in MISTAKES]
)
def test_message_appears(message, folder):
    assert re.search(re.escape(message).replace("…", ".+"), MISTAKES[message](folder))


def test_every_message_is_tested():
    assert set(MESSAGES) == MISTAKES.keys() | SHOWN_ELSEWHERE


# ---------------------------------------------------------------------------- what it refers to


def test_pipeline_is_that_of_main_wds():
    (stages,) = re.findall(r"^```python\n(return wds.DataPipeline.*?)^```", README, re.M | re.S)
    script = (ROOT / "main-wds.py").read_text()
    assert all(line.strip() in script for line in stages.splitlines())


def test_run_diff_explains_each_hunk():
    """./run diff prints all lines of the diff, under the README's numbered titles."""
    stdout, stderr = run_command([ROOT / "run", "diff"], cwd=ROOT, env={"PYTHON": sys.executable})
    diff = subprocess.run(["diff", "main-orig.py", "main-wds.py"], cwd=ROOT, capture_output=True, text=True).stdout
    titles = re.findall(r"^=+ (\d+)\. (.+) \(-\d+ \+\d+ lines\)$", stdout, re.M)
    assert [int(number) for number, _ in titles] == list(range(1, 15)) and not stderr
    lines = lambda text: [line for line in text.splitlines() if re.match("[<>] .", line)]  # noqa: E731
    assert lines(stdout) == lines(diff)


def test_links_and_files_exist():
    links = re.findall(r"\]\(([^)]+)\)", README)
    titles = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    own = [link for link in links if not link.startswith("https://")]
    assert own and all(link in anchors or (ROOT / link).exists() for link in own), own
    scripts = set(re.findall(r"[\w-]+\.py\b", README))
    assert scripts == {"main-orig.py", "main-wds.py", "makeshards.py", "peers.py"}
    assert (ROOT / "tests/peers.py").exists()
    names = set(re.findall(r"\./run ([a-z]+)\b(?!\.)", README)) - {"main", "makeshards"}
    assert names <= set(re.findall(r"^cmd_(\w+)", (ROOT / "run").read_text(), re.M)), names
