"""The two training scripts are one text but for the loaders, and what is said about that is true."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run
from lesson import hunks

ORIG, WDS = ((ROOT / name).read_text().splitlines() for name in ("main-orig.py", "main-wds.py"))


def functions(lines):
    """{name: text} of the functions and classes at the top level."""
    found = {}
    for line in lines:
        if match := re.match(r"(?:def|class) (\w+)", line):
            name = match[1]
            found[name] = []
        elif line and not line.startswith((" ", "@", ")")):
            name = None
        if found and name:
            found[name].append(line)
    return {name: "\n".join(text).rstrip() for name, text in found.items()}


def test_all_but_the_loaders_is_the_same_text():
    orig, wds = functions(ORIG), functions(WDS)
    differing = {name for name in orig if orig[name] != wds.get(name)}
    assert differing == {"parse_args", "run", "make_transform"}
    first_new = min(WDS.index(line) for line in WDS if re.match(r"def (\w+)", line) and line not in ORIG)
    banner = next(i for i, line in enumerate(WDS) if line.startswith("# =====") and "the shards" in line)
    assert first_new > banner  # what is new stands last, in one piece
    assert WDS[-2:] == ORIG[-2:] == ['if __name__ == "__main__":', "    main()"]


def test_the_loop_differs_in_the_loaders_only():
    loop = functions(ORIG)["run"].splitlines() + functions(WDS)["run"].splitlines()
    changed = [line.strip() for old, new in hunks()[:-1] for line in old + new if line and line in loop]
    assert changed == [
        "val_loader = make_val_loader_orig(args)",
        "train_loader = None if args.evaluate else make_train_loader_orig(args)",
        'make_train_loader, make_val_loader = LOADERS["orig" if args.dummy else args.dataset]',
        "val_loader = DeviceLoader(make_val_loader(args), args)",
        "train_loader = None",
        "if not args.evaluate:",
        "save = functools.partial(save_checkpoint, args, net, optimizer, scheduler)",
        "train_loader = TrainLoader("
        "make_train_loader(args), args, state, lambda **at: save(best_acc1=best_acc1, **at))",
        "if args.distributed:",
        'if hasattr(train_loader.sampler, "set_epoch"):',
    ]


def test_eight_hunks():
    """Seven small ones, and then a pure addition."""
    *small, (old, new) = hunks()
    assert len(small) == 7 and all(len(a) + len(b) <= 21 for a, b in small)
    assert not old and "# =====" in new[0] and "the shards" in new[0]


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py", "makeshards.py"])
def test_help(script):
    """In groups, and on a terminal of 80 columns each option in one line with its default."""
    text, _ = run(script, "--help", cwd=ROOT, env={"COLUMNS": "80", "PYTHON_COLORS": "0"})
    assert all(len(line) <= 80 for line in text.splitlines())
    groups = re.split(r"^\S.*:\n", text.partition("\noptions:\n")[2], flags=re.M)
    options = [line for group in groups[1:] for line in group.splitlines() if line]
    assert len(groups) >= 4 and len(options) >= 12
    for line in options:
        assert re.match(r"  (-{1,2}[a-z].*|DIR) {2,}\S", line) and re.search(r"\(.+\)$", line), line


def test_options_of_the_pair():
    """main-wds.py has all of main-orig.py's options, and those that the design names."""
    helps = [run(script, "--help", cwd=ROOT)[0] for script in ("main-orig.py", "main-wds.py")]
    options = [set(re.findall(r"--[a-z0-9-]+", text)) for text in helps]
    named = "arch workers epochs start-epoch batch-size lr learning-rate momentum wd weight-decay print-freq resume"
    named += " evaluate pretrained world-size rank dist-url dist-backend seed gpu no-accel multiprocessing-distributed"
    assert options[0] == {f"--{name}" for name in (named + " dummy help amp").split()}
    added = "data dataset loader shards trainshards valshards trainsize valsize shuffle augmentation decode image-size"
    added += " checkpoint-steps"
    assert options[1] - options[0] == {f"--{name}" for name in added.split()}
    assert "DIR" in helps[0]


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py", "makeshards.py"])
def test_the_beginning_tells_how_to_start(script):
    head = "\n".join((ROOT / script).read_text().splitlines()[:20])
    assert f"    python {script}" in head and head.startswith("#!/usr/bin/env python3\n" + '"""')


def test_lint_and_format():
    """ruff's check and format, as .ruff.toml has them."""
    for args in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *args, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
