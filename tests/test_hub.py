"""The Hub over real HTTP: push, load back, every fault; what interrupts a run; files that are not what they claim.

INTERRUPTIONS=20 pytest tests/test_hub.py -k interrupted      # all the random moments instead of a sample
"""

import io
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import READ_TOKEN, TOKEN


class Script(NamedTuple):
    flags: str  # a run of about a second
    longer: str  # one of several seconds, to interrupt
    model: str  # its model file
    load: str  # how to load that, if it can be trusted
    tags: set  # of the card, besides the environment
    extras: set = frozenset()  # files that only this script packages
    policy: str = "script.make_policy(agent)"  # what was scored


COURSE_TAGS = {"reinforcement-learning", "custom-implementation"}
SMALL = "--env-id CartPole-v1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2"
MARIO = "--env-id SuperMarioBros-1-3-v0 --deterministic-eval True --num-envs 2 --num-steps 16 --num-minibatches 2"
SCRIPTS = {
    "ppo.py": Script(
        flags=f"{SMALL} --total-timesteps 1024 --n-eval-episodes 2",
        longer=f"{SMALL} --total-timesteps 12800 --n-eval-episodes 20",
        model="model.pt",
        load="torch.load(path)",
        tags={*COURSE_TAGS, "ppo", "deep-reinforcement-learning", "deep-rl-course"},
    ),
    "q_learning.py": Script(
        flags="--is-slippery True --n-training-episodes 500 --n-eval-episodes 2",
        longer="--is-slippery True --n-training-episodes 7000 --n-eval-episodes 20",
        model="q-learning.pkl",
        load="pickle.load(open(path, 'rb'))",
        tags={*COURSE_TAGS, "q-learning"},
        extras={"q-table.png"},
    ),
    "reinforce.py": Script(
        flags="--num-envs 4 --n-training-episodes 40 --n-eval-episodes 2",
        longer="--num-envs 8 --n-training-episodes 400 --n-eval-episodes 20",
        model="model.pt",
        load="torch.load(path)",
        tags={*COURSE_TAGS, "reinforce", "deep-rl-class"},
    ),
    "ppo_mario.py": Script(
        flags=f"{MARIO} --total-timesteps 32 --n-eval-episodes 1",
        longer=f"{MARIO} --total-timesteps 320 --n-eval-episodes 1",
        model="model.pt",
        load="torch.load(path)",
        tags={*COURSE_TAGS, "ppo", "deep-reinforcement-learning", "deep-rl-course"},
        policy="script.make_policy(agent, deterministic=True)",
    ),
}
INTERRUPTIONS = int(os.environ.get("INTERRUPTIONS", "2"))

every_script = pytest.mark.parametrize("script", SCRIPTS)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves, and what it says
# ---------------------------------------------------------------------------------------------------------------------


def files_of(folder):
    """All files below a folder as {relative path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def the_run(cwd):
    """The run folder of the only run in this folder."""
    (run_folder,) = Path(cwd, "runs").iterdir()
    return run_folder


def differences(files, others):
    """The files in which two packages of one training differ; times, and the name of the repository, may differ."""

    def comparable(files):
        files = {re.sub(r"tfevents.*", "tfevents", path): content for path, content in files.items()}
        files |= {path: json.loads(content) for path, content in files.items() if path.endswith(".json")}
        files["results.json"].pop("eval_datetime")
        card = files["README.md"].decode()
        files["README.md"] = card.replace(re.search(r"hf download (\S+)", card)[1], "the repository")
        files["logs/events.out.tfevents"] = "wall times"
        return files

    files, others = comparable(files), comparable(others)
    return sorted(path for path in files.keys() | others.keys() if files.get(path) != others.get(path))


def the_line(result, code, *words):
    """The one line that a failed run says, checked: exit code, no traceback, no token, and these words in it.

    Remarks of the client may stand above it, so that a user sees what is being waited for.
    """
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert TOKEN not in result.stderr + result.stdout
    remarks = r"thrown while requesting|^Retrying in|^No files matched"
    lines = [line for line in result.stderr.splitlines() if not re.search(remarks, line)]
    assert len(lines) == 1, result.stderr
    assert "error: " in lines[0]
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def command_in(line):
    """The command at the end of a line, as it stands there."""
    return line[line.rindex("python ") :]


class Trained(NamedTuple):
    cwd: Path
    run_folder: Path
    repo_id: str
    result: object

    @property
    def package(self):
        return self.run_folder / "hub"

    @property
    def results(self):
        return json.loads((self.package / "results.json").read_text())


@pytest.fixture(scope="session", params=SCRIPTS)
def trained(request, shell, hub_server, tmp_path_factory):
    """One short run of each script that went well, pushed; for the tests to read and to copy, not to change."""
    script, cwd = request.param, tmp_path_factory.mktemp("trained")
    repo_id = f"user/{Path(script).stem}-trained"
    command = [sys.executable, ROOT / script, *SCRIPTS[script].flags.split(), "--repo-id", repo_id]
    result = shell.run(command, cwd)
    assert result.returncode == 0, result.stderr
    return script, Trained(cwd, the_run(cwd), repo_id, result)


# ---------------------------------------------------------------------------------------------------------------------
# The full circle
# ---------------------------------------------------------------------------------------------------------------------


def test_push_sends_the_package_byte_for_byte(trained, hub):
    script, run = trained
    files = files_of(run.package)
    assert hub.files(run.repo_id) == files
    logs = {path for path in files if path.startswith("logs/events.out.tfevents")}
    others = {"README.md", "results.json", "hyperparameters.json", "replay.mp4", script, *SCRIPTS[script].extras}
    others.add(SCRIPTS[script].model)
    assert len(logs) == 1 and set(files) == logs | others
    assert files[script] == (ROOT / script).read_bytes()
    asked = [request for request in hub.requests if run.repo_id in request.path and request.method == "POST"]
    assert asked and all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in asked)


LOAD_BACK = """
import json, sys
import numpy as np
import {module} as script

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))

repo_id, path, model_file, n = sys.argv[1:]
import pickle, torch
score = script.main(["--evaluate", repo_id])
agent, env = script.load_agent(repo_id)
again = script.evaluate_agent(env, {policy}, int(n), range(1_000_001, 1_000_001 + int(n)))
print(json.dumps([score, again, same(script.load_from_hub(repo_id, model_file), {load})]))
"""


def test_a_clean_process_loads_it_back_to_the_same_score(trained, shell, hub, tmp_path):
    script, run = trained
    code = LOAD_BACK.format(module=Path(script).stem, load=SCRIPTS[script].load, policy=SCRIPTS[script].policy)
    model, n = SCRIPTS[script].model, run.results["n_eval_episodes"]
    command = [sys.executable, "-c", code, run.repo_id, run.package / model, model, n]
    result = shell.run(command, tmp_path, HF_HOME=str(tmp_path / "home"), HF_TOKEN=None, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    score, again, same_model = json.loads(result.stdout.splitlines()[-1])
    assert score == again == [run.results["mean_reward"], run.results["std_reward"]]
    assert same_model


def test_pushing_again_replaces_everything(trained, shell, hub, tmp_path):
    script, run = trained
    repo_id = f"user/{Path(script).stem}-twice"
    first = shell.script(script, "--push", run.run_folder, "--repo-id", repo_id, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = hub.files(repo_id)
    assert differences(before, files_of(run.package)) == []

    second = shell.script(script, *SCRIPTS[script].flags.split(), "--seed", 2, "--repo-id", repo_id, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    after = hub.files(repo_id)
    assert after == files_of(the_run(tmp_path) / "hub")
    assert after["replay.mp4"] != before["replay.mp4"]
    assert not {path for path in before if path.startswith("logs/")} & set(after)

    nothing_new = shell.script(script, "--push", the_run(tmp_path), "--repo-id", repo_id, cwd=tmp_path)
    assert nothing_new.returncode == 0, nothing_new.stderr
    assert hub.files(repo_id) == after


def test_the_leaderboard_can_read_the_card(trained, shell, hub, tmp_path):
    script, run = trained
    code = """
from huggingface_hub import ModelCard
print(json.dumps(ModelCard.load(sys.argv[1]).data.to_dict()))
"""
    result = shell.script(script, run.repo_id, cwd=tmp_path, code=code)
    assert result.returncode == 0, result.stderr
    card, results = json.loads(result.stdout), run.results
    assert set(card["tags"]) == {results["env_name"], *SCRIPTS[script].tags}
    assert card["pipeline_tag"] == "reinforcement-learning"
    entry = card["model-index"][0]["results"][0]
    assert entry["dataset"] == {"type": results["env_name"], "name": results["env_name"]}
    metric = entry["metrics"][0]
    assert metric["type"] == "mean_reward"
    mean_reward, std_reward = map(float, metric["value"].split(" +/- "))
    assert mean_reward - std_reward == pytest.approx(results["mean_reward"] - results["std_reward"], abs=0.011)


def snippet(card, language):
    """The only code block of this language in a model card."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    return block


@pytest.mark.parametrize("language", ["bash", "python"])
def test_the_snippet_in_the_card_runs_as_printed(trained, shell, hub, tmp_path, language):
    script, run = trained
    card = hub.files(run.repo_id)["README.md"].decode()
    code = snippet(card, language)
    command = code if language == "bash" else [sys.executable, "-c", code]
    result = shell.run(command, tmp_path, HF_HOME=str(tmp_path / "home"), HF_TOKEN=None)
    assert result.returncode == 0, result.stdout + result.stderr
    mean_reward, std_reward = re.search(r"([-\d.]+) \+/- ([\d.]+)", result.stdout).groups()
    if language == "bash":  # the score of the card, on its seeds
        assert f"{mean_reward} +/- {std_reward}" in card
        assert (tmp_path / script).read_bytes() == (ROOT / script).read_bytes()


def test_the_token_is_in_no_file_and_no_line(trained, hub):
    _, run = trained
    places = {"stdout": run.result.stdout.encode(), "stderr": run.result.stderr.encode()}
    places |= files_of(run.cwd) | {f"hub: {path}": content for path, content in hub.files(run.repo_id).items()}
    assert [name for name, content in places.items() if TOKEN.encode() in content] == []
    with_flags = [name for name, content in places.items() if run.results["env_id"].encode() in content]
    assert any("tfevents" in name for name in with_flags)  # the flags as text: there it would be


# ---------------------------------------------------------------------------------------------------------------------
# Faults that are found before training
# ---------------------------------------------------------------------------------------------------------------------


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


BEFORE_TRAINING = {
    # name: (repo id, change of the environment, words in the line)
    "no token": ("user/new", {"HF_TOKEN": None}, ["not logged in", "`hf auth login`", "--repo-id"]),
    "wrong token": ("user/new", {"HF_TOKEN": "hf_wrong"}, ["does not accept your token", "`hf auth login`"]),
    "token without write access": ("user/new", {"HF_TOKEN": READ_TOKEN}, ["may not write to user/new", "--repo-id"]),
    "somebody else's repository": ("else/theirs", {}, ["may not write to else/theirs", "--repo-id"]),
    "somebody else's name": ("else/new", {}, ["may not write to else/new", "--repo-id"]),
    "the Hub is down": ("user/down", {}, ["answered 500", "later", "--repo-id"]),
    "no user in the repo id": ("name", {}, ["'name' is not a repo id", "user/name"]),
    "two slashes in the repo id": ("a/b/c", {}, ["'a/b/c' is not a repo id"]),
    "a space in the repo id": ("user/my agent", {}, ["'user/my agent' is not a repo id"]),
    "an empty name in the repo id": ("user/", {}, ["'user/' is not a repo id"]),
}


@every_script
@pytest.mark.parametrize("fault", BEFORE_TRAINING)
def test_fault_before_training(script, fault, shell, hub, tmp_path):
    repo_id, env, words = BEFORE_TRAINING[fault]
    hub.commit("else/theirs", {"README.md": b"not yours"})
    hub.fail("user/down", "auth-check/write", 500)
    result = shell.script(script, *SCRIPTS[script].flags.split(), "--repo-id", repo_id, cwd=tmp_path, **env)
    the_line(result, 2, *words)
    assert list(tmp_path.iterdir()) == []
    assert result.stdout == ""
    assert hub.files("else/theirs") == {"README.md": b"not yours"}


@every_script
def test_no_network_is_said_before_training(script, shell, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, ROOT / script, *SCRIPTS[script].flags.split(), "--repo-id", "user/name"]
    result = shell.run(command, tmp_path, HF_ENDPOINT=nobody)
    the_line(result, 2, "cannot be reached", "check the network", "--repo-id")
    assert list(tmp_path.iterdir()) == []


def test_push_has_the_same_checks(trained, shell, hub, tmp_path):
    script, run = trained
    before = files_of(run.package)
    push = ["--push", run.run_folder, "--repo-id"]
    the_line(shell.script(script, *push, "user/new", cwd=tmp_path, HF_TOKEN=None), 2, "not logged in", "hf auth login")
    the_line(shell.script(script, *push, "else/new", cwd=tmp_path), 2, "may not write to else/new")
    the_line(shell.script(script, *push[:2], cwd=tmp_path), 2, "--push needs --repo-id")
    the_line(shell.script(script, "--push", "nowhere", "--repo-id", "user/new", cwd=tmp_path), 2, "no such folder")
    assert files_of(run.package) == before


@every_script
def test_push_of_a_package_that_is_none(script, shell, hub, tmp_path):
    words_for_numbers = {"env_name": "x", "mean_reward": "much", "n_eval_episodes": 2, "deterministic_eval": True}
    list_for_metrics = words_for_numbers | {"mean_reward": 1.0, "std_reward": 0.0, "metrics": [1]}
    damaged = [json.dumps(results).encode() for results in (words_for_numbers, list_for_metrics)]
    for results in (b"{}", b"[]", b"not JSON", *damaged):
        (tmp_path / "hyperparameters.json").write_bytes(b"{}")
        (tmp_path / "results.json").write_bytes(results)
        (tmp_path / SCRIPTS[script].model).write_bytes(b"weights")
        result = shell.script(script, "--push", tmp_path, "--repo-id", "user/no-package", cwd=tmp_path)
        the_line(result, 2, str(tmp_path))
    assert "user/no-package" not in hub.repos


# ---------------------------------------------------------------------------------------------------------------------
# Faults after training
# ---------------------------------------------------------------------------------------------------------------------

AFTER_TRAINING = {
    # name: (step, fault, words in the line)
    "the Hub answers 500": ("commit", 500, ["answered 500", "later"]),
    "the connection drops": ("commit", "drop", ["cannot be reached", "check the network"]),
    "the token is refused after all": ("commit", 403, ["may not write to", "hf auth login"]),
    "the Hub is down for the negotiation": ("preupload", 503, ["answered 503", "later"]),
}


@pytest.mark.parametrize("fault", AFTER_TRAINING)
def test_fault_after_training(trained, fault, shell, hub, tmp_path):
    script, run = trained
    step, status, words = AFTER_TRAINING[fault]
    repo_id = f"user/{Path(script).stem}-{step}-{status}"
    hub.fail(repo_id, step, status)
    result = shell.script(script, *SCRIPTS[script].flags.split(), "--repo-id", repo_id, cwd=tmp_path)
    line = the_line(result, 1, *words, "complete", "push it with")
    assert hub.files(repo_id) == {}
    assert differences(files_of(the_run(tmp_path) / "hub"), files_of(run.package)) == []

    again = shell.script(script, *shlex.split(command_in(line))[2:], cwd=tmp_path)
    the_line(again, 1, *words, "complete", "push it with")
    hub.heal()
    pushed = shell.script(script, *shlex.split(command_in(line))[2:], cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files(repo_id) == files_of(the_run(tmp_path) / "hub")
    assert differences(hub.files(repo_id), hub.files(run.repo_id)) == []


@pytest.mark.parametrize("fault", [503, 500, "drop"])
def test_a_passing_fault_is_survived(trained, fault, shell, hub, tmp_path):
    script, run = trained
    repo_id = f"user/{Path(script).stem}-once-{fault}"
    hub.fail(repo_id, "commit", fault, times=1)
    result = shell.script(script, "--push", run.run_folder, "--repo-id", repo_id, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Retrying in" in result.stderr  # what is being waited for
    assert differences(hub.files(repo_id), files_of(run.package)) == []


def test_a_slow_hub_is_waited_for(trained, shell, hub, tmp_path):
    script, run = trained
    repo_id = f"user/{Path(script).stem}-slow"
    hub.fail(repo_id, "commit", 2.0)
    result = shell.script(script, "--push", run.run_folder, "--repo-id", repo_id, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert differences(hub.files(repo_id), files_of(run.package)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_during_the_upload(trained, number, shell, hub, tmp_path):
    script, run = trained
    repo_id = f"user/{Path(script).stem}-{number.name}"
    hub.fail(repo_id, "commit", 60.0)
    command = [sys.executable, ROOT / script, *SCRIPTS[script].flags.split(), "--repo-id", repo_id]
    process = shell.start(command, tmp_path)
    hub.wait_for("commit", repo_id)
    stopped = stop(process, number)
    line = the_line(stopped, 128 + number, "complete", "push it with")

    hub.heal()
    pushed = shell.script(script, *shlex.split(command_in(line))[2:], cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr
    assert differences(hub.files(repo_id), hub.files(run.repo_id)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and full disks
# ---------------------------------------------------------------------------------------------------------------------


def stop(process, number):
    """Send a signal and wait for the end of the process."""
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    process.stdout, process.stderr = out, err
    return process


def state_of(run_folder):
    """What must be the same after an interruption: how far it came, with which learning rate, after which updates."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint = torch.load(run_folder / "checkpoint.pt")  # weights_only, its default
    curves = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    state = {}
    if "optimizer" in checkpoint:
        state["updates"] = [int(slot["step"]) for slot in checkpoint["optimizer"]["state"].values()]
        state["lr"] = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    for tag in {"charts/epsilon", "charts/learning_rate"} & set(curves.Tags()["scalars"]):
        state[f"{tag} values"] = [round(event.value, 12) for event in curves.Scalars(tag)]
    state["progress"] = checkpoint.get("episode") or checkpoint.get("update") or checkpoint["global_step"]
    if state["progress"] != checkpoint["global_step"]:  # counted in episodes: how many steps these take is up to chance
        points = {tag: [event.step for event in curves.Scalars(tag)] for tag in curves.Tags()["scalars"]}
        assert all(steps == sorted(set(steps)) for steps in points.values())
        return state | {tag: len(steps) for tag, steps in points.items()}
    where_episodes_ended = {
        f"charts/{name}" for name in ("episodic_return", "episodic_length", "furthest_x", "flag_rate")
    }
    for tag in set(curves.Tags()["scalars"]) - where_episodes_ended:
        state[tag] = [event.step for event in curves.Scalars(tag)]
    return state


# A checkpoint every tenth of a second, so that a run of seconds has several.
OFTEN = "import {module} as module; module.CHECKPOINT_SECONDS = 0.1; module.main()"


def start_longer(script, shell, cwd):
    """Start the longer run of a script in a real process; returns it once it says where its run folder is."""
    code = OFTEN.format(module=Path(script).stem)
    command = [sys.executable, "-u", "-c", code, *SCRIPTS[script].longer.split()]
    process = shell.start(command, cwd, PYTHONPATH=str(ROOT))
    process.stdout.readline()
    return process


@pytest.fixture(scope="session")
def undisturbed(shell, tmp_path_factory):
    """{script: (state, seconds until the package was there, files of it)} of its longer run, undisturbed."""
    outcome = {}
    for script in SCRIPTS:
        cwd = tmp_path_factory.mktemp("undisturbed")
        process = start_longer(script, shell, cwd)
        started = time.monotonic()
        while not (the_run(cwd) / "hub").exists() and process.poll() is None:
            time.sleep(0.01)
        seconds = time.monotonic() - started
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outcome[script] = (state_of(the_run(cwd)), seconds, set(files_of(the_run(cwd) / "hub")))
    return outcome


def check_resumed(script, shell, cwd, undisturbed):
    """Go on from the checkpoint: it loads, and the run ends as the undisturbed one did."""
    state, _, package = undisturbed[script]
    run_folder = the_run(cwd)
    resumed = shell.script(script, "--resume", run_folder.relative_to(cwd), cwd=cwd)
    assert resumed.returncode == 0, resumed.stderr
    assert state_of(run_folder) == state
    files = {path for path in files_of(run_folder / "hub") if not path.startswith("logs/")}
    assert files == {path for path in package if not path.startswith("logs/")}
    assert not (run_folder / "hub.partial").exists()
    n_eval_episodes = json.loads((run_folder / "hub" / "hyperparameters.json").read_text())["n_eval_episodes"]
    assert SCRIPTS[script].longer.endswith(f"--n-eval-episodes {n_eval_episodes}")


@every_script
@pytest.mark.parametrize("attempt", range(INTERRUPTIONS))
def test_interrupted_at_a_random_moment(script, attempt, shell, undisturbed, tmp_path):
    """Ctrl-C and SIGTERM by turns, from the first line of the run to its last."""
    number = (signal.SIGINT, signal.SIGTERM)[attempt % 2]
    rng = random.Random(f"{script} {attempt}")
    seconds = undisturbed[script][1]
    for patience in itertools.count():
        cwd = tmp_path / str(patience)
        cwd.mkdir()
        process = start_longer(script, shell, cwd)
        time.sleep(rng.uniform(attempt, attempt + 1) / INTERRUPTIONS * seconds * 0.9**patience)
        process = stop(process, number)
        if process.returncode == 128 + number or not (the_run(cwd) / "hub").exists():
            break  # else it was over before the signal came
        assert patience < 5, "it is always over before the signal comes"
    line = the_line(process, 128 + number)
    if (the_run(cwd) / "checkpoint.pt").exists():
        assert command_in(line) == f"python {script} --resume {the_run(cwd).relative_to(cwd)}"
        check_resumed(script, shell, cwd, undisturbed)
    else:
        assert "--resume" not in line


@every_script
def test_stopped_before_training_has_begun(script, shell, hub, tmp_path):
    """While it waits for the Hub there is nothing to lose, and still one line."""
    repo_id = f"user/{Path(script).stem}-waiting"
    hub.fail(repo_id, "auth-check/write", 60.0)
    command = [sys.executable, ROOT / script, *SCRIPTS[script].flags.split(), "--repo-id", repo_id]
    process = shell.start(command, tmp_path)
    hub.wait_for("auth-check/write", repo_id)
    line = the_line(stop(process, signal.SIGINT), 130, "Stopped")
    assert "--resume" not in line
    assert list(tmp_path.iterdir()) == []


KILLED = """
import signal
module.CHECKPOINT_SECONDS = 0
replace, times = os.replace, 0
def replace_or_die(*paths):
    global times
    times += 1
    if times == 5:
        os.truncate(paths[0], 1000)  # the worst moment: the new checkpoint is half written
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
module.main()
"""


@every_script
def test_kill_9_leaves_the_last_checkpoint(script, shell, undisturbed, tmp_path):
    result = shell.script(script, *SCRIPTS[script].longer.split(), cwd=tmp_path, code=KILLED)
    assert result.returncode == -signal.SIGKILL, result.stderr
    checkpoint = torch.load(the_run(tmp_path) / "checkpoint.pt")
    progress = checkpoint.get("episode") or checkpoint.get("update") or checkpoint["global_step"]
    assert 0 < progress < undisturbed[script][0]["progress"]
    check_resumed(script, shell, tmp_path, undisturbed)


# From a certain call on, no file may grow beyond a thousand bytes: what a full disk looks like to whoever writes.
FULL = """
import resource
from functools import partial

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def full_disk(function, *args, **kwargs):
    limit(1000)
    return function(*args, **kwargs)

def full_for_a_while(function, *args, **kwargs):
    full_disk(function, *args, **kwargs)
    limit(resource.RLIM_INFINITY)

"""
FULL_AT = {
    "packaging": FULL + "module.save_agent = partial(full_disk, module.save_agent)\nmodule.main()",
    "filming": FULL + "module.record_video = partial(full_for_a_while, module.record_video)\nmodule.main()",
    "checkpointing": FULL + "module.CHECKPOINT_SECONDS = 0\nos.replace = partial(full_disk, os.replace)\nmodule.main()",
}
FULL_DISK = "disk|File too large|No space left"


@pytest.mark.parametrize("moment", ["packaging", "filming"])
def test_full_disk_while_packaging(trained, moment, shell, tmp_path):
    """The run was packaged before, and its package stays as it was."""
    script, run = trained
    run_folder = tmp_path / "runs" / run.run_folder.name
    shutil.copytree(run.run_folder, run_folder)
    before = files_of(run_folder)
    again = ["--resume", run_folder.relative_to(tmp_path)]
    line = the_line(shell.script(script, *again, cwd=tmp_path, code=FULL_AT[moment]), 1, "go on with")
    assert re.search(FULL_DISK, line) and len(line) < 500
    after = files_of(run_folder)
    assert {path: after[path] for path in before if path.startswith("hub/")} == {
        path: content for path, content in before.items() if path.startswith("hub/")
    }
    torch.load(run_folder / "checkpoint.pt")
    assert shell.script(script, *shlex.split(command_in(line))[2:], cwd=tmp_path).returncode == 0
    assert not (run_folder / "hub.partial").exists()


@every_script
def test_full_disk_while_checkpointing(script, shell, undisturbed, tmp_path):
    result = shell.script(script, *SCRIPTS[script].longer.split(), cwd=tmp_path, code=FULL_AT["checkpointing"])
    line = the_line(result, 1, "go on with")
    assert re.search(FULL_DISK, line) and len(line) < 500
    torch.load(the_run(tmp_path) / "checkpoint.pt")
    check_resumed(script, shell, tmp_path, undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not what they claim
# ---------------------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(value):
    """A value as the bytes of a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def course_agent(n_observations=4, n_actions=2):
    """The weights of the course's PPO agent, by its names and shapes."""
    layers = {"critic": (n_observations, 64, 64, 1), "actor": (n_observations, 64, 64, n_actions)}
    state_dict = {}
    for network, sizes in layers.items():
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            state_dict[f"{network}.{2 * i}.weight"] = torch.randn(n_out, n_in)
            state_dict[f"{network}.{2 * i}.bias"] = torch.randn(n_out)
    return state_dict


def malicious(marker):
    """{route: the bytes of a model.pt that makes the file `marker` when it is unpickled}."""
    by_system = Runs(os.system, f"touch {marker}")
    by_eval = Runs(eval, f"open({str(marker)!r}, 'w').close()")
    in_array = np.array([by_system, None], dtype=object)
    return {
        "os.system": saved(by_system),
        "builtins.eval": saved(by_eval),
        "nested": saved({**course_agent(), "critic.0.weight": [{"deep": (by_system,)}]}),
        "numpy object array": saved({"critic.0.weight": in_array}),
        "bare pickle": pickle.dumps(by_system),
        "bare pickle, protocol 2": pickle.dumps({"critic.0.weight": by_eval}, protocol=2),
        "bare pickle of a numpy object array": pickle.dumps(in_array),
        "old torch format": old_format(by_eval),
    }


def old_format(value):
    """A value as torch.save wrote it before its files were zip archives."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


ROUTES = list(malicious("marker"))
RESULTS = json.dumps({"env_id": "CartPole-v1", "mean_reward": 1.0, "std_reward": 0.0, "n_eval_episodes": 2}).encode()
TAXI_RESULTS = RESULTS.replace(b"CartPole-v1", b"Taxi-v3")
EVALUATE = ["--n-eval-episodes", 2, "--evaluate"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_malicious_model_is_refused_and_nothing_runs(route, shell, hub, tmp_path):
    marker = tmp_path / "marker"
    content = malicious(marker)[route]

    # The file is as malicious as it claims: without safe loading it does run.
    unsafe = "import torch\ntry: torch.load(sys.argv[1], weights_only=False)\nexcept BaseException: pass"
    (tmp_path / "bad.pt").write_bytes(content)
    if "bare" in route:
        unsafe = "import pickle\npickle.load(open(sys.argv[1], 'rb'))"
    shell.script("ppo.py", tmp_path / "bad.pt", cwd=tmp_path, code=unsafe)
    assert marker.exists()
    marker.unlink()

    repo_id = f"user/malicious-{ROUTES.index(route)}"
    hub.commit(repo_id, {"results.json": RESULTS, "model.pt": content})
    run_folder = tmp_path / "runs" / "run"
    (run_folder / "hub").mkdir(parents=True)
    (run_folder / "hub" / "results.json").write_bytes(RESULTS)
    (run_folder / "hub" / "model.pt").write_bytes(content)
    (run_folder / "checkpoint.pt").write_bytes(content)
    load = f"module.load_from_hub({repo_id!r}, 'model.pt')"
    for result in (
        shell.script("ppo.py", *EVALUATE, repo_id, cwd=tmp_path),
        shell.script("ppo.py", *EVALUATE, "runs/run", cwd=tmp_path),
        shell.script("ppo.py", "--resume", "runs/run", cwd=tmp_path),
        shell.script("ppo.py", cwd=tmp_path, code=load),
    ):
        line = the_line(result, 2, "not loaded")
        assert re.search("eval|system|_reconstruct|pickle", line), f"that does not say why: {line}"
        assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_malicious_q_table_is_refused_and_nothing_runs(protocol, shell, hub, tmp_path):
    marker = tmp_path / "marker"
    by_system, by_eval = Runs(os.system, f"touch {marker}"), Runs(eval, f"open({str(marker)!r}, 'w').close()")
    in_array = np.array([by_system, None], dtype=object)
    for number, value in enumerate((by_system, {"qtable": by_eval}, {"qtable": in_array}, {"env_id": [(by_system,)]})):
        content = pickle.dumps(value, protocol)
        pickle.loads(content)  # as malicious as it claims
        assert marker.exists()
        marker.unlink()
        repo_id = f"user/malicious-table-{protocol}-{number}"
        hub.commit(repo_id, {"results.json": TAXI_RESULTS, "q-learning.pkl": content})
        load = f"module.load_from_hub({repo_id!r}, 'q-learning.pkl')"
        for result in (
            shell.script("q_learning.py", *EVALUATE, repo_id, cwd=tmp_path),
            shell.script("q_learning.py", cwd=tmp_path, code=load),
        ):
            the_line(result, 2, "not loaded", "it asks for")
            assert not marker.exists()


def test_the_course_s_q_table_loads(shell, hub, tmp_path):
    model = {"env_id": "Taxi-v3", "max_steps": 99, "qtable": np.zeros((500, 6)), "eval_seed": [], "gamma": 0.95}
    hub.commit("user/course-taxi", {"results.json": TAXI_RESULTS, "q-learning.pkl": pickle.dumps(model)})
    result = shell.script("q_learning.py", *EVALUATE, "user/course-taxi", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mean_reward -99.00 +/- 0.00 over 2 episodes" in result.stdout  # it only drives south


def whole_module():
    """What the course's unit 4 pushes: torch.save(model), the pickled class and all."""
    return saved(torch.nn.Sequential(torch.nn.Linear(4, 2)))


def stable_baselines3():
    """What rl_zoo and the course's unit 1 push: a zip of JSON and tensors."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": {":type:": "<class 'abc.ABCMeta'>"}}))
        archive.writestr("policy.pth", saved({"log_std": torch.zeros(1)}))
        archive.writestr("_stable_baselines3_version", "2.0.0")
    return buffer.getvalue()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 42312\n"
SB3_RESULTS = b'{"mean_reward": 250.0, "std_reward": 20.0, "is_deterministic": true, "n_eval_episodes": 10}'
NOT_OURS = {
    # name: (files besides results.json, words in the line)
    "a whole pickled module": (
        {"model.pt": whole_module()},
        ["whole pickled", "torch.nn.modules"],
    ),
    "Stable-Baselines3": (
        {"results.json": SB3_RESULTS, "ppo-LunarLander-v2.zip": stable_baselines3(), "config.json": b"{}"},
        ["Stable-Baselines3", "ppo-LunarLander-v2.zip"],
    ),
    "Stable-Baselines3 renamed": ({"model.pt": stable_baselines3()}, ["model.pt was not loaded"]),
    "no model": ({}, ["there is no model.pt"]),
    "a text": ({"model.pt": b"hello"}, ["model.pt was not loaded"]),
    "nothing": ({"model.pt": b""}, ["model.pt was not loaded"]),
    "half a file": ({"model.pt": saved(course_agent())[:20_000]}, ["model.pt was not loaded"]),
    "a git-lfs pointer": ({"model.pt": LFS_POINTER}, ["model.pt was not loaded"]),
    "a tensor": ({"model.pt": saved(torch.zeros(3))}, ["model.pt"]),
    "a list": ({"model.pt": saved([1, 2, 3])}, ["model.pt"]),
    "words for weights": ({"model.pt": saved(dict.fromkeys(course_agent(), "weight"))}, ["critic.0.weight"]),
    "sparse weights": (
        {"model.pt": saved({name: tensor.to_sparse() for name, tensor in course_agent().items()})},
        ["model.pt"],
    ),
    "another task's weights": (
        {"model.pt": saved(course_agent(n_observations=8, n_actions=4))},
        ["critic.0.weight", "(64, 8)", "(64, 4)"],
    ),
    "other actions": ({"model.pt": saved(course_agent(n_actions=3))}, ["actor.4.weight", "(3, 64)", "(2, 64)"]),
    "a tensor too few": (
        {"model.pt": saved({n: t for n, t in course_agent().items() if n != "actor.4.bias"})},
        ["actor.4.bias"],
    ),
    "a tensor too many": ({"model.pt": saved({**course_agent(), "log_std": torch.zeros(2)})}, ["log_std"]),
}


@pytest.mark.parametrize("name", NOT_OURS)
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_file_that_is_not_ours_is_named(name, place, shell, hub, tmp_path):
    files, words = NOT_OURS[name]
    files = {"results.json": RESULTS, **files}
    source = f"user/not-ours-{list(NOT_OURS).index(name)}"
    if place == "folder":
        for path, content in files.items():
            (tmp_path / source / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / source / path).write_bytes(content)
    else:
        hub.commit(source, files)
    the_line(shell.script("ppo.py", *EVALUATE, source, cwd=tmp_path), 2, source, *words)


def test_the_course_agent_loads(shell, hub, tmp_path):
    hub.commit("user/course", {"results.json": RESULTS, "model.pt": saved(course_agent())})
    result = shell.script("ppo.py", *EVALUATE, "user/course", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"mean_reward [\d.]+ \+/- [\d.]+ over 2 episodes", result.stdout)


HYPERPARAMETERS = {
    # name: (the file, words in the line)
    "unknown key": ({"env_id": "CartPole-v1", "colour": "red"}, ["--colour"]),
    "unknown key with a dash": ({"env_id": "CartPole-v1", "-x": "1"}, ["x"]),
    "empty": ({}, ["env_id"]),
    "no env_id": ({"gamma": 0.99}, ["env_id"]),
    "a number for env_id": ({"env_id": 3}, ["env_id"]),
    "a list": ([1, 2], ["env_id"]),
    "no JSON": (b"{", ["not JSON"]),
    "no text": (b"\xff\xfe\x00", ["not JSON"]),
    "too deep": (b"[" * 100_000, ["not JSON"]),
    "a word for a number": ({"env_id": "CartPole-v1", "num_envs": "many"}, ["--num-envs", "many"]),
    "a list for a number": ({"env_id": "CartPole-v1", "num_steps": [128]}, ["--num-steps"]),
    "a number for a boolean": ({"env_id": "CartPole-v1", "gae": 7}, ["--gae", "7"]),
    "a negative number": ({"env_id": "CartPole-v1", "gamma": -1}, ["--gamma"]),
    "infinite": (b'{"env_id": "CartPole-v1", "learning_rate": 1e999}', ["--learning-rate"]),
    "another job": ({"env_id": "CartPole-v1", "push": "runs"}, ["push"]),
    "help": ({"env_id": "CartPole-v1", "help": "me"}, ["help"]),
    "a path for env_id": ({"env_id": "../../CartPole-v1"}, ["../../CartPole-v1"]),
    "an absolute path for env_id": ({"env_id": "/etc/passwd"}, ["/etc/passwd"]),
    "a module for env_id": ({"env_id": "marker_module:CartPole-v1"}, ["marker_module:CartPole-v1"]),
    "no environment": ({"env_id": "Nowhere-v0"}, ["Nowhere-v0"]),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_malformed_hyperparameters(name, shell, hub, tmp_path):
    content, words = HYPERPARAMETERS[name]
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    # gymnasium imports what stands before a colon; such a module may well lie where the script was downloaded to.
    (tmp_path / "marker_module.py").write_text("open('marker', 'w').close()\n")
    repo_id = f"user/malformed-{list(HYPERPARAMETERS).index(name)}"
    files = {"results.json": RESULTS, "model.pt": saved(course_agent()), "hyperparameters.json": content}
    hub.commit(repo_id, files)
    the_line(shell.script("ppo.py", "--evaluate", repo_id, cwd=tmp_path), 2, *words)
    assert {path.name for path in tmp_path.iterdir()} <= {"marker_module.py", "__pycache__"} - {"__pycache__"}


@every_script
def test_a_repository_that_is_not_there(script, shell, hub, tmp_path):
    the_line(shell.script(script, "--evaluate", "user/nowhere", cwd=tmp_path), 2, "user/nowhere", "check the name")
    the_line(shell.script(script, "--evaluate", "nowhere", cwd=tmp_path), 2, "'nowhere' is neither a folder")
    hub.commit("user/empty", {})
    the_line(shell.script(script, "--evaluate", "user/empty", cwd=tmp_path), 2, "user/empty", SCRIPTS[script].model)
    code = "module.load_from_hub('user/empty', 'nowhere.pt')"
    the_line(shell.script(script, cwd=tmp_path, code=code), 2, "user/empty", "nowhere.pt")
    assert list(tmp_path.iterdir()) == []
