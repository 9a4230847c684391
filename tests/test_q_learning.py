"""q_learning.py: the update by hand, what it learns against dynamic programming, the course's file, safe loading."""

import base64
import json
import math
import os
import pickle
import random
import subprocess
import sys
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


@pytest.mark.parametrize(
    "flags",
    [
        "--learning-rate 0.1 --gamma 0.99",
        "--is-slippery --learning-rate 0.1 --gamma 0.99",
        "--is-slippery False --max-steps 5",
        "--map-name 8x8 --is-slippery --learning-rate 0.1 --gamma 0.99 --max-steps 150",
        "--env-id FrozenLake8x8-v1",
        "--env-id FrozenLake8x8-v1 --is-slippery False --max-steps 30",
        "--env-id FrozenLake-v1 --is-slippery True --map-name 4x4 --tuned False --max-steps 20",
        "--env-id Taxi-v3",
        "--env-id Taxi-v3 --tuned False --n-eval-episodes 120 --seed 3",
        "--env-id CliffWalking-v1 --max-steps 12",
    ],
)
def test_a_reloaded_agent_scores_what_the_packaged_one_did(flags):
    q_learning.main(["--n-training-episodes", "700", "--n-eval-episodes", "30", *flags.split()])
    (run_folder,) = run_folders()
    hub = run_folder / "hub"
    results = json.loads((hub / "results.json").read_text())
    score = results["mean_reward"], results["std_reward"]
    assert q_learning.main(["--evaluate", str(run_folder)]) == score
    args = q_learning.parse_args(["--evaluate", str(hub)])
    saved = json.loads((hub / "hyperparameters.json").read_text())
    assert {name: getattr(args, name) for name in saved} == saved  # the row of TUNED does not come in between

    agent, env = q_learning.load_agent(hub)
    seeds = q_learning.evaluation_seeds(args)
    assert q_learning.evaluate_agent(env, q_learning.make_policy(agent), len(seeds), seeds) == score

    (hub / "hyperparameters.json").unlink()  # what the course's notebook leaves: results.json and its model dict
    agent, env = q_learning.load_agent(hub)
    assert q_learning.evaluate_agent(env, q_learning.make_policy(agent), len(seeds), seeds) == score
    more = ["--n-eval-episodes", str(len(seeds)), "--seed", str(args.seed)]
    assert q_learning.main(["--evaluate", str(hub), *more]) == score


def test_flags_change_the_ice_that_an_agent_is_evaluated_on():
    q_learning.main(["--n-training-episodes", "1000", "--n-eval-episodes", "30"])
    (run_folder,) = run_folders()
    assert q_learning.main(["--evaluate", str(run_folder)]) == (1.0, 0.0)
    assert q_learning.main(["--evaluate", str(run_folder), "--is-slippery"])[0] < 0.9
    assert q_learning.main(["--evaluate", str(run_folder), "--max-steps", "5"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("argv", "env_id", "tuned"),
    [
        ("--env-id Taxi", "Taxi-v3", True),
        ("--env-id FrozenLake8x8", "FrozenLake8x8-v1", True),
        ("--env-id CliffWalking", "CliffWalking-v1", True),
        ("--env-id FrozenLake", "FrozenLake-v1", False),
        ("--env-id FrozenLake --is-slippery", "FrozenLake-v1", True),
        ("--env-id Taxi-v4", "Taxi-v4", False),
        ("--env-id Taxi --tuned False", "Taxi-v3", False),
        ("--env-id LunarLander", "LunarLander-v2", False),
    ],
)
def test_an_id_without_version_is_the_full_id_with_its_row(argv, env_id, tuned, capsys):
    args = q_learning.parse_args(argv.split())
    assert (args.env_id, args.tuned) == (env_id, tuned)
    if "Lunar" not in env_id:
        q_learning.main([*argv.split(), "--n-training-episodes", "2", "--n-eval-episodes", "1"])
        (run_folder,) = run_folders()
        assert run_folder.name.startswith(f"{env_id}__")
        assert json.loads((run_folder / "hub" / "results.json").read_text())["env_id"] == env_id
        assert ("Without a row of TUNED" in capsys.readouterr().out) == (not tuned)


def test_no_two_training_seeds_share_an_evaluation_episode():
    seeds = [q_learning.evaluation_seeds(q_learning.parse_args(["--seed", str(seed)])) for seed in (0, 1, 5)]
    assert len({0, 1, 5}.union(*seeds)) == 303


def test_taxi_s_further_episodes_have_seeds_of_their_own():
    args = q_learning.parse_args(["--env-id", "Taxi-v3", "--n-eval-episodes", "120"])
    seeds = q_learning.evaluation_seeds(args)
    assert seeds[:100] == q_learning.TAXI_EVAL_SEED
    assert len(set(seeds[100:]) - set(q_learning.TAXI_EVAL_SEED)) == 20


@pytest.mark.parametrize("env_id", ["Taxi-v3", "FrozenLake-v1"])
def test_the_card_says_what_is_so(env_id, capsys):
    q_learning.main([*QUICK, "--env-id", env_id])
    card = (run_folders()[0] / "hub" / "README.md").read_text()
    assert ("seeds that training never used" in card) == (env_id != "Taxi-v3")
    assert "most probable" not in card
    if env_id == "Taxi-v3":
        assert "the course's seeds" in card
        assert "148" not in capsys.readouterr().out  # one of the hundred
    else:
        assert "| map_name | 4x4 |\n| is_slippery | False |" in card


def test_a_finished_run_says_so_and_goes_on_with_more_but_not_with_fewer_episodes(capfd):
    q_learning.main(QUICK)
    (run_folder,) = run_folders()
    again = ["--resume", str(run_folder)]
    capfd.readouterr()
    q_learning.main(again)
    assert "Nothing is left to train" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        q_learning.main([*again, "--n-training-episodes", "150"])
    err = capfd.readouterr().err
    assert "150" in err and "200" in err and err.count("\n") == 1
    q_learning.main([*again, "--n-training-episodes", "300"])
    assert "Nothing is left to train" not in capfd.readouterr().out
    assert q_learning.load_checkpoint(run_folder)["episode"] == 300


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
    assert checkpoint["episode"] == 299  # saved by time, not only where the curves have a point

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    q_learning.main(["--resume", str(run_folder)])
    assert q_learning.load_checkpoint(run_folder)["episode"] == 500
    events = EventAccumulator(str(run_folder))
    events.Reload()
    epsilons = [event.value for event in events.Scalars("charts/epsilon")]
    assert epsilons == pytest.approx([q_learning.epsilon_at(e - 1, 1.0, 0.05, 0.0005) for e in range(100, 501, 100)])
    steps = [event.step for event in events.Scalars("charts/epsilon")]
    assert steps == sorted(set(steps))
    # The point after 300 episodes is the mean of a hundred, those before the stop too.
    lengths = [event.value for event in events.Scalars("charts/episodic_length")]
    assert np.cumsum(lengths) * 100 == pytest.approx(steps)


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


@pytest.mark.parametrize(("env_id", "low"), [("FrozenLake-v1", 0.7351), ("CliffWalking-v1", -98.766)])
def test_the_numbers_in_the_picture_stay_inside_their_cells(env_id, low):
    env = q_learning.make_env(env_id)
    qtable = np.linspace(low, low + 0.01, int(env.observation_space.n) * 4).reshape(-1, 4)
    image = np.asarray(q_learning.draw_q_table({"qtable": qtable}, env)).astype(int)
    cell = image.shape[0] // 4
    gaps = [x + offset for x in range(cell, image.shape[1], cell) for offset in range(-3, 4)]
    assert image[:, gaps, 0].max() <= 90  # the text is white, everything else has less red


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id CartPole-v1", "discrete observations"),
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Taxi-v3 --map-name 8x8", "belong to FrozenLake"),
        ("--map-name 5x5", "5x5"),
        ("--learning-rate 2", "between 0 and 1"),
        ("--min-epsilon 0.5 --max-epsilon 0.1", "--min-epsilon"),
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
        {"qtable": Runs(getattr, "x", "join")},
    ],
)
def test_a_malicious_pickle_is_refused_and_nothing_runs(malicious, protocol):
    Path("q-learning.pkl").write_bytes(pickle.dumps(malicious, protocol))
    with pytest.raises(pickle.UnpicklingError):
        q_learning.read_q_table(Path("q-learning.pkl"))
    assert not Path("marker").exists()


def array_pickle(shape, data=bytes(16), dtype="f8", fortran=False):
    """A model dict whose qtable claims to be what is said here."""
    reconstruct, arguments, _ = np.zeros(1).__reduce__()
    call = Runs(reconstruct, *arguments)
    call.call += ((1, shape, np.dtype(dtype), fortran, data),)
    return pickle.dumps({"qtable": call}, 2)


def hostile_pickles():
    """What should be refused, by name."""
    pointers = Runs(np.ndarray, (1,), np.dtype("O"), b"A" * 8)
    yield "an object array made of pointers", pickle.dumps(pointers)
    yield "and these followed, as a shape", pickle.dumps(Runs(np.ndarray, pointers))
    yield "both in a dict", pickle.dumps({"qtable": Runs(np.ndarray, pointers, np.dtype("O"), b"A" * 8)})
    for dtype in ("O", "V8", "U2", "S8", "M8[s]", "m8[s]", "c16", "g", [("x", "f8")], [("x", "O")], "2f8", "V0"):
        yield f"dtype {dtype}", pickle.dumps({"qtable": np.zeros((1, 1), dtype)}, 4)
        yield f"bytes of {dtype}", array_pickle((1, 1), bytes(8), dtype)
    sides = ((2, 2), (1, 1), (-1, 2), (-1, -2), (2**62, 4), (2**63, 2**63), (2**2000, 2), (0, 2**70), (2, 1.0))
    for shape in (*sides, ("a", 2), (2,), (), (1,) * 100, (1,) * 10**5, 2, None, [1, 2], ([1], 2)):
        yield f"shape {shape!s:.40}", array_pickle(shape)
    yield "text for bytes", array_pickle((1, 2), "x" * 16)
    yield "no bytes", array_pickle((1, 2), None)
    scalar, arguments = np.datetime64("2020-01-01").__reduce__()
    yield "a date for a number", pickle.dumps({"qtable": np.zeros((1, 2)), "gamma": Runs(scalar, *arguments)}, 4)

    deep = 100_000
    model = pickle.dumps({"qtable": np.zeros((1, 2))}, 2)[:-1]
    yield "deep lists", b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b"."
    yield "deep tuples for a key", model + b")" + b"\x85" * deep + b"K\x01s."
    yield "deep tuples for a name", b"\x80\x04)" + b"\x85" * deep + b"\x8c\x01x\x93."
    yield "deep tuples for a state", b"\x80\x02cnumpy\ndtype\n)" + b"\x85" * deep + b"b."
    yield "deep calls", b"\x80\x02" + b"cnumpy\ndtype\n" * deep + b"R" * (deep - 1) + b"."
    yield "deep states", b"\x80\x02" + b"cnumpy\ndtype\n" * deep + b"b" * (deep - 1) + b"."
    shared = b"\x80\x04]\x94" + b"".join(b"]\x94h%cah%ca" % (n, n) for n in range(60))
    yield "lists in lists twice, for a name", shared + b"\x8c\x01x\x93."
    yield "a list in itself for a name", b"\x80\x02]q\x00h\x00a\x8c\x01x\x93."
    yield "a list in itself for a key", b"\x80\x02}]q\x00h\x00aK\x01s."

    yield "a huge place in the memo", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "a huge bytearray", b"\x80\x05\x96" + (2**37).to_bytes(8, "little") + b"."
    yield "huge bytes", b"\x80\x05\x8e" + (2**37).to_bytes(8, "little") + b"."
    yield "a huge text", b"\x80\x05\x8d" + (2**37).to_bytes(8, "little") + b"."
    yield "a huge frame", b"\x80\x05\x95" + (2**37).to_bytes(8, "little") + b"."
    yield "a huge number", b"\x80\x05\x8b" + (2**31 - 1).to_bytes(4, "little") + b"."
    yield "a number of many digits", b"I" + b"9" * 10**7 + b"\n."
    yield "no number", b"F" + b"x" * 10**7 + b"\n."
    yield "a long name", b"c" + b"x" * 10**7 + b"\n\x1b[2J\n."
    yield "a huge file", bytes(2**27)
    yield "very many lists", b"\x80\x02" + b"]" * 3 * 10**7 + b"."
    text = b"X" + (10**6).to_bytes(4, "little") + b"x" * 10**6
    call = b"c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    yield "a text encoded again and again", b"\x80\x02" + call + b"h\x00h\x01h\x02\x86R" * 10**5 + b"."

    yield "a persistent id", b"\x80\x02K\x01Q."
    yield "an extension", b"\x80\x02\x82\x01."
    yield "an instance", b"(ios\nsystem\n."
    yield "an object", b"(cos\nsystem\nX\x01\x00\x00\x00xo."
    yield "a new object", b"\x80\x02cnumpy\nndarray\n)\x81."
    yield "attributes", b"\x80\x02cnumpy\ndtype\n}X\x09\x00\x00\x00__class__K\x01sb."
    yield "a state for a list", b"\x80\x02])b."
    yield "a call of text", b"\x80\x02X\x01\x00\x00\x00x)R."
    yield "below the stack", b"\x80\x02\x87aeuR."
    for content in (b"", b"garbage", b"\x80\x05.", pickle.dumps([1]), pickle.dumps({"qtable": 3}), pickle.dumps({})):
        yield f"no table: {content}", content
    yield "a table of lists", pickle.dumps({"qtable": [[0.0, 1.0]]})


READ_THEM = """
import pickle, resource, sys
from pathlib import Path
import q_learning

with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for path in sorted(Path(".").glob("*.pkl")):
    print(path.name, end=": ", flush=True)
    try:
        q_learning.read_q_table(path)
        print("loaded", flush=True)
    except pickle.UnpicklingError as error:
        print("refused" if len(str(error)) < 300 and str(error).isprintable() else f"refused with {error}", flush=True)
    except Exception as error:
        print(type(error), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it limits the memory as Linux does")
def test_hostile_pickles_are_refused_without_a_crash_in_a_gibibyte():
    names = []
    for number, (name, content) in enumerate(hostile_pickles()):
        Path(f"{number:03}.pkl").write_bytes(content)
        names.append(name)
    root = Path(q_learning.__file__).parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", READ_THEM], env=env, capture_output=True, text=True)
    outcomes = [line.partition(": ")[2] for line in result.stdout.splitlines()]
    assert {name: outcome for name, outcome in zip(names, outcomes) if outcome != "refused"} == {}
    assert len(outcomes) == len(names), names[len(outcomes) - 1]  # where it died
    assert (result.returncode, result.stderr) == (0, "")


def test_a_truncated_file_is_refused_wherever_it_ends():
    whole = pickle.dumps({"env_id": "FrozenLake-v1", "gamma": np.float64(0.95), "qtable": np.ones((16, 4))})
    for end in range(len(whole)):
        Path("q-learning.pkl").write_bytes(whole[:end])
        with pytest.raises(pickle.UnpicklingError):
            q_learning.read_q_table(Path("q-learning.pkl"))


def test_what_is_no_table_is_one_line_of_main(capfd):
    q_learning.main(QUICK)
    (run_folder,) = run_folders()
    (run_folder / "hub" / "q-learning.pkl").write_bytes(b"garbage")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        q_learning.main(["--evaluate", str(run_folder)])
    err = capfd.readouterr().err
    assert (stop.value.code, err.count("\n"), err[:7]) == (2, 1, "error: ")


# pickle.dumps of a model as the course builds it, written by NumPy 1.26.4 with Python's default protocol, 4.
NUMPY_1_PICKLE = (
    "gASVLAEAAAAAAAB9lCiMBmVudl9pZJSMDUZyb3plbkxha2UtdjGUjAlldmFsX3NlZWSUXZSMDWxlYXJuaW5nX3JhdGWUjBVudW1weS5jb3JlLm"
    "11bHRpYXJyYXmUjAZzY2FsYXKUk5SMBW51bXB5lIwFZHR5cGWUk5SMAmY4lImIh5RSlChLA4wBPJROTk5K/////0r/////SwB0lGJDCGZmZmZm"
    "ZuY/lIaUUpSMBnF0YWJsZZRoBowMX3JlY29uc3RydWN0lJOUaAmMB25kYXJyYXmUk5RLAIWUQwFilIeUUpQoSwFLAksEhpRoDolDQAAAAAAAAA"
    "AAAAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEAAAAAAAAAUQAAAAAAAABhAAAAAAAAAHECUdJRidS4="
)


def model_pickled(protocol, qtable=None, module="numpy._core"):
    model = {
        "env_id": "FrozenLake-v1",
        "eval_seed": [16, 54, 300, 70_000, 2**40],
        "learning_rate": np.float64(0.7),
        "n_eval_episodes": np.int64(100),
        "slippery": False,
        "map_name": None,
        "qtable": np.arange(8.0).reshape(2, 4) if qtable is None else qtable,
    }
    content = pickle.dumps(model, protocol)
    if module != "numpy._core":  # as NumPy 1 names it; one letter less, where protocol 4 counts
        for name in ("numeric", "multiarray"):
            new, old = (f"{core}.{name}".encode() for core in ("numpy._core", module))
            content = content.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
        frame = len(content) - 11
        content = content[:3] + frame.to_bytes(8, "little") + content[11:] if protocol >= 4 else content
    return content


TABLES = {
    "plain": np.arange(8.0).reshape(2, 4),
    "Fortran": np.asfortranarray(np.arange(8.0).reshape(2, 4)),
    "big-endian": np.arange(8.0, dtype=">f8").reshape(2, 4),
    "strided": np.arange(16.0).reshape(4, 4)[::2],
    "read-only": np.broadcast_to(np.arange(4.0), (2, 4)),
    "small": np.arange(8, dtype="f4").reshape(2, 4),
    "bytes": np.arange(8, dtype="u1").reshape(2, 4),
    "whole numbers": np.arange(8).reshape(2, 4),
}


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_protocol_and_layout_load(name, protocol, module):
    content = model_pickled(protocol, TABLES[name], module)
    assert (b"numpy.core" in content) == (module == "numpy.core")
    Path("q-learning.pkl").write_bytes(content)
    model = q_learning.read_q_table(Path("q-learning.pkl"))
    qtable = model.pop("qtable")
    assert np.array_equal(qtable, TABLES[name])
    assert qtable.dtype == TABLES[name].dtype.newbyteorder("=")
    qtable += 1  # it can be trained on
    assert model == {
        "env_id": "FrozenLake-v1", "eval_seed": [16, 54, 300, 70_000, 2**40], "learning_rate": 0.7,
        "n_eval_episodes": 100, "slippery": False, "map_name": None,
    }  # fmt: skip


def test_a_table_of_numpy_1_loads():
    Path("q-learning.pkl").write_bytes(base64.b64decode(NUMPY_1_PICKLE))
    model = q_learning.read_q_table(Path("q-learning.pkl"))
    assert np.array_equal(model["qtable"], np.arange(8.0).reshape(2, 4))
    assert model["learning_rate"] == 0.7
