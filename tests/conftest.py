"""Fixtures: a fake Hub, and the scripts as real processes that talk to it."""

import json
import os
import subprocess
import sys
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
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


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

    def start(self, command, cwd, **env):
        """A real process, still running: a Popen. command: a list, or a line for bash."""
        if isinstance(command, str):
            command = ["bash", "-ec", command]
        pipe = subprocess.PIPE
        env = self.environment(env)
        return subprocess.Popen([*map(str, command)], cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)

    def run(self, command, cwd, **env):
        """A real process from its start to its end: a CompletedProcess."""
        process = self.start(command, cwd, **env)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def script(self, script, *args, cwd, code="module.main()", **env):
        """A script with these arguments, forked from a warm process: a CompletedProcess.

        code: what to run in the place of its main; there the script's module is called `module`.
        """
        if script not in self.warm:
            command = [sys.executable, "-c", WARM, script.removesuffix(".py")]
            path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.env['PYTHONPATH']}"}
            pipe = subprocess.PIPE
            self.warm[script] = subprocess.Popen(
                command, cwd=self.home, env=self.environment(path), stdin=pipe, stdout=pipe, text=True
            )
        warm = self.warm[script]
        out, err = self.home / "out", self.home / "err"
        out.write_text("")
        err.write_text("")
        argv = [str(ROOT / script), *map(str, args)]
        env = self.environment(env)
        job = {"argv": argv, "code": code, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        print(json.dumps(job), file=warm.stdin, flush=True)
        code = int(warm.stdout.readline())
        return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())


@pytest.fixture(scope="session")
def shell(hub_server, tmp_path_factory):
    """Runs scripts against the Hub."""
    shell = Shell(hub_server, tmp_path_factory.mktemp("home"))
    yield shell
    for process in shell.warm.values():
        process.stdin.close()
        process.wait(timeout=10)
