"""Every script pasted into one cell of a real Jupyter kernel: it runs, runs again, shows its replay, can be stopped."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parent.parent


class Script(NamedTuple):
    small: str  # flags of a run of about a second
    long: str  # of one that is still going on when it is interrupted
    play: str  # plays an episode with `agent`


LANDER = "--env-id LunarLander-v2 --total-timesteps 4096 --num-envs 8 --num-minibatches 8 --n-eval-episodes 1"
MARIO = "--env-id SuperMarioBros-1-3-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --n-eval-episodes 1"
PLAY = "evaluate_agent(env, make_policy(agent), 1, [7])"
SCRIPTS = {
    "ppo.py": Script(LANDER, "--total-timesteps 10000000", f"env = make_env('LunarLander-v2'); {PLAY}"),
    "q_learning.py": Script(
        "--n-training-episodes 500 --n-eval-episodes 2",
        "--n-training-episodes 10000000",
        f"env = make_env('FrozenLake-v1'); {PLAY}",
    ),
    "reinforce.py": Script(
        "--env-id Pixelcopter-PLE-v0 --n-training-episodes 16 --n-eval-episodes 2",
        "--n-training-episodes 10000000",
        f"env = make_env('Pixelcopter-PLE-v0'); {PLAY}",
    ),
    "ppo_mario.py": Script(
        f"{MARIO} --total-timesteps 32",
        f"{MARIO} --total-timesteps 10000000",
        f"env = make_env('SuperMarioBros-1-3-v0'); score = {PLAY}; env.close(); score",
    ),
}


class Answer(NamedTuple):
    stdout: str
    stderr: str
    shown: list  # of display_data and execute_result: {type: content}
    error: tuple  # (name, traceback) or None


class Kernel:
    """A Jupyter kernel in a folder of its own."""

    def __init__(self, cwd, **env):
        clean = {name: value for name, value in env.items() if value is not None}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(cwd), env=clean)
        self.cwd = cwd

    def start(self, code):
        """Run a cell; `answer` waits for its end."""
        self.started = self.client.execute(code)

    def answer(self):
        stdout, stderr, shown, error = "", "", [], None
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != self.started:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                stdout += content["text"] if content["name"] == "stdout" else ""
                stderr += content["text"] if content["name"] == "stderr" else ""
            elif kind in ("display_data", "execute_result"):
                shown.append(content["data"])
            elif kind == "error":
                error = (content["ename"], "\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                return Answer(stdout, stderr, shown, error)

    def run(self, code):
        self.start(code)
        return self.answer()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path, shell):
    kernel = Kernel(tmp_path, **shell.environment({"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": None}))
    yield kernel
    kernel.close()


def small_defaults(script):
    """A cell that stands in for defaults of minutes: what is not a kernel's own argv is the script's."""
    return f"import sys; sys.argv = {['cell', *SCRIPTS[script].small.split()]}"


def check_run(answer, script):
    """A run in a cell went well, and what it shows can be read."""
    assert answer.error is None, answer.error[1]
    assert "Package: runs" in answer.stdout and "main(['--evaluate', 'runs" in answer.stdout
    assert "python " + script not in answer.stdout
    lines = (answer.stdout + answer.stderr).splitlines()
    assert len(lines) < 60, lines
    assert "Warning" not in answer.stdout + answer.stderr and "WARN" not in answer.stdout + answer.stderr
    (video,) = [data["text/html"] for data in answer.shown if "video" in data.get("text/html", "")]
    assert "<video" in video and len(re.search(r'data:video/mp4;base64,([^"]+)', video)[1]) > 1000


def test_the_kernel_s_own_arguments_are_not_the_script_s(kernel):
    text = (ROOT / "q_learning.py").read_text()
    assert "'-f'" in kernel.run("import sys; sys.argv").shown[0]["text/plain"]
    check_run(kernel.run(text), "q_learning.py")
    (run_folder,) = (kernel.cwd / "runs").iterdir()
    assert "FrozenLake-v1" in run_folder.name
    assert (run_folder / "hub" / "q_learning.py").read_text() == text  # the cell's text is the source


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pasted_script_runs_and_runs_again_and_its_agent_plays(script, kernel):
    text = (ROOT / script).read_text()
    kernel.run(small_defaults(script))
    for _ in range(2):
        check_run(kernel.run(text), script)
    run_folders = sorted((kernel.cwd / "runs").iterdir())
    assert len(run_folders) == 2
    assert (run_folders[0] / "hub" / script).read_text() == text

    played = kernel.run(SCRIPTS[script].play)
    assert played.error is None, played.error[1]
    assert re.fullmatch(r"\(-?[\d.]+, 0\.0\)", played.shown[-1]["text/plain"])

    check_run(kernel.run(f"agent = main({SCRIPTS[script].small.split()})"), script)
    again = kernel.run(f"main(['--evaluate', {str(run_folders[0])!r}, '--n-eval-episodes', '1'])")
    assert again.error is None and "mean_reward" in again.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kernel_s_interrupt_leaves_a_checkpoint_that_goes_on(script, kernel):
    kernel.run(small_defaults(script))
    assert kernel.run((ROOT / script).read_text()).error is None
    (first,) = (kernel.cwd / "runs").iterdir()

    kernel.start(f"main({SCRIPTS[script].long.split()})")
    while not (run_folders := set((kernel.cwd / "runs").iterdir()) - {first}):
        time.sleep(0.05)
    (run_folder,) = run_folders
    while not (run_folder / "checkpoint.pt").exists():
        time.sleep(0.05)
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    stopped = kernel.answer()
    assert stopped.error[1] == "" and stopped.stderr.splitlines()[-1].startswith("error: Stopped; go on with: main(")
    assert "Traceback" not in stopped.stderr

    resume = stopped.stderr[stopped.stderr.rindex("main(") :].strip()
    total = "--n-training-episodes" if "training-episodes" in SCRIPTS[script].long else "--total-timesteps"
    progress = kernel.run(
        f"checkpoint = load_checkpoint({str(run_folder)!r}); checkpoint.get('episode') or "
        "checkpoint.get('update', 0) * checkpoint['args']['num_envs'] or checkpoint['global_step']"
    )
    done = int(progress.shown[-1]["text/plain"])
    assert done > 0
    shorter = resume.replace("])", f", '{total}', '{done + 512}', '--repo-id', 'user/name'])")
    assert "notebook_login()" in kernel.run(shorter).stderr  # no token: said before it goes on
    check_run(kernel.run(shorter.replace(", '--repo-id', 'user/name'", "")), script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_package_is_one_line_with_what_to_install(script, kernel):
    kernel.run("import sys; sys.modules['imageio'] = None")
    answer = kernel.run((ROOT / script).read_text())
    name, text = answer.error
    assert name == "SystemExit" and answer.stdout == ""
    (line,) = [line for line in text.splitlines() if "install" in line]
    header = re.findall(r'(?m)^#     (".+"),$', (ROOT / script).read_text())
    assert len(header) > 5 and f"%pip install {' '.join(header)}" in line and "imageio" in line


def test_workers_start_from_a_cell_with_spawn_too(kernel):
    kernel.run("import multiprocessing; multiprocessing.set_start_method('spawn')")
    kernel.run(small_defaults("ppo_mario.py"))
    check_run(kernel.run((ROOT / "ppo_mario.py").read_text()), "ppo_mario.py")
