"""q_learning.py: the update by hand, what it learns against dynamic programming, the course's file, safe loading."""

import base64
import json
import math
import os
import pickle
import random
import resource
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import Counting, Runs, read, run

import q_learning

COURSE_KEYS = {"env_id", "max_steps", "n_training_episodes", "n_eval_episodes", "eval_seed", "learning_rate", "gamma"}
COURSE_KEYS |= {"max_epsilon", "min_epsilon", "decay_rate", "qtable"}


def trained(*flags):
    """The Q-table that the flags train, without the package."""
    Path("trained").mkdir(exist_ok=True)
    return q_learning.train(q_learning.parse_args([*flags]), Path("trained"))[0]["qtable"]


def probability_of_success(qtable, env, steps):
    """Exact chance that the greedy policy reaches the goal, by dynamic programming on the environment's own table."""
    transitions = env.unwrapped.P
    value = np.zeros(len(transitions))
    for _ in range(steps):
        outcomes = [transitions[state][int(np.argmax(qtable[state]))] for state in range(len(transitions))]
        value = np.array([sum(p * (r + (0 if end else value[to])) for p, to, r, end in after) for after in outcomes])
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


@pytest.mark.parametrize(("cut_off", "expected"), [(False, 2.0), (True, 2.0 + 0.5 * 1.0)])
def test_training_bootstraps_a_truncated_step_and_not_a_terminal_one(cut_off, expected, monkeypatch):
    """An episode of two steps in the only state there is, with rewards 1 and 2: after the first, its value is 1."""
    env = gym.wrappers.TransformObservation(Counting(2, cut_off), lambda _: 0, gym.spaces.Discrete(1))
    monkeypatch.setattr(q_learning, "make_env", lambda *args, **kwargs: env)
    assert trained("--n-training-episodes", "1", "--learning-rate", "1", "--gamma", "0.5").max() == expected


def test_epsilon_follows_the_course_s_formula_and_is_the_share_of_random_actions():
    assert q_learning.epsilon_at(0, 1.0, 0.05, 0.0005) == 1.0
    assert q_learning.epsilon_at(700, 1.0, 0.05, 0.0005) == pytest.approx(0.05 + 0.95 * math.exp(-0.35))
    rng = random.Random(0)
    counts = np.bincount([q_learning.epsilon_greedy_policy([[0.0, 5.0, 1.0]], 0, 0.3, rng) for _ in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.1, 0.8, 0.1], atol=0.01)
    counts = np.bincount([q_learning.epsilon_greedy_policy([[2.0, 0.0, 2.0]], 0, 0.0, rng) for _ in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.0, 0.5], atol=0.02)  # ties


# --- what it learns


def test_the_8x8_map_is_learned_from_a_table_of_zeros():
    qtable = trained("--map-name", "8x8", "--n-training-episodes", "3000")
    env = q_learning.make_env("FrozenLake-v1", "8x8", False)
    assert probability_of_success(qtable, env, steps=14) == 1.0  # 14 moves: the shortest way there is


def test_slippery_ice_is_crossed_nearly_as_well_as_can_be():
    qtable = trained("--is-slippery", "--n-training-episodes", "8000")
    best = 0.744  # by dynamic programming over policies that may depend on the time left
    assert probability_of_success(qtable, q_learning.make_env("FrozenLake-v1"), steps=100) >= 0.95 * best


# --- runs through main


@pytest.mark.parametrize(
    ("flags", "name", "course", "shape"),
    [
        ("", "FrozenLake-v1-4x4-no_slippery", {"map_name": "4x4", "slippery": False}, (16, 4)),
        ("--env-id FrozenLake8x8", "FrozenLake8x8-v1-8x8", {"map_name": "8x8", "slippery": True}, (64, 4)),
        ("--map-name 8x8 --is-slippery", "FrozenLake-v1-8x8", {"map_name": "8x8", "slippery": True}, (64, 4)),
        ("--env-id CliffWalking", "CliffWalking-v1", {}, (48, 4)),
        ("--env-id Taxi", "Taxi-v3", {}, (500, 6)),
    ],
)
def test_the_package_is_the_course_s(flags, name, course, shape):
    run_folder = run(q_learning, f"--n-training-episodes 200 --n-eval-episodes 2 {flags}")
    model = pickle.loads((run_folder / "hub" / "q-learning.pkl").read_bytes())
    assert model.keys() >= COURSE_KEYS and course.items() <= model.items() and model["qtable"].shape == shape
    results = read(run_folder, "results.json")
    assert (results["env_name"], run_folder.name.split("__")[0]) == (name, results["env_id"])
    assert imageio.get_reader(run_folder / "hub" / "replay.mp4").get_meta_data()["fps"] == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--is-slippery --learning-rate 0.1 --gamma 0.99",
        "--no-is-slippery --max-steps 5",
        "--env-id FrozenLake8x8-v1 --no-is-slippery --max-steps 30",
        "--env-id Taxi-v3 --n-eval-episodes 120 --seed 3 --min-epsilon 0.05 --max-steps 20",
    ],
)
def test_a_reloaded_agent_scores_what_the_packaged_one_did(flags):
    run_folder = run(q_learning, f"--n-training-episodes 500 --n-eval-episodes 10 {flags}")
    hub, results = run_folder / "hub", read(run_folder, "results.json")
    score = {name: results[name] for name in ("mean_reward", "std_reward")}
    assert q_learning.main(["--evaluate", str(run_folder)]) == score
    args, saved = q_learning.parse_args(["--evaluate", str(hub)]), read(run_folder, "hyperparameters.json")
    assert {name: getattr(args, name) for name in saved} == saved  # the row of TUNED does not come in between

    # What an old package of ours has besides; and the course's, which are results.json and the model dict alone.
    old = {"tuned": True, "push": None, "eval_seed": [1, 2], "wandb_entity": -1, "resume": "runs", "render": True}
    (hub / "hyperparameters.json").write_text(json.dumps(saved | old))
    assert q_learning.main(["--evaluate", str(hub)]) == score
    (hub / "hyperparameters.json").unlink()
    more = f"--n-eval-episodes {args.n_eval_episodes} --seed {args.seed} --max-steps {args.max_steps}"
    if args.map_name:  # of the map and the ice, results.json says nothing; else they are FrozenLake's defaults here
        more += f" --map-name {args.map_name} --{'' if args.is_slippery else 'no-'}is-slippery"
    assert q_learning.main(["--evaluate", str(hub), *more.split()]) == score
    spec = q_learning.load_agent(hub)[1].spec  # plays what the course does under this name
    assert spec.max_episode_steps == 99 and spec.kwargs.items() >= q_learning.LAKES.get(args.env_id, {}).items()


def test_flags_change_the_ice_that_an_agent_is_evaluated_on():
    evaluate = ["--evaluate", str(run(q_learning, "--n-training-episodes 1000 --n-eval-episodes 30"))]
    assert q_learning.main(evaluate) == {"mean_reward": 1.0, "std_reward": 0.0}
    assert q_learning.main([*evaluate, "--is-slippery"])["mean_reward"] < 0.9
    assert q_learning.main([*evaluate, "--max-steps", "5"])["mean_reward"] == 0.0


def test_taxi_is_scored_on_the_course_s_seeds_in_order(resets):
    q_learning.main(["--env-id", "Taxi-v3", "--n-training-episodes", "10", "--n-eval-episodes", "4"])
    assert [seed for _, seed in resets] == [1, 16, 54, 165, 177, 16]  # training, episodes, replay
    args = q_learning.parse_args(["--env-id", "Taxi-v3", "--n-eval-episodes", "120"])
    assert len(set(q_learning.evaluation_seeds(args)[100:]) - set(q_learning.TAXI_EVAL_SEED)) == 20


# --- loading a pickle runs nothing in it


def load(content):
    Path("q-learning.pkl").write_bytes(content)
    return q_learning.read_q_table(Path("q-learning.pkl"), 2, 4)


def hostile_pickles():
    """What should be refused, by name."""
    in_an_array = np.empty(1, dtype=object)
    in_an_array[0] = Runs(os.mkdir, "marker")
    for protocol in (0, 2, 4, 5):
        yield "a call", pickle.dumps(Runs(os.system, "touch marker"), protocol)
        yield "a call for a table", pickle.dumps({"qtable": Runs(eval, "open('marker', 'w')")}, protocol)
        yield "a call in an array", pickle.dumps({"qtable": in_an_array}, protocol)
        yield "a table of another size", pickle.dumps({"qtable": np.zeros((4, 4))}, protocol)
        for table in (np.asfortranarray(TABLE), TABLE.astype(int), TABLE.astype("f4")):
            yield f"a table of {table.dtype}, {table.flags.c_contiguous}", pickle.dumps({"qtable": table}, protocol)
        yield "two of a size", pickle.dumps({"visits": TABLE + 1, "qtable": TABLE}, protocol)
    for code in (b"\x96", b"\x8e", b"\x8d", b"\x95"):  # a bytearray, bytes, a text, a frame
        yield f"huge {code}", b"\x80\x05" + code + (2**37).to_bytes(8, "little") + b"."
    yield "a number of many digits", b"I" + b"9" * 10**6 + b"\n."
    yield "a long name", b"c" + b"x" * 10**6 + b"\n\x1b[2J\n."
    yield "very many lists", b"\x80\x02" + b"]" * 10**6 + b"."
    for content in (b"", b"garbage", b"\x80\x05.", b"\x80\x02\x82\x01.", *map(pickle.dumps, ([1], {}, {"qtable": 3}))):
        yield f"no table: {content}", content
    whole = pickle.dumps({"env_id": "FrozenLake-v1", "qtable": np.ones((2, 4))})
    table = whole.index(np.ones((2, 4)).tobytes())
    yield from ((f"a file that ends at {end}", whole[:end]) for end in range(0, table + 64, 3))


def test_hostile_pickles_are_refused_and_nothing_runs_in_a_gibibyte():
    names, contents = zip(*hostile_pickles())
    pid = os.fork()  # as one could end the process
    if pid == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        with open("outcomes", "w", buffering=1) as outcomes:
            for content in contents:
                try:
                    print("loaded", load(content).shape, file=outcomes)
                except OSError:
                    print("refused", file=outcomes)
                except BaseException as error:
                    print(repr(error), file=outcomes)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    outcomes = Path("outcomes").read_text().splitlines()
    assert status == 0, names[len(outcomes)]  # where it died
    assert {name: outcome for name, outcome in zip(names, outcomes, strict=True) if outcome != "refused"} == {}
    assert not Path("marker").exists()


def test_a_table_beside_a_call_loads_and_the_call_does_not_run():
    content = pickle.dumps({"x": Runs(os.mkdir, "marker"), "qtable": TABLE}, 4)
    assert np.array_equal(load(content), TABLE) and not Path("marker").exists()
    pickle.loads(content)
    assert Path("marker").exists()  # the file was as malicious as it claims


# pickle.dumps of a model as the course builds it, written by NumPy 1.26.4 with Python's default protocol, 4.
NUMPY_1_PICKLE = (
    "gASVLAEAAAAAAAB9lCiMBmVudl9pZJSMDUZyb3plbkxha2UtdjGUjAlldmFsX3NlZWSUXZSMDWxlYXJuaW5nX3JhdGWUjBVudW1weS5jb3JlLm"
    "11bHRpYXJyYXmUjAZzY2FsYXKUk5SMBW51bXB5lIwFZHR5cGWUk5SMAmY4lImIh5RSlChLA4wBPJROTk5K/////0r/////SwB0lGJDCGZmZmZm"
    "ZuY/lIaUUpSMBnF0YWJsZZRoBowMX3JlY29uc3RydWN0lJOUaAmMB25kYXJyYXmUk5RLAIWUQwFilIeUUpQoSwFLAksEhpRoDolDQAAAAAAAAA"
    "AAAAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEAAAAAAAAAUQAAAAAAAABhAAAAAAAAAHECUdJRidS4="
)
TABLE = np.arange(8.0).reshape(2, 4)


@pytest.mark.parametrize("protocol", [3, 4])
def test_tables_of_every_protocol_load(protocol):
    about = {"env_id": "FrozenLake-v1", "eval_seed": [16, 300, 70_000], "slippery": False, "gamma": np.float64(0.95)}
    loaded = load(pickle.dumps(about | {"qtable": TABLE}, protocol))
    assert np.array_equal(loaded, TABLE) and loaded.dtype == np.float64


def test_a_table_of_numpy_1_loads():
    assert np.array_equal(load(base64.b64decode(NUMPY_1_PICKLE)), TABLE)
