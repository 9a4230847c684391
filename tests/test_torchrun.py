"""Many processes are one: the same gradient, the same weights, one run folder, and one of them never goes on alone."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import curves_of, read, wait_until

import ppo

ROOT = Path(__file__).parent.parent
FLAGS = "--num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 2 --n-eval-episodes 2 --seed 3"
MARIO = "--env-id SuperMarioBros-1-3-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 64"

# What each process runs: the script, and then its weights go into a file. {} is the script's name. PyTorch's usual
# build says that it is for GPUs, on machines without any, too.
KEEP_WEIGHTS = """
import sys, torch
torch._C._get_accelerator = lambda: torch.device("cuda")
import {0}
agent = {0}.main(sys.argv[1:])
torch.save(agent.state_dict(), f"weights{{{0}.RANK}}.pt")
"""


def start(code, flags="", launch="--standalone --nproc-per-node 2"):
    """Start torchrun on a Python program in the working folder, in a session of its own, as in a terminal."""
    Path("program.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), "program.py", *flags.split()]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def end(process, seconds=120):
    """Its output, error output and exit code; none of its processes is left."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.terminate()
    for file in Path().glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    return out, err, process.returncode


def the_run():
    (run_folder,) = Path("runs").iterdir()
    return run_folder


def examples():
    """An agent and 64 steps: observations, actions, old log-probabilities, old values, returns and advantages."""
    torch.manual_seed(1)
    agent = ppo.Agent(4, 2)
    floats = torch.randn(4, 64)
    floats[0] = floats[0] / 10 - 0.7
    return agent, [torch.randn(64, 4), torch.randint(2, (64,)), *floats]


def gradient(rows):
    """What `update` makes of these rows of the examples, with those of the other processes if there are any."""
    agent, columns = examples()
    *columns, advantages = (column[rows] for column in columns)
    everyones = torch.stack([torch.as_tensor(part) for part in ppo.gather([advantages.numpy()])], dim=1)
    advantages = ppo.standardise(everyones[None])[0, :, ppo.RANK]
    parameters = ppo.flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], lr=1e-3, eps=1e-5, fused=True)
    args = SimpleNamespace(clip_coef=0.2, clip_vloss=True, vf_coef=0.5, ent_coef=0.01, max_grad_norm=0.05)
    ppo.update(agent, parameters, optimizer, (*columns, advantages), args)
    return torch.stack([parameters.grad, parameters])


GRADIENT = """
import torch, ppo, test_torchrun
torch.distributed.init_process_group("gloo")
rows = slice(ppo.RANK * 64 // ppo.WORLD_SIZE, (ppo.RANK + 1) * 64 // ppo.WORLD_SIZE)
torch.save(test_torchrun.gradient(rows), f"gradient{ppo.RANK}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_the_joint_minibatch():
    joint = gradient(slice(None))
    assert joint[0].norm().item() == pytest.approx(0.05)  # it is clipped
    _, err, code = end(start(GRADIENT))
    assert code == 0 and "Warning" not in err, err
    parts = [torch.load(f"gradient{rank}.pt") for rank in range(2)]
    assert torch.equal(*parts)
    torch.testing.assert_close(parts[0], joint, rtol=1e-4, atol=1e-7)


KL_OF_ONE = """
import ppo
update = ppo.update
def update_and_lie(*args):  # process 1 sees an approx_kl of 0.7, process 0 almost none: in the mean that is too much
    log_probs, losses = update(*args)
    return log_probs + ppo.RANK, losses
ppo.update = update_and_lie
"""


def check_equal_weights():
    """Those of process 0 and 1, each kept by itself."""
    first, second = (torch.load(f"weights{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_are_one_run_and_another_number_resumes_it(monkeypatch):
    out, err, code = end(
        start(KL_OF_ONE + KEEP_WEIGHTS.format("ppo"), f"{FLAGS} --total-timesteps 1024 --target-kl 0.2")
    )
    assert code == 0, err
    assert out.count("into runs") == out.count("mean_reward") == 1 and "100%" in err
    check_equal_weights()
    run_folder = the_run()
    assert read(run_folder, "results.json")["global_step"] == 1024
    two = curves_of(run_folder)

    with monkeypatch.context() as elsewhere:
        Path("alone").mkdir()
        elsewhere.chdir("alone")
        ppo.main(f"{FLAGS} --total-timesteps 256".split())
        one = curves_of(the_run())  # the first rollout is the same: environment i is seeded, and acts, alike anywhere
    for name in ("charts/episodic_return", "charts/episodic_length"):
        assert two[name][0] == pytest.approx(one[name][0])

    ppo.main(f"--resume {run_folder} --total-timesteps 1280".split())
    four = "--standalone --nproc-per-node 4"
    _, err, code = end(start("import ppo\nppo.main()", f"--resume {run_folder} --total-timesteps 1536", four))
    assert code == 0, err
    assert [*Path("runs").iterdir()] == [run_folder]
    assert [step for step, _ in curves_of(run_folder)["charts/SPS"]] == [256 * i for i in range(1, 7)]


def test_two_launchers_meet_as_two_machines_would():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launch = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {endpoint} --local-addr 127.0.0.1"
    program, launchers = KEEP_WEIGHTS.format("ppo"), []
    for seed in (3, 4):  # one person's mistake
        launchers.append(start(program, f"{FLAGS} --total-timesteps 512 --seed {seed}", launch))
    for launcher in launchers:
        _, err, code = end(launcher)
        assert code == 0, err
    check_equal_weights()
    assert read(the_run(), "results.json")["global_step"] == 512


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num-envs 3", "--num-envs 3 is no multiple of 2"),
        ("--env-id Nope-v0", "Nope"),
        ("--evaluate random", "one process"),
    ],
)
def test_a_mistake_is_told_once_before_training(flags, says):
    out, err, code = end(start("import ppo\nppo.main()", flags))
    lines = re.findall(r"^(?:\w+\.py: )?error: .*", err, re.MULTILINE)
    assert code > 0 and out == "" and len(lines) == 1 and says in lines[0], err
    assert not Path("runs").exists()


def test_help_is_printed_once_and_all_end():
    out, err, code = end(start("import ppo\nppo.main()", "--help"))
    assert code == 0 and out.count("--env-id ENV_ID") == 1, err


LONG = """
import os, {0}
open(f"pid{{{0}.RANK}}", "w").write(str(os.getpid()))
{0}.CHECKPOINT_SECONDS = 0
{0}.main()
"""
STOPS = [("ppo", stop) for stop in ("Ctrl-C", "SIGTERM", "process 0 dies", "process 1 dies")]


@pytest.mark.parametrize(("script", "stop"), [*STOPS, ("ppo_mario", "Ctrl-C")])
def test_they_end_together_and_the_checkpoint_is_good(script, stop):
    if script == "ppo_mario":
        pytest.importorskip("stable_retro")
    flags = FLAGS if script == "ppo" else MARIO
    process = start(LONG.format(script), f"{flags} --total-timesteps 10000000")
    wait_until(lambda: list(Path("runs").glob("*/checkpoint.pt")))
    time.sleep(0.5)
    if stop == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif stop == "SIGTERM":
        process.terminate()
    else:
        os.kill(int(Path(f"pid{stop.split()[1]}").read_text()), signal.SIGKILL)
    _, err, code = end(process, seconds=40)  # seconds, as a rule; torchrun kills after 30 what has not ended
    assert code != 0
    assert ppo.torch.load(the_run() / "checkpoint.pt")["global_step"] > 0
    lines = re.findall(r"^(?:\w+\.py: )?error: .*", err, re.MULTILINE)
    if stop != "process 0 dies":
        assert len(lines) == 1 and lines[0].endswith(f"; go on with: --resume {the_run()}"), err
        assert "error: stopped" in lines[0] or "error: another process has ended" in lines[0]
        assert "Process Worker" not in err  # an emulator's traceback


def test_mario_in_two_processes():
    pytest.importorskip("stable_retro")
    _, err, code = end(start(KEEP_WEIGHTS.format("ppo_mario"), f"{MARIO} --n-eval-episodes 1"))
    assert code == 0, err
    assert read(the_run(), "results.json")["global_step"] == 64
    first, second = torch.load(the_run() / "checkpoint.pt")["agent"], torch.load("weights1.pt")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
