"""What README.md says is so: its commands run, its troubles come as its headings say, and what it names is there."""

import argparse
import functools
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading

import pytest
import torch
from conftest import ROOT, error_of, load, run, run_command, summary
from test_run import copy_project
from test_shards import tar

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", README, re.M))
FAST = "-a shufflenet_v2_x0_5 -b 16 -j 1 --epochs 1 --no-accel"
MESSAGES = re.findall(r"^\| `([^`]+)` \|", SECTIONS["Troubleshooting"], re.M)


# ---------------------------------------------------------------------------- the commands


def commands():
    """{command: marked as needing what the tests have not} of those in the text, in its order."""
    found = {}
    for line in README.splitlines():
        names = r"(?:\./run|ln|mkdir|srun|venv/bin/torchrun|python|diff)\b"
        spans = [line.strip()] if re.match(rf"    {names}", line) else re.findall(rf"`({names} ?[^`]*)`", line)
        for command in spans:
            found[command] = found.get(command, False) or "†" in line or command.startswith("srun")
    return found


FORMS = {"./run", "./run test"}  # the list of commands; and what runs this
FORMS |= {"diff main-orig.py main-wds.py"}  # its exit status is 1; ./run diff shows the same
ELSEWHERE = {  # those that take long, and where they are run at a smaller size
    "./run bench": ("test_run.py", 'run(made, "bench", "--only", "training"'),
    "./run bench --cold": ("test_bench.py", '"--cold"'),
    "./run bench --quick": ("test_bench.py", '"--quick"'),
    "./run bench --only loading --resized DIR": ("test_bench.py", '"--resized"'),
    "./run bench --only loading --cold --decode tensor --images 1300 -b 64": ("test_bench.py", '"--cold"'),
    "python tests/peers.py": ("test_readme.py", "def test_peers(small, tmp_path)"),
}
PREPARED = {  # what a command needs that a reader has, in his words
    "./run makeshards.py --index": "mkdir theirs && for i in 0 1 2; do cp shards/imagenet-train-00000$i.tar "
    "theirs/imagenet1k-train-000$i.tar; done",
    "./run makeshards.py --data ./pets": "cp -r data/. pets",
    "./run makeshards.py --data ./data --shards DIR": "mkdir resized",
}


def adapted(command):
    """The command for a smaller dataset and network; main() takes the last of options that are given twice."""
    command = re.sub(r"\{(0+)\.\.\d+\}", lambda match: f"{{{match[1]}..{match[1][:-1]}2}}", command)
    command = command.replace("--resize N --quality Q", "--resize 64 --quality 90").replace(
        "--shards DIR", "--shards ."
    )
    if "main-" in command or "./run multi" in command:
        command += f" {FAST}" + (" --image-size 32" if "orig.py" not in command else "")
    return command


def test_commands(tmp_path):
    """As they are typed, one after the other, in a copy of the project that has nothing but the images."""
    project, weights = copy_project(tmp_path), tmp_path / "torch/hub/checkpoints"
    run("tests/sample.py", "--train", 6, "--val", 2, "--data", tmp_path / "imagenet", cwd=tmp_path)
    weights.mkdir(parents=True)
    env = {"PYTHON": sys.executable, "TORCH_HOME": str(tmp_path / "torch"), "PYTHONWARNINGS": "ignore"}
    torchvision = load("main-wds.py").models
    url = torchvision.get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1.url
    torch.save(torchvision.get_model("shufflenet_v2_x0_5").state_dict(), weights / url.rpartition("/")[2])
    (project / "makeshards.py").write_text((ROOT / "makeshards.py").read_text().replace("default=1000", "default=20"))
    done = []
    for command, marked in commands().items():
        if marked or command in FORMS or command in ELSEWHERE:
            continue
        text = adapted(command).replace("/data/imagenet", str(tmp_path / "imagenet"))
        text = re.sub("^python ", f"{sys.executable} ", text)
        before = next((words for start, words in PREPARED.items() if command.startswith(start)), "true")
        stdout, _ = run_command(["bash", "-euc", f"{before}\n{text}"], cwd=project, env=env)
        trains = "main-" in command or "multi" in command
        assert not trains or len(summary(stdout)) == (0 if "--resume" in command else 1), f"{text}\n{stdout}"
        done.append(command)
    assert len(done) >= 17, done
    for name in ("ln -s /data/imagenet ./data", "./run makeshards.py", "./run multi -a resnet50", "./run diff"):
        assert name in done


def test_peers(small, tmp_path):
    """What it compares is the same images: ours, which need no other packages. Without them it says what to install."""
    peers = load_path("tests/peers.py")
    args = argparse.Namespace(data=str(small / "data"), shards=str(small / "shards"), images=100)
    plan = peers.make_plan(args)
    assert len(plan["samples"]) >= 100 and len(plan["urls"]) == len(plan["lengths"]) == 6
    assert {path for path, _ in plan["samples"]} == {str(path) for path in (small / "data/train").glob("*/*")}
    assert "--shards" in run("tests/peers.py", "--help", cwd=tmp_path)[0]


def load_path(name):
    spec = importlib.util.spec_from_file_location("peers", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_of_ones_own(ranks, small, tmp_path):
    """The lines that the README has for it, in a script beside main-wds.py alone: each epoch is the whole set."""
    (code,) = re.findall(r"^```python\n(import importlib\n.*?)^```", README, re.M | re.S)
    (tmp_path / "own.py").write_text(code + '            print("target", *target.tolist())\n')
    shutil.copy(ROOT / "main-wds.py", tmp_path)
    (tmp_path / "shards").symlink_to(small / "shards")
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
    stdout, _ = run_command([sys.executable, *before, "own.py"], cwd=tmp_path)
    found = sorted(line for line in stdout.splitlines() if line.startswith("epoch"))
    sizes = (30, 30, 20) if ranks == 1 else (30, 10)
    expected = [f"epoch {e}, rank {r}: {n} images" for e in (0, 1) for r in range(ranks) for n in sizes]
    assert found == sorted(expected)
    classes = " ".join(re.findall(r"^target (.*)$", stdout, re.M)).split()
    assert sorted(classes, key=int) == [str(c) for c in range(10) for _ in range(2 * 8)]


def test_no_number_is_missing():
    """A place that was left for a figure."""
    assert not re.search(r"\b(TODO|XXX|MINUTES)\b", README)


def test_commands_that_are_run_elsewhere():
    for command, (file, text) in ELSEWHERE.items():
        assert command in commands(), command
        assert text in (ROOT / "tests" / file).read_text(), command


def test_commands_that_are_marked():
    """Of hardware that the tests lack they have two processes of torchrun, and two nodes: see test_distributed.py."""
    marked = [command for command, mark in commands().items() if mark]
    assert len(marked) >= 5 and all(re.search("8|gpu|HOST|srun", command) for command in marked), marked
    script = re.search(r"^    #!/bin/bash\n(?:    .*\n)+", README, re.M)[0].replace("\n    ", "\n")
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    options = set(re.findall(r"--[a-z-]+", script.partition("main-wds.py")[0].partition("torchrun")[2]))
    text = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    assert options and all(option in text.stdout.replace("_", "-") for option in options)


def test_a_token(tmp_path):
    """The recipe with curl: the server gets the line of token.txt, and gives nothing to those who have none."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    recipe = re.search(r"`--trainshards '(pipe:curl [^']+)'", README)[1]

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
    (tmp_path / "imagenet-train-000000.tar").write_bytes(tar([("0.cls", b"1"), ("0.jpg", b"image")]))
    (tmp_path / "token.txt").write_text("Authorization: Bearer abc\n")
    url = recipe.replace("https://HOST", f"http://127.0.0.1:{server.server_port}").replace(
        "@token", f"@{tmp_path}/token"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(main_wds, "PAUSES", ())
        (url,) = main_wds.expand(re.sub(r"\{0+\.\.\d+\}", "000000", url))
        assert [sample["jpg"] for sample in main_wds.read_shard(url, 1, 0, 1)] == [b"image"]
        (tmp_path / "token.txt").write_text("Authorization: Bearer xyz\n")
        with pytest.raises(main_wds.DataError, match="pipe:curl"):
            list(main_wds.read_shard(url, 1, 0, 1))
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------- the troubles


def shards_error(*args):
    return lambda folder: error_of("makeshards.py", *args, cwd=folder)


def wds_error(*args):
    return lambda folder: error_of("main-wds.py", *FAST.split(), "--image-size", 32, *args, cwd=folder)


def wds_output(*args):
    return lambda folder: run("main-wds.py", *FAST.split(), "--image-size", 32, *args, cwd=folder)[0]


def after(change, then):
    """Spoil something in the folder, and then make the mistake."""

    def make(folder):
        change(folder)
        return then(folder)

    return make


def move_a_class(folder):
    (folder / "data/val/n90000001").rename(folder / "data/val/n90000099")


def empty_an_image(folder):
    next((folder / "data/train/n90000001").iterdir()).write_bytes(b"")


def flatten(folder, split="train"):
    shutil.rmtree(folder / "data" / split)
    (folder / "data" / split).mkdir()
    (folder / "data" / split / "a.JPEG").write_bytes(b"")


def hold(folder):
    """Another run that writes to the same folder, as far as its lock goes."""
    import fcntl

    file = os.open(folder / "empty", os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    HELD.append(file)


HELD = []


def rewrite(folder, change):
    """The first training shard, of the members [(name, bytes)] that change() leaves of it."""
    path, out = folder / "shards/imagenet-train-000000.tar", io.BytesIO()
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(out.getvalue())


def cut(folder):
    path = folder / "shards/imagenet-train-000000.tar"
    path.write_bytes(path.read_bytes()[:-40_000])


def spoil_an_image(members):
    return [(name, b"no image" if name.endswith("jpg") else data) for name, data in members]


def checkpoint(folder, **state):
    """One of main-wds.py's, stopped within an epoch if its position says so."""
    main_wds = load("main-wds.py")
    net = main_wds.models.get_model("shufflenet_v2_x0_5")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    args = {"epoch": 0, "arch": "shufflenet_v2_x0_5", "state_dict": net.state_dict(), "best_acc1": 0.0}
    more = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**args, **more, **state}, folder / "checkpoint.pth.tar")


def stumble(folder):
    """What a command says that fails once, and then gives the shard."""
    shard, once = folder / "shards/imagenet-train-000000.tar", folder / "once"
    command = f"if mkdir {once} 2>&-; then exit 7; fi; cat {shard}"
    args = [*FAST.split(), "--image-size", 32, "--trainshards", f"pipe:{command}"]
    return run("main-wds.py", *args, "--valshards", "shards/imagenet-val-*.tar", cwd=folder)[1]


def warning(folder):
    many = 4 * (os.cpu_count() or 1)
    return run(
        "main-wds.py", *FAST.split(), "--image-size", 32, "-j", many, "--evaluate", cwd=folder,
        env={"PYTHONWARNINGS": "default"},
    )[1].replace(f"create {many} worker", "create 4 worker")  # fmt: skip


def change_index(folder, change):
    path = folder / "shards/_info.json"
    index = json.loads(path.read_text())
    change(index["splits"]["train"])
    path.write_text(json.dumps(index))


def other_classes(entry):
    entry["classes"] = ["cat", "dog"]


def one_sample(entry):
    entry.update(filenames=entry["filenames"][:1], shard_lengths=[1], num_samples=1)


RESUME = ["--resume", "checkpoint.pth.tar"]
POSITION = {"step": 1, "seed": 0, "shards": [], "shuffle": 1000, "world_size": 1, "workers": 1, "batch_size": 16}
TWO_RANKS = ["--multiprocessing-distributed", "--dist-url"]
MISTAKES = {
    "no such folder; create it first: mkdir …": shards_error("--shards", "./none"),
    "must hold a folder of images for each class": after(flatten, shards_error("--shards", "empty")),
    "images outside of class folders": after(
        functools.partial(flatten, split="val"), shards_error("--shards", "empty")
    ),
    "that train/ does not have": after(move_a_class, shards_error("--shards", "empty")),
    "can't be read as an image (…); fix it, then run this again": after(
        empty_an_image, shards_error("--shards", "empty")
    ),
    "shards were written with other options or images (…)": shards_error("--maxcount", 20),
    "quote patterns such as": shards_error("--index", "a.tar", "b.tar"),
    "another run is writing to it; wait until it has ended": after(hold, shards_error("--shards", "empty")),
    "no _info.json there that names … shards": wds_error("--shards", "empty"),
    "no shard matches": wds_error("--valshards", "shards/imagenet-vall-*.tar"),
    "beside the shards or in --shards …; write it with makeshards.py --index": wds_error(
        "--valshards", "pipe:cat none.tar", "--shards", "empty"
    ),
    "matches 0 shards of the index, not one": wds_error("--trainshards", "pipe:cat none.tar"),
    "training and validation shards have different classes": after(
        lambda folder: change_index(folder, other_classes), wds_error()
    ),
    "… samples, but … by its index": after(lambda folder: rewrite(folder, lambda members: members[:-2]), wds_error()),
    "broken after … of its … samples": after(cut, wds_error()),
    "…: sample …: not a readable image": after(lambda folder: rewrite(folder, spoil_an_image), wds_error()),
    "retrying in 1 s": stumble,
    "not a single-output classifier of torchvision; try …": wds_error("-a", "resnet5"),
    ": it is for …; add --arch …": after(lambda folder: checkpoint(folder, arch="resnet18"), wds_error(*RESUME)),
    "the checkpoint's options are kept: …": after(checkpoint, wds_output(*RESUME, "--lr", 1)),
    "no checkpoint found at …": wds_output("--resume", "none", "--epochs", 0),
    "not a checkpoint of this script": wds_error("--resume", "data/.sample"),
    "it stopped within an epoch, with …": after(
        lambda folder: checkpoint(folder, position=POSITION), wds_error(*RESUME, "-j", 1)
    ),
    "… ranks but … training samples: start fewer processes": after(
        lambda folder: change_index(folder, one_sample),
        lambda folder: wds_error(*TWO_RANKS, f"file://{folder}/store")(folder),
    ),
    "the ranks can't meet": wds_error(*TWO_RANKS, "pigeon://here"),
    "This DataLoader will create 4 worker processes": warning,
}
SHOWN_ELSEWHERE = {
    "lost the connection to another rank": "test_resume.py",
    "; it must be the same": "test_machines.py",
    "/dev/shm is full": "test_machines.py",
    "if out of memory, lower --workers or --batch-size": "test_machines.py",
    "too long for the workers' sockets": "test_machines.py",
    "can't write checkpoints there": "test_machines.py",
    "it does not take --image-size": "test_machines.py",
}


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the small dataset and its shards, to be spoilt, and an empty folder."""
    for name in ("data", "shards"):
        shutil.copytree(small / name, tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("message", MISTAKES)
def test_troubles(message, folder):
    """Each mistake made on purpose gives its message."""
    assert re.search(re.escape(message).replace("…", ".+"), MISTAKES[message](folder))


def test_messages():
    """Each one is seen by a test."""
    assert set(MESSAGES) == MISTAKES.keys() | SHOWN_ELSEWHERE.keys()
    for text in SHOWN_ELSEWHERE:
        assert text in (ROOT / "main-wds.py").read_text()


# ---------------------------------------------------------------------------- what it names


def test_sections():
    """In the order of a reader's questions."""
    wanted = ["Quick start", "Results", "Generating the shards", "Running training", "Changes from the original"]
    wanted += ["Resuming", "Remote shards", "The benchmark", "Using the loader in your own script"]
    assert list(SECTIONS) == [*wanted, "Troubleshooting", "Limits and comparison"]


def test_its_pipeline_is_that_of_the_script():
    (stages,) = re.findall(r"^```python\n(dataset\.pipeline.*?)^```", README, re.M | re.S)
    script = (ROOT / "main-wds.py").read_text()
    assert all(line.strip() in script for line in stages.splitlines())


def test_run_diff_has_a_word_on_each_hunk():
    """And all of their lines."""
    stdout, stderr = run_command([ROOT / "run", "diff"], cwd=ROOT, env={"PYTHON": sys.executable})
    diff = subprocess.run(["diff", "main-orig.py", "main-wds.py"], cwd=ROOT, capture_output=True, text=True).stdout
    titles = re.findall(r"^=+ (\d)\. (.+) \(-\d+ \+\d+ lines\)$", stdout, re.M)
    assert [int(number) for number, _ in titles] == list(range(1, 10)) and not stderr
    lines = lambda text: [line for line in text.splitlines() if re.match("[<>] .", line)]  # noqa: E731
    assert lines(stdout) == lines(diff)


def test_links_and_files_that_it_names_are_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    titles = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    own = [link for link in links if not link.startswith("https://github.com/")]
    assert own and all(link in anchors or (ROOT / link).exists() for link in own), own
    scripts = set(re.findall(r"[\w-]+\.py\b", README))
    assert scripts == {"main-orig.py", "main-wds.py", "makeshards.py", "peers.py"}
    assert (ROOT / "tests/peers.py").exists()
    names = set(re.findall(r"\./run ([a-z]+)\b(?!\.)", README)) - {"main", "makeshards"}
    assert names <= set(re.findall(r"^cmd_(\w+)", (ROOT / "run").read_text(), re.M)), names
