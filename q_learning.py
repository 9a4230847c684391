"""Tabular Q-learning in one file: trains an agent, scores it, films it and packages it for the Hub.

    python q_learning.py                                            # FrozenLake 4x4, solved in seconds
    python q_learning.py --env-id Taxi-v3 --repo-id user/q-taxi     # train, score, film, push to the Hugging Face Hub
    python q_learning.py --evaluate user/q-taxi                     # load it back, score it, film it
    tensorboard --logdir runs

Q(s, a) is the return to expect from action a in state s and the best actions ever after: one number for each pair, in
a table. The algorithm acts, mostly by the table, and after each step pulls one number towards what the step showed:

    Q(s, a) <- Q(s, a) + learning_rate * [r + gamma * max over a' of Q(s', a') - Q(s, a)]

The bracket is the temporal-difference error. The max makes it off-policy: it learns the value of acting greedily while
it explores (epsilon-greedy: with probability epsilon, a random action).

Sources: Learning from Delayed Rewards (Watkins, 1989); Reinforcement Learning: An Introduction (Sutton and Barto, 2nd
edition, 2018, http://incompleteideas.net/book/the-book.html), section 6.5.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6",
#     "gymnasium[toy-text]>=1.2,<2",
#     "numpy>=2,<3",
#     "tensorboard>=2.18,<3",
#     "huggingface_hub>=1.20,<3",
#     "imageio>=2.36,<3",
#     "imageio-ffmpeg>=0.6,<1",
#     "pillow>=10,<15",
#     "tqdm>=4.66,<5",
#     "wasabi>=1.1,<2",
# ]
# ///

import argparse
import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import linecache
import math
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without widgets; its bar is text
try:
    import gymnasium as gym
    import imageio.v2 as imageio
    import numpy as np
    import torch
    from huggingface_hub import EvalResult, HfApi, ModelCardData, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, RemoteEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id
    from PIL import Image, ImageDraw
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
    from wasabi import Printer, color
except ModuleNotFoundError as missing:
    needed = re.findall(r'(?m)^#     (".+"),$', "".join(linecache.getlines(sys._getframe().f_code.co_filename)))
    pip = "%pip" if "IPython" in sys.modules else "pip"
    sys.exit(f"error: {missing}; what this script needs: {pip} install {' '.join(needed)}")

SCRIPT = "q_learning.py"  # the name of this file in the package
ALGORITHM = "Q-Learning"
CARD_TAGS = ["q-learning", "reinforcement-learning", "custom-implementation"]
MODEL_FILE = "q-learning.pkl"
VIDEO_FPS = 2  # slow enough to follow each move
LOG_EPISODES = 250  # episodes between two points of the curves
CHECKPOINT_SECONDS = 10  # what a crash costs at the most
EVAL_SEED = 1_000_000  # evaluation plays (seed + 1) * EVAL_SEED, + 1, ...: no two seeds share an episode
NOT_SAVED = ("resume", "evaluate", "render", "push")  # flags that say what to do now, not how the agent was trained

msg = Printer(pretty=sys.stdout.isatty())
asked_to_stop = []  # the signals that came while a run was on

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# The course's evaluation seeds for Taxi-v3, one per starting position, so that all agents are scored on the same ones.
# fmt: off
TAXI_EVAL_SEED = [
    16, 54, 165, 177, 191, 191, 120, 80, 149, 178, 48, 38, 6, 125, 174, 73, 50, 172, 100, 148, 146, 6, 25, 40, 68, 148,
    49, 167, 9, 97, 164, 176, 61, 7, 54, 55, 161, 131, 184, 51, 170, 12, 120, 113, 95, 126, 51, 98, 36, 135, 54, 82,
    45, 95, 89, 59, 95, 124, 9, 113, 58, 85, 51, 134, 121, 169, 105, 21, 30, 11, 50, 65, 12, 43, 82, 145, 152, 97, 106,
    55, 31, 85, 38, 112, 102, 168, 123, 97, 21, 83, 158, 26, 80, 63, 5, 81, 32, 11, 28, 148,
]
# fmt: on

# What differs from the defaults below, which are the course's, per environment; by the name on its model card. Flags on
# the command line win over the row.
TUNED = {
    # On slippery ice one action has three outcomes: a small learning rate averages over them, and a gamma near 1 does
    # not mind the way round that is longer and safer.
    "FrozenLake-v1-4x4": dict(
        n_training_episodes=20_000, max_steps=100, learning_rate=0.05, gamma=0.995, min_epsilon=0.2
    ),
    "FrozenLake8x8-v1-8x8": dict(
        n_training_episodes=40_000, max_steps=200, learning_rate=0.1, gamma=0.999, min_epsilon=0.2
    ),
    # The course has decay_rate 0.005 and min_epsilon 0.05, which leave a few of the 500 states half learned.
    "Taxi-v3": dict(n_training_episodes=25_000, min_epsilon=0.2),
    "CliffWalking-v1": dict(n_training_episodes=2_000, decay_rate=0.005, gamma=0.99),
}


def parse_args(argv=None):
    """Read the flags. The command line wins over a saved run's flags, those over the TUNED row, that over the defaults.

    argv: list of strings; by default the command line (a notebook kernel's own arguments are not meant for us).
    A mistake prints one line and exits with code 2, before anything is written.
    """
    if argv is None:
        argv = [] if in_notebook() and "kernel" in sys.argv[0] else sys.argv[1:]
    switch = {"type": boolean, "nargs": "?", "const": True}  # --flag, --flag True, --flag False

    # Two passes, because these flags decide the defaults of all the others.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = fail
    flag = first.add_argument_group("what to do").add_argument
    flag("--env-id", type=full_id, default="FrozenLake-v1", help="any with discrete observations and actions")
    flag("--map-name", choices=["4x4", "8x8"], help="map of FrozenLake (default: its own)")
    flag("--is-slippery", **switch, help="whether the ice slips (default: only that of FrozenLake8x8-v1)")
    flag("--tuned", **switch, default=True, help="start from the environment's row of TUNED")
    flag("--resume", metavar="RUN_FOLDER", help="go on from the checkpoint of an interrupted run, with its flags")
    flag("--evaluate", metavar="SOURCE", help="no training: score and film a run folder, a Hub repo id, or 'random'")
    flag("--push", metavar="RUN_FOLDER", help="no training: upload this run's package to --repo-id")
    known, _ = first.parse_known_args(argv)
    if sum(map(bool, (known.resume, known.evaluate, known.push))) > 1:
        fail("--resume, --evaluate and --push are three jobs: give one of them")

    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        description=__doc__.splitlines()[0],
        parents=[first],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("experiment").add_argument
    flag("--exp-name", default="q_learning", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=number(int, 0), default=1, help="seed of everything random")
    flag("--track", **switch, default=False, help="log to Weights & Biases as well")
    flag("--wandb-project-name", default="deep-rl", help="project on Weights & Biases")
    flag("--wandb-entity", help="entity (team) on Weights & Biases")

    flag = parser.add_argument_group("algorithm").add_argument
    flag("--n-training-episodes", type=number(int, 1), default=10_000, help="episodes to train for")
    flag("--max-steps", type=number(int, 1), default=99, help="time limit of an episode, in training and evaluation")
    flag("--learning-rate", type=number(float, 0, 1), default=0.7, help="how far a value moves towards its target")
    flag("--gamma", type=number(float, 0, 1), default=0.95, help="discount factor")
    flag("--max-epsilon", type=number(float, 0, 1), default=1.0, help="share of random actions at the start")
    flag("--min-epsilon", type=number(float, 0, 1), default=0.05, help="share of random actions in the long run")
    flag("--decay-rate", type=number(float, 0), default=0.0005, help="exponential decay of epsilon, per episode")

    flag = parser.add_argument_group("evaluation and the Hugging Face Hub").add_argument
    flag("--n-eval-episodes", type=number(int, 1), default=100, help="episodes that the score is measured over")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")
    flag("--render", **switch, default=False, help="with --evaluate: play in a window")

    saved, done = {}, 0
    if known.resume:
        checkpoint = load_checkpoint(known.resume)
        saved, done = checkpoint["args"], checkpoint["episode"]
    elif known.evaluate and known.evaluate != "random":
        saved = saved_flags(known.evaluate)
    else:
        if known.env_id.startswith("FrozenLake"):  # what the ids mean here; Gymnasium's own FrozenLake-v1 slips
            is_8x8 = known.env_id == "FrozenLake8x8-v1"
            known.map_name = known.map_name or ("8x8" if is_8x8 else "4x4")
            known.is_slippery = is_8x8 if known.is_slippery is None else known.is_slippery
        row = TUNED.get(env_name(known.env_id, known.map_name, known.is_slippery), {}) if known.tuned else {}
        saved = {"map_name": known.map_name, "is_slippery": known.is_slippery, "tuned": bool(row), **row}
    parser.set_defaults(**saved)  # all of them, None as well
    # Saved flags go through the parser like those of the command line, which checks their names and values.
    for name in saved.keys() & set(NOT_SAVED):
        fail(f"{known.resume or known.evaluate}: {name} is not among the flags that a run saves")
    saved = [f"--{name.replace('_', '-')}={value}" for name, value in saved.items() if value is not None]
    parser.error = lambda message: fail(f"{known.resume or known.evaluate}: {message}")
    before = parser.parse_args(saved)
    parser.error = fail
    args = parser.parse_args(saved + argv)
    args.tuned = parser.get_default("tuned")  # whether there was a row
    if args.env_id != known.env_id:
        check_env_id(args.env_id, known.resume or known.evaluate)

    if args.resume and args.n_training_episodes < done:
        fail(f"--n-training-episodes {args.n_training_episodes}: this run has done {done} already")
    if known.resume:
        changeable = {"n_training_episodes", "repo_id", "track", "wandb_project_name", "wandb_entity"}
        for name, value in vars(before).items():
            if getattr(args, name) != value and name not in changeable.union(NOT_SAVED):
                fail(f"--{name.replace('_', '-')} cannot change on --resume: the run was started with {value}")
    if args.render and not args.evaluate:
        fail("--render goes with --evaluate")
    if args.push and not args.repo_id:
        fail("--push needs --repo-id user/name, the repository to push to")
    if args.repo_id:
        check_repo_id(args.repo_id)
    if (args.map_name or args.is_slippery is not None) and not args.env_id.startswith("FrozenLake"):
        fail(f"--map-name and --is-slippery belong to FrozenLake, not to {args.env_id}")
    if args.min_epsilon > args.max_epsilon:
        fail(f"--min-epsilon {args.min_epsilon} is above --max-epsilon {args.max_epsilon}")
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            fail("--track needs Weights & Biases: pip install wandb, or drop --track")
    return args


def boolean(text):
    """argparse type: True or False."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def number(kind, low, high=math.inf):
    """argparse type: a finite number of this kind (int or float), from low to high."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"between {low} and {high}" if high < math.inf else f"a finite number from {low} up"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message: "invalid int value"
    return parse


# ---------------------------------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------------------------------

# Names that leaderboards and model cards know, and the version that Gymnasium has of them now. The defaults did not
# change: v3 of LunarLander widened the observation bounds and fixed resets, v4 of Taxi changed its rainy and fickle
# modes only.
RETIRED = {"LunarLander-v2": "LunarLander-v3", "Taxi-v3": "Taxi-v4"}


def full_id(env_id):
    """An environment's id with its version, where it was left out: Taxi is Taxi-v3, FrozenLake is FrozenLake-v1."""
    for retired in RETIRED:
        if env_id == retired.rpartition("-v")[0]:
            return retired
    namespace, _, name = env_id.rpartition("/")
    version = gym.envs.registration.find_highest_version(namespace or None, name)
    return env_id if version is None else f"{env_id}-v{version}"


def make_env(env_id, map_name=None, is_slippery=None, max_steps=None, render_mode=None):
    """Make one environment; retired names get the current version under their old name.

    map_name, is_slippery: of FrozenLake; max_steps: time limit instead of the environment's own. Exits with one line
    where Gymnasium does not know the name, or the spaces are not what this script can learn.
    """
    if render_mode == "human" and not has_display():
        fail("--render opens a window, and there is no display here")
    if render_mode == "rgb_array" and not has_display():
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # frames need no display, but SDL complains where it finds none
    options = {"map_name": map_name, "is_slippery": is_slippery}
    if env_id == "FrozenLake-v1":
        options = {"map_name": map_name or "4x4", "is_slippery": bool(is_slippery)}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        spec = gym.registry.get(env_id)
        if spec is None and env_id in RETIRED:
            spec = dataclasses.replace(gym.spec(RETIRED[env_id]), id=env_id)
        env = gym.make(
            spec or env_id, max_episode_steps=max_steps, render_mode=render_mode, disable_env_checker=True, **options
        )
    except (gym.error.Error, ImportError, AssertionError, KeyError, TypeError) as error:  # as options may be a file's
        fail(f"--env-id {env_id}: {error}")
    for kind, space in (("actions", env.action_space), ("observations", env.observation_space)):
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            fail(f"--env-id {env_id}: a table needs discrete {kind}, and its are {space}")
    return env


def env_name(env_id, map_name=None, is_slippery=None):
    """What the course's leaderboard calls an environment, such as FrozenLake-v1-4x4-no_slippery."""
    if env_id == "FrozenLake-v1":
        map_name, is_slippery = map_name or "4x4", bool(is_slippery)
    elif env_id == "FrozenLake8x8-v1":
        map_name = map_name or "8x8"
    return env_id + (f"-{map_name}" if map_name else "") + ("-no_slippery" if is_slippery is False else "")


# ---------------------------------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------------------------------


def initialize_q_table(state_space, action_space):
    """A table of zeros, (state_space, action_space): nothing is known yet."""
    return np.zeros((state_space, action_space))


def greedy_policy(qtable, state):
    """The action with the highest value in this state; of several, the first. This is the policy that is scored."""
    return int(np.argmax(qtable[state]))


def epsilon_greedy_policy(qtable, state, epsilon, rng):
    """With probability epsilon a random action, else a best one; of several best ones, any. This one trains.

    qtable: a list of rows, each a list: for a handful of numbers, lists are faster than arrays. rng: random.Random.
    """
    row = qtable[state]
    if rng.random() < epsilon:
        return int(rng.random() * len(row))
    best = max(row)
    if row.count(best) == 1:
        return row.index(best)
    # A table of zeros is all ties. Were the first action always to win them, the agent would walk into the left wall of
    # FrozenLake until epsilon finds the goal for it, which on the 8x8 map may be never.
    return rng.choice([action for action, value in enumerate(row) if value == best])


def make_policy(agent):
    """The agent as a function `observation -> action`, for evaluation and video."""
    return lambda state: greedy_policy(agent["qtable"], state)


def show_policy(agent, env):
    """The greedy policy of a grid world as text: an arrow for each cell, or "." where nothing was learned.

    None for other environments.
    """
    grid = grid_world(env)
    if grid is None:
        return None
    (rows, columns), arrows, marks = grid
    best = [arrows[int(row.argmax())] if np.ptp(row) else "." for row in agent["qtable"]]
    cells = [marks.get(state, best[state]) for state in range(rows * columns)]
    return "\n".join(" ".join(cells[row * columns : (row + 1) * columns]) for row in range(rows))


def draw_q_table(agent, env, cell=128):
    """The Q-table of a grid world as an image: a triangle for each action, the brighter the higher its value.

    A white arrow is the greedy action. cell: side of a cell in pixels. None for other environments.
    """
    grid = grid_world(env)
    if grid is None:
        return None
    (rows, columns), arrows, marks = grid
    qtable = agent["qtable"]
    low, high = qtable.min(), max(qtable.max(), qtable.min() + 1e-9)
    image = Image.new("RGB", (columns * cell, rows * cell))
    draw = ImageDraw.Draw(image)
    for state in range(rows * columns):
        left, top = state % columns * cell, state // columns * cell
        corners = np.array([(left, top), (left + cell, top), (left + cell, top + cell), (left, top + cell)])
        centre = corners.mean(axis=0)
        if state in marks:
            draw.rectangle([tuple(corners[0]), tuple(corners[2])], fill=(90, 90, 110), outline=(60, 60, 60))
            draw.text(tuple(centre), marks[state], fill="white", anchor="mm", font_size=cell // 3)
            continue
        for value, arrow in zip(qtable[state], arrows):
            side = "↑→↓←".index(arrow)
            edge = corners[side], corners[(side + 1) % 4]
            share = (value - low) / (high - low)
            colour = (int(20 + 60 * share), int(30 + 190 * share), int(70 + 60 * share))
            draw.polygon([*map(tuple, edge), tuple(centre)], fill=colour, outline=(60, 60, 60))
            middle = 0.31 * edge[0] + 0.31 * edge[1] + 0.38 * centre
            draw.text(tuple(middle), f"{value:.2f}", fill="white", anchor="mm")
        if np.ptp(qtable[state]):
            side = "↑→↓←".index(arrows[greedy_policy(qtable, state)])
            forward = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)][side]) * cell / 8
            across = forward[::-1] * 0.7
            arrowhead = centre + forward, centre - forward + across, centre - forward - across
            draw.polygon([*map(tuple, arrowhead)], fill="white")
    return image


def grid_world(env):
    """What it takes to draw a grid world: ((rows, columns), the arrow of each action, {state: letter of its cell}).

    The letters are those of the cells that end or fail an episode. None for other environments.
    """
    if env.spec.name.startswith("FrozenLake"):
        letters = [letter.decode() for letter in env.unwrapped.desc.ravel()]
        marks = {state: letter for state, letter in enumerate(letters) if letter in "HG"}
        return env.unwrapped.desc.shape, "←↓→↑", marks
    if env.spec.name.startswith("CliffWalking"):
        return (4, 12), "↑→↓←", {**dict.fromkeys(range(37, 47), "C"), 47: "G"}
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The math
# ---------------------------------------------------------------------------------------------------------------------


def epsilon_at(episode, max_epsilon, min_epsilon, decay_rate):
    """Epsilon falls from max_epsilon towards min_epsilon: min + (max - min) * exp(-decay_rate * episode)."""
    return min_epsilon + (max_epsilon - min_epsilon) * math.exp(-decay_rate * episode)


def q_learning_update(qtable, state, action, reward, next_state, terminated, learning_rate, gamma):
    """The Bellman update of one step, in place (Sutton and Barto, 2018, equation 6.8).

    After a terminal state nothing follows, so its target is the reward alone. A time limit is not an end: the target
    of a truncated step bootstraps like any other.
    """
    row = qtable[state]
    target = reward if terminated else reward + gamma * max(qtable[next_state])
    row[action] += learning_rate * (target - row[action])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, run_folder):
    """Learn a Q-table and return it in the course's model dict; with --resume, go on from the checkpoint in run_folder.

    Writes TensorBoard events and checkpoint.pt into run_folder.
    """
    rng = random.Random(args.seed)  # of exploration and ties; the environment has its own
    env = make_env(args.env_id, args.map_name, args.is_slippery, args.max_steps)
    qtable = initialize_q_table(int(env.observation_space.n), int(env.action_space.n)).tolist()
    first_episode = global_step = 0
    env_seed = args.seed
    returns, lengths = [], []  # of the episodes since the last point of the curves
    recent_returns = deque(maxlen=100)
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        qtable = checkpoint["qtable"].tolist()
        version, state, gauss_next = checkpoint["rng"]
        rng.setstate((version, tuple(state), gauss_next))
        first_episode, global_step = checkpoint["episode"], checkpoint["global_step"]
        returns, lengths = checkpoint["returns"], checkpoint["lengths"]
        recent_returns.extend(checkpoint["recent_returns"])
        if first_episode == args.n_training_episodes:
            msg.info(f"Nothing is left to train: all {first_episode:,} episodes are done")
        env_seed = rng.randrange(2**31)  # not the first episodes again

    def save_checkpoint(episode):
        state = {
            "script": SCRIPT,
            "args": hyperparameters_of(args),
            "episode": episode,
            "global_step": global_step,
            "qtable": torch.tensor(qtable, dtype=torch.float64),
            "rng": rng.getstate(),
            "returns": returns,
            "lengths": lengths,
            "recent_returns": list(recent_returns),
        }
        save_tensors(state, run_folder / "checkpoint.tmp")
        os.replace(run_folder / "checkpoint.tmp", run_folder / "checkpoint.pt")  # atomic: never half a checkpoint

    if args.track:
        start_wandb(args, run_folder)
    save_checkpoint(first_episode)
    last_checkpoint = time.monotonic()
    first_step = global_step
    learning_rate, gamma = args.learning_rate, args.gamma
    env.reset(seed=env_seed)
    with (
        contextlib.closing(env),
        SummaryWriter(run_folder, purge_step=global_step + 1 if args.resume else None) as writer,
        Progress(args.n_training_episodes, first_episode, "episode") as progress,
    ):
        writer.add_text("hyperparameters", markdown_table(hyperparameters_of(args)))
        for episode in range(first_episode, args.n_training_episodes):
            epsilon = epsilon_at(episode, args.max_epsilon, args.min_epsilon, args.decay_rate)
            state, _ = env.reset()
            episode_return, episode_length, done = 0.0, 0, False
            while not done:
                action = epsilon_greedy_policy(qtable, state, epsilon, rng)
                next_state, reward, terminated, truncated, _ = env.step(action)
                q_learning_update(qtable, state, action, reward, next_state, terminated, learning_rate, gamma)
                state = next_state
                episode_return += reward
                episode_length += 1
                done = terminated or truncated
            global_step += episode_length
            returns.append(float(episode_return))
            lengths.append(episode_length)
            recent_returns.append(float(episode_return))

            is_last = episode + 1 == args.n_training_episodes
            if (episode + 1) % LOG_EPISODES == 0 or is_last:
                steps_per_second = (global_step - first_step) / (time.monotonic() - progress.started)
                writer.add_scalar("charts/episodic_return", np.mean(returns), global_step)
                writer.add_scalar("charts/episodic_length", np.mean(lengths), global_step)
                writer.add_scalar("charts/epsilon", epsilon, global_step)
                writer.add_scalar("charts/SPS", steps_per_second, global_step)
                progress.update(episode + 1, recent_returns)
                returns, lengths = [], []
            if is_last or asked_to_stop or time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS:
                save_checkpoint(episode + 1)
                last_checkpoint = time.monotonic()
                stop_if_asked()

    # The course's model file, key by key.
    agent = {
        "env_id": args.env_id,
        "max_steps": args.max_steps,
        "n_training_episodes": args.n_training_episodes,
        "n_eval_episodes": args.n_eval_episodes,
        "eval_seed": evaluation_seeds(args),
        "learning_rate": args.learning_rate,
        "gamma": args.gamma,
        "max_epsilon": args.max_epsilon,
        "min_epsilon": args.min_epsilon,
        "decay_rate": args.decay_rate,
        "qtable": np.array(qtable),
    }
    if env.spec.kwargs.get("map_name"):
        agent["map_name"] = env.spec.kwargs["map_name"]
        if env.spec.kwargs.get("is_slippery") is False:
            agent["slippery"] = False
    return agent


class Progress:
    """A bar in a terminal or a notebook; where the output goes elsewhere, a plain line every ten seconds."""

    def __init__(self, total, start, unit="step"):
        in_view = sys.stderr.isatty() or in_notebook()
        self.bar = tqdm(total=total, initial=start, unit=unit, unit_scale=True, dynamic_ncols=True, disable=not in_view)
        self.total, self.start, self.unit = total, start, unit
        self.started = self.last_line = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def rate(self, now):
        """Steps per second in this process."""
        return int((now - self.start) / (time.monotonic() - self.started))

    def update(self, now, recent_returns):
        """Show that training has come to step `now`, and the mean of the recent returns."""
        mean_return = f"{np.mean(recent_returns):.2f}" if recent_returns else "none yet"
        self.bar.set_postfix_str(f"return {mean_return}", refresh=False)
        self.bar.update(now - self.bar.n)
        if self.bar.disable and (time.monotonic() - self.last_line > 10 or now >= self.total):
            self.last_line = time.monotonic()
            rate = self.rate(now)
            left = f", {tqdm.format_interval((self.total - now) / rate)} left" if rate and now < self.total else ""
            print(
                f"{now:,} of {self.total:,} {self.unit}s, return {mean_return}, {rate:,} {self.unit}s/s{left}",
                flush=True,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and replay
# ---------------------------------------------------------------------------------------------------------------------


def evaluate_agent(env, policy, n_eval_episodes, seeds):
    """Play n_eval_episodes episodes, one per seed; returns the mean and the standard deviation of their returns.

    policy: a function observation -> action. Returns are undiscounted sums of the environment's own rewards.
    """
    episode_returns = []
    for seed, _ in zip(seeds, range(n_eval_episodes), strict=True):
        observation, _ = env.reset(seed=seed)
        episode_return, done = 0.0, False
        while not done:
            stop_if_asked()
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            episode_return += float(reward)
            done = terminated or truncated
        episode_returns.append(episode_return)
    return float(np.mean(episode_returns)), float(np.std(episode_returns))


def record_video(env, policy, path, fps=None, seed=None):
    """Film one whole episode as H.264 that plays in every browser, by default at the environment's own frame rate.

    env: made with render_mode="rgb_array"; where a step is several frames, its `render` returns a list of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fps = fps or env.metadata["render_fps"]
    # yuv420p wants even sides: imageio's own way there is to rescale, so the last odd row or column is cut here.
    # faststart puts the index first, so that the video plays while it loads.
    options = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
    with imageio.get_writer(path, fps=fps, ffmpeg_log_level="quiet", **options) as video:
        observation, _ = env.reset(seed=seed)
        done = False
        while True:
            stop_if_asked()
            rendered = env.render()
            for frame in rendered if isinstance(rendered, list) else [rendered]:
                video.append_data(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
            if done:
                break
            observation, _, terminated, truncated, _ = env.step(policy(observation))
            done = terminated or truncated
    try:  # imageio does not hear of it when ffmpeg fails at the end, where the disk is full
        imageio.get_reader(path).close()
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{path} was not written to its end, is the disk full?") from error


def random_policy(env, seed):
    """The baseline that every agent should beat: actions drawn uniformly."""
    env.action_space.seed(seed)
    return lambda observation: env.action_space.sample()


def evaluate(env, policy, args, seeds, video_fps=None, metrics=dict):
    """--evaluate: play and film without training. Returns the mean and the standard deviation of the returns.

    metrics: a function that returns {name: value} of what else is to be said about the episodes just played.
    """
    msg.info(f"Playing {args.n_eval_episodes} episodes of {args.env_id} with {args.evaluate}")
    mean_reward, std_reward = evaluate_agent(env, policy, args.n_eval_episodes, seeds)
    print_score(mean_reward, std_reward, args.n_eval_episodes, metrics())
    if not args.render:
        replay = new_run_folder(args) / "replay.mp4"
        record_video(env, policy, replay, video_fps, seed=seeds[0])
        msg.good(f"Replay: {replay}")
        show_video(replay)
    return mean_reward, std_reward


def print_score(mean_reward, std_reward, n_eval_episodes, metrics):
    """The score, what the course's leaderboard makes of it, and {name: value} of further metrics."""
    score = f"mean_reward {mean_reward:.2f} +/- {std_reward:.2f}"
    more = "".join(f", {name} {value:.2f}" for name, value in metrics.items())
    msg.good(f"{score} over {n_eval_episodes} episodes (result {mean_reward - std_reward:.2f}){more}")


def show_video(path):
    """Show the video inline where there is a notebook to show it in."""
    if in_notebook():
        from IPython.display import Video, display

        display(Video(path, embed=True))


def evaluation_seeds(args):
    """The seeds of the evaluation episodes: a block for each --seed; for Taxi-v3 the course's hundred come first."""
    first = (args.seed + 1) * EVAL_SEED
    seeds = [*(TAXI_EVAL_SEED if args.env_id == "Taxi-v3" else []), *range(first, first + args.n_eval_episodes)]
    return seeds[: args.n_eval_episodes]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder, the package and the Hub
# ---------------------------------------------------------------------------------------------------------------------


def new_run_folder(args):
    """Make runs/{env_id}__{exp_name}__{seed}__{time} and return its path."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
    run_folder = Path("runs") / re.sub(r"[^\w.-]", "-", name)
    run_folder.mkdir(parents=True)
    return run_folder


def hyperparameters_of(args):
    """The flags that say how an agent is trained and scored, as a dict for JSON."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def markdown_table(values):
    """A dict as a Markdown table."""
    return "| name | value |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in values.items())


def script_source():
    """The text of this script: a file's, or a notebook cell's, which Python keeps as well."""
    return "".join(linecache.getlines(main.__code__.co_filename))


def load_checkpoint(run_folder):
    """The last checkpoint of a run, as a dict."""
    path = Path(run_folder) / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume {run_folder}: there is no checkpoint.pt in that folder")
    checkpoint = load_tensors(path, f"--resume {run_folder}")
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != SCRIPT:
        fail(f"--resume {run_folder}: that checkpoint is not one of {SCRIPT}")
    return checkpoint


def load_tensors(path, source):
    """Load a file of torch.save without running anything in it; source: what a message calls the place it is from."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles; the line below says what there is to say
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anybody may have made this file, so anything may be wrong with it
        refused = re.search(r"GLOBAL (\S+)", str(error))
        why = "it is damaged, or a pickle of something else"
        if refused:
            why = f"it is a whole pickled object, not a state_dict: it names {refused[1]}, which could run any code"
        fail(f"{source}: {path.name} was not loaded: {why}")


def save_tensors(values, path):
    """torch.save, but a full disk is an OSError as everywhere else."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getvalue())


# What a pickle of a Q-table may name, and the numbers that its arrays may hold.
PICKLED_NAMES = (
    "_codecs encode",  # bytes, in pickle protocol 2
    "numpy dtype",
    "numpy ndarray",
    "numpy._core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy._core.numeric _frombuffer",  # pickle protocol 5
)
PICKLED_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
PICKLED_SIZE, PICKLED_OPCODES = 2**26, 500_000  # a limit to the memory that reading takes


class Kept:
    """What a pickle wants called, kept instead: the function's name, the arguments, the state to set afterwards."""

    def __init__(self, name, arguments=None):
        self.name, self.arguments, self.state = name, arguments, None


def read_pickle(content):
    """What a pickle of plain values and arrays holds, with each array as a Kept; nothing is imported or called.

    A pickle is a program for a small machine with a stack. Python's own has instructions that run any code, and can be
    made to crash or to take all memory, so this one knows but what plain values need (pickletools explains each).
    """
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items, stack[start:] = stack[start:], []
        return items

    for opcode, argument, _ in itertools.islice(pickletools.genops(content), PICKLED_OPCODES):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND" | "APPENDS":
                items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, str) for key in items[::2]):  # the hash of a deep tuple overflows C's stack
                    raise pickle.UnpicklingError("the keys of a dict are not all text")
                stack[-1].update(zip(items[::2], items[1::2]))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument or " ".join([stack.pop(-2), stack.pop()])
                name = name.replace("numpy.core.", "numpy._core.")  # NumPy 1's name of it
                if name not in PICKLED_NAMES:
                    raise pickle.UnpicklingError(f"it asks for {name.replace(' ', '.')[:80]!r}")
                stack.append(Kept(name.split()[1]))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(Kept(stack.pop().name, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case _:
                raise pickle.UnpicklingError(f"plain values do not need {opcode.name}")
    raise pickle.UnpicklingError(f"it takes more than {PICKLED_OPCODES:,} steps")


def kept_array(kept, dimensions):
    """The array of numbers that a Kept describes, with this many dimensions."""
    match kept:
        case Kept(name="_reconstruct", state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran is True or fortran == 1 else "C"
        case Kept(name="_frombuffer", arguments=(data, dtype, shape, "C" | "F" as order)):
            pass
        case Kept(name="scalar", arguments=(dtype, data)):
            shape, order = (), "C"
        case _:
            raise pickle.UnpicklingError("what should be an array is none")
    match dtype:
        case Kept(name="dtype", arguments=(kind, *_), state=(_, "<" | ">" | "|" | "=" as byte_order, *_)):
            if kind not in PICKLED_KINDS:
                raise pickle.UnpicklingError("an array holds something else than numbers")
        case _:
            raise pickle.UnpicklingError("an array has no dtype")
    is_text = isinstance(data, Kept) and data.name == "encode" and data.arguments[1] == "latin1"
    data = data.arguments[0] if is_text else data
    if not isinstance(data, str if is_text else (bytes, bytearray)) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("an array has no bytes or no shape")
    if len(shape) != dimensions or not all(type(side) is int and side >= 0 for side in shape):
        raise pickle.UnpicklingError(f"an array does not have {dimensions} dimensions")
    if math.prod(shape) * int(kind[1]) != len(data):
        raise pickle.UnpicklingError("an array's shape does not fit its bytes")
    data = data.encode("latin1") if is_text else data
    array = np.frombuffer(data, byte_order + kind).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="))  # a copy, which can be written to


def read_q_table(path):
    """The course's model dict in a q-learning.pkl. Raises UnpicklingError for anything else; nothing in it runs."""
    try:
        with open(path, "rb") as file:
            content = file.read(PICKLED_SIZE + 1)
        if len(content) > PICKLED_SIZE:
            raise pickle.UnpicklingError(f"it is larger than {PICKLED_SIZE >> 20} MiB")
        model = read_pickle(content)
        if not isinstance(model, dict) or not isinstance(model.get("qtable"), Kept):
            raise pickle.UnpicklingError("it is no dict with an array 'qtable'")
        qtable = kept_array(model.pop("qtable"), dimensions=2)
        numbers = {name: kept_array(value, 0).item() for name, value in model.items() if isinstance(value, Kept)}
    except Exception as error:  # anybody may have made this file, so anything may be wrong with it
        raise pickle.UnpicklingError(f"{path.name} was not loaded as a Q-table: {error!s:.150}") from error
    return {**model, **numbers, "qtable": qtable}


def load_q_table(path, source):
    """Load the course's model dict from a q-learning.pkl without running anything in it.

    source: what a message calls the place it is from.
    """
    try:
        return read_q_table(path)
    except pickle.UnpicklingError as error:
        fail(f"{source}: {error}")


@contextlib.contextmanager
def resumable(run_folder):
    """Make Ctrl-C, SIGTERM and a full disk end the run with one line that says how to go on."""

    def on_signal(signum, frame):
        asked_to_stop.append(signum)  # no more than that: an exception could break into a library that holds a lock
        if len(asked_to_stop) > 1:  # nobody presses Ctrl-C twice without meaning it
            raise KeyboardInterrupt(signum)

    def go_on():
        has_begun = (run_folder / "checkpoint.pt").exists()
        return f"go on with: {command('--resume', run_folder)}" if has_begun else "training had not begun"

    asked_to_stop.clear()
    # TensorBoard's writer thread prints a full disk's traceback, and then raises the same error in this thread.
    threading.excepthook = lambda hook: isinstance(hook.exc_value, OSError) or threading.__excepthook__(hook)
    try:
        with handling_signals(on_signal):
            yield
    except KeyboardInterrupt as stop:
        fail(f"Stopped; {go_on()}", code=exit_code(stop))
    except OSError as error:
        fail(f"{first_sentence(error)}; {go_on()}", code=1)
    finally:
        threading.excepthook = threading.__excepthook__


@contextlib.contextmanager
def handling_signals(handler):
    """Let handler(signum, frame) answer Ctrl-C and SIGTERM for a while."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def stop_if_asked():
    """Raise the KeyboardInterrupt that `resumable` has kept for a moment when nothing is half done."""
    if asked_to_stop:
        raise KeyboardInterrupt(asked_to_stop[0])


def raise_interrupt(signum, frame):
    """A signal handler for where waiting is all that goes on, as in an upload."""
    raise KeyboardInterrupt(signum)


def exit_code(stop):
    """The exit code that a shell expects after a signal; stop: the KeyboardInterrupt that it became."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def start_wandb(args, run_folder):
    """Send to Weights & Biases whatever goes to TensorBoard."""
    import wandb

    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        name=run_folder.name,
        config=hyperparameters_of(args),
        sync_tensorboard=True,
        save_code=True,
    )


def save_agent(agent, path):
    """Save the course's model dict as a pickle and, for a grid world, a picture of its Q-table beside it."""
    with open(path, "wb") as file:
        pickle.dump(agent, file)
    env = make_env(agent["env_id"], agent.get("map_name"), agent.get("slippery"))
    picture = draw_q_table(agent, env)
    if picture is not None:
        picture.save(path.with_name("q-table.png"))


def package_to_hub(
    agent,
    policy,
    env,
    env_name,
    hyperparameters,
    seeds,
    run_folder,
    repo_id=None,
    video_fps=None,
    commit_message=f"{ALGORITHM} agent",
    token=None,
    logs=None,
    metrics=dict,
):
    """Evaluate, film and describe the agent in run_folder/hub, and push that to repo_id if there is one.

    policy: observation -> action, what is scored; env: made with render_mode="rgb_array"; env_name: what the card
    calls it; hyperparameters: a dict for JSON, with env_id and n_eval_episodes; seeds: one per evaluation episode;
    logs: folder of TensorBoard events; metrics: a function that returns {name: value} of what else is to be said about
    the evaluation episodes. The package is built beside its final place and moved there whole. Returns its path.
    """
    partial, package = run_folder / "hub.partial", run_folder / "hub"
    hyperparameters = {name: value for name, value in hyperparameters.items() if name != "repo_id"}  # --push may choose
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    n_eval_episodes = hyperparameters["n_eval_episodes"]
    msg.info(f"Playing {n_eval_episodes} evaluation episodes")
    mean_reward, std_reward = evaluate_agent(env, policy, n_eval_episodes, seeds)
    metrics = metrics()
    print_score(mean_reward, std_reward, n_eval_episodes, metrics)
    results = {
        "env_id": hyperparameters["env_id"],
        "env_name": env_name,
        "mean_reward": mean_reward,
        "std_reward": std_reward,
        "metrics": metrics,
        "n_eval_episodes": n_eval_episodes,
        "deterministic_eval": hyperparameters.get("deterministic_eval", True),
        "eval_datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (partial / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (partial / "hyperparameters.json").write_text(json.dumps(hyperparameters, indent=2) + "\n")
    save_agent(agent, partial / MODEL_FILE)
    shutil.copy(run_folder / SCRIPT, partial)
    record_video(env, policy, partial / "replay.mp4", video_fps, seed=seeds[0])
    if logs:
        (partial / "logs").mkdir()
        for events in Path(logs).glob("events.out.tfevents*"):
            shutil.copy(events, partial / "logs")
    write_model_card(partial, repo_id)

    shutil.rmtree(package, ignore_errors=True)
    partial.rename(package)
    msg.good(f"Package: {package}")
    show_video(package / "replay.mp4")
    if repo_id:
        push_to_hub(package, repo_id, commit_message, token)
    return package


def read_package(package):
    """The results.json and the hyperparameters.json of a package, as dicts; exits where they are not ours."""
    try:
        results = json.loads((package / "results.json").read_text())
        hyperparameters = json.loads((package / "hyperparameters.json").read_text())
        measured = [results["mean_reward"], results["std_reward"], *results.get("metrics", {}).values()]
        ours = {"env_name", "n_eval_episodes", "deterministic_eval"} <= results.keys()
        ours = ours and all(isinstance(value, int | float) for value in measured)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        ours = False
    if not ours or not isinstance(hyperparameters, dict):
        fail(f"{package} is not a package of {SCRIPT}: its results.json and hyperparameters.json are not those of one")
    return results, hyperparameters


def write_model_card(package, repo_id):
    """Write the package's README.md from its results.json and hyperparameters.json.

    The metadata is what the course's leaderboard reads: the tags, and mean_reward as "mean +/- std".
    """
    results, hyperparameters = read_package(package)
    env_name, mean_reward, std_reward = results["env_name"], results["mean_reward"], results["std_reward"]
    repo_id = repo_id or "user/name"  # --push fills it in
    module = SCRIPT.removesuffix(".py")
    seeds = "the course's seeds" if results["env_id"] == "Taxi-v3" else "seeds that training never used"
    more = results.get("metrics", {})
    metrics = {"mean_reward": f"{mean_reward:.2f} +/- {std_reward:.2f}", **more}
    more_text = "".join(f", {name} **{value:.2f}**" for name, value in more.items())
    metadata = ModelCardData(
        model_name=ALGORITHM,
        tags=[env_name, *CARD_TAGS],
        pipeline_tag="reinforcement-learning",
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=env_name,
                dataset_name=env_name,
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )
    text = f"""\
# {ALGORITHM} agent playing {env_name}

mean_reward **{metrics["mean_reward"]}**{more_text} over {results["n_eval_episodes"]} episodes with
the best action by the table, on {seeds}. Trained by [{SCRIPT}]({SCRIPT}), which is all it takes to run it;
the packages that it needs stand at its top, and `uv run {SCRIPT}` installs them by itself.

## Use it

```bash
hf download {repo_id} {SCRIPT} --local-dir .
python {SCRIPT} --evaluate {repo_id}
```

The same in Python:

```python
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download

sys.path.insert(0, str(Path(hf_hub_download("{repo_id}", "{SCRIPT}")).parent))
import {module}

agent, env = {module}.load_agent("{repo_id}")
policy = {module}.make_policy(agent)
mean_reward, std_reward = {module}.evaluate_agent(env, policy, n_eval_episodes=10, seeds=range(10))
print(f"{{mean_reward:.2f}} +/- {{std_reward:.2f}}")
```

## Hyperparameters

{markdown_table(hyperparameters)}
"""
    (package / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def check_repo_id(repo_id):
    """Exit with one line unless repo_id has the form user/name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        fail(f"{repo_id!r} is not a repo id: {first_sentence(error)}")
    if "/" not in repo_id:
        fail(f"{repo_id!r} is not a repo id: it takes the form user/name")


def check_hub_access(repo_id, token=None):
    """Before training: exit with one line unless this user may write to repo_id, which is created if need be."""
    try:
        api = HfApi(token=token)
        api.whoami()
        api.create_repo(repo_id, exist_ok=True)
        api.auth_check(repo_id, write=True)  # create_repo is content with a repository that belongs to somebody else
    except (HTTPError, OSError) as error:
        fail(f"{hub_problem(error, repo_id)} (without --repo-id the package is made on disk all the same)")


def push_to_hub(package, repo_id, commit_message=f"{ALGORITHM} agent", token=None):
    """Upload a package; logs of an earlier push are replaced. Exits with the command to try again if it fails."""
    msg.info(f"Uploading {package} to {repo_id}")
    write_model_card(package, repo_id)
    go_on = f"The package is complete in {package}; push it with: {command('--push', package, '--repo-id', repo_id)}"
    try:
        with handling_signals(raise_interrupt):
            api = HfApi(token=token)
            url = api.create_repo(repo_id, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=package, commit_message=commit_message, delete_patterns="logs/*"
            )
    except KeyboardInterrupt as stop:
        fail(f"Stopped. {go_on}", code=exit_code(stop))
    except (HTTPError, OSError, RuntimeError) as error:
        fail(f"{hub_problem(error, repo_id)}. {go_on}", code=1)
    msg.good(f"Pushed: {url}")


def hub_problem(error, repo_id):
    """What went wrong with the Hub and what to do, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return f"not logged in to the Hugging Face Hub: run {login_command()}"
    if status == 401:
        return f"the Hugging Face Hub does not accept your token: run {login_command()}"
    if status == 403:
        return f"your token may not write to {repo_id}: use one with write access to it ({login_command()})"
    if status == 404:
        return f"there is no {repo_id} on the Hugging Face Hub, or you may not see it: check the name"
    if status is not None:
        return f"the Hugging Face Hub answered {status} for {repo_id}: try again later"
    return f"the Hugging Face Hub cannot be reached ({first_sentence(error)}): check the network"


def login_command():
    """How to log in to the Hub from here."""
    return "notebook_login() from huggingface_hub" if in_notebook() else "`hf auth login`"


def find_package(source):
    """The folder of a package: a run folder's hub/, that folder itself, or a download of a Hub repo id."""
    for package in (Path(source) / "hub", Path(source)):
        if (package / "results.json").is_file():
            files = os.listdir(package)
            break
    else:
        if Path(source).exists():
            fail(f"{source} holds no package: no hub/results.json there; an unfinished run goes on with --resume")
        if "/" not in str(source):
            fail(f"{source!r} is neither a folder here nor a repo id (user/name) on the Hub")
        check_repo_id(source)
        try:
            package = Path(snapshot_download(source, allow_patterns=["*.json", MODEL_FILE]))
            files = os.listdir(package) if (package / MODEL_FILE).is_file() else HfApi().list_repo_files(source)
        except (HTTPError, OSError) as error:
            fail(f"{source} is no folder here, and {hub_problem(error, source)}")
    if MODEL_FILE in files:
        return package
    for name in files:
        if name.endswith(".zip"):
            fail(f"{source} holds {name}, a Stable-Baselines3 model: its own library loads that, {SCRIPT} does not")
    fail(f"{source}: there is no {MODEL_FILE}")


def load_hyperparameters(source):
    """The flags of a package, as a dict; of one that another program made, at least its environment."""
    package = find_package(source)
    for name in ("hyperparameters.json", "results.json"):
        if (package / name).is_file():
            try:
                values = json.loads((package / name).read_text())
            except (ValueError, RecursionError) as error:
                fail(f"{source}: {name} is not JSON: {error}")
            if not isinstance(values, dict) or not isinstance(values.get("env_id"), str):
                fail(f"{source}: {name} names no env_id")
            return values if name == "hyperparameters.json" else {"env_id": values["env_id"]}
    fail(f"{source}: neither hyperparameters.json nor results.json there")


def check_env_id(env_id, source):
    """Exit with one line if the environment that a file names is in a module that gymnasium would import for it."""
    if ":" in env_id:
        fail(f"{source}: importing the environment {env_id} could run any code; if you trust it: --env-id {env_id}")


def saved_flags(source):
    """The flags that an agent was trained with, as a dict: of our packages, or what the course's model dict says."""
    saved = load_hyperparameters(source)
    if "max_steps" in saved:
        return saved
    model = load_q_table(find_package(source) / MODEL_FILE, source)
    is_lake = saved["env_id"].startswith("FrozenLake")
    return {
        **saved,
        "max_steps": model.get("max_steps"),
        "map_name": model.get("map_name") if is_lake else None,
        "is_slippery": model.get("slippery", True) if is_lake else None,  # the course leaves it out where it is True
    }


def load_agent(source, env_id=None, render_mode=None, **options):
    """Load the agent of a run folder or a Hub repo id: returns it, as the course's model dict, and its environment.

    env_id, and map_name, is_slippery, max_steps in options: by default what it was trained on.
    """
    saved = saved_flags(source)
    if env_id is None:
        env_id = saved["env_id"]
        check_env_id(env_id, source)
    agent = load_q_table(find_package(source) / MODEL_FILE, source)
    options = {name: saved.get(name) for name in ("map_name", "is_slippery", "max_steps")} | options
    env = make_env(env_id, **options, render_mode=render_mode)
    needed = (int(env.observation_space.n), int(env.action_space.n))
    if agent["qtable"].shape != needed:
        fail(f"{source}: the Q-table has shape {agent['qtable'].shape}, {env_id} needs {needed}")
    return agent, env


def load_from_hub(repo_id, filename):
    """Download the course's model dict from the Hub and load it without running anything in it."""
    check_repo_id(repo_id)
    try:
        path = hf_hub_download(repo_id, filename)
    except RemoteEntryNotFoundError:
        fail(f"{repo_id} has no file {filename}")
    except (HTTPError, OSError) as error:
        fail(hub_problem(error, repo_id))
    return load_q_table(Path(path), repo_id)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def fail(message, code=2):
    """Print one line to stderr and exit: code 2 for a mistake in the call, 1 for a failure later."""
    line = "error: " + " ".join(str(message).split())
    print(color(line, fg="red") if sys.stderr.isatty() else line, file=sys.stderr)
    if in_notebook():  # there is no exit code, and SystemExit would show three lines more
        stop = RuntimeError(line)
        stop._render_traceback_ = list  # IPython shows what this returns: nothing
        raise stop
    sys.exit(code)


def command(*flags):
    """How to run this script with these flags from here."""
    if in_notebook():
        return f"main({[str(flag) for flag in flags]})"
    return " ".join(["python", SCRIPT, *map(str, flags)])


def first_sentence(error):
    """The beginning of an error's message, for use inside a line."""
    return re.split(r"[.:]?\s*\n|\. ", str(error).strip() or type(error).__name__)[0]


def has_display():
    """Whether a window can be opened."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def in_notebook():
    """Whether this runs in an IPython kernel (Jupyter, Colab)."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def main(argv=None):
    """Train, evaluate, or push, as the flags say. Returns the trained agent, the course's model dict."""
    args = parse_args(argv)
    seeds = evaluation_seeds(args)
    if args.push:
        if not Path(args.push).exists():
            fail(f"--push {args.push}: there is no such folder")
        package = find_package(args.push)
        read_package(package)  # so that a folder that is none is refused before the Hub hears of it
        check_hub_access(args.repo_id)
        return push_to_hub(package, args.repo_id)
    if args.evaluate == "random":
        render_mode = "human" if args.render else "rgb_array"
        env = make_env(args.env_id, args.map_name, args.is_slippery, args.max_steps, render_mode)
        return evaluate(env, random_policy(env, args.seed), args, seeds, VIDEO_FPS)
    if args.evaluate:
        options = {"map_name": args.map_name, "is_slippery": args.is_slippery, "max_steps": args.max_steps}
        agent, env = load_agent(args.evaluate, args.env_id, "human" if args.render else "rgb_array", **options)
        return evaluate(env, make_policy(agent), args, seeds, VIDEO_FPS)

    env = make_env(args.env_id, args.map_name, args.is_slippery, args.max_steps, "rgb_array")
    name = env_name(args.env_id, args.map_name, args.is_slippery)
    if args.repo_id:
        check_hub_access(args.repo_id)
    run_folder = Path(args.resume) if args.resume else new_run_folder(args)
    msg.info(f"{ALGORITHM} on {name}, into {run_folder}")
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in hyperparameters_of(args).items()), 120))
    if not args.tuned:
        msg.info(f"Without a row of TUNED for {name}: what no flag says has the plain default")
    (run_folder / SCRIPT).write_bytes(script_source().encode())  # now: the file may be edited while it trains
    with resumable(run_folder):
        agent = train(args, run_folder)
        package_to_hub(
            agent,
            make_policy(agent),
            env,
            name,
            hyperparameters_of(args),
            seeds,
            run_folder,
            repo_id=args.repo_id,
            video_fps=VIDEO_FPS,
            logs=run_folder,
        )
    policy = show_policy(agent, env)
    if policy:
        msg.info("What it learned:")
        print(policy)
    if not args.repo_id:
        msg.info("Push it to the Hub:")
        print(f"  {command('--push', run_folder, '--repo-id', 'user/name')}")  # wasabi would break the line
    msg.info("See it play again:")
    print(f"  {command('--evaluate', run_folder)}")
    return agent


if __name__ == "__main__":
    try:
        agent = main()
    except KeyboardInterrupt:
        fail("Stopped", code=128 + signal.SIGINT)
