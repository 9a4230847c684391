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
#     "torch>=2.6", "gymnasium[toy-text]>=1.2,<2", "numpy>=2,<3", "tensorboard>=2.18,<3", "huggingface_hub>=1.20,<3",
#     "imageio>=2.36,<3", "imageio-ffmpeg>=0.6,<1", "tqdm>=4.66,<5", "wasabi>=1.1,<2",
# ]
# ///

import argparse
import dataclasses
import io
import json
import linecache
import math
import os
import pickle
import pickletools
import random
import signal
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from wasabi import Printer

SCRIPT = "q_learning.py"  # the name of this file in the package
ALGORITHM = "Q-Learning"
CARD_TAGS = ["q-learning", "reinforcement-learning", "custom-implementation"]
CHECKPOINT_SECONDS = 10  # what a stop costs at the most, besides the episode under way
CURVE_EPISODES = 250  # episodes between two points of the curves, which show the means over as many
EXPECTED = (gym.error.Error, HTTPError, ImportError, HFValidationError, json.JSONDecodeError, OSError)
NEW_ON_RESUME = {"resume", "n_training_episodes", "n_eval_episodes", "repo_id", "track"}
IN_NOTEBOOK = "ipykernel" in sys.modules  # in a Jupyter or Colab cell
msg = Printer(pretty=sys.stdout.isatty())

# --- Flags -----------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, which are the course's, per environment by the name on its model card.
# Flags on the command line win over the row.
EXPLORE = dict(min_epsilon=0.2)  # with the course's 0.05, a few states stay half learned
TUNED = {
    "FrozenLake-v1-4x4-no_slippery": {},
    "FrozenLake-v1-8x8-no_slippery": {},
    # On slippery ice one action has three outcomes: a small learning rate averages over them, and a gamma near 1 does
    # not mind the way round that is longer and safer.
    "FrozenLake-v1-4x4": dict(n_training_episodes=20_000, max_steps=100, learning_rate=0.05, gamma=0.995, **EXPLORE),
    "FrozenLake8x8-v1-8x8": dict(n_training_episodes=40_000, max_steps=200, learning_rate=0.1, gamma=0.999, **EXPLORE),
    "Taxi-v3": dict(n_training_episodes=25_000, **EXPLORE),
    "CliffWalking-v1": dict(n_training_episodes=2_000, decay_rate=0.005, gamma=0.99),
}
# What the ids mean here, as in the course; Gymnasium's own FrozenLake-v1 slips.
LAKES = {
    "FrozenLake-v1": dict(map_name="4x4", is_slippery=False),
    "FrozenLake8x8-v1": dict(map_name="8x8", is_slippery=True),
}


def parse_args(argv=None):
    """Read the flags: the command line wins over a saved run's flags or the TUNED row, those over the defaults here."""
    about = dict(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(SCRIPT, description=__doc__.splitlines()[0], add_help=False, **about)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--env-id", type=full_id, default="FrozenLake-v1", help="any with discrete observations and actions")
    flag("--map-name", choices=["4x4", "8x8"], help="map of FrozenLake")
    flag("--is-slippery", action=switch, help="whether the ice of FrozenLake slips")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", metavar="RUN_FOLDER", help="go on from the checkpoint of an interrupted run, with its flags")
    either("--evaluate", metavar="SOURCE", help="no training: score and film a run folder, a Hub repo id, or 'random'")
    flag("--render", action=switch, default=False, help="with --evaluate: play in a window")
    flag("--exp-name", default="q_learning", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=int, default=1, help="seed of everything random")
    flag("--track", action=switch, default=False, help="log to Weights & Biases as well (pip install wandb)")
    flag("--n-training-episodes", type=int, default=10_000, help="episodes to train for")
    flag("--max-steps", type=int, default=99, help="time limit of an episode, in training and evaluation")
    flag("--learning-rate", type=float, default=0.7, help="how far a value moves towards its target")
    flag("--gamma", type=float, default=0.95, help="discount factor")
    flag("--max-epsilon", type=float, default=1.0, help="share of random actions at the start")
    flag("--min-epsilon", type=float, default=0.05, help="share of random actions in the long run")
    flag("--decay-rate", type=float, default=0.0005, help="exponential decay of epsilon, per episode")
    flag("--n-eval-episodes", type=int, default=100, help="episodes that the score is measured over")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")

    argv = argv if argv is not None else [] if IN_NOTEBOOK else sys.argv[1:]  # a kernel's own arguments are not ours
    known, _ = parser.parse_known_args(argv)  # --env-id, --resume and --evaluate decide the defaults of all the others
    parser.set_defaults(**LAKES.get(known.env_id, {}))
    known, _ = parser.parse_known_args(argv)  # now with the map and the ice, which are part of the environment's name
    flag("-h", "--help", action="help", help="show this, with the defaults for --env-id, and exit")
    checkpoint = load_checkpoint(known.resume) if known.resume else {}
    saved = checkpoint.get("args", TUNED.get(env_name(known), {}))
    if known.evaluate and known.evaluate != "random":
        flags = open_package(known.evaluate, known.env_id)[1]
        saved = {"map_name": None, "is_slippery": None} | LAKES.get(flags.get("env_id"), {}) | flags
    parser.set_defaults(**{name: saved[name] for name in saved.keys() & hyperparameters_of(known).keys()})
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = name in ("n_training_episodes", "max_steps", "n_eval_episodes")
        unit = ("learning_rate", "gamma", "max_epsilon", "min_epsilon")
        most = 1 if name in unit else 10**6 if name == "n_eval_episodes" else 2**63 - 1
        if value == "" or (isinstance(value, int | float) and not least <= value <= most):
            parser.error(f"--{name.replace('_', '-')} {value!r} is out of range")
        if name not in NEW_ON_RESUME and checkpoint.get("args", {}).get(name, value) != value:
            parser.error(f"--{name.replace('_', '-')} cannot change on --resume")
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if args.render and not (args.evaluate and has_display):
        parser.error("--render goes with --evaluate, and needs a display")
    if args.env_id not in LAKES and (args.map_name or args.is_slippery is not None):
        parser.error(f"--map-name and --is-slippery belong to FrozenLake, not to {args.env_id}")
    if args.n_training_episodes < checkpoint.get("episode", 0):
        parser.error(f"--n-training-episodes is less than --resume's run has had already, {checkpoint['episode']}")
    return args


def env_name(args):
    """What the course's leaderboard calls the environment of these flags, such as FrozenLake-v1-4x4-no_slippery."""
    ice = "-no_slippery" if args.is_slippery is False else ""
    return args.env_id + (f"-{args.map_name}" if args.map_name else "") + ice


# --- The environment -------------------------------------------------------------------------------------------------

# The name that leaderboards and model cards know. What v4 changed is two modes that are off by default.
if "Taxi-v4" in gym.registry:
    gym.registry.setdefault("Taxi-v3", dataclasses.replace(gym.spec("Taxi-v4"), id="Taxi-v3"))


def full_id(env_id):
    """An id with its version: CartPole-v1, the newest, for CartPole; LunarLander-v2, which leaderboards know."""
    return next((known for known in reversed(gym.registry) if known.rpartition("-v")[0] == env_id), env_id)


def make_env(env_id, map_name=None, is_slippery=None, max_steps=None, render_mode=None):
    """Make one environment. A gymnasium.error.Error says what is wrong with its name, or its spaces for this script.

    map_name, is_slippery: of FrozenLake; max_steps: the time limit; None is the environment's own.
    """
    if render_mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames need no display, but SDL looks for one
    options = {"map_name": map_name, "is_slippery": is_slippery, "max_episode_steps": max_steps}
    options = {name: value for name, value in options.items() if value is not None}
    spec = gym.registry.get(env_id, env_id)  # given the id alone, gymnasium warns where it is old
    env = gym.make(spec, render_mode=render_mode, disable_env_checker=True, **options)
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise gym.error.Error(f"{env_id}: it cannot be filmed, which takes render mode rgb_array")
    for kind, space in (("actions", env.action_space), ("observations", env.observation_space)):
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            raise gym.error.Error(f"{env_id}: a table needs discrete {kind}, and its are {space}")
    env.metadata = {**env.metadata, "render_fps": 2}  # slow enough to follow each move in the film
    return env


# --- The agent -------------------------------------------------------------------------------------------------------
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
    """The agent as a function `observation -> action`, for evaluation and video: the best by the table."""
    return lambda state: int(np.argmax(agent["qtable"][state]))


# --- The math --------------------------------------------------------------------------------------------------------
def epsilon_at(episode, max_epsilon, min_epsilon, decay_rate):
    """Epsilon falls from max_epsilon towards min_epsilon: min + (max - min) * exp(-decay_rate * episode)."""
    return min_epsilon + (max_epsilon - min_epsilon) * math.exp(-decay_rate * episode)


# --- Training --------------------------------------------------------------------------------------------------------
def q_learning_update(qtable, state, action, reward, next_state, terminated, learning_rate, gamma):
    """The Bellman update of one step, in place (Sutton and Barto, 2018, equation 6.8).

    After a terminal state nothing follows, so its target is the reward alone. A time limit is not an end: the target
    of a truncated step bootstraps like any other.
    """
    row = qtable[state]
    target = reward if terminated else reward + gamma * max(qtable[next_state])
    row[action] += learning_rate * (target - row[action])


def train(args, run_folder):
    """Learn a Q-table; with --resume, go on from the checkpoint in run_folder. Checkpoints and curves go there.

    Returns the agent, which is the course's model dict, and the number of steps it was trained for.
    """
    rng = random.Random(args.seed)  # of exploration and ties; the environment has its own
    env = make_env(args.env_id, args.map_name, args.is_slippery, args.max_steps)
    qtable = np.zeros((env.observation_space.n, env.action_space.n)).tolist()
    first_episode = global_step = 0
    recent = deque(maxlen=CURVE_EPISODES)  # (return, length) of the last episodes
    env_seed = args.seed
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        qtable = checkpoint["qtable"].tolist()
        rng.setstate(checkpoint["rng"])
        first_episode, global_step = checkpoint["episode"], checkpoint["global_step"]
        recent.extend(checkpoint["recent"])
        msg.info(f"Resumed after {first_episode:,} episodes, {args.n_training_episodes - first_episode:,} to go")
        env_seed = rng.randrange(2**31)  # not the first episodes again

    env.reset(seed=env_seed)
    first_step, last_checkpoint = global_step, 0.0
    # flush_secs: for so long, a Ctrl-C in a bad moment waits for TensorBoard's thread.
    logs = {"log_dir": run_folder / "hub" / "logs", "flush_secs": 2, "purge_step": global_step + 1}
    with SummaryWriter(**logs) as writer, progress_bar(args.n_training_episodes, first_episode, "episode") as bar:
        writer.add_text("hyperparameters", f"```\n{json.dumps(hyperparameters_of(args), indent=2)}\n```")
        for episode in range(first_episode, args.n_training_episodes):
            epsilon = epsilon_at(episode, args.max_epsilon, args.min_epsilon, args.decay_rate)
            state, _ = env.reset()
            episode_return, episode_length, done = 0.0, 0, False
            while not done:
                action = epsilon_greedy_policy(qtable, state, epsilon, rng)
                next_state, reward, terminated, truncated, _ = env.step(action)
                q_learning_update(qtable, state, action, reward, next_state, terminated, args.learning_rate, args.gamma)
                state = next_state
                episode_return += reward
                episode_length += 1
                done = terminated or truncated
            global_step += episode_length
            recent.append((float(episode_return), episode_length))
            bar.update()

            is_last = episode + 1 == args.n_training_episodes
            if (episode + 1) % CURVE_EPISODES == 0 or is_last:
                curves = dict(zip(("charts/episodic_return", "charts/episodic_length"), np.mean(recent, axis=0)))
                curves["charts/epsilon"] = epsilon
                curves["charts/SPS"] = (global_step - first_step) / bar.format_dict["elapsed"]
                for name, value in curves.items():
                    writer.add_scalar(name, value, global_step)
                bar.set_postfix_str(f"return {curves['charts/episodic_return']:.2f}", refresh=False)
            if time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS or is_last:
                saved = dict(qtable=torch.tensor(qtable, dtype=torch.float64), rng=rng.getstate(), recent=[*recent])
                save_checkpoint(run_folder, args, episode=episode + 1, global_step=global_step, **saved)
                last_checkpoint = time.monotonic()

    # What the course's model dict has, and the other flags as well.
    eval_seed = TAXI_EVAL_SEED if args.env_id == "Taxi-v3" else []
    course = {"eval_seed": eval_seed, "slippery": args.is_slippery, "qtable": np.array(qtable)}
    return hyperparameters_of(args) | course, global_step


def progress_bar(total, done, unit):
    """tqdm's bar; where stderr is no terminal and no notebook, its text as a plain line every ten seconds."""
    if sys.stderr.isatty() or IN_NOTEBOOK:
        return tqdm(total=total, initial=done, unit=unit, unit_scale=True, dynamic_ncols=True)
    lines = SimpleNamespace(write=lambda text: text.strip() and print(text.strip(), file=sys.stderr), flush=int)
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, file=lines, mininterval=10, miniters=1, ncols=0)


def save_checkpoint(run_folder, args, **state):
    """Replace the checkpoint by this state, atomically: there is never half of one."""
    buffer = io.BytesIO()  # by itself, torch.save calls a full disk a RuntimeError; here it is an OSError as elsewhere
    torch.save({"script": SCRIPT, "args": vars(args), **state}, buffer)
    (run_folder / "checkpoint.tmp").write_bytes(buffer.getvalue())
    os.replace(run_folder / "checkpoint.tmp", run_folder / "checkpoint.pt")


def load_checkpoint(run_folder):
    """The last checkpoint of a run, as a dict. Nothing in the file can run."""
    try:
        checkpoint = torch.load(Path(run_folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
        return {SCRIPT: checkpoint}[checkpoint["script"]]
    except Exception as error:  # of many kinds, and torch's own message advises to load the file unprotected
        raise OSError(f"{run_folder}: no checkpoint.pt of {SCRIPT} was loaded ({error!r:.60})") from error


# --- Evaluation and replay -------------------------------------------------------------------------------------------

# The course's evaluation seeds for Taxi-v3, so that all agents are scored on the same episodes.
TAXI_EVAL_SEED = [
    16, 54, 165, 177, 191, 191, 120, 80, 149, 178, 48, 38, 6, 125, 174, 73, 50, 172, 100, 148, 146, 6, 25, 40, 68, 148,
    49, 167, 9, 97, 164, 176, 61, 7, 54, 55, 161, 131, 184, 51, 170, 12, 120, 113, 95, 126, 51, 98, 36, 135, 54, 82,
    45, 95, 89, 59, 95, 124, 9, 113, 58, 85, 51, 134, 121, 169, 105, 21, 30, 11, 50, 65, 12, 43, 82, 145, 152, 97, 106,
    55, 31, 85, 38, 112, 102, 168, 123, 97, 21, 83, 158, 26, 80, 63, 5, 81, 32, 11, 28, 148,
]  # fmt: skip


def evaluation_seeds(args):
    """The seeds of the evaluation episodes: a block for each --seed; for Taxi-v3 the course's hundred come first."""
    first_seed = (args.seed + 1) * 1_000_000
    seeds = [*range(first_seed, first_seed + args.n_eval_episodes)]
    return (TAXI_EVAL_SEED + seeds if args.env_id == "Taxi-v3" else seeds)[: args.n_eval_episodes]


def evaluate_agent(env, policy, seeds, film=None):
    """Play one episode per seed; returns the mean and the standard deviation of their returns.

    policy: a function observation -> action. Returns are undiscounted sums of the environment's own rewards.
    film: a writer of imageio's for the frames; where a step is several, the environment's `render` returns a list.
    """
    episode_returns = []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        episode_return, done = 0.0, False
        while True:
            rendered = env.render() if film else []
            for frame in rendered if isinstance(rendered, list) else [rendered]:
                film.append_data(frame)
            if done:
                break
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            episode_return += float(reward)
            done = terminated or truncated
        episode_returns.append(episode_return)
    return float(np.mean(episode_returns)), float(np.std(episode_returns))


def record_video(env, policy, path, seed=None):
    """Film one episode as H.264, which plays in every browser. env: made with render_mode="rgb_array"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=env.metadata["render_fps"], macro_block_size=2, ffmpeg_log_level="quiet") as film:
        evaluate_agent(env, policy, [seed], film)


def score_and_film(env, film_env, policy, seeds, folder=None):
    """Play an episode per seed and print the score; with a folder, film the first seed's there, played in film_env."""
    msg.info(f"Playing {len(seeds)} episodes")
    mean, std = evaluate_agent(env, policy, seeds)  # the course's leaderboard ranks by mean - std
    msg.good(f"mean_reward {mean:.2f} +/- {std:.2f} over {len(seeds)} episodes (result {mean - std:.2f})")
    if folder:
        record_video(film_env, policy, folder / "replay.mp4", seed=seeds[0])
        if IN_NOTEBOOK:
            from IPython.display import Video, display

            display(Video(folder / "replay.mp4", embed=True))
    return {"mean_reward": mean, "std_reward": std}


# --- The run folder, the package and the Hub -------------------------------------------------------------------------
def new_folder(args, purpose):
    """Make runs/{env_id}__{purpose}__{seed}__{time}, print that and return it."""
    name = f"{args.env_id}__{purpose}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path("runs") / "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in name)
    folder.mkdir(parents=True)
    msg.info(f"{purpose} on {args.env_id}, into {folder}")
    return folder


def start_run(args):
    """Check --repo-id, make the run folder with this script in its package, or take --resume's; print the flags."""
    if args.repo_id:
        HfApi().whoami()
        args.repo_id = HfApi().create_repo(args.repo_id, exist_ok=True).repo_id  # with the user's name
        HfApi().auth_check(args.repo_id, write=True)  # create_repo is content with somebody else's
    if args.track:
        import wandb

        name = f"{args.env_id}__{args.exp_name}__{args.seed}"
        wandb.init(project="deep-rl", name=name, config=hyperparameters_of(args), sync_tensorboard=True)
    run_folder = Path(args.resume) if args.resume else new_folder(args, args.exp_name)
    script = run_folder / "hub" / SCRIPT
    script.parent.mkdir(exist_ok=True)
    if not script.exists():  # the text of this file, or of a notebook's cell, which Python keeps, too
        script.write_text("".join(linecache.getlines(main.__code__.co_filename)), encoding="utf-8")
    print(*(f"{name}={value}" for name, value in hyperparameters_of(args).items()), sep="  ")
    return run_folder


def hyperparameters_of(args):
    """The flags that say how an agent is trained and scored, as a dict for JSON: not those that say what to do now."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "evaluate", "render", "rom")}


def package_to_hub(run_folder, args, results):
    """Complete the package, in hub.partial, where model and replay are already; move it into run_folder/hub; push it.

    results: the score, "global_step", "scored_with", and "env_name", what leaderboards call the environment.
    """
    partial, package = run_folder / "hub.partial", run_folder / "hub"
    results = {"env_id": args.env_id, **results, "n_eval_episodes": args.n_eval_episodes}
    results["eval_datetime"] = datetime.now(UTC).isoformat(timespec="seconds")
    (partial / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (partial / "hyperparameters.json").write_text(json.dumps(hyperparameters_of(args), indent=2) + "\n")
    (partial / "README.md").write_text(model_card(args, results))
    for file in partial.iterdir():  # only now, when all is written
        os.replace(file, package / file.name)  # which has the logs already
    partial.rmdir()
    command = f"hf upload {args.repo_id or 'user/name'} {package}"
    msg.good(f"Package: {package}")
    print(f"  see it play again with  --evaluate {run_folder}\n  push it with            {command}")
    if args.repo_id:
        try:
            url = HfApi().upload_folder(repo_id=args.repo_id, folder_path=package, delete_patterns="logs/*").repo_url
        except (HTTPError, OSError, RuntimeError, KeyboardInterrupt) as error:
            why = " ".join(str(error).split()) or "stopped"
            sys.exit(f"error: not pushed: {why}; the package is complete, push it with: {command}")
        msg.good(f"Pushed: {url}")


def model_card(args, results):
    """The package's README.md: metadata as the course's leaderboard reads it, the score, and how to use the agent."""
    env_name, repo_id = results["env_name"], args.repo_id or "user/name"
    score = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    task = dict(task_type="reinforcement-learning", dataset_type=env_name, dataset_name=env_name)
    entry, tags = EvalResult(**task, metric_type="mean_reward", metric_value=score), [env_name, *CARD_TAGS]
    data = ModelCardData(model_name=ALGORITHM, tags=tags, pipeline_tag=task["task_type"], eval_results=[entry])
    return f"""\
---
{data.to_yaml()}
---

# {ALGORITHM} agent playing {env_name}

mean_reward **{score}** over {results["n_eval_episodes"]} episodes with {results["scored_with"]}.
Trained for {results["global_step"]:,} steps by [{SCRIPT}]({SCRIPT}), which is all it takes to run it (`uv run {SCRIPT}`
installs what it needs):

```bash
hf download {repo_id} {SCRIPT} --local-dir .
python {SCRIPT} --evaluate {repo_id}
```

```json
{json.dumps(hyperparameters_of(args), indent=2)}
```
"""


def open_package(source, trusted_env_id=None):
    """Find a package: a run folder's hub/, that folder itself, or a Hub repo id's. Returns its folder and its flags.

    An environment of a module could run any code, so it must be the trusted one.
    """
    folder = Path(source, "hub") if Path(source, "hub").is_dir() else Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.pkl"]))
    files = [folder / name for name in ("hyperparameters.json", "results.json") if (folder / name).is_file()]
    if not files:  # the course's packages have results.json only
        raise OSError(f"{source} holds no package of {SCRIPT}; an unfinished run goes on with --resume")
    flags = json.loads(files[0].read_text(errors="replace"))
    if ":" in str(flags.get("env_id")) and flags["env_id"] != trusted_env_id:
        raise OSError(f"{source}: if you trust its environment, which could run any code: --env-id {flags['env_id']}")
    return folder, flags


def read_q_table(path, n_states, n_actions):
    """The table, (n_states, n_actions), in a q-learning.pkl: float64, as np.zeros makes it; pickle protocols 3 and 4.

    A pickle is a program for a small machine, and can run any code. So none of it is run: the table is the one string
    of so many bytes among the program's instructions that follows a False, which says: not in Fortran's order.
    """
    content, size = path.read_bytes(), 8 * n_states * n_actions
    try:
        pairs = pairwise(pickletools.genops(content))
        arrays = [value for (before, *_), (_, value, _) in pairs if before.name == "NEWFALSE" and type(value) is bytes]
        (table,) = (array for array in arrays if len(array) == size)
        if not any(value == "f8" for _, value, _ in pickletools.genops(content)):
            raise ValueError("no float64")
    except ValueError as error:
        raise OSError(f"{path} holds no table for {n_states} states and {n_actions} actions") from error
    return np.frombuffer(table).reshape(n_states, n_actions)


def load_agent(source, env_id=None, render_mode=None, **options):
    """Load the agent of a run folder or a Hub repo id: returns it and an environment, by default its training's.

    options: map_name, is_slippery, max_steps of an environment that is another in these.
    """
    package, flags = open_package(source, env_id)
    flags = {"max_steps": 99} | LAKES.get(flags.get("env_id"), {}) | flags  # the course's packages do not say these
    options = {name: flags.get(name) for name in ("map_name", "is_slippery", "max_steps")} | options
    env = make_env(env_id or flags["env_id"], **options, render_mode=render_mode)
    sizes = int(env.observation_space.n), int(env.action_space.n)
    return {"qtable": read_q_table(package / "q-learning.pkl", *sizes)}, env


# --- Main ------------------------------------------------------------------------------------------------------------
def main(argv=None):
    """Train, score, film and package an agent; returns it. With --evaluate, score and film one; returns the score."""
    if not IN_NOTEBOOK:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is a Ctrl-C
        # A full disk would be told twice: by TensorBoard's thread with a traceback, by this one with its one line.
        threading.excepthook = lambda hook: isinstance(hook.exc_value, OSError) or threading.__excepthook__(hook)
    run_folder = None
    try:
        args = parse_args(argv)
        seeds = evaluation_seeds(args)
        options = {"map_name": args.map_name, "is_slippery": args.is_slippery, "max_steps": args.max_steps}
        film_env = None if args.render else make_env(args.env_id, **options, render_mode="rgb_array")
        options["render_mode"] = "human" if args.render else None
        if args.evaluate and args.evaluate != "random":
            agent, env = load_agent(args.evaluate, args.env_id, **options)
            policy = make_policy(agent)
        else:
            env = make_env(args.env_id, **options)  # what is wrong with it is said now
            env.action_space.seed(args.seed)
            policy = lambda _: env.action_space.sample()  # noqa: E731
        if args.evaluate:
            return score_and_film(env, film_env, policy, seeds, None if args.render else new_folder(args, "evaluate"))

        run_folder = start_run(args)
        if env_name(args) not in TUNED and not args.resume:
            msg.warn(f"There are no tuned settings for {env_name(args)}: the plain defaults hold")
        agent, global_step = train(args, run_folder)
        partial = run_folder / "hub.partial"  # the package, as long as it is not complete
        results = score_and_film(env, film_env, make_policy(agent), seeds, partial)
        course = "the course's seeds" + (" and others" if len(seeds) > len(TAXI_EVAL_SEED) else "")
        which_seeds = course if args.env_id == "Taxi-v3" else "seeds that training never used"
        results["scored_with"] = f"the best action by the table, on {which_seeds}"
        (partial / "q-learning.pkl").write_bytes(pickle.dumps(agent, protocol=4))  # the course's format
        package_to_hub(run_folder, args, results | {"env_name": env_name(args), "global_step": global_step})
        return agent
    except (KeyboardInterrupt, *EXPECTED) as error:
        can_resume = run_folder and (run_folder / "checkpoint.pt").is_file()
        why = " ".join(str(error).split()) or "stopped"
        hub = "Hugging Face Hub: " if isinstance(error, HTTPError) else ""
        sys.exit(f"error: {hub}{why}{f'; go on with: --resume {run_folder}' if can_resume else ''}")


if __name__ == "__main__":
    agent = main()
