"""The two training scripts are the same text except for the loaders; options of all three scripts."""

import ast
import functools
import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, SCRIPTS, run, run_command
from lesson import hunks

TRAINING = {"--arch": "resnet18", "--workers": "4", "--epochs": "90", "--batch-size": "256", "--lr": "0.1", "-p": "10"}
DEFAULTS = {
    "main-orig.py": {"DIR": "imagenet", **TRAINING},
    "main-wds.py": {"--dataset": "wds", "--data": "./data", "--shards": "./shards", **TRAINING},
    "makeshards.py": {"--data": "./data", "--shards": "./shards", "--splits": "train,val", "--maxcount": "1000"},
}


def definitions(script):
    """{name: source} of the functions and classes at the top level of a script."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@functools.cache
def options(script):
    """{option or DIR: (whether it takes a value, its default as the help states it, or None)}."""
    stdout, _ = run(script, "--help", cwd=ROOT)
    found = {}
    for entry in re.split(r"^  (?=-|DIR\b)", stdout, flags=re.M)[1:]:
        entry, _, _ = entry.partition("\n\n")
        names, text = re.split(r"\s{2,}", entry, maxsplit=1)
        names = names.split(", ")
        takes_value = " " in names[-1] or names == ["DIR"]
        default = re.search(r"\(default: ([^()]+)\)$", " ".join(text.split()))
        for name in names:
            found[name.split()[0]] = (takes_value, default[1] if default else None)
    return found


def test_shared_functions_are_identical():
    orig = definitions("main-orig.py")
    wds = definitions("main-wds.py")
    assert orig.keys() <= wds.keys()
    differing = {name for name in orig if orig[name] != wds[name]}
    differing -= {"parse_args", "main_worker", "shared_options", "open_folder", "make_transform", "load_image"}
    assert differing == {"train", "read_checkpoint"}


def test_hunks():
    """At most 13 small hunks, then a pure addition with everything that is new at the top level."""
    *small, (old, new) = hunks()
    assert len(small) <= 13
    assert old == []
    added = definitions("main-wds.py").keys() - definitions("main-orig.py").keys()
    assert added
    for name in added:
        assert any(re.match(rf"(def|class) {name}\b", line) for line in new), name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.slow
def test_script_runs_alone(script, folders, shards, tmp_path):
    """A copy of the script needs no other file of the project."""
    model = ["-a", "shufflenet_v2_x0_5", "--epochs", 1, "-b", 16, "-j", 2]
    args, result = {
        "main-orig.py": ([folders, *model], "checkpoint.pth.tar"),
        "main-wds.py": (["--shards", shards, "--image-size", 32, *model], "checkpoint.pth.tar"),
        "makeshards.py": (["--data", folders, "--shards", "."], "_info.json"),
    }[script]
    shutil.copy(ROOT / script, tmp_path)
    command = [sys.executable, script, *map(str, args)]
    _, stderr = run_command(command, cwd=tmp_path, env={"PYTHONWARNINGS": "error"})
    assert stderr == ""
    assert (tmp_path / result).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_defaults(script):
    """Each option that takes a value states its default, unless it is off by default."""
    found = options(script)
    without = {name for name, (takes_value, default) in found.items() if takes_value and default is None}
    assert without == ({"--resize", "--index"} if script == "makeshards.py" else set())
    for name, default in DEFAULTS[script].items():
        assert found[name] == (True, default), name


def test_options_of_the_pair():
    """main-wds.py has main-orig.py's options except DIR, and those for shards."""
    orig = {name for name in options("main-orig.py") if name.startswith("--")}
    wds = {name for name in options("main-wds.py") if name.startswith("--")}
    named = """
        --arch --workers --epochs --start-epoch --batch-size --lr --learning-rate --momentum --wd --weight-decay
        --print-freq --resume --evaluate --pretrained --world-size --rank --dist-url --dist-backend --seed --gpu
        --no-accel --multiprocessing-distributed --dummy --amp --help
    """
    added = """
        --data --dataset --loader --shards --index --shuffle --augmentation --decode --image-size --checkpoint-steps
    """
    assert orig == set(named.split())
    assert wds - orig == set(added.split())
    assert orig <= wds
    assert "DIR" in options("main-orig.py") and "DIR" not in options("main-wds.py")


def test_lint_and_format():
    for args in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *args, *SCRIPTS, "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
