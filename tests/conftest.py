"""For all tests: running a script and reading what it leaves, a Hub, and scripts as real processes that talk to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from hub_server import TOKEN, Hub
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # two tests run at a time; no test file has imported torch yet


class Script(NamedTuple):
    flags: str
    total: str  # the flag that says how much to train, and what it gets:
    short: int  # for about a second; where steps or episodes go in batches, not all of them are taken
    longer: int  # for several seconds, to interrupt
    more: int  # for --resume of the short run: twice what it took
    tags: set  # of the card, besides the environment and those of all
    model: str = "model.safetensors"


PPO = {"ppo", "deep-reinforcement-learning", "deep-rl-course"}
CARTPOLE = "--n-eval-episodes 10 --env-id CartPole-v1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2"
MARIO = "--n-eval-episodes 1 --env-id SuperMarioBros-1-3-v0 --num-envs 2 --num-steps 16 --num-minibatches 2"
DQN = "--n-eval-episodes 10 --num-envs 2 --train-frequency 8 --gradient-steps 1 --batch-size 16 --learning-starts 200"
EPISODES = "--n-training-episodes"
SCRIPTS = {
    "ppo.py": Script(f"{CARTPOLE} --no-deterministic-eval", "--total-timesteps", 1100, 12800, 2048, PPO),
    "dqn.py": Script(DQN, "--total-timesteps", 1100, 24_000, 2192, PPO - {"ppo"} | {"dqn"}),
    "q_learning.py": Script(
        "--n-eval-episodes 10 --is-slippery", EPISODES, 500, 7000, 1000, {"q-learning"}, "q-learning.pkl"
    ),
    "reinforce.py": Script("--n-eval-episodes 10 --num-envs 4", EPISODES, 42, 400, 80, {"reinforce", "deep-rl-class"}),
    "ppo_mario.py": Script(MARIO, "--total-timesteps", 70, 320, 128, PPO),
}


def flags_of(script, length="short"):
    """The flags of a run of this length, as a list: the number comes last."""
    about = SCRIPTS[script]
    return [*about.flags.split(), about.total, str(getattr(about, length))]


class Counting(gym.Env):
    """An environment whose observations tell where they come from: (episode, step), one array for all of an episode.

    An episode is of this length, and ends by termination or by a time limit. The reward is the number of the step.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length, cut_off=False, first_episode=0):
        self.length, self.cut_off, self.seeds = length, cut_off, []
        self.state = np.array([first_episode - 1, 0], dtype=np.float32)

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.state = np.array([self.state[0] + 1, 0], dtype=np.float32)
        return self.state, {}

    def step(self, action):
        self.state[1] += 1
        ends = bool(self.state[1] == self.length)
        return self.state, float(self.state[1]), ends and not self.cut_off, ends and self.cut_off, {}


class Runs:
    """A pickle of this calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def resets(monkeypatch):
    """(environment, seed) of each reset to a seed, of the environments of gymnasium.make."""
    noted, reset = [], gym.wrappers.TimeLimit.reset

    def note_and_reset(self, *, seed=None, options=None):
        noted.extend([] if seed is None else [(self, seed)])
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.wrappers.TimeLimit, "reset", note_and_reset)
    return noted


def run(script, flags):
    """Run the main of a script, a module, with these flags: the folder of the run."""
    before = {*Path("runs").glob("*")}
    script.main(flags.split())
    (run_folder,) = {*Path("runs").glob("*")} - before
    return run_folder


def the_error(text):
    """The line of an error, which argparse begins with the script's name: what stands behind `error: `."""
    (line,) = text.splitlines()
    assert re.match(r"(\w+\.py: )?error: ", line), line
    return line.split("error: ", 1)[1]


def refused(script, flags, capfd):
    """The line with which main exits, which is all that it says; it has written nothing."""
    before = [*Path().rglob("*")]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    out, err = capfd.readouterr()
    line = err if stop.value.code == 2 else stop.value.code  # a text is for Python to print, when the process ends
    assert (out, err) == ("", line if stop.value.code == 2 else "")
    assert [*Path().rglob("*")] == before
    return the_error(line)


def read(run_folder, name):
    """A file of a package: a dict of JSON, or a text."""
    text = (run_folder / "hub" / name).read_text()
    return json.loads(text) if name.endswith(".json") else text


def weights(run_folder):
    """The packaged weights by their names."""
    return load_file(run_folder / "hub" / "model.safetensors")


def curves_of(run_folder):
    """{tag: [(step, value), ...]}, from the one place where a run has its events."""
    folders = {path.parent for path in run_folder.rglob("events.out.tfevents*")}
    assert folders == {run_folder / "hub" / "logs"}  # in two places, TensorBoard would show the run twice
    events = EventAccumulator(str(*folders), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def files_of(folder):
    """All files below a folder as {relative path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def wait_until(condition, seconds=120):
    """Wait until a function says that it is so, and return its answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.01)
    return answer


# A short run spends most of its time on importing torch and on tidying up when Python ends. So the tests that run a
# script many times import it once, in a process that forks for each run. The fork is a process like any other, with its
# own arguments, environment, folder, streams and exit code; only the tidying up is left out.
WARM = """
import atexit, importlib, json, os, sys, traceback
import torch._dynamo  # which each fork would have to load at its first optimizer, and at its first weights:

torch.linalg.qr(torch.eye(64))
module = importlib.import_module(sys.argv[1])
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
            if isinstance(code, str):  # a text is printed, as Python does
                print(code, file=sys.stderr)
                code = 1
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


def succeeded(result):
    """The result of a process that went well."""
    assert result.returncode == 0, result.stderr
    return result


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
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "tests" / "fast_retries"),
        }

    def environment(self, changes):
        """The environment with changes; None removes a variable."""
        return {name: value for name, value in {**self.env, **changes}.items() if value is not None}

    def run(self, command, cwd=".", **env):
        """A real process from its start to its end: a CompletedProcess. command: a list, or a line for bash."""
        command = ["bash", "-ec", command] if isinstance(command, str) else [*map(str, command)]
        env = self.environment(env)
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    def start(self, script, *args, cwd=".", code="module.main()", **env):
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
        job = {"argv": [str(ROOT / script), *map(str, args)], "code": code, "cwd": os.path.abspath(cwd), **files}
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
