"""q_learning.py: the update by hand, what it learns against dynamic programming, the course's file, safe loading."""

import base64
import json
import math
import os
import pickle
import random
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import q_learning

QUICK = ["--n-training-episodes", "200", "--n-eval-episodes", "3"]
COURSE_KEYS = {
    "env_id", "max_steps", "n_training_episodes", "n_eval_episodes", "eval_seed", "learning_rate", "gamma",
    "max_epsilon", "min_epsilon", "decay_rate", "qtable",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folders():
    return sorted(Path("runs").glob("*"))


def trained(*flags):
    """The Q-table that the flags train, without the package."""
    folder = Path("trained")
    folder.mkdir()
    return q_learning.train(q_learning.parse_args(list(flags)), folder)["qtable"]


def probability_of_success(qtable, env, steps):
    """Exact chance that the greedy policy reaches the goal, by dynamic programming on the environment's own table."""
    transitions = env.unwrapped.P
    value = np.zeros(len(transitions))
    for _ in range(steps):
        value = np.array([
            sum(p * (reward + (0 if end else value[next_state]))
                for p, next_state, reward, end in transitions[state][int(np.argmax(qtable[state]))])
            for state in range(len(transitions))
        ])  # fmt: skip
    return value[0]


# --- the math


@pytest.mark.parametrize(
    ("reward", "next_state", "terminated", "expected"),
    [
        (1.0, 1, False, 2.0 + 0.5 * (1.0 + 0.9 * 7.0 - 2.0)),  # an ordinary step, and one that a time limit cuts off
        (1.0, 1, True, 2.0 + 0.5 * (1.0 - 2.0)),  # after a terminal state nothing follows
        (-3.0, 0, False, 2.0 + 0.5 * (-3.0 + 0.9 * 2.0 - 2.0)),  # staying in the state
    ],
)
def test_one_update_by_hand(reward, next_state, terminated, expected):
    qtable = [[2.0, 1.0], [4.0, 7.0]]
    q_learning.q_learning_update(qtable, 0, 0, reward, next_state, terminated, learning_rate=0.5, gamma=0.9)
    assert qtable[0][0] == pytest.approx(expected)
    assert (qtable[0][1], qtable[1]) == (1.0, [4.0, 7.0])


class Corridor(gym.Env):
    """One state, one action, reward 1: it ends after two steps, by termination or by a time limit."""

    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(1)
    spec = gym.spec("CartPole-v1")  # any without a map

    def __init__(self, terminates):
        self.terminates = terminates

    def reset(self, seed=None, options=None):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, 1.0, self.steps == 2 and self.terminates, self.steps == 2 and not self.terminates, {}


@pytest.mark.parametrize(("terminates", "expected"), [(True, 1.0), (False, 1.0 + 0.5 * (1.0 + 0.5 * 1.0))])
def test_training_bootstraps_a_truncated_step_and_not_a_terminal_one(terminates, expected, monkeypatch):
    monkeypatch.setattr(q_learning, "make_env", lambda *args, **kwargs: Corridor(terminates))
    # learning rate 1: Q = 1 + 0.5 * 0 after the first step; after the second 1, or 1 + 0.5 * 1.
    (qtable,) = trained("--n-training-episodes", "1", "--learning-rate", "1", "--gamma", "0.5")
    assert qtable.item() == (1.0 if terminates else 1.5)


@pytest.mark.parametrize("episode", [0, 700, 10_000])
def test_epsilon_follows_the_course_s_formula(episode):
    expected = 0.05 + (1.0 - 0.05) * math.exp(-0.0005 * episode)
    assert q_learning.epsilon_at(episode, 1.0, 0.05, 0.0005) == pytest.approx(expected)
    if episode == 0:
        assert q_learning.epsilon_at(episode, 1.0, 0.05, 0.0005) == 1.0


def test_epsilon_greedy_explores_with_probability_epsilon_and_breaks_ties_at_random():
    rng = random.Random(0)
    counts = np.bincount([q_learning.epsilon_greedy_policy([[0.0, 5.0, 1.0]], 0, 0.3, rng) for _ in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.1, 0.8, 0.1], atol=0.01)
    counts = np.bincount([q_learning.epsilon_greedy_policy([[2.0, 0.0, 2.0]], 0, 0.0, rng) for _ in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.0, 0.5], atol=0.02)
    assert q_learning.greedy_policy(np.array([[2.0, 0.0, 2.0]]), 0) == 0


# --- what it learns


def test_the_8x8_map_is_learned_from_a_table_of_zeros():
    qtable = trained("--map-name", "8x8", "--n-training-episodes", "6000")
    env = q_learning.make_env("FrozenLake-v1", "8x8", False)
    assert probability_of_success(qtable, env, steps=14) == 1.0  # 14 moves: the shortest way there is


def test_slippery_ice_is_crossed_nearly_as_well_as_can_be():
    qtable = trained("--is-slippery", "True")
    env = q_learning.make_env("FrozenLake-v1", "4x4", True)
    best = 0.744  # by dynamic programming over policies that may depend on the time left
    assert probability_of_success(qtable, env, steps=100) >= 0.95 * best


def test_cliff_walking_finds_the_shortest_way():
    q_learning.main(["--env-id", "CliffWalking-v1", "--n-eval-episodes", "2"])
    results = json.loads((run_folders()[0] / "hub" / "results.json").read_text())
    assert (results["mean_reward"], results["std_reward"]) == (-13.0, 0.0)


# --- runs through main


@pytest.mark.parametrize(
    ("flags", "name", "extra"),
    [
        ([], "FrozenLake-v1-4x4-no_slippery", {"map_name": "4x4", "slippery": False}),
        (["--is-slippery"], "FrozenLake-v1-4x4", {"map_name": "4x4"}),
        (["--map-name", "8x8"], "FrozenLake-v1-8x8-no_slippery", {"map_name": "8x8", "slippery": False}),
        (["--env-id", "FrozenLake8x8-v1"], "FrozenLake8x8-v1-8x8", {"map_name": "8x8"}),
        (["--env-id", "Taxi-v3"], "Taxi-v3", {}),
    ],
)
def test_the_package_is_the_course_s(flags, name, extra):
    q_learning.main([*QUICK, *flags])
    (run_folder,) = run_folders()
    hub = run_folder / "hub"
    model = pickle.loads((hub / "q-learning.pkl").read_bytes())
    assert model.keys() == COURSE_KEYS | extra.keys()
    assert {key: model[key] for key in extra} == extra
    assert model["qtable"].shape == ((500, 6) if name == "Taxi-v3" else (64, 4) if "8x8" in name else (16, 4))
    card = (hub / "README.md").read_text()
    for tag in (name, "q-learning", "reinforcement-learning", "custom-implementation"):
        assert f"- {tag}\n" in card
    assert f"type: {name}\n" in card
    assert (hub / "q_learning.py").read_bytes() == Path(q_learning.__file__).read_bytes()
    assert 1 <= imageio.get_reader(hub / "replay.mp4").get_meta_data()["fps"] <= 4
    if name != "Taxi-v3":
        width, height = Image.open(hub / "q-table.png").size
        assert width == height > 300
    events = EventAccumulator(str(run_folder))
    events.Reload()
    for tag in ("episodic_return", "episodic_length", "epsilon", "SPS"):
        assert len(events.Scalars(f"charts/{tag}")) == 1  # after each 250 episodes, and after the last

    results = json.loads((hub / "results.json").read_text())
    assert q_learning.main(["--evaluate", str(run_folder)]) == (results["mean_reward"], results["std_reward"])


def test_the_time_limit_follows_the_environment():
    assert q_learning.parse_args([]).max_steps == 99
    assert q_learning.parse_args(["--env-id", "FrozenLake8x8-v1"]).max_steps == 200
    assert q_learning.parse_args(["--env-id", "FrozenLake8x8-v1", "--max-steps", "50"]).max_steps == 50
    env = q_learning.make_env("FrozenLake8x8-v1", max_steps=200)
    env.reset(seed=0)
    steps = 1
    while not env.step(0)[3]:  # against the left wall, until the time is up
        steps += 1
        if env.unwrapped.s in (19, 29, 35, 41, 42, 46, 49, 52, 54, 59):
            env.unwrapped.s = 0
    assert steps == 200


def test_taxi_is_scored_on_the_course_s_seeds_in_order(monkeypatch):
    seen = []
    reset = gym.wrappers.TimeLimit.reset

    def spy(self, *, seed=None, options=None):
        if seed is not None:
            seen.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.wrappers.TimeLimit, "reset", spy)
    q_learning.main(["--env-id", "Taxi-v3", "--n-training-episodes", "10", "--n-eval-episodes", "4"])
    assert seen[0] == 1  # training starts from --seed
    assert seen[1:] == [16, 54, 165, 177, 16]  # four episodes and the replay
    assert len(q_learning.TAXI_EVAL_SEED) == 100


def test_the_same_seed_gives_the_same_table_and_another_seed_does_not():
    for seed in ("1", "1", "2"):
        q_learning.main([*QUICK, "--seed", seed, "--is-slippery"])
    first, again, other = (
        q_learning.load_q_table(folder / "hub" / "q-learning.pkl", folder)["qtable"]
        for folder in sorted(run_folders(), key=lambda folder: folder.name.split("__")[2:])
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_interrupted_run_resumes(monkeypatch):
    monkeypatch.setattr(q_learning, "LOG_EPISODES", 100)
    monkeypatch.setattr(q_learning, "CHECKPOINT_SECONDS", 0)

    class StopAt(q_learning.Progress):
        def update(self, now, recent_returns):
            super().update(now, recent_returns)
            if now == 300:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(q_learning, "Progress", StopAt)
        q_learning.main(["--n-training-episodes", "500", "--n-eval-episodes", "2"])
    assert stop.value.code == 130
    (run_folder,) = run_folders()
    checkpoint = q_learning.load_checkpoint(run_folder)
    assert checkpoint["episode"] == 200

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    q_learning.main(["--resume", str(run_folder)])
    assert q_learning.load_checkpoint(run_folder)["episode"] == 500
    events = EventAccumulator(str(run_folder))
    events.Reload()
    epsilons = [event.value for event in events.Scalars("charts/epsilon")]
    assert epsilons == pytest.approx([q_learning.epsilon_at(e - 1, 1.0, 0.05, 0.0005) for e in range(100, 501, 100)])
    steps = [event.step for event in events.Scalars("charts/epsilon")]
    assert steps == sorted(set(steps))


def test_the_policy_map_and_the_picture_show_the_table():
    env = q_learning.make_env("FrozenLake-v1")
    qtable = np.zeros((16, 4))
    qtable[0] = [0, 0, 0, 1]
    qtable[14] = [0, 0, 1, 0]
    shown = q_learning.show_policy({"qtable": qtable}, env)
    assert shown.splitlines() == ["↑ . . .", ". H . H", ". . . H", "H . → G"]
    image = np.asarray(q_learning.draw_q_table({"qtable": qtable}, env, cell=40))
    assert image.shape == (160, 160, 3)
    up, down = image[2, 20], image[38, 20]  # the upper and the lower triangle of the first cell
    assert up[1] > down[1]
    assert q_learning.show_policy({"qtable": np.zeros((500, 6))}, q_learning.make_env("Taxi-v3")) is None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id CartPole-v1", "discrete observations"),
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Taxi-v3 --map-name 8x8", "belong to FrozenLake"),
        ("--map-name 5x5", "5x5"),
        ("--learning-rate 2", "between 0 and 1"),
        ("--min-epsilon 0.5 --max-epsilon 0.1", "--min-epsilon"),
        ("--eval-seed 1,x", "list of seeds"),
        ("--eval-seed 1,2", "too few"),
        ("--env-id Taxi-v3 --n-eval-episodes 101", "too few"),
        ("--n-training-episodes 0", "--n-training-episodes"),
        ("--evaluate nowhere", "neither a folder here nor a repo id"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(argv, says, capfd):
    with pytest.raises(SystemExit) as stop:
        q_learning.main(argv.split())
    out, err = capfd.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not Path("runs").exists()


# --- loading a pickle runs nothing in it


class Runs:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_an_object_array(thing):
    array = np.empty(1, dtype=object)
    array[0] = thing
    return array


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "malicious",
    [
        Runs(os.system, "touch marker"),
        {"qtable": Runs(eval, "open('marker', 'w')")},
        {"qtable": np.zeros((2, 2)), "env_id": [("deep", {"down": Runs(os.mkdir, "marker")})]},
        {"qtable": in_an_object_array(Runs(os.mkdir, "marker"))},
        {"qtable": Runs(getattr, os, "mkdir")},
    ],
)
def test_a_malicious_pickle_is_refused_with_a_line_and_nothing_runs(malicious, protocol, capfd):
    try:
        content = pickle.dumps(malicious, protocol)
    except TypeError:
        content = pickle.dumps({"qtable": Runs(getattr, "x", "join")}, protocol)  # modules do not pickle
    Path("q-learning.pkl").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        q_learning.load_q_table(Path("q-learning.pkl"), "here")
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "it asks for" in err
    assert not Path("marker").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x05.", pickle.dumps([1]), pickle.dumps({"qtable": 3})])
def test_a_file_that_is_no_q_table_is_refused_with_a_line(content, capfd):
    Path("q-learning.pkl").write_bytes(content)
    with pytest.raises(SystemExit):
        q_learning.load_q_table(Path("q-learning.pkl"), "here")
    assert capfd.readouterr().err.count("\n") == 1


# pickle.dumps of a model as the course builds it, written by NumPy 1.26.4 with Python's default protocol, 4.
NUMPY_1_PICKLE = (
    "gASVLAEAAAAAAAB9lCiMBmVudl9pZJSMDUZyb3plbkxha2UtdjGUjAlldmFsX3NlZWSUXZSMDWxlYXJuaW5nX3JhdGWUjBVudW1weS5jb3JlLm"
    "11bHRpYXJyYXmUjAZzY2FsYXKUk5SMBW51bXB5lIwFZHR5cGWUk5SMAmY4lImIh5RSlChLA4wBPJROTk5K/////0r/////SwB0lGJDCGZmZmZm"
    "ZuY/lIaUUpSMBnF0YWJsZZRoBowMX3JlY29uc3RydWN0lJOUaAmMB25kYXJyYXmUk5RLAIWUQwFilIeUUpQoSwFLAksEhpRoDolDQAAAAAAAAA"
    "AAAAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEAAAAAAAAAUQAAAAAAAABhAAAAAAAAAHECUdJRidS4="
)


def model_pickled(protocol):
    model = {"env_id": "FrozenLake-v1", "eval_seed": [], "learning_rate": np.float64(0.7)}
    return pickle.dumps({**model, "qtable": np.arange(8.0).reshape(2, 4)}, protocol)


@pytest.mark.parametrize(
    "content", [base64.b64decode(NUMPY_1_PICKLE), model_pickled(4), model_pickled(5)], ids=["NumPy 1", "4", "5"]
)
def test_tables_of_numpy_1_and_2_load(content):
    Path("q-learning.pkl").write_bytes(content)
    model = q_learning.load_q_table(Path("q-learning.pkl"), "here")
    assert np.array_equal(model["qtable"], np.arange(8.0).reshape(2, 4))
    assert model["learning_rate"] == 0.7
