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
    model = q_learning.read_q_table(hub / "q-learning.pkl")
    keys = COURSE_KEYS | ({"map_name"} if args.map_name else set())
    keys |= {"slippery"} if args.is_slippery is False else set()  # where the ice slips, the course does not say so
    (hub / "q-learning.pkl").write_bytes(pickle.dumps({key: model[key] for key in keys}))
    more = ["--n-eval-episodes", str(args.n_eval_episodes), "--seed", str(args.seed)]
    assert q_learning.main(["--evaluate", str(hub), *more]) == score


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
    return q_learning.read_q_table(Path("q-learning.pkl"))


def array_pickle(shape, data=bytes(16), dtype="f8"):
    """A model dict whose qtable claims to be what is said here."""
    reconstruct, arguments, _ = np.zeros(1).__reduce__()
    call = Runs(reconstruct, *arguments)
    call.call += ((1, shape, np.dtype(dtype), False, data),)
    return pickle.dumps({"qtable": call}, 2)


def hostile_pickles():
    """What should be refused, by name."""
    in_an_array = np.empty(1, dtype=object)
    in_an_array[0] = Runs(os.mkdir, "marker")
    for protocol in (0, 2, 4, 5):
        yield "a call", pickle.dumps(Runs(os.system, "touch marker"), protocol)
        yield "a call for a table", pickle.dumps({"qtable": Runs(eval, "open('marker', 'w')")}, protocol)
        yield "a call deep inside", pickle.dumps({"qtable": np.eye(2), "x": [("x", [in_an_array[0]])]}, protocol)
        yield "a call in an array", pickle.dumps({"qtable": in_an_array}, protocol)
    pointers = Runs(np.ndarray, (1,), np.dtype("O"), b"A" * 8)
    yield "an array made of pointers", pickle.dumps({"qtable": Runs(np.ndarray, pointers, np.dtype("O"), b"A" * 8)})
    for dtype in ("O", "V8", "U2", "S8", "M8[s]", "m8[s]", "c16", "g", [("x", "f8")], [("x", "O")], "2f8", "V0"):
        yield f"dtype {dtype}", pickle.dumps({"qtable": np.zeros((1, 1), dtype)}, 4)
        yield f"bytes of {dtype}", array_pickle((1, 1), bytes(8), dtype)
    sides = ((2, 2), (1, 1), (-1, 2), (-1, -2), (2**62, 4), (2**63, 2**63), (2**2000, 2), (0, 2**70), (2, 1.0))
    for shape in (*sides, ("a", 2), (2,), (), (1,) * 100, (1,) * 10**4, (2**62,) * 10**4, 2, None, [1, 3], ([1], 2)):
        yield f"shape {shape!s:.40}", array_pickle(shape)
    yield "text for bytes", array_pickle((1, 2), "x" * 16)

    n, dtype = 33_000, b"cnumpy\ndtype\n"
    yield "deep lists", b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b"."
    for start, use in ((b"}", b"K\x01s."), (b"", b"\x8c\x01x\x93."), (dtype, b"b.")):  # for a key, a name, a state
        yield f"deep tuples and {use}", b"\x80\x02" + start + b")" + b"\x85" * n + use
    for code in (b"R", b"b"):  # calls and states
        yield f"deep {code}", b"\x80\x02" + dtype * n + code * (n - 1) + b"."
    # Tuples of the same tuple twice, sixty deep: 2**60 of them to hash, or to show.
    twice = b"\x80\x04])\x94a" + b"".join(b"h%ch%c\x86\x94a" % (n, n) for n in range(60))
    yield "one for a key", twice + b"}h\x3cK\x01s."
    yield "one for a name", twice + b"h\x3c\x8c\x01x\x93."
    yield "one in a set", twice + b"\x8f(h\x3c\x90."
    array = b"}\x8c\x06qtablecnumpy.core.multiarray\n_reconstruct\n)R(K\x01%b"
    array += b"cnumpy\ndtype\n(\x8c\x02f8tR(K\x03%bNtb\x89%btbs."
    for values in ((b"h\x3c", b"\x8c\x01<", b"C\x00"), (b")", b"h\x3c", b"C\x00"), (b")", b"\x8c\x01<", b"h\x3c")):
        yield "one for a shape, an order, bytes", twice + array % values
    yield "a huge place in the memo", b"\x80\x02]r\xff\xff\xff\x7f."
    for code in (b"\x96", b"\x8e", b"\x8d", b"\x95"):  # a bytearray, bytes, a text, a frame
        yield f"huge {code}", b"\x80\x05" + code + (2**37).to_bytes(8, "little") + b"."
    yield "a number of many digits", b"I" + b"9" * 10**6 + b"\n."
    yield "a long name", b"c" + b"x" * 10**6 + b"\n\x1b[2J\n."
    yield "very many lists", b"\x80\x02" + b"]" * 10**7 + b"."
    some = (b"K\x01Q", b"\x82\x01", b"(ios\nsystem\n", b"(cos\nsystem\nX\x01\x00\x00\x00xo", b"])b", b"\x87aeuR")
    for content in (*some, b"cnumpy\nndarray\n)\x81", b"X\x01\x00\x00\x00x)R"):
        yield f"instructions {content}", b"\x80\x02" + content + b"."
    for content in (b"", b"garbage", b"\x80\x05.", *map(pickle.dumps, ([1], {}, {"qtable": 3}, {"qtable": [[0.0]]}))):
        yield f"no table: {content}", content
    whole = pickle.dumps({"env_id": "FrozenLake-v1", "gamma": np.float64(0.95), "qtable": np.ones((2, 4))})
    yield from ((f"a file that ends at {end}", whole[:end]) for end in range(0, len(whole), 3))


def test_hostile_pickles_are_refused_and_nothing_runs_in_a_gibibyte():
    names, contents = zip(*hostile_pickles())
    pid = os.fork()  # as one could end the process
    if pid == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        with open("outcomes", "w", buffering=1) as outcomes:
            for content in contents:
                try:
                    print("loaded", load(content).keys(), file=outcomes)
                except pickle.UnpicklingError as error:
                    print("refused" if len(str(error)) < 250 and str(error).isprintable() else error, file=outcomes)
                except BaseException as error:
                    print(repr(error), file=outcomes)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    outcomes = Path("outcomes").read_text().splitlines()
    assert status == 0, names[len(outcomes)]  # where it died
    assert {name: outcome for name, outcome in zip(names, outcomes, strict=True) if outcome != "refused"} == {}
    assert not Path("marker").exists()


# pickle.dumps of a model as the course builds it, written by NumPy 1.26.4 with Python's default protocol, 4.
NUMPY_1_PICKLE = (
    "gASVLAEAAAAAAAB9lCiMBmVudl9pZJSMDUZyb3plbkxha2UtdjGUjAlldmFsX3NlZWSUXZSMDWxlYXJuaW5nX3JhdGWUjBVudW1weS5jb3JlLm"
    "11bHRpYXJyYXmUjAZzY2FsYXKUk5SMBW51bXB5lIwFZHR5cGWUk5SMAmY4lImIh5RSlChLA4wBPJROTk5K/////0r/////SwB0lGJDCGZmZmZm"
    "ZuY/lIaUUpSMBnF0YWJsZZRoBowMX3JlY29uc3RydWN0lJOUaAmMB25kYXJyYXmUk5RLAIWUQwFilIeUUpQoSwFLAksEhpRoDolDQAAAAAAAAA"
    "AAAAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEAAAAAAAAAUQAAAAAAAABhAAAAAAAAAHECUdJRidS4="
)
TABLE = np.arange(8.0).reshape(2, 4)
TABLES = [TABLE, np.asfortranarray(TABLE), TABLE.astype(">f8"), np.arange(16.0).reshape(4, 4)[::2], TABLE.astype("f4")]
TABLES += [np.broadcast_to(np.arange(4.0), (2, 4)), TABLE.astype("u1"), TABLE.astype(int)]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tables_of_every_protocol_and_layout_load(protocol):
    plain = {"env_id": "FrozenLake-v1", "eval_seed": [16, 300, 70_000, 2**40], "slippery": False, "map_name": None}
    for table in TABLES:
        numbers = {"learning_rate": np.float64(0.7), "n_eval_episodes": np.int64(100)}
        pickled = pickle.dumps(plain | numbers | {"qtable": table}, protocol)
        for content in (pickled, pickled.replace(b"numpy._core", b"numpy.core"))[: 2 if protocol < 4 else 1]:
            model = load(content)
            qtable = model.pop("qtable")
            assert np.array_equal(qtable, table)
            assert qtable.dtype == table.dtype.newbyteorder("=")
            qtable += 1  # it can be trained on
            assert model == plain | numbers and type(model["learning_rate"]) is float


def test_an_array_under_many_names_takes_its_memory_once():
    shared = np.zeros((100, 100))
    model = load(pickle.dumps({"qtable": shared, **{f"name {i}": shared for i in range(1000)}}))
    assert np.array_equal(model.pop("qtable"), shared)
    assert len(model) == 1000 and len({id(value) for value in model.values()}) == 1


def test_a_table_of_numpy_1_loads():
    model = load(base64.b64decode(NUMPY_1_PICKLE))
    assert np.array_equal(model["qtable"], TABLE)
    assert model["learning_rate"] == 0.7
