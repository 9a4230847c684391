"""The Hub over real HTTP: push, load back, every fault; what interrupts a run; files that are not what they claim.

INTERRUPTIONS=20 pytest tests/test_hub.py -k interrupted      # all the random moments instead of a sample
"""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, SCRIPTS, Runs, curves_of, files_of, flags_of, read, succeeded, the_error, wait_until
from hub_server import READ_TOKEN, TOKEN
from huggingface_hub import ModelCard
from safetensors.torch import load, save

INTERRUPTIONS = int(os.environ.get("INTERRUPTIONS", "2"))

every_script = pytest.mark.parametrize("script", SCRIPTS)


# --- What a run leaves, and what it says ---------------------------------------------------------------------------


def the_run(cwd="."):
    """The run folder of the only run in this folder."""
    (run_folder,) = Path(cwd, "runs").iterdir()
    return run_folder


def the_line(result, code=None):
    """The one line that a failed run says, checked: exit code, no traceback, no token.

    Besides it there may be the progress of the training, and what the client says so that a user sees what it waits
    for; it commits in a thread, which may speak after an interruption, too.
    """
    assert result.returncode == code if code else result.returncode > 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert TOKEN not in result.stderr + result.stdout
    remarks = r" *\d+% |.*thrown while requesting|Retrying in|No files matched"
    lines = [line for line in result.stderr.splitlines() if not re.match(remarks, line)]
    assert len(lines) == 1, result.stderr
    the_error(lines[0])
    return lines[0]


class Trained(NamedTuple):
    script: str
    cwd: Path
    run_folder: Path
    repo_id: str
    result: object

    @property
    def package(self):
        return self.run_folder / "hub"

    @property
    def results(self):
        return read(self.run_folder, "results.json")

    def copy(self):
        """A copy of the run folder in the current folder, for a test to change."""
        return Path(shutil.copytree(self.run_folder, Path("runs", self.run_folder.name)))


@pytest.fixture(scope="session", params=SCRIPTS)
def trained(request, shell, hub_server, tmp_path_factory):
    """One short run of each script that went well, pushed; for the tests to read and to copy, not to change.

    Its --repo-id is a name alone, which the user's name completes.
    """
    script, cwd = request.param, tmp_path_factory.mktemp("trained")
    name = f"{Path(script).stem}-trained"
    result = succeeded(shell.run([sys.executable, ROOT / script, *flags_of(script), "--repo-id", name], cwd))
    return Trained(script, cwd, the_run(cwd), f"user/{name}", result)


def progress_of(checkpoint):
    """The episodes of a run that counts these, else its steps."""
    return checkpoint.get("episode") or checkpoint.get("episodes") or checkpoint["global_step"]


# --- The full circle -----------------------------------------------------------------------------------------------


def test_push_sends_the_package_byte_for_byte(trained, hub):
    files = files_of(trained.package)
    assert hub.repos[trained.repo_id] == files
    logs = {path for path in files if path.startswith("logs/events.out.tfevents")}
    about = {"README.md", "results.json", "hyperparameters.json", "replay.mp4", trained.script}
    model = SCRIPTS[trained.script].model
    about |= {model, "config.json"} if model == "model.safetensors" else {model}
    assert logs and set(files) == logs | about
    assert files[trained.script] == (ROOT / trained.script).read_bytes()
    asked = [who for method, path, who in hub.requests if trained.repo_id in path and method == "POST"]
    assert set(asked) == {f"Bearer {TOKEN}"}


def test_the_package_says_what_was_really_trained(trained):
    about, checkpoint = SCRIPTS[trained.script], torch.load(trained.run_folder / "checkpoint.pt")
    said = read(trained.run_folder, "hyperparameters.json")[about.total[2:].replace("-", "_")]
    assert said == progress_of(checkpoint) == about.more / 2 <= about.short
    steps = checkpoint["global_step"]
    assert trained.results["global_step"] == curves_of(trained.run_folder)["charts/SPS"][-1][0] == steps > 0
    assert f"{steps:,} steps" in read(trained.run_folder, "README.md")


def test_a_clean_process_loads_it_back_to_the_same_score(trained, shell, hub):
    """By the card's own commands, and once more to the last digit."""
    card = hub.repos[trained.repo_id]["README.md"].decode()
    (commands,) = re.findall(r"^```bash\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    shown = succeeded(shell.run(commands, HF_HOME="home", HF_TOKEN=None))
    score = f"{trained.results['mean_reward']:.2f} +/- {trained.results['std_reward']:.2f}"
    assert score in card and f"mean_reward {score} over" in shown.stdout
    assert Path(trained.script).read_bytes() == (ROOT / trained.script).read_bytes()
    assert "__evaluate__" in the_run().name and list(files_of(the_run())) == ["replay.mp4"]

    code = "print(json.dumps(module.main()))"
    for source in (trained.repo_id, trained.run_folder, trained.package):
        result = succeeded(shell.script(trained.script, "--evaluate", source, code=code, HF_TOKEN=None))
        again = json.loads(result.stdout.splitlines()[-1])
        assert again == {name: trained.results[name] for name in again} and len(again) >= 2


def test_the_leaderboard_can_read_the_card(trained, hub):
    card, results = ModelCard(hub.repos[trained.repo_id]["README.md"].decode()).data.to_dict(), trained.results
    all_have = {results["env_name"], "reinforcement-learning", "custom-implementation"}
    assert set(card["tags"]) == all_have | SCRIPTS[trained.script].tags
    assert card["pipeline_tag"] == "reinforcement-learning"
    entry = card["model-index"][0]["results"][0]
    assert entry["dataset"] == {"type": results["env_name"], "name": results["env_name"]}
    value = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    assert (entry["metrics"][0]["type"], entry["metrics"][0]["value"]) == ("mean_reward", value)


def test_the_token_is_in_no_file_and_no_line(trained, hub):
    places = {"stdout": trained.result.stdout.encode(), "stderr": trained.result.stderr.encode()}
    places |= files_of(trained.cwd) | {f"hub: {path}": text for path, text in hub.repos[trained.repo_id].items()}
    assert [name for name, content in places.items() if TOKEN.encode() in content] == []
    with_flags = [name for name, content in places.items() if trained.results["env_id"].encode() in content]
    assert any("tfevents" in name for name in with_flags)  # the flags as text: there it would be


def test_more_steps_keep_every_point_and_replace_everything_on_the_hub(trained, shell, hub):
    run_folder, about, repo_id = trained.copy(), SCRIPTS[trained.script], f"{trained.repo_id}-on"
    before, code = curves_of(trained.run_folder), "print('the code that trained the first half')"
    (run_folder / "hub" / trained.script).write_text(code)
    for flags in ([], [about.total, about.more]):
        succeeded(shell.script(trained.script, "--resume", run_folder, *flags, "--repo-id", repo_id))
        assert hub.repos[repo_id] == files_of(run_folder / "hub")
    assert hub.repos[repo_id][trained.script].decode() == code
    checkpoint, after = torch.load(run_folder / "checkpoint.pt"), curves_of(run_folder)
    assert progress_of(checkpoint) == about.more
    assert all(after[tag][: len(points)] == points for tag, points in before.items())
    assert all(sorted({step for step, _ in points}) == [step for step, _ in points] for points in after.values())

    # The second half anneals as a run of all the steps does; the first half was annealed for its own.
    args, half, whole = checkpoint["args"], len(before["charts/SPS"]), len(after["charts/SPS"])
    assert whole == 2 * half
    if trained.script == "q_learning.py":
        low, high = args["min_epsilon"], args["max_epsilon"]
        tag = "charts/epsilon"
        expected = [low + (high - low) * math.exp(-args["decay_rate"] * n) for n in (249, 499, 749, 999)]
    elif trained.script == "dqn.py":
        assert [step for step, _ in after["charts/epsilon"]] == [1000, 1096, 2000, 2192]
        tag, low, high = "charts/epsilon", args["end_e"], args["start_e"]
        falling = [args["exploration_fraction"] * total for total in (1096, 1096, 2192, 2192)]
        begun = (992, 1088, 1992, 2184)  # an iteration of 8 steps before
        expected = [max(low, high - (high - low) * step / steps) for step, steps in zip(begun, falling)]
    else:
        tag, rate = "charts/learning_rate", args.get("learning_rate") or args["lr"]
        expected = [rate * (1 - i / (half if i < half else whole)) for i in range(whole)]
    assert [value for _, value in after[tag]] == pytest.approx(expected, rel=1e-6)

    files = files_of(".")
    for flags in ([about.total, about.short // 2], ["--seed", 5]):
        the_line(shell.script(trained.script, "--resume", run_folder, *flags), 2)
    assert files_of(".") == files


# --- Faults on the way to the Hub ----------------------------------------------------------------------------------

BEFORE_TRAINING = {
    # name: (repo id, change of the environment)
    "no token": ("user/new", {"HF_TOKEN": None}),
    "wrong token": ("user/new", {"HF_TOKEN": "hf_wrong"}),
    "token without write access": ("user/new", {"HF_TOKEN": READ_TOKEN}),
    "somebody else's repository": ("else/theirs", {}),
    "somebody else's name": ("else/new", {}),
    "the Hub is down": ("user/down", {}),
    "a space in the repo id": ("user/my agent", {}),
    "no network": ("user/new", {"HF_ENDPOINT": "http://127.0.0.1:1"}),
}


@every_script
@pytest.mark.parametrize("fault", BEFORE_TRAINING)
def test_fault_before_training(script, fault, shell, hub):
    repo_id, env = BEFORE_TRAINING[fault]
    hub.repos["else/theirs"] = {"README.md": b"not yours"}
    hub.fail("user/down", "auth-check/write", 500)
    code = "import huggingface_hub.constants as hub\nhub.ENDPOINT = os.environ['HF_ENDPOINT']\nmodule.main()"
    result = shell.script(script, *flags_of(script), "--repo-id", repo_id, code=code, **env)
    the_line(result)
    assert [*Path().iterdir()] == [] and result.stdout == ""
    assert hub.repos["else/theirs"] == {"README.md": b"not yours"}


SLOW = 60.0  # seconds of waiting, into which the signal comes


@pytest.mark.parametrize("step, fault", [("preupload", 403), ("commit", "drop"), ("commit", SLOW)])
def test_a_failed_upload_leaves_the_package_and_the_command_that_pushes_it(trained, step, fault, shell, hub):
    repo_id = f"{trained.repo_id}-{step}-{fault}"
    hub.fail(repo_id, step, fault)
    pid = shell.start(trained.script, *flags_of(trained.script), "--repo-id", repo_id)
    if fault == SLOW:
        wait_until(lambda: hub.was_asked(repo_id, step))
        os.kill(pid, signal.SIGINT)
    result = shell.end(trained.script, pid)
    run_folder = the_run()
    command = f"hf upload {repo_id} {run_folder}/hub"
    assert the_line(result, 1).endswith(command)
    if fault != SLOW:  # the client's thread may go on with what was interrupted
        assert hub.repos[repo_id] == {}
    assert package_of(run_folder) == package_of(trained.run_folder)
    assert read(run_folder, "results.json")["mean_reward"] == trained.results["mean_reward"]

    hub.heal()
    succeeded(shell.run(command))
    assert hub.repos[repo_id] == files_of(run_folder / "hub")


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_passing_fault_is_survived(trained, fault, shell, hub):
    repo_id = f"{trained.repo_id}-once-{fault}"
    hub.fail(repo_id, "commit", fault, times=1)
    run_folder = trained.copy()
    result = succeeded(shell.script(trained.script, "--resume", run_folder, "--repo-id", repo_id))
    assert "Retrying in" in result.stderr  # what is being waited for
    assert hub.repos[repo_id] == files_of(run_folder / "hub")


# --- Stops, kills and full disks -----------------------------------------------------------------------------------


@every_script
def test_stopped_while_it_waits_for_the_hub_before_training(script, shell, hub):
    repo_id = f"user/{Path(script).stem}-stopped"
    hub.fail(repo_id, "auth-check/write", SLOW)
    pid = shell.start(script, *flags_of(script), "--repo-id", repo_id)
    wait_until(lambda: hub.was_asked(repo_id, "auth-check/write"))
    os.kill(pid, signal.SIGTERM)
    assert "--resume" not in the_line(shell.end(script, pid), 1)
    assert [*Path().iterdir()] == []  # there is nothing to lose


def state_of(run_folder):
    """What must be the same after an interruption: how far it came, with which learning rate, after which updates."""
    checkpoint = torch.load(run_folder / "checkpoint.pt")  # weights_only, its default
    state = {"progress": progress_of(checkpoint)}
    if "optimizer" in checkpoint:
        state["updates"] = [int(slot["step"]) for slot in checkpoint["optimizer"]["state"].values()]
        state["lr"] = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    if checkpoint["script"] == "ppo_mario.py":  # the others draw new seeds for their environments
        state["rng"] = checkpoint["rng"]
    for tag, points in curves_of(run_folder).items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))
        if tag in ("charts/epsilon", "charts/learning_rate"):
            state[tag] = [round(value, 12) for _, value in points]
        # By chance is where episodes ended and, of a run that counts these, how many steps they took.
        if not re.search("episodic|furthest_x|flag_rate", tag):
            state[f"{tag} points"] = steps if state["progress"] == checkpoint["global_step"] else len(steps)
    return state


def package_of(run_folder):
    """The names in a package, but for its logs: an interrupted run has more than one."""
    return {path for path in files_of(run_folder / "hub") if not path.startswith("logs/")}


def start_longer(script, shell):
    """Start the longer run of a script, with a checkpoint every tenth of a second; returns its pid and the time."""
    code = "module.CHECKPOINT_SECONDS = 0.1\nmodule.main()"
    pid = shell.start(script, *flags_of(script, "longer"), code=code)
    wait_until(lambda: [*Path().glob("runs/*")])
    return pid, time.monotonic()


@pytest.fixture(scope="session")
def undisturbed(shell, tmp_path_factory):
    """A function of a script: (state, seconds until the package was there, names in it) of its longer run."""

    @functools.cache
    def run(script):
        with contextlib.chdir(tmp_path_factory.mktemp("undisturbed")):
            pid, began = start_longer(script, shell)
            wait_until(lambda: [*Path().glob("runs/*/hub/results.json")])
            seconds = time.monotonic() - began
            succeeded(shell.end(script, pid))
            return state_of(the_run()), seconds, package_of(the_run())

    return run


def check_resumed(script, shell, undisturbed):
    """Go on from the checkpoint: it loads, and the run ends as the undisturbed one did."""
    state, _, package = undisturbed(script)
    run_folder = the_run()
    succeeded(shell.script(script, "--resume", run_folder))
    assert state_of(run_folder) == state
    assert package_of(run_folder) == package and not (run_folder / "hub.partial").exists()
    flags = read(run_folder, "hyperparameters.json")
    assert SCRIPTS[script].flags.startswith(f"--n-eval-episodes {flags['n_eval_episodes']} ")


def check_hint(line):
    """The line names the flag that goes on, and nothing else that a notebook could not use."""
    assert line.endswith(f"; go on with: --resume {the_run()}"), line


@every_script
@pytest.mark.parametrize("attempt", range(INTERRUPTIONS))
def test_interrupted_at_a_random_moment(script, attempt, shell, undisturbed):
    """Ctrl-C and SIGTERM by turns, from the first line of the run to its last."""
    rng = random.Random(f"{script} {attempt}")
    seconds = undisturbed(script)[1]
    for patience in range(6):
        shutil.rmtree("runs", ignore_errors=True)
        pid, _ = start_longer(script, shell)
        time.sleep(rng.uniform(attempt, attempt + 1) / INTERRUPTIONS * seconds * 0.9**patience)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, [signal.SIGINT, signal.SIGTERM][attempt % 2])
        stopped = shell.end(script, pid)
        if stopped.returncode != 0 or not (the_run() / "hub" / "results.json").exists():
            break  # else it was over before the signal came
    line = the_line(stopped, 1)
    if (the_run() / "checkpoint.pt").exists():
        check_hint(line)
        check_resumed(script, shell, undisturbed)
    else:
        assert "--resume" not in line


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
def test_kill_9_leaves_the_last_checkpoint(script, shell, undisturbed):
    result = shell.script(script, *flags_of(script, "longer"), code=KILLED)
    assert result.returncode == -signal.SIGKILL, result.stderr
    progress = progress_of(torch.load(the_run() / "checkpoint.pt"))
    assert 0 < progress < undisturbed(script)[0]["progress"]
    check_resumed(script, shell, undisturbed)


# From a certain call on, no file may grow beyond a thousand bytes: what a full disk looks like to whoever writes.
FULL = """
import resource
from functools import partial

def full(function, *args, **kwargs):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return function(*args, **kwargs)

"""


@pytest.mark.parametrize("step", ["score_and_film", "model_card"])
def test_full_disk_while_packaging(trained, step, shell):
    """The run was packaged before, and its package stays as it was."""
    run_folder = trained.copy()
    again = [trained.script, "--resume", run_folder]
    code = f"{FULL}module.{step} = partial(full, module.{step})\nmodule.main()"
    line = the_line(shell.script(*again, code=code), 1)
    files, before = files_of(run_folder / "hub"), files_of(trained.package)
    assert {path: files[path] for path in before} == before
    check_hint(line)
    assert len(line) < 700 and "libav" not in line  # ffmpeg's command, not its whole log
    (run_folder / "hub" / trained.script).unlink()  # the checkpoint is enough
    succeeded(shell.script(*again))
    assert not (run_folder / "hub.partial").exists()
    assert curves_of(run_folder) == curves_of(trained.run_folder)


@every_script
def test_full_disk_while_checkpointing(script, shell, undisturbed):
    code = f"{FULL}module.CHECKPOINT_SECONDS = 0\nos.replace = partial(full, os.replace)\nmodule.main()"
    result = shell.script(script, *flags_of(script, "longer"), code=code)
    check_hint(the_line(result, 1))
    check_resumed(script, shell, undisturbed)


# --- Files that are not what they claim ----------------------------------------------------------------------------


def saved(value, **options):
    """A value as the bytes of a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_a_pickle_in_the_place_of_a_checkpoint_or_q_table_runs_nothing(trained, shell):
    marker = Path("marker")
    runs = Runs(os.system, f"touch {marker}")
    contents = [pickle.dumps({"args": runs}, protocol=2), saved({"script": trained.script, "args": runs})]
    contents += [saved(runs, _use_new_zipfile_serialization=False)]
    run_folder = trained.copy()
    for content in contents:
        (run_folder / "checkpoint.pt").write_bytes(content)
        the_line(shell.script(trained.script, "--resume", run_folder))
        (run_folder / "hub" / SCRIPTS[trained.script].model).write_bytes(content)
        the_line(shell.script(trained.script, "--evaluate", run_folder))
        assert not marker.exists()
    pickle.loads(contents[0])
    assert marker.exists()  # the file was as malicious as it claims


def fewer_rows(tensors):
    """The weights of another task."""
    return {name: tensor[:-1].clone() if len(tensor) > 1 else tensor for name, tensor in tensors.items()}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 42312\n"
DAMAGE = {
    "a text": lambda content: b"hello",
    "nothing": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a git-lfs pointer": lambda _: LFS_POINTER,
    "another task's weights": lambda content: save(fewer_rows(load(content))),
    "a tensor missing": lambda content: save(dict([*load(content).items()][1:])),
}


def test_a_damaged_model_is_one_line(trained, shell):
    model = trained.copy() / "hub" / SCRIPTS[trained.script].model
    content = model.read_bytes()
    for name, damaged in DAMAGE.items():
        if model.suffix != ".pkl" or not re.search("weights|tensor", name):  # there are no tensors in a Q-table
            model.write_bytes(damaged(content))
            the_line(shell.script(trained.script, "--evaluate", model.parent))


def test_a_repository_that_is_not_ours_is_one_line(trained, shell, hub):
    files = files_of(trained.package)
    others = {
        "empty": {},
        "no-model": {path: content for path, content in files.items() if path != SCRIPTS[trained.script].model},
        "no-flags": {path: content for path, content in files.items() if not path.endswith(".json")},
        "sb3": {"results.json": b'{"mean_reward": 250.0}', "config.json": b"{}", "ppo-LunarLander-v2.zip": b"PK"},
    }
    for name, content in others.items():
        hub.repos[f"{trained.repo_id}-{name}"] = content
    for source in [f"{trained.repo_id}-{name}" for name in others] + ["user/nowhere", "nowhere", "/nowhere/at/all"]:
        the_line(shell.script(trained.script, "--evaluate", source))
    assert not Path("runs").exists()


def test_what_a_downloaded_package_says_is_not_believed_blindly(trained, shell):
    package = trained.copy() / "hub"
    flags = read(package.parent, "hyperparameters.json")

    def evaluate(**changes):
        (package / "hyperparameters.json").write_text(json.dumps(flags | changes))
        return shell.script(trained.script, "--evaluate", package)

    # gymnasium imports what stands before a colon; such a module may well lie where the script was downloaded to.
    Path("marker_module.py").write_text("open('marker', 'w').close()\n")
    the_line(evaluate(env_id=f"marker_module:{flags['env_id']}"))
    assert not Path("marker").exists()
    the_line(evaluate(env_id="Nowhere-v0"))
    result = succeeded(evaluate(track=True))  # wandb is not installed here, and not needed
    assert f"mean_reward {trained.results['mean_reward']:.2f}" in result.stdout
