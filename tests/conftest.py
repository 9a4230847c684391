"""Fixtures: a fake Hub, and the scripts as real processes that talk to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

ROOT = Path(__file__).resolve().parent.parent

# A short run spends most of its time on importing torch and on tidying up when Python ends. So the tests that run a
# script many times import it once, in a process that forks for each run. The fork is a process like any other, with its
# own arguments, environment, folder, streams and exit code; only the tidying up is left out.
WARM = """
import atexit, importlib, json, os, sys, traceback

module = importlib.import_module(sys.argv[1])
if "torch" in sys.modules:  # what each fork would have to load at its first optimizer and its first weights
    import torch._dynamo

    torch.set_num_threads(1)
    torch.linalg.qr(torch.eye(64))
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(path, os.O_RDWR), number)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.path.insert(0, job["cwd"])
        sys.argv = job["argv"]
        code = 1
        try:
            exec(job["code"])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def pytest_collection_modifyitems(items):
    """With --dist loadgroup, one of the two processes has all Hub tests of a script, and trains it once for them."""
    for item in items:
        if item.path.name == "test_hub.py":
            item.add_marker(pytest.mark.xdist_group(re.search(r"\w+\.py(?=[-\]])", item.name)[0]))


@pytest.fixture(scope="session")
def hub_server():
    """One server for all tests; each uses repositories of its own."""
    with Hub() as server:
        yield server


@pytest.fixture
def hub(hub_server):
    """The server, healthy at the start of the test and at its end."""
    hub_server.heal()
    yield hub_server
    hub_server.heal()


class Shell:
    """Runs scripts against the Hub. Each call takes the folder to run in, and environment variables to change."""

    def __init__(self, hub, home):
        self.home = home  # of the warm processes: their tokens and caches
        self.warm = {}
        clean = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
        self.env = clean | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",  # two tests run at a time
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "tests" / "fast_retries"),
        }

    def environment(self, changes):
        """The environment with changes; None removes a variable."""
        return {name: value for name, value in {**self.env, **changes}.items() if value is not None}

    def run(self, command, cwd, **env):
        """A real process from its start to its end: a CompletedProcess. command: a list, or a line for bash."""
        command = ["bash", "-ec", command] if isinstance(command, str) else [*map(str, command)]
        env = self.environment(env)
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    def start(self, script, *args, cwd, code="module.main()", **env):
        """A script with these arguments, forked from a warm process and still running: its pid.

        code: what to run in the place of its main; there the script's module is called `module`.
        """
        if script not in self.warm:
            command = [sys.executable, "-c", WARM, script.removesuffix(".py")]
            path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.env['PYTHONPATH']}"}
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.warm[script] = subprocess.Popen(command, cwd=self.home, env=self.environment(path), **pipes)
        files = {name: str(self.home / name) for name in ("out", "err")}
        for path in files.values():
            Path(path).write_text("")
        job = {"argv": [str(ROOT / script), *map(str, args)], "code": code, "cwd": str(cwd), **files}
        print(json.dumps(job | {"env": self.environment(env)}), file=self.warm[script].stdin, flush=True)
        return next(int(line) for line in self.warm[script].stdout if " " not in line)  # not the end of one before

    def end(self, script, pid, seconds=120):
        """Wait for the end of a script that `start` began: a CompletedProcess."""
        too_long = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
        too_long.start()
        code = next(line for line in self.warm[script].stdout if line.startswith(f"{pid} ")).split()[1]
        too_long.cancel()
        out, err = ((self.home / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(script, int(code), out, err)

    def script(self, script, *args, **options):
        """A script from its start to its end: a CompletedProcess."""
        return self.end(script, self.start(script, *args, **options))


@pytest.fixture(scope="session")
def shell(hub_server, tmp_path_factory):
    """Runs scripts against the Hub."""
    shell = Shell(hub_server, tmp_path_factory.mktemp("home"))
    yield shell
    for process in shell.warm.values():
        process.stdin.close()
        process.wait(timeout=60)
