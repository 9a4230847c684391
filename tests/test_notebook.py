"""Every script pasted into one cell of a real Jupyter kernel: it runs, runs again, shows its replay, can be stopped."""

import re
import time
from typing import NamedTuple

import pytest
from conftest import ROOT, SCRIPTS, flags_of, wait_until
from jupyter_client.manager import start_new_kernel


class Answer(NamedTuple):
    stdout: str
    stderr: str
    shown: list  # of display_data and execute_result: {type: content}
    traceback: str | None  # None without an error


class Kernel:
    """A Jupyter kernel in a folder of its own."""

    def __init__(self, cwd, env):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(cwd), env=env)
        self.cwd = cwd

    def start(self, code):
        """Run a cell; `answer` waits for its end."""
        self.started = self.client.execute(code)

    def answer(self):
        text, shown, traceback = {"stdout": "", "stderr": ""}, [], None
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != self.started:
                continue
            if kind == "stream":
                text[content["name"]] += content["text"]
            elif kind in ("display_data", "execute_result"):
                shown.append(content["data"])
            elif kind == "error":
                traceback = "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                return Answer(text["stdout"], text["stderr"], shown, traceback)

    def run(self, code):
        self.start(code)
        return self.answer()

    def run_folders(self):
        return sorted(path.relative_to(self.cwd) for path in (self.cwd / "runs").glob("*"))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path, shell):
    kernel = Kernel(tmp_path, shell.environment({"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": None}))
    yield kernel
    kernel.close()


def check_run(answer):
    """A run in a cell went well, and what it shows can be read."""
    assert answer.traceback is None, answer.traceback
    assert re.search(r"Package: runs\S+\n.*--evaluate runs", answer.stdout)
    warnings = [line for line in (answer.stdout + answer.stderr).splitlines() if "Warning" in line]
    assert "python " not in answer.stdout
    assert all("IProgress" in line for line in warnings)  # the Hub's tqdm misses ipywidgets, which Colab has
    lines = (answer.stdout + answer.stderr).split("\n")  # a bar is one, which each \r begins anew
    assert len(lines) < 60, lines
    (video,) = [data["text/html"] for data in answer.shown if "video" in data.get("text/html", "")]
    assert "<video" in video and len(re.search(r'data:video/mp4;base64,([^"]+)', video)[1]) > 1000


def check_error(answer):
    """A cell ended with one line, which is returned: IPython shows a SystemExit without a traceback."""
    assert answer.traceback.startswith("An exception has occurred, use %tb to see the full traceback")
    assert "Traceback" not in answer.stderr
    line = answer.traceback.splitlines()[-1]
    assert "SystemExit" in line
    return re.sub(r"\x1b\[[\d;]*m", "", line)


def test_the_kernel_s_own_arguments_are_not_the_script_s(kernel):
    text = (ROOT / "q_learning.py").read_text()
    assert "'-f'" in kernel.run("import sys; sys.argv").shown[0]["text/plain"]
    check_run(kernel.run(text))
    (run_folder,) = kernel.run_folders()
    assert "FrozenLake-v1" in run_folder.name
    assert (kernel.cwd / run_folder / "hub" / "q_learning.py").read_text() == text  # the cell's text is the source


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pasted_script_runs_again_and_goes_on_after_an_interrupt(script, kernel):
    small, total = flags_of(script), SCRIPTS[script].total
    text = (ROOT / script).read_text()
    assert text.endswith("    agent = main()\n")
    cell = text.removesuffix("main()\n") + f"main({small})\n"  # without the flags it would take minutes
    for code in (cell, cell, f"agent = main({small})"):
        check_run(kernel.run(code))
    finished = kernel.run_folders()
    assert len(finished) == 3
    assert (kernel.cwd / finished[0] / "hub" / script).read_text() == cell

    played = kernel.run(f"agent, env = load_agent({str(finished[0])!r})\nevaluate_agent(env, make_policy(agent), [7])")
    assert re.fullmatch(r"\(-?[\d.]+, 0\.0\)", played.shown[-1]["text/plain"]), played.traceback
    again = kernel.run(f"env.close()\nscore = main(['--evaluate', {str(finished[0])!r}])")
    assert again.traceback is None and "mean_reward" in again.stdout
    check_error(kernel.run("main(['--env-id', 'Nowhere-v0'])"))
    check_error(kernel.run(f"main({[*small, '--repo-id', 'user/name']})"))  # no token

    finished = kernel.run_folders()
    kernel.start(f"main({[*small[:-1], '10000000']})")
    (run_folder,) = wait_until(lambda: set(kernel.run_folders()) - {*finished})
    wait_until(lambda: (kernel.cwd / run_folder / "checkpoint.pt").exists())
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    line = check_error(kernel.answer())
    assert line.endswith(f"; go on with: --resume {run_folder}")

    done = "state.get('episode', state.get('episodes', state['global_step']))"
    done = kernel.run(f"state = load_checkpoint({str(run_folder)!r})\n{done}").shown[-1]["text/plain"]
    check_run(kernel.run(f"agent = main(['--resume', '{run_folder}', '{total}', '{int(done) + 512}'])"))
