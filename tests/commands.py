"""Runs the project's scripts: as a user types them, or forked from a process that has already imported PyTorch.

Importing PyTorch takes four seconds of a run that otherwise takes one. fork_server() therefore imports the scripts once
and forks a process for each request; run() and Run use it unless told otherwise.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("main-orig.py", "main-wds.py", "makeshards.py")
FORKED = (*SCRIPTS, "tests/sample.py", "tests/bench.py", "tests/print_samples.py")
WARNINGS = "error,ignore:This DataLoader will create"  # the tests use more workers than there are cores
SMALL_MODEL = ["-a", "shufflenet_v2_x0_5", "--image-size", 32, "-p", 1, "--lr", 0.01, "--no-accel"]
STEPS = 20  # of an epoch of SMALL_RUN in one process; two ranks with the same -b make as many
EPOCHS = 3
SMALL_RUN = [*SMALL_MODEL, "-b", 4, "-j", 2, "--epochs", EPOCHS, "--seed", 1]
SHORT_RUN = ["-a", "shufflenet_v2_x0_5", "-b", 8, "-j", 1, "-p", 1, "--epochs", 1, "--no-accel"]
RESUME = ["--resume", "checkpoint.pth.tar"]
LIMIT = 250  # seconds after which a wait fails, with what it saw; a test has 300, a slow one 1200: see conftest.py
SESSION = "TEST_SESSION"  # an environment variable that marks a run's processes: torchrun's have sessions of their own


def load(script):
    """A script as a module, for its public functions."""
    name = Path(script).stem.replace("-", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def data_of(script, folders, shards):
    """The arguments with which a training script reads the folders or the shards."""
    return [folders] if script == "main-orig.py" else ["--shards", shards, "--image-size", 32]


def args_of(script, folders, shards):
    """The arguments with which a script trains an epoch, of four steps or of ten."""
    return [*SHORT_RUN, *data_of(script, folders, shards)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawned_ranks():
    """The arguments that start a process per GPU or, without GPUs, two processes."""
    return ["--multiprocessing-distributed", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]


def torchrun(processes=2):
    """The arguments of Python that start that many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def checkpoint(folder, name="checkpoint.pth.tar"):
    return torch.load(folder / name, weights_only=True)


class Batches(list):
    """Batches that train() and validate() take instead of a loader."""

    first_step = 0


# ---------------------------------------------------------------------------- the fork server, a process of its own


def serve():
    """Answer requests on stdin, a line of JSON each: fork a process and print its pid, or wait and print its status."""
    importlib.import_module("instruments")
    mp.set_start_method("fork")  # see conftest.py
    for script in FORKED:
        load(script)
    if importlib.util.find_spec("torchcodec"):
        importlib.import_module("torchcodec.decoders")
    gc.freeze()  # so that collections in the children do not copy these modules' memory
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "pid" in request:
            answer = wait_for(**request)
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
                leave()
                return
        print(json.dumps(answer), flush=True)


def wait_for(pid, timeout):
    """The exit status of a child, or None after the timeout in seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def become(script, args, cwd, env, output, instrument=None):
    """Do in this process what the command does. --multiprocessing-distributed forks its ranks here, too.

    instrument: the name of a function of instruments.py that is called first.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    os.setsid()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in enumerate((os.devnull, f"{output}/out", f"{output}/err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = [str(ROOT / script), *args]
    mp.spawn = functools.partial(mp.start_processes, start_method="fork")
    if instrument:
        getattr(sys.modules["instruments"], instrument)()
    try:
        load(script).main()
    except SystemExit as error:
        leave(error.code)
        raise


def leave(status=0):
    """End this process as Python does at its exit, but without freeing PyTorch, which takes half a second.

    Returns, for the usual exit, if the output can't be written or the status is not a number.
    """
    if not isinstance(status, int):
        return
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(status)


class ForkServer:
    """The tests' side of serve()."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, text=True, **pipes)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, args, cwd, output, env=None, instrument=None):
        """The pid of a process that runs the script, with this process's environment."""
        mine = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONWARNINGS")}
        env = {**mine, **{name: str(value) for name, value in (env or {}).items()}}
        args = [str(arg) for arg in args]
        return self.ask(script=script, args=args, cwd=str(cwd), output=str(output), env=env, instrument=instrument)


@functools.cache
def fork_server():
    """The only one of this process; it ends when this process does."""
    return ForkServer()


# ---------------------------------------------------------------------------- a command, from start to end


def run(script, *args, cwd, status=0, env=None):
    """(stdout, stderr) of a script that must exit with that status. With env, Python starts it anew."""
    if script in FORKED and not env:
        return run_ranks(None, script, *args, cwd=cwd, status=status)
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return run_command(command, cwd=cwd, status=status, env={"PYTHONWARNINGS": "error", **(env or {})})


def run_command(command, *, cwd, status=0, env=None):
    """(stdout, stderr) of any command that must exit with that status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}  # several tests share the cores
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{command}\ndid not end in {LIMIT} s\n{error.stdout}\n{error.stderr}") from error
    assert done.returncode == status, f"{command}\nstatus {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def run_ranks(ranks, script, *args, cwd, status=0):
    """(stdout, stderr) of rank 0 of as many ranks as torchrun would start, forked; None: a process without ranks."""
    server = fork_server()
    port = free_port()
    end = time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as output:
        pids = []
        for rank in range(ranks or 1):
            folder = Path(output, str(rank))
            folder.mkdir()
            env = {}
            if ranks:
                env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks}
                env |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            pids.append(server.start(script, args, cwd, folder, env))
        try:
            found = [server.ask(pid=pid, timeout=max(1, end - time.monotonic())) for pid in pids]
        except BaseException:
            kill_groups(pids)
            raise
        texts = []
        for rank in range(len(pids)):
            texts += [Path(output, str(rank), name).read_text() for name in ("out", "err")]
    if found != [status] * len(pids):
        kill_groups(pids)
        raise AssertionError("\n".join([f"{script} {args}", f"status {found}", *texts]))
    stdout, stderr, *others = texts
    assert not any(others[::2]), others  # only rank 0 prints
    return stdout, stderr


def start_nodes(start, script, folder, *args_of_nodes, env=None, **options):
    """The runs of one process per node, each with its own arguments, as torchrun would start them."""
    env = {**(env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": len(args_of_nodes)}
    env |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    folder.mkdir(exist_ok=True)
    runs = []
    for rank, args in enumerate(args_of_nodes):
        runs.append(start(*args, script=script, cwd=folder / str(rank), env={**env, "RANK": rank}, **options))
    return runs


def kill_groups(pids):
    """Kill the runs with these pids, and their children."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(pid, signal.SIGKILL)


def error_of(script, *args, cwd, env=None):
    """The one line with which a script refuses bad input: status 2, no traceback."""
    _, stderr = run(script, *args, cwd=cwd, status=2, env=env)
    (line,) = lines_of(stderr)
    assert line.startswith(f"{script}: "), stderr
    return line


def lines_of(stderr):
    """The lines of stderr, without those that PyTorch's launcher logs when it ends the other ranks."""
    return [line for line in stderr.splitlines() if "Terminating process" not in line]


def summary(stdout):
    """[(Acc@1, Acc@5)] of each validation."""
    return [(float(a), float(b)) for a, b in re.findall(r"^ \* Acc@1 (\S+) Acc@5 (\S+)$", stdout, re.M)]


# ---------------------------------------------------------------------------- a command that is watched, or ended


def wait_until(condition, output):
    """Wait for condition() to be true; fail with output() if it does not become so."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, output()
        time.sleep(0.002)


def shared_memory():
    """The names of PyTorch's files of shared memory, torch_PID_..., on this machine."""
    return {path.name for path in Path("/dev/shm").glob("torch_[0-9]*_*")}


class Run:
    """A script that runs in a session of its own, in the folder cwd; its output goes to the files `out` and `err`.

    typed: Python starts it anew; `before` are arguments for Python itself, such as torchrun's.
    """

    def __init__(self, script, *args, cwd, typed=False, before=(), env=None, instrument=None):
        self.cwd = cwd
        self.typed = typed or bool(before)
        self.seen = set()  # the pids of all processes of the run that were ever seen
        self.earlier = shared_memory()  # may be left by others with the same pids
        cwd.mkdir(exist_ok=True)
        for name in ("out", "err"):
            (cwd / name).write_text("")
        if not self.typed:
            self.pid = fork_server().start(script, args, cwd, cwd, env, instrument)
            return
        warnings = "error::DeprecationWarning,error::FutureWarning" if before else "error"  # torchrun itself warns
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings, SESSION: str(cwd), **(env or {})}
        command = [sys.executable, *before, str(ROOT / script), *map(str, args)]
        with open(cwd / "out", "w") as out, open(cwd / "err", "w") as err:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
        self.pid = self.process.pid

    def alive(self, among="[0-9]*"):
        """{pid: parent's pid} of its processes that have not ended."""
        found = {}
        for folder in Path("/proc").glob(str(among)):
            try:
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                ours = self.pid in (int(session), int(folder.name)) or (
                    self.typed and f"{SESSION}={self.cwd}\0".encode() in (folder / "environ").read_bytes()
                )
            except OSError:  # it has just ended, or is another user's
                continue
            if ours and state not in "ZX":
                found[int(folder.name)] = int(parent)
        self.seen |= set(found)
        return found

    def until(self, pattern, count=1):
        """Wait until stdout has that many matches; fail with the output if the run ends first."""
        end = time.monotonic() + LIMIT
        alive = True
        while len(re.findall(pattern, (self.cwd / "out").read_text(), re.M)) < count:
            assert time.monotonic() < end and alive, f"{pattern}\n{self.output()}"
            alive = self.alive(self.pid)  # before its output is read: it may print that and end
            time.sleep(0.01)
        return self

    def output(self):
        return "\n".join((self.cwd / name).read_text() for name in ("out", "err"))

    def kill(self, number, group=False):
        self.alive()
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def wait(self):
        """The exit status, or None if it does not end."""
        if not self.typed:
            return fork_server().ask(pid=self.pid, timeout=LIMIT)
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return None

    def finish(self, status=0, lines=0):
        """(stdout, lines of stderr), once it has ended with that status and that many lines on stderr (None: any).

        There may be no traceback: never on stdout, and with status 0 or 2 not on stderr either. No process and no
        shared memory may be left.
        """
        found = self.wait()
        assert found == status, f"status {found}\n{self.output()}"
        wait_until(lambda: not self.alive(), self.output)  # workers look for their parent every 5 s
        left = [name for name in shared_memory() - self.earlier if int(name.split("_")[1]) in self.seen]
        assert not left, left
        out, err = (self.cwd / "out").read_text(), lines_of((self.cwd / "err").read_text())
        assert lines in (None, len(err)), self.output()
        assert "Traceback" not in out and (status not in (0, 2) or "Traceback" not in str(err)), self.output()
        return out, err


if __name__ == "__main__":
    sys.modules["commands"] = sys.modules["__main__"]  # which instruments.py imports
    serve()
