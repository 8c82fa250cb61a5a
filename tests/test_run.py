"""The helper ./run, as a user types it, in a copy of the project whose path holds a space."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_command

TRACKED = "git ls-files --error-unmatch run && git ls-files || ls *.py run requirements.txt tests/*.*"
ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), sys.prefix]))"
PYTHON3 = f"exec '{sys.executable}' \"$@\""
OLD = f"exec '{sys.executable}' -c 'import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])'"
FAST = ["-a", "shufflenet_v2_x0_5"]
OWN = {"folder": Path.mkdir, "file": Path.touch, "link": lambda path: path.symlink_to("/no/such")}


def copy_project(folder):
    project = folder.resolve() / "a project"
    names = subprocess.run(TRACKED, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    (project / "echo.py").write_text(ECHO)
    return project


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


@pytest.fixture(scope="module")
def small_project(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("small"))
    run(project, "sample", "--train", "4", "--val", "1")
    run(project, "makeshards")
    return project


@pytest.fixture
def made(small_project, tmp_path):
    """A project with a small sample in ./data and its shards in ./shards."""
    return shutil.copytree(small_project, tmp_path.resolve() / "a project")


def run(project, *args, status=0, cwd=None, **env):
    """./run with this Python, or with PYTHON="" as if it were not set; returns (stdout, stderr)."""
    env = {"PYTHON": sys.executable, **env}
    return run_command([project / "run", *args], cwd=cwd or project, status=status, env=env)


def error_of(project, *args, **env):
    stdout, stderr = run(project, *args, status=2, **env)
    assert stdout == "" and re.fullmatch("run: .+\n", stderr), stdout + stderr
    return stderr


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def no_variable(project, python3=PYTHON3):
    """Environment without PYTHON, whose PATH holds what run needs and this shell script, if any, as python3."""
    (project / "requirements.txt").write_text("# nothing\n")  # lest a fault of run install PyTorch
    folder = project.parent / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "cmp", "cp", "dirname", "mkdir", "readlink", "rm", "rmdir", "sed"):
        (folder / name).symlink_to(shutil.which(name))
    if python3:
        program(folder / "python3", python3)
    return {"PYTHON": "", "PATH": str(folder)}


def require(project, version):
    """Let requirements.txt name a package that pip installs without the network; returns its wheel."""
    wheel, info = project.parent / f"tiny-{version}-py3-none-any.whl", f"tiny-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", f"print({version})")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    (project / "requirements.txt").write_text(f"tiny @ {wheel.as_uri()}\n")
    (project / "tiny_version.py").write_text("import tiny")
    return wheel


def snapshot(folder):
    """Everything in the folder, with its time, target and bytes."""
    paths = [folder, *folder.rglob("*")]
    return {p: (p.lstat().st_mtime_ns, os.path.realpath(p), p.is_file() and p.read_bytes()) for p in paths}


def test_help_lists_every_command(project):
    stdout, _ = run(project, "help")
    assert run(project) == run(project, "--help") == (stdout, "")
    commands = re.findall(r"^cmd_(\w+)", (project / "run").read_text(), re.M)
    assert {"help", "venv", "sample", "makeshards", "single", "multi", "bench", "test", "clean"} <= set(commands)
    assert all(re.search(rf"^  {name} +\S.{{10}}", stdout, re.M) for name in commands), stdout


@pytest.mark.parametrize("name", ["nonsense", "HELP", "-x", "main", "cmd_help", "a b", "./tests", "nosuch.py"])
def test_unknown_command(name, project):
    assert f"{name}: no such " in error_of(project, name)
    error_of(project, name, **no_variable(project))
    assert not (project / "venv").exists()


def test_works_from_anywhere_and_through_links(project, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "relative").symlink_to("../a project/run")
    (elsewhere / "absolute").symlink_to(project / "run")
    (elsewhere / "chain").symlink_to("../else where/relative")
    (elsewhere / "folder").symlink_to(project)
    stdout, _ = run(project, "help")
    for name in ("relative", "absolute", "chain", "folder/run", "../a project/run", str(project / "run")):
        assert run_command([Path("else where", name)], cwd=tmp_path, env={"CDPATH": "."})[0] == stdout
    args = ["sample", "--train", "1", "--val", "21"]
    run_command([elsewhere / "chain", *args], cwd=project, env={"PYTHON": sys.executable})
    assert (project / "data" / "train").is_dir() and not (elsewhere / "data").exists()
    before = snapshot(project / "data")
    assert "left as it is" in run(project, "sample")[0]
    assert snapshot(project / "data") == before
    run(project, "clean")  # whatever the sample's size, here with more images than usual for validation
    assert not (project / "data").exists()


def test_script_gets_its_arguments_and_folder(project, tmp_path):
    args = ["two  words", "", "*", "'", '"', "$HOME", "\\", "line\nline", "-h", "--"]
    stdout, _ = run(project, "echo.py", *args, cwd=tmp_path)
    assert json.loads(stdout) == [args, str(tmp_path.resolve()), sys.prefix]
    (tmp_path / "own.py").write_text("import sys; sys.exit(7)")
    for name in ("own.py", "./own.py", str(tmp_path / "own.py")):
        run(project, name, cwd=tmp_path, status=7)


def test_python_variable(project):
    """Any spelling of it, from any folder; ./venv is not made."""
    elsewhere = project.parent / "bin"
    env = no_variable(project)
    program(elsewhere / "my python", f"echo used >&2; {PYTHON3}")
    for python in (str(elsewhere / "my python"), "./my python", "../bin/my python", "my python"):
        for args in (["echo.py"], ["sample", "--help"], ["clean"]):
            assert "used" in run(project, *args, cwd=elsewhere, **env | {"PYTHON": python})[1]
    assert not (project / "venv").exists()


@pytest.mark.parametrize("command", ["echo.py", "sample", "single", "clean"])
def test_python_variable_that_is_no_good(command, project, tmp_path):
    for python in ("nosuch", "/no/such", str(tmp_path)):
        assert f"PYTHON={python}: " in error_of(project, command, PYTHON=python)
    if command != "clean":  # which needs no packages
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        error = error_of(project, command, PYTHON=str(tmp_path / "bare" / "bin" / "python"))
        assert all(name in error.lower() for name in ("torch", "torchvision", "webdataset", "pil", "tqdm")), error
    assert not (project / "venv").exists() and not (project / "data").exists()


BAD_PYTHONS = {
    "absent": (None, "there is no python3: install Python 3.10"),
    "old": (f'case "$1" in -c) {OLD} "$2" ;; *) echo Python 3.9.1 ;; esac', "3.9.1 is too old: install Python 3.10"),
    "without venv": ('case "$*" in *ensurepip*) exit 1 ;; esac', "apt install python3-venv"),
    "venv fails": ('case "$*" in "-m venv"*) exit 1 ;; esac', "venv"),
}


@pytest.mark.parametrize("kind", BAD_PYTHONS)
def test_without_a_good_python3(kind, project):
    python3, words = BAD_PYTHONS[kind]
    env = no_variable(project, python3)
    for command in ("venv", "echo.py", "sample"):
        assert words in error_of(project, command, **env)
    if kind == "absent":
        assert "python3" in error_of(project, "clean", **env)
    assert not (project / "venv").exists()


def test_environment_follows_requirements(project):
    env = no_variable(project)
    require(project, 1)
    stdout, stderr = run(project, "tiny_version.py", **env)
    assert stdout == "1\n" and stderr.count("installing") == 1
    assert json.loads(run(project, "echo.py", **env)[0])[2] == str(project / "venv")
    os.utime(project / "requirements.txt")
    assert run(project, "venv", **env) == ("", "")
    require(project, 2)
    assert run(project, "venv", **env)[1].count("installing") == 1
    assert run(project, "tiny_version.py", **env) == ("2\n", "")


def test_interrupted_installation_is_done_again(project):
    env = no_variable(project)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / "venv"], check=True)  # stopped before pip
    wheel = require(project, 1)
    wheel.rename(project / "away")
    for _ in range(2):
        lines = run(project, "venv", status=2, **env)[1].splitlines()
        assert "installing" in lines[0] and [line for line in lines if line.startswith("run: ")] == lines[-1:]
        assert "No module named pip" not in str(lines) and "pip could not install" in lines[-1]
    (project / "away").rename(wheel)
    assert run(project, "tiny_version.py", **env)[0] == "1\n"
    assert run(project, "venv", **env) == ("", "")


@pytest.mark.parametrize("kind", OWN)
def test_what_is_yours_is_left_alone(kind, project):
    env = no_variable(project)
    for name in ("venv", "data", "shards"):
        OWN[kind](project / name)
    before = snapshot(project)
    assert "is not a virtual environment" in error_of(project, "venv", **env)
    assert "left as it is" in run(project, "sample", "--train", "1")[0]
    assert run(project, "clean") == ("", "")
    assert snapshot(project) == before


def test_clean(made):
    names = set(os.listdir(made)) - {"data", "shards"}
    index = made / "shards" / "_info.json"
    index.write_text(index.read_text().replace('"filenames": [', '"filenames": ["../echo.py", '))  # not to be followed
    assert run(made, "clean")[1] == ""
    assert set(os.listdir(made)) == names
    subprocess.run("ln -s /data/imagenet ./data && mkdir ./shards", shell=True, cwd=made, check=True)
    assert run(made, "clean") == ("", "") and set(os.listdir(made)) == names | {"data", "shards"}


@pytest.mark.parametrize("name", ["data/train/n90000001/own.JPEG", "data/own.txt", "shards/own.tar"])
def test_clean_leaves_your_files(name, made):
    """And says which; once they are away it does the rest."""
    (made / name).write_text("mine")
    stdout, stderr = run(made, "clean")
    assert f"./{name} is not of it" in stdout and stderr == ""
    files = [path for path in (*made.glob("data/**/*"), *made.glob("shards/*")) if path.is_file()]
    assert [path for path in files if path.name != ".sample"] == [made / name]
    (made / name).unlink()
    run(made, "clean")
    assert not (made / "data").exists()


@pytest.mark.parametrize("kind", ["data link", "data alone", "shards link", "shards other", "shards hub", "shards []"])
def test_clean_leaves_your_datasets(kind, made, tmp_path):
    folder = made / kind.split()[0]
    if kind == "data alone":  # without the mark
        (folder / ".sample").unlink()
    elif kind.endswith("link"):
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        index = json.loads((folder / "_info.json").read_text())
        other = {"shards other": index | {"classes": ["cat", "dog"]}, "shards hub": {"splits": index["splits"]}}
        (folder / "_info.json").write_text(json.dumps(other.get(kind, [])))
    before = snapshot(folder)
    assert run(made, "clean")[1] == ""
    assert snapshot(folder) == before


def test_makeshards_leaves_no_empty_folder(project):
    run(project, "makeshards", "--help")
    run(project, "makeshards", status=2)  # no ./data
    assert not (project / "shards").exists()


def test_the_folder_is_the_callers(project, tmp_path):
    """All commands read and write where they are called, and nothing in the project."""
    before = snapshot(project)
    run(project, "sample", "--train", "4", "--val", "1", cwd=tmp_path)
    run(project, "makeshards", cwd=tmp_path)
    run(project, "single", "--epochs", "1", *FAST, cwd=tmp_path)
    run(project, "single", "--shards", "shards", "--evaluate", *FAST, cwd=tmp_path)
    assert {"data", "shards", "checkpoint.pth.tar"} <= set(os.listdir(tmp_path))
    run(project, "clean", cwd=tmp_path)
    assert not {"data", "shards"} & set(os.listdir(tmp_path))
    assert {path: state for path, state in snapshot(project).items() if "__pycache__" not in str(path)} == before


def test_training(made):
    """In one process; test_readme.py has `multi`."""
    stdout, _ = run(made, "single", "--epochs", "1", *FAST)
    assert len(re.findall(r"^ \* Acc@1 \d", stdout, re.M)) == 1, stdout
    assert "Epoch: [0]" in stdout and "Epoch: [1]" not in stdout
    assert (made / "checkpoint.pth.tar").exists()


def test_bench(made):
    """It makes the shards; the ways to measure are in test_bench.py."""
    shutil.rmtree(made / "shards")
    stdout, _ = run(made, "bench", "--only", "training", "--repeats", "1", *FAST)
    assert stdout.startswith("no shards in ./shards: making them from ./data\n")
    assert all(re.search(rf"^{row} +\d", stdout, re.M) for row in ("wds/tensor", "orig/pil")), stdout
    assert (made / "bench.json").exists() and not (made / "venv").exists()
    before = snapshot(made / "shards"), snapshot(made / "data")
    assert "making" not in run(made, "bench", "--prepare")[0]
    assert (snapshot(made / "shards"), snapshot(made / "data")) == before
