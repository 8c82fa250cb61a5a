"""The two training scripts are one text but for the loaders, and what is said about that is true."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run, run_command, summary
from lesson import hunks

ORIG, WDS = ((ROOT / name).read_text().splitlines() for name in ("main-orig.py", "main-wds.py"))
SCRIPTS = ("main-orig.py", "main-wds.py", "makeshards.py")


def help_of(script):
    return run(script, "--help", cwd=ROOT, env={"COLUMNS": "80", "PYTHON_COLORS": "0"})[0]


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
    assert differing == {"parse_args", "main_worker", "open_folder", "make_transform"}
    first_new = min(WDS.index(line) for line in WDS if re.match(r"(?:def|class) \w+", line) and line not in ORIG)
    banner = next(i for i, line in enumerate(WDS) if line.startswith("# =====") and "the shards" in line)
    assert first_new > banner  # what is new stands last, in one piece
    assert WDS[-2:] == ORIG[-2:] == ['if __name__ == "__main__":', "    main()"]


def test_the_loop_differs_in_the_loaders_only():
    loop = functions(ORIG)["main_worker"].splitlines() + functions(WDS)["main_worker"].splitlines()
    changed = [line.strip() for old, new in hunks()[:-1] for line in old + new if line and line in loop]
    assert changed == [
        "val_loader = make_val_loader_orig(args)",
        "train_loader = None if args.evaluate else make_train_loader_orig(args)",
        'if "position" in checkpoint and args.start_epoch is None:',
        'say(args, f"=> epoch {first_epoch} is trained again from its first step")',
        "say(args, f\"=> decoding JPEGs with {'Pillow' if args.decode == 'pil' else jpeg_decoder()[0]}\")",
        "check_image_size(model, args)",
        "run = Run(args, state)",
        'make_train_loader, make_val_loader = LOADERS["orig" if args.dummy else args.dataset]',
        "val_loader = DeviceLoader(make_val_loader(args), run)",
        "train_loader = None if args.evaluate else DeviceLoader(make_train_loader(args), run, checkpoint)",
        "if args.distributed:",
        "train_loader.sampler.set_epoch(epoch)",
        "train(train_loader, model, criterion, optimizer, epoch, device, args)",
        "train_loader.set_epoch(epoch)",
        "train(train_loader, model, criterion, optimizer, epoch, device, args, train_loader.first_step)",
    ]


def test_hunks():
    """At most eight small ones, and then a pure addition."""
    *small, (old, new) = hunks()
    assert len(small) <= 8 and all(len(a) + len(b) <= 22 for a, b in small)
    assert not old and "# =====" in new[0] and "the shards" in new[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    assert not re.search(r"(import|from) .*(makeshards|main)\b", (ROOT / script).read_text())


def test_main_wds_alone_trains(small, tmp_path):
    """In a folder that holds nothing else, as a user types it."""
    shutil.copy(ROOT / "main-wds.py", tmp_path)
    options = ["-a", "shufflenet_v2_x0_5", "--epochs", "1", "-b", "16", "-j", "2", "--image-size", "32"]
    command = [sys.executable, "main-wds.py", "--shards", str(small / "shards"), *options]
    stdout, stderr = run_command(command, cwd=tmp_path, env={"PYTHONWARNINGS": "error"})
    assert stderr == "" and "Epoch: [0][1/5]" in stdout and len(summary(stdout)) == 1
    assert (tmp_path / "checkpoint.pth.tar").exists()


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_help(script):
    """As argparse writes it: the options' syntax in the usage line, and with each value its default."""
    text = help_of(script)
    usage, _, options = text.partition("\n\nPyTorch ImageNet training\n\n")
    assert "[-a ARCH]" in usage and "[-b N]" in usage and "OPTION" not in usage
    options = re.split(r"^  (?=-|DIR)", options, flags=re.M)[1:]
    assert len(options) >= 24 and all(len(line) <= 80 for line in text.splitlines())
    for option in options:
        has_value = re.match(r"DIR|--?[a-z-]+ [A-Z{]", option)
        assert bool(has_value) == bool(re.search(r"\(default:\s[^()]+\)$", option.rstrip().partition("\n\n")[0])), (
            option
        )
    defaults = {"-a": "resnet18", "-j": "4", "--epochs": "90", "-b": "256", "--lr": "0.1", "-p": "10"}
    for name, default in defaults.items():
        option = next(option for option in options if option.startswith(f"{name} "))
        assert f"(default: {default})" in " ".join(option.split())
    assert "https://pytorch.org/vision/" in next(option for option in options if option.startswith("-a "))


def test_help_of_makeshards():
    text = " ".join(help_of("makeshards.py").split())
    for name, default in {
        "--data": "./data",
        "--shards": "./shards",
        "--maxcount": "1000",
        "--splits": "train,val",
    }.items():
        assert re.search(rf" {name} [A-Z]+ [^()]*\(default: {default}\)", text), name


def test_options_of_the_pair():
    """main-wds.py has all of main-orig.py's options, and those that the design names."""
    helps = [help_of(script) for script in ("main-orig.py", "main-wds.py")]
    options = [set(re.findall(r"--[a-z0-9-]+", text)) for text in helps]
    named = "arch workers epochs start-epoch batch-size lr learning-rate momentum wd weight-decay print-freq resume"
    named += " evaluate pretrained world-size rank dist-url dist-backend seed gpu no-accel multiprocessing-distributed"
    assert options[0] == {f"--{name}" for name in (named + " dummy help amp").split()}
    added = "data dataset loader shards trainshards valshards shuffle augmentation decode image-size"
    added += " checkpoint-steps"
    assert options[1] - options[0] == {f"--{name}" for name in added.split()}
    assert "DIR" in helps[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_beginning_tells_how_to_start(script):
    head = "\n".join((ROOT / script).read_text().splitlines()[:20])
    assert f"    python {script}" in head and head.startswith("#!/usr/bin/env python3\n" + '"""')


def test_lint_and_format():
    """ruff's check and format, as .ruff.toml has them."""
    for args in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *args, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
