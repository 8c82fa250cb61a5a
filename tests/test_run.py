"""The helper ./run, as a user types it, in a copy of the project whose path contains a space."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, run_command

COPIED = ("*.py", "*.txt", "*.md", "run", "tests/*.*")
ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), sys.prefix]))"
THIS_PYTHON = f"exec '{sys.executable}' \"$@\""
OLD_PYTHON = f"exec '{sys.executable}' -c 'import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])'"
PROGRAMS = ("bash", "cat", "cmp", "cp", "dirname", "mkdir", "readlink", "rm", "rmdir", "sed")
FAST = ["-a", "shufflenet_v2_x0_5"]


def copy_project(folder):
    """The copy's folder, which also holds echo.py: it prints its arguments, current folder and environment."""
    project = folder.resolve() / "a project"
    (project / "tests").mkdir(parents=True)
    for path in [path for pattern in COPIED for path in ROOT.glob(pattern)]:
        shutil.copy(path, project / path.relative_to(ROOT))
    (project / "echo.py").write_text(ECHO)
    return project


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("made"))
    run(project, "sample", "--train", "4", "--val", "1")
    run(project, "makeshards")
    return project


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of the project with a small sample in ./data and its shards in ./shards."""
    return shutil.copytree(made_once, tmp_path.resolve() / "a project")


def run(project, *args, status=0, cwd=None, **env):
    """(stdout, stderr) of ./run with PYTHON set to this Python, unless env says otherwise."""
    env = {"PYTHON": sys.executable, **env}
    return run_command([project / "run", *args], cwd=cwd or project, status=status, env=env)


def error_of(project, *args, **env):
    """The one line with which ./run fails, with status 2."""
    stdout, stderr = run(project, *args, status=2, **env)
    assert stdout == "" and re.fullmatch("run: .+\n", stderr), stdout + stderr
    return stderr


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def without_python_variable(project, python3=THIS_PYTHON):
    """An environment with an empty PYTHON and a PATH of what ./run needs, and of this shell script as python3."""
    (project / "requirements.txt").write_text("# nothing\n")  # so that no failure installs PyTorch
    folder = project.parent / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).symlink_to(shutil.which(name))
    if python3:
        write_program(folder / "python3", python3)
    return {"PYTHON": "", "PATH": str(folder)}


def require_tiny(project, version):
    """Make requirements.txt name a package that pip installs without a network; returns its wheel."""
    wheel = project.parent / f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", f"print({version})")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    (project / "requirements.txt").write_text(f"tiny @ {wheel.as_uri()}\n")
    (project / "tiny_version.py").write_text("import tiny")
    return wheel


def snapshot(folder):
    """{path: (time, target, bytes)} of everything in the folder, without Python's caches."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        if "__pycache__" not in path.parts:
            data = path.read_bytes() if path.is_file() else None
            found[path] = (path.lstat().st_mtime_ns, os.path.realpath(path), data)
    return found


# ---------------------------------------------------------------------------- commands and scripts


def test_help(project):
    stdout, _ = run(project, "help")
    assert run(project) == run(project, "--help") == (stdout, "")
    listed = set(re.findall(r"^  (\w+) +\S", stdout, re.M))
    assert {"help", "venv", "sample", "makeshards", "single", "multi", "bench", "diff", "test", "clean"} <= listed


@pytest.mark.parametrize("name", ["nonsense", "-x", "main", "a b", "nosuch.py"])
def test_unknown_command(name, project):
    """It is refused before an environment is made."""
    assert f"{name}: no such " in error_of(project, name)
    error_of(project, name, **without_python_variable(project))
    assert not (project / "venv").exists()


def test_symbolic_links_to_it(project, tmp_path):
    """From any folder, ./run finds its own and works in the current one."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "relative").symlink_to("../a project/run")
    (elsewhere / "absolute").symlink_to(project / "run")
    (elsewhere / "chain").symlink_to("../else where/relative")
    (elsewhere / "folder").symlink_to(project)
    (tmp_path / "current").mkdir()
    env = {"CDPATH": ".", "PYTHON": sys.executable}
    for name in ("relative", "absolute", "chain", "folder/run", "../a project/run", str(project / "run")):
        stdout, _ = run_command([Path("../else where", name), "echo.py"], cwd=tmp_path / "current", env=env)
        assert json.loads(stdout)[:2] == [[], str(tmp_path.resolve() / "current")]


def test_script_arguments_and_status(project, tmp_path):
    args = ["two  words", "", "*", "'", '"', "$HOME", "\\", "line\nline", "-h", "--"]
    stdout, _ = run(project, "echo.py", *args, cwd=tmp_path)
    assert json.loads(stdout) == [args, str(tmp_path.resolve()), sys.prefix]
    (tmp_path / "own.py").write_text("import sys; sys.exit(7)")
    for name in ("own.py", "./own.py", str(tmp_path / "own.py")):
        run(project, name, cwd=tmp_path, status=7)


def test_arguments_of_test(project):
    """They go to pytest, which runs this project's tests."""
    write_program(project / "python", '[ "$1" = - ] || printf "%s\\n" "$@"')  # "-": ./run looks for the packages
    stdout, _ = run(project, "test", "--all", "-k", "two words", PYTHON="./python")
    module, pytest_, tests, *args = stdout.splitlines()
    assert (module, pytest_, tests) == ("-m", "pytest", f"{project}/tests")
    assert args[-3:] == ["--all", "-k", "two words"]


# ---------------------------------------------------------------------------- Python and ./venv


def test_python_variable(project):
    """A path or a name, from any folder; no environment is made."""
    env = without_python_variable(project)
    folder = project.parent / "bin"
    write_program(folder / "my python", f"echo used >&2; {THIS_PYTHON}")
    for python in (str(folder / "my python"), "./my python", "../bin/my python", "my python"):
        for args in (["echo.py"], ["sample", "--help"], ["clean"]):
            _, stderr = run(project, *args, cwd=folder, **{**env, "PYTHON": python})
            assert "used" in stderr
    assert not (project / "venv").exists()


def test_unusable_python_variable(project, tmp_path):
    """The error names it, or the packages that it lacks; `clean` needs no packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    for command in ("echo.py", "sample", "single", "clean"):
        for python in ("nosuch", "/no/such", str(tmp_path)):
            assert f"PYTHON={python}: " in error_of(project, command, PYTHON=python)
        if command != "clean":
            error = error_of(project, command, PYTHON=bare).lower()
            assert all(name in error for name in ("torch", "torchvision", "webdataset", "pil", "tqdm")), error
    run(project, "clean", PYTHON=bare)
    assert not (project / "venv").exists() and not (project / "data").exists()


UNUSABLE = {  # name: (python3 as a shell script, what the error contains)
    "absent": (None, "install Python 3.10"),
    "old": (f'case "$1" in -c) {OLD_PYTHON} "$2" ;; *) echo Python 3.9.1 ;; esac', "3.9.1 is too old"),
    "without venv": ('case "$*" in *ensurepip*) exit 1 ;; esac', "apt install python3-venv"),
    "venv fails": ('case "$*" in "-m venv"*) exit 1 ;; esac', "venv"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_python3(kind, project):
    python3, expected = UNUSABLE[kind]
    env = without_python_variable(project, python3)
    for command in ("venv", "echo.py", "sample"):
        assert expected in error_of(project, command, **env)
    if kind == "absent":
        assert "python3" in error_of(project, "clean", **env)
    assert not (project / "venv").exists()


@pytest.mark.slow
def test_environment_follows_requirements(project):
    env = without_python_variable(project)
    require_tiny(project, 1)
    stdout, stderr = run(project, "tiny_version.py", **env)
    assert stdout == "1\n" and stderr.count("installing") == 1
    assert json.loads(run(project, "echo.py", **env)[0])[2] == str(project / "venv")
    os.utime(project / "requirements.txt")
    assert run(project, "venv", **env) == ("", "")
    require_tiny(project, 2)
    assert run(project, "venv", **env)[1].count("installing") == 1
    assert run(project, "tiny_version.py", **env) == ("2\n", "")


@pytest.mark.slow
def test_interrupted_installation_is_repeated(project):
    """Interrupted before the environment had pip, or before pip had all packages."""
    env = without_python_variable(project)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / "venv"], check=True)
    wheel = require_tiny(project, 1)
    wheel.rename(project / "away")
    for _ in range(2):
        lines = run(project, "venv", status=2, **env)[1].splitlines()
        assert "installing" in lines[0] and "No module named pip" not in str(lines)
        assert [line for line in lines if line.startswith("run: ")] == lines[-1:]
        assert "pip could not install" in lines[-1]
    (project / "away").rename(wheel)
    assert run(project, "tiny_version.py", **env)[0] == "1\n"
    assert run(project, "venv", **env) == ("", "")


# ---------------------------------------------------------------------------- ./data and ./shards


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_existing_files_are_kept(kind, project):
    """What the user has under the names venv, data and shards is neither replaced nor deleted."""
    env = without_python_variable(project)
    for name in ("venv", "data", "shards"):
        if kind == "folder":
            (project / name).mkdir()
        elif kind == "file":
            (project / name).touch()
        else:
            (project / name).symlink_to("/no/such")
    before = snapshot(project)
    assert str(project / "venv") in error_of(project, "venv", **env)
    assert "./data" in run(project, "sample", "--train", "1")[0]
    assert run(project, "clean") == ("", "")
    assert snapshot(project) == before


@pytest.mark.slow
def test_clean(made):
    names = set(os.listdir(made)) - {"data", "shards"}
    index = made / "shards" / "_info.json"
    index.write_text(index.read_text().replace('"filenames": [', '"filenames": ["../echo.py", '))  # must be kept
    _, stderr = run(made, "clean")
    assert stderr == "" and set(os.listdir(made)) == names
    run(made, "sample", "--train", "1", "--val", "21")  # of another size than the default one
    run(made, "clean")
    assert set(os.listdir(made)) == names


@pytest.mark.parametrize("name", ["data/train/n90000001/own.JPEG", "data/own.txt", "shards/own.tar"])
@pytest.mark.slow
def test_clean_keeps_other_files(name, made):
    """It names them. Once they are gone, it deletes the folder."""
    (made / name).write_text("mine")
    stdout, stderr = run(made, "clean")
    assert f"./{name}" in stdout and stderr == ""
    files = [path for path in (*made.glob("data/**/*"), *made.glob("shards/*")) if path.is_file()]
    assert [path for path in files if path.name != ".sample"] == [made / name]
    (made / name).unlink()
    run(made, "clean")
    assert not (made / "data").exists()


OTHER = ["data link", "data without .sample", "shards link", "shards of other classes", "shards without classes",
         "shards with an invalid index"]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.slow
def test_clean_keeps_other_datasets(kind, made, tmp_path):
    folder = made / kind.split()[0]
    if kind == "data without .sample":
        (folder / ".sample").unlink()
    elif kind.endswith("link"):
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        index = json.loads((folder / "_info.json").read_text())
        classes = {"classes": ["cat", "dog"]} if "other" in kind else {}
        index = [] if "invalid" in kind else {"splits": index["splits"], **classes}
        (folder / "_info.json").write_text(json.dumps(index))
    before = snapshot(folder)
    _, stderr = run(made, "clean")
    assert stderr == "" and snapshot(folder) == before


@pytest.mark.slow
def test_makeshards_leaves_no_empty_folder(project):
    run(project, "makeshards", "--help")
    run(project, "makeshards", status=2)  # no ./data
    assert not (project / "shards").exists()


@pytest.mark.slow
def test_current_folder(project, tmp_path):
    """All commands read and write in the current folder, and change nothing in the project's."""
    before = snapshot(project)
    run(project, "sample", "--train", "4", "--val", "1", cwd=tmp_path)
    data = snapshot(tmp_path / "data")
    run(project, "sample", cwd=tmp_path)
    assert snapshot(tmp_path / "data") == data
    run(project, "makeshards", cwd=tmp_path)
    stdout, _ = run(project, "single", "--epochs", "1", *FAST, cwd=tmp_path)  # `multi` is in test_readme.py
    assert set(re.findall(r"^Epoch: \[(\d+)\]", stdout, re.M)) == {"0"}
    assert len(re.findall(r"^ \* Acc@1 \d", stdout, re.M)) == 1, stdout
    run(project, "single", "--shards", "shards", "--evaluate", *FAST, cwd=tmp_path)
    assert {"data", "shards", "checkpoint.pth.tar"} <= set(os.listdir(tmp_path))
    run(project, "clean", cwd=tmp_path)
    assert not {"data", "shards"} & set(os.listdir(tmp_path))
    assert snapshot(project) == before


@pytest.mark.slow
def test_bench(made):
    """It writes missing shards, and changes nothing else; test_bench.py tests the measurement."""
    shutil.rmtree(made / "shards")
    stdout, _ = run(made, "bench", "--only", "training", "--dataset", "wds", "--repeats", "1", *FAST)
    assert re.search(r"^wds/tensor +\d", stdout, re.M), stdout
    assert (made / "bench.json").exists() and not (made / "venv").exists()
    before = snapshot(made / "shards"), snapshot(made / "data")
    run(made, "bench", "--prepare")
    assert (snapshot(made / "shards"), snapshot(made / "data")) == before
