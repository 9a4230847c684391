"""REINFORCE (Monte-Carlo policy gradient) in one file: trains, scores, films and packages an agent.

    python reinforce.py                                                       # CartPole-v1, solved in seconds
    python reinforce.py --env-id Pixelcopter-PLE-v0 --repo-id user/copter     # train, score, film, push to the Hub
    python reinforce.py --evaluate user/copter                                # load it back, score it, film it
    tensorboard --logdir runs

The policy pi(a | s, theta) is a network that gives each action a probability. The algorithm repeats, for each episode:
  1. Generate an episode S_0, A_0, R_1, ..., S_{T-1}, A_{T-1}, R_T, following the policy.
  2. For each step t of it, sum up what followed: G_t = R_{t+1} + gamma * R_{t+2} + gamma^2 * R_{t+3} + ...
  3. Make what was followed by much more probable, and what was followed by little less so:
     theta <- theta + learning_rate * sum over t of G_t * gradient of ln pi(A_t | S_t, theta)

With --num-envs the sum runs over several episodes, played side by side: fewer steps, each in a better direction.

Sources: Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992);
Reinforcement Learning: An Introduction (Sutton and Barto, 2nd edition, 2018,
http://incompleteideas.net/book/the-book.html), sections 13.3 and 13.4.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6",
#     "gymnasium[classic-control]>=1.2,<2",
#     "numpy>=2,<3",
#     "tensorboard>=2.18,<3",
#     "huggingface_hub>=1.20,<3",
#     "imageio>=2.36,<3",
#     "imageio-ffmpeg>=0.6,<1",
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
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from bisect import bisect_left
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
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
    from wasabi import Printer, color
except ModuleNotFoundError as missing:
    needed = re.findall(r'(?m)^#     (".+"),$', "".join(linecache.getlines(sys._getframe().f_code.co_filename)))
    pip = "%pip" if "IPython" in sys.modules else "pip"
    sys.exit(f"error: {missing}; what this script needs: {pip} install {' '.join(needed)}")

SCRIPT = "reinforce.py"  # the name of this file in the package
ALGORITHM = "Reinforce"
CARD_TAGS = ["reinforce", "reinforcement-learning", "custom-implementation", "deep-rl-class"]
MODEL_FILE = "model.pt"
CHECKPOINT_SECONDS = 10  # what a crash costs at the most, besides the update under way
EVAL_SEED = 1_000_000  # evaluation plays seeds seed + EVAL_SEED, + 1, ...; training starts from seed, + 1, ...
EVAL_MAX_STEPS = 10_000  # where an environment has no time limit of its own, so that a perfect player comes to an end
NOT_SAVED = ("resume", "evaluate", "render", "push")  # flags that say what to do now, not how the agent was trained

msg = Printer(pretty=sys.stdout.isatty())
asked_to_stop = []  # the signals that came while a run was on

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# What differs from the defaults below, which are the course's, per environment. Flags on the command line win over the
# row. Averaging over several episodes and a learning rate that falls make the last policy a good one. In Pixelcopter,
# where positions are 24 times as large as momentum, learning needs standardised observations: without them the policy
# soon climbs straight into the ceiling, always, and then there is nothing left to learn from. With the course's gamma,
# 0.99, it learns far more slowly.
TUNED = {
    "CartPole-v1": dict(n_training_episodes=1_600, anneal_lr=True, num_envs=8, norm_obs=True),
    "Pixelcopter-PLE-v0": dict(
        h_size=[64, 128],
        n_training_episodes=24_000,
        max_t=10_000,
        gamma=0.95,
        lr=4e-3,
        anneal_lr=True,
        num_envs=16,
        norm_obs=True,
    ),
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
    flag("--env-id", default="CartPole-v1", help="environment: any with vector observations and discrete actions")
    flag("--tuned", **switch, default=True, help="start from --env-id's row of TUNED")
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
    flag("--exp-name", default="reinforce", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=number(int, 0), default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", **switch, default=True, help="deterministic cuDNN")
    flag("--cuda", **switch, default=True, help="use a GPU if there is one")
    flag("--track", **switch, default=False, help="log to Weights & Biases as well")
    flag("--wandb-project-name", default="deep-rl", help="project on Weights & Biases")
    flag("--wandb-entity", help="entity (team) on Weights & Biases")
    flag("--capture-video", **switch, default=False, help="film ten episodes on the way")

    flag = parser.add_argument_group("algorithm").add_argument
    flag("--h-size", type=layer_sizes, default=[16], help="units of each hidden layer: 16, or 64,128 for two layers")
    flag("--n-training-episodes", type=number(int, 1), default=1000, help="episodes, all environments together")
    flag("--max-t", type=number(int, 1), default=1000, help="an episode is cut off after this many steps")
    flag("--gamma", type=number(float, 0, 1), default=1.0, help="discount factor")
    flag("--lr", "--learning-rate", type=number(float, 0), default=1e-2, help="step size of Adam")
    flag("--anneal-lr", **switch, default=False, help="the learning rate falls linearly to 0")
    flag("--num-envs", type=number(int, 1), default=1, help="episodes per update, played side by side")
    flag("--norm-obs", **switch, default=False, help="standardise observations by what training has seen so far")

    flag = parser.add_argument_group("evaluation and the Hugging Face Hub").add_argument
    flag("--n-eval-episodes", type=number(int, 1), default=100, help="episodes that the score is measured over")
    flag("--deterministic-eval", **switch, default=True, help="argmax; False: sample")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")
    flag("--render", **switch, default=False, help="with --evaluate: play in a window")

    saved = {}
    if known.resume:
        saved = load_checkpoint(known.resume)["args"]
    elif known.evaluate and known.evaluate != "random":
        saved = load_hyperparameters(known.evaluate)
    elif known.tuned:
        parser.set_defaults(**TUNED.get(known.env_id, {}))
    # Saved flags go through the parser like those of the command line, which checks their names and values.
    for name in saved.keys() & set(NOT_SAVED):
        fail(f"{known.resume or known.evaluate}: {name} is not among the flags that a run saves")
    saved = [f"--{name.replace('_', '-')}={value}" for name, value in saved.items() if value is not None]
    parser.error = lambda message: fail(f"{known.resume or known.evaluate}: {message}")
    before = parser.parse_args(saved)
    parser.error = fail
    args = parser.parse_args(saved + argv)
    if args.env_id != known.env_id:
        check_env_id(args.env_id, known.resume or known.evaluate)

    if known.resume:
        changeable = {"n_training_episodes", "repo_id", "track", "wandb_project_name", "wandb_entity", "capture_video"}
        for name, value in vars(before).items():
            if getattr(args, name) != value and name not in changeable.union(NOT_SAVED):
                fail(f"--{name.replace('_', '-')} cannot change on --resume: the run was started with {value}")
    if args.render and not args.evaluate:
        fail("--render goes with --evaluate")
    if args.push and not args.repo_id:
        fail("--push needs --repo-id user/name, the repository to push to")
    if args.repo_id:
        check_repo_id(args.repo_id)
    if args.n_training_episodes < args.num_envs:
        fail(f"--n-training-episodes {args.n_training_episodes} is less than one update's, --num-envs {args.num_envs}")
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


def layer_sizes(text):
    """argparse type: the sizes of hidden layers, with commas between them."""
    try:
        sizes = [int(size) for size in text.strip("[]").split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one layer's size, such as 16, nor several: 64,128")
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------------------------------


class Pixelcopter(gym.Env):
    """Pixelcopter of the PyGame Learning Environment, rule for rule: fly through a cave, around the blocks in it.

    Actions: 0 up, 1 nothing. Rewards: +1 for each piece of the cave and each block left behind, -5 for the crash.
    Observation (7,): the copter's y and momentum (down is positive), its distances to the ceiling and to the floor, the
    distance to the next block ahead, that block's y, and its y plus its height. The unit is a pixel of the original's
    screen of 48 x 48, a step is a frame of 1/30 s. There is no time limit.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    SHIFT = 0.0004 * 48 * 1000 / 30  # how far the world moves to the left in a frame
    CLIMB, FALL = -0.875 * SHIFT, 0.09 * SHIFT  # what a frame adds to the momentum
    SCALE = 10  # a rendered frame is that much larger than the original's screen

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.spaces.Box(-48.0, 96.0, (7,), np.float32)

    def reset(self, seed=None, options=None):
        """Start a new level; returns (observation, {})."""
        super().reset(seed=seed)
        # The state is plain Python floats, so in float64 as the original's: what collides depends on the last digit.
        self.y, self.momentum = 24.0, 0.0
        self.blocks = []  # [x, y] of each centre
        self.piece_x, self.piece_y = [], []  # the centres of the cave's pieces, from left to right
        self._add_block()
        self._add_cave(0, 192)
        return self._observation(), {}

    def step(self, action):
        """Play one frame; returns (observation, reward, terminated, False, {})."""
        self.momentum = 0.99 * (self.momentum + (self.CLIMB if action == 0 else self.FALL))
        self.y = y = self.y + self.momentum
        shift = self.SHIFT
        self.piece_x = [x - shift for x in self.piece_x]
        for block in self.blocks:
            block[0] -= shift

        # The copter's 2 x 2 and a block's 4 x 9 pixels overlap; the cave counts by the copter's exact height.
        crashed = y < 6 or y > 42
        for block_x, block_y in self.blocks:
            crashed |= 14 <= block_x < 19 and -4 <= int(y) - block_y <= 5
        for i in self._pieces_here():
            crashed |= y - 2.4 <= self.piece_y[i] - 12 or y >= self.piece_y[i] + 12

        reward = -5.0 if crashed else 0.0
        if len(self.blocks) == 1 and self.blocks[0][0] <= 16:
            reward += 1
            self._add_block()
        if self.blocks[0][0] <= -4:
            del self.blocks[0]
        if self.piece_x[0] <= -4:
            reward += 1
            del self.piece_x[0], self.piece_y[0]
        if len(self.piece_x) <= 13:
            self._add_cave(48, 240)
        return self._observation(), reward, crashed, False, {}

    def render(self):
        """The screen, (480, 480, 3) uint8: white copter, green cave and blocks, black background."""
        screen = np.zeros((48, 48, 3), dtype=np.uint8)

        def draw(left, top, width, height, colour):
            screen[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = colour

        draw(15, int(self.y) - 1, 2, 2, (255, 255, 255))
        for x, y in self.blocks:
            draw(int(x) - 2, y - 4, 4, 9, (120, 240, 80))
        for x, y in zip(self.piece_x, self.piece_y):
            draw(int(x) - 2, y - 36, 4, 24, (120, 240, 80))
            draw(int(x) - 2, y + 14, 4, 24, (120, 240, 80))
        return screen.repeat(self.SCALE, axis=0).repeat(self.SCALE, axis=1)

    def _add_block(self):
        self.blocks.append([float(self.np_random.integers(48, 72)), int(self.np_random.integers(12, 36))])

    def _add_cave(self, start, end):
        """Pieces from x = start to end: their heights are those of a sine with jitter."""
        centres = range(start + 2, end + 2, 4)
        frequency = 4.5 / 48 + self.np_random.uniform(-0.01, 0.01)
        jitter = self.np_random.uniform(0.0, 0.5, size=len(centres)).tolist()
        self.piece_x += centres
        self.piece_y += [int(24 + 6 * math.sin(frequency * x + phase)) for x, phase in zip(centres, jitter)]

    def _pieces_here(self):
        """Indices of the pieces above and below the copter: their pixels [x - 2, x + 2) overlap its [15, 17)."""
        first = bisect_left(self.piece_x, 14)
        return range(first, bisect_left(self.piece_x, 19, first))

    def _observation(self):
        x, y = min(block for block in self.blocks if block[0] > 16)
        middle = self.piece_y[bisect_left(self.piece_x, 14)]
        state = self.y, self.momentum, self.y - (middle - 12), middle + 12 - self.y, x - 16, y, y + 9
        return np.array(state, dtype=np.float32)


gym.registry.pop("Pixelcopter-PLE-v0", None)  # a notebook cell may run twice
gym.register("Pixelcopter-PLE-v0", entry_point=Pixelcopter)


# Names that leaderboards and model cards know, and the version that Gymnasium has of them now. The defaults did not
# change: v3 of LunarLander widened the observation bounds and fixed resets, v4 of Taxi changed its rainy and fickle
# modes only.
RETIRED = {"LunarLander-v2": "LunarLander-v3", "Taxi-v3": "Taxi-v4"}


def make_env(env_id, render_mode=None):
    """Make one environment; retired names get the current version under their old name.

    An environment without a time limit of its own gets one of EVAL_MAX_STEPS. Exits with one line where Gymnasium does
    not know the name, or the spaces are not what this script can learn.
    """
    if render_mode == "human" and not has_display():
        fail("--render opens a window, and there is no display here")
    if render_mode == "rgb_array" and not has_display():
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # frames need no display, but SDL complains where it finds none
    try:
        spec = gym.registry.get(env_id)
        if spec is None and env_id in RETIRED:
            spec = dataclasses.replace(gym.spec(RETIRED[env_id]), id=env_id)
        env = gym.make(spec or env_id, render_mode=render_mode, disable_env_checker=True)
        if env.spec.max_episode_steps is None:
            env = gym.wrappers.TimeLimit(env, EVAL_MAX_STEPS)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {env_id}: {error}")
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        fail(f"--env-id {env_id}: this script needs discrete actions, and its are {env.action_space}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        fail(f"--env-id {env_id}: this script needs vector observations, and its are {env.observation_space}")
    return env


# ---------------------------------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """The policy: a network from observations to the logits of the actions.

    h_size: list of the hidden layers' sizes.
    The observations' mean and standard deviation are part of the model: it is trained on standardised ones.
    """

    def __init__(self, n_observations, n_actions, h_size):
        super().__init__()
        self.actor = relu_network([n_observations, *h_size, n_actions])
        self.register_buffer("mean", torch.zeros(n_observations))
        self.register_buffer("std", torch.ones(n_observations))


def relu_network(sizes):
    """Linear layers between these sizes, with ReLU between the layers."""
    layers = []
    for n_inputs, n_outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(n_inputs, n_outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def policy_layers(agent):
    """The weights of the policy as [(weight, bias), ...] NumPy arrays, for `choose_actions`.

    Standardising the observations is a linear map, so it goes into the first layer.
    """
    layers = [(layer.weight.detach(), layer.bias.detach()) for layer in agent.actor if isinstance(layer, nn.Linear)]
    weight, bias = layers[0]
    weight = weight / agent.std
    layers[0] = weight, bias - weight @ agent.mean
    return [(weight.cpu().numpy().T, bias.cpu().numpy()) for weight, bias in layers]


def choose_actions(layers, observations, noise=0.0):
    """Choose an action for each observation: the policy's forward pass in NumPy.

    For a few observations through a network this small, NumPy takes a quarter of PyTorch's time.

    layers: from `policy_layers`; observations: (N, n_observations); returns (N,) int64. Without noise: the most
    probable actions. With standard Gumbel noise, (N, n_actions): samples from softmax(logits), because
    argmax(logits + noise) is distributed so (the Gumbel-max trick).
    """
    hidden = observations
    for weight, bias in layers[:-1]:
        hidden = np.maximum(hidden @ weight + bias, 0.0)
    weight, bias = layers[-1]
    return (hidden @ weight + bias + noise).argmax(axis=-1)


def evaluate_actions(actor, observations, actions):
    """Log-probabilities (B,) of the actions (B,) in the observations (B, n_observations), and the mean entropy."""
    log_probs = torch.log_softmax(actor(observations), dim=-1)
    entropy = (log_probs.exp() * log_probs).sum() / -len(log_probs)
    return log_probs.gather(1, actions[:, None]).squeeze(-1), entropy


def make_policy(agent, deterministic=True, seed=0):
    """The agent as a function `observation -> action`, for evaluation and video; seed: of the sampled actions."""
    layers = policy_layers(agent)
    n_actions = len(layers[-1][1])
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = 0.0 if deterministic else rng.gumbel(size=(1, n_actions))
        return int(choose_actions(layers, np.asarray(observation, dtype=np.float32)[None], noise)[0])

    return policy


# ---------------------------------------------------------------------------------------------------------------------
# The math
# ---------------------------------------------------------------------------------------------------------------------


def discounted_returns(rewards, gamma):
    """G_t = R_{t+1} + gamma * G_{t+1} for each step t of one episode (Sutton and Barto, 2018, equation 3.9).

    rewards: (T,), of which rewards[t] is the book's R_{t+1}. Returns (T,) float64.

    Nothing follows the last step, also where a time limit or --max-t cut the episode off: there is no critic here that
    could say what would have come. CartPole's 500 is such an end.
    """
    returns = np.empty(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following
    return returns


def standardise_returns(returns):
    """To mean 0 and standard deviation 1, (B,), as the course does; zeros where all are equal or there is but one."""
    deviation = returns.std(ddof=min(1, len(returns) - 1))
    return (returns - returns.mean()) / (deviation + np.finfo(np.float32).eps)


def merge_moments(mean, std, n, observations):
    """The mean and standard deviation (n_observations,) of n observations and these, (B, n_observations), together.

    Chan et al., 1979 (Updating Formulae and a Pairwise Algorithm for Computing Sample Variances). A deviation below
    0.001 is taken for that, lest a constant be blown up.
    """
    batch = torch.from_numpy(observations).to(mean.device)
    share, difference = len(batch) / (n + len(batch)), batch.mean(dim=0) - mean
    variance = (1 - share) * (std.square() + share * difference.square()) + share * batch.var(dim=0, correction=0)
    return mean + share * difference, variance.sqrt().clamp(min=1e-3)


def policy_objective(log_probs, returns, n_episodes):
    """What the update ascends: the mean over the episodes of the sum over t of G_t * ln pi(A_t | S_t). Both: (B,).

    Its gradient is that of the expected return (the policy gradient theorem; Sutton and Barto, 2018, equation 13.8).
    The book's algorithm has a factor gamma^t besides, which nearly nobody applies, the course neither: it would all but
    ignore what happens late in an episode.
    """
    return (log_probs * returns).sum() / n_episodes


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, run_folder):
    """Train an agent with REINFORCE and return it; with --resume, go on from the checkpoint in run_folder.

    Writes TensorBoard events, checkpoint.pt and, with --capture-video, videos/ into run_folder.
    """
    torch.set_num_threads(1)  # sharing work this small between threads costs more than it saves
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # the actions

    # Initialise the policy parameters theta.
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    n_observations, n_actions = envs[0].observation_space.shape[0], int(envs[0].action_space.n)
    agent = Agent(n_observations, n_actions, args.h_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)

    num_updates = args.n_training_episodes // args.num_envs
    first_update = global_step = 0
    recent_returns = deque(maxlen=100)  # of the episodes that ended last
    env_seeds = [args.seed + i for i in range(args.num_envs)]
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        first_update, global_step = checkpoint["update"], checkpoint["global_step"]
        recent_returns.extend(checkpoint["recent_returns"])
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # not the first episodes again
    for env, seed in zip(envs, env_seeds):
        env.reset(seed=seed)  # from here on, each draws its own episodes

    def save_checkpoint(update):
        state = {
            "script": SCRIPT,
            "args": hyperparameters_of(args),
            "update": update,
            "global_step": global_step,
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": rng.bit_generator.state,
            "recent_returns": list(recent_returns),
        }
        save_tensors(state, run_folder / "checkpoint.tmp")
        os.replace(run_folder / "checkpoint.tmp", run_folder / "checkpoint.pt")  # atomic: never half a checkpoint

    if args.track:
        start_wandb(args, run_folder)
    save_checkpoint(first_update)
    last_checkpoint = time.monotonic()
    first_step = global_step
    with (
        contextlib.ExitStack() as at_the_end,
        SummaryWriter(run_folder, purge_step=global_step + 1 if args.resume else None) as writer,
        Progress(num_updates * args.num_envs, first_update * args.num_envs, "episode") as progress,
    ):
        for env in envs:
            at_the_end.callback(env.close)
        writer.add_text("hyperparameters", markdown_table(hyperparameters_of(args)))
        # Loop forever (for each episode; with --num-envs, for each batch of episodes):
        for update in range(first_update, num_updates):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - update / num_updates) * args.lr

            # 1. Generate an episode S_0, A_0, R_1, ..., S_{T-1}, A_{T-1}, R_T, following pi(. | ., theta).
            observations, actions, rewards = play_episodes(envs, policy_layers(agent), rng, args.max_t)

            # 2. Loop for each step of the episode: the return G_t.
            returns = np.concatenate([discounted_returns(episode, args.gamma) for episode in rewards])

            # 3. theta <- theta + learning_rate * G_t * gradient of ln pi(A_t | S_t, theta), for all t in one pass.
            inputs = (torch.from_numpy(observations).to(device) - agent.mean) / agent.std
            log_probs, entropy = evaluate_actions(agent.actor, inputs, torch.from_numpy(actions).to(device))
            returns = torch.from_numpy(standardise_returns(returns)).float().to(device)
            objective = policy_objective(log_probs, returns, args.num_envs)
            optimizer.zero_grad()
            (-objective).backward()
            optimizer.step()
            if args.norm_obs:  # only now, for the update is one of the policy that acted
                agent.mean, agent.std = merge_moments(agent.mean, agent.std, global_step, observations)
            global_step += len(observations)

            steps_per_second = (global_step - first_step) / (time.monotonic() - progress.started)
            episode_returns = [sum(episode) for episode in rewards]
            recent_returns.extend(episode_returns)
            writer.add_scalar("charts/episodic_return", np.mean(episode_returns), global_step)
            writer.add_scalar("charts/episodic_length", len(observations) / args.num_envs, global_step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/SPS", steps_per_second, global_step)
            writer.add_scalar("losses/policy_loss", -objective.item(), global_step)
            writer.add_scalar("losses/entropy", entropy.item(), global_step)
            writer.flush()  # else TensorBoard's thread writes during the episode, and takes the GIL at every step of it
            progress.update((update + 1) * args.num_envs, recent_returns)

            tenth = (update + 1) * 10 // num_updates
            if args.capture_video and tenth > update * 10 // num_updates:
                with contextlib.closing(make_env(args.env_id, "rgb_array")) as env:
                    policy = make_policy(agent, deterministic=False, seed=args.seed)
                    record_video(env, policy, run_folder / "videos" / f"step-{global_step}.mp4")
            is_due = time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS
            if is_due or asked_to_stop or update == num_updates - 1:
                save_checkpoint(update + 1)
                last_checkpoint = time.monotonic()
            stop_if_asked()
    return agent


def play_episodes(envs, layers, rng, max_t):
    """Play one episode in each environment, side by side, with sampled actions. An episode that has ended waits.

    Filling the batch with new episodes instead would be faster and wrong: those that end early would be in it more
    often than their share.

    layers: of the policy; max_t: where an episode is cut off. Returns (observations, actions, rewards): float32
    (B, n_observations) and int64 (B,), one episode behind the other, and a list of each episode's rewards.
    """
    n_actions = len(layers[-1][1])
    current = [env.reset()[0] for env in envs]
    observations, actions, players = [], [], []  # a row for each t: of the episodes that are still going on
    rewards = [[] for _ in envs]
    playing = list(range(len(envs)))
    for _ in range(max_t):
        batch = np.array([current[i] for i in playing], dtype=np.float32)
        chosen = choose_actions(layers, batch, rng.gumbel(size=(len(playing), n_actions)))
        observations.append(batch)
        actions.append(chosen)
        players.append(playing)
        still_playing = []
        for i, action in zip(playing, chosen.tolist()):
            current[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(float(reward))
            if not (terminated or truncated):
                still_playing.append(i)
        playing = still_playing
        if not playing:
            break
    order = np.argsort(np.concatenate(players), kind="stable")  # by episode, and within it by time
    return np.concatenate(observations)[order], np.concatenate(actions)[order], rewards


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
    """Save the weights as a state_dict on the CPU, each tensor with its own memory."""
    save_tensors({name: tensor.cpu().clone() for name, tensor in agent.state_dict().items()}, path)


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
    msg.info(f"Playing {n_eval_episodes} evaluation episodes on seeds that training has not seen")
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
    actions = "the most probable action" if results["deterministic_eval"] else "sampled actions"
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

mean_reward **{metrics["mean_reward"]}**{more_text} over {results["n_eval_episodes"]} episodes with {actions},
on seeds that training never used. Trained by [{SCRIPT}]({SCRIPT}), which is all it takes to run it; the packages that
it needs stand at its top, and `uv run {SCRIPT}` installs them by itself.

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


def load_agent(source, env_id=None, render_mode=None):
    """Load the agent of a run folder or a Hub repo id: returns it and an environment for it.

    env_id: by default the one it was trained on.
    """
    hyperparameters = load_hyperparameters(source)
    if env_id is None:
        env_id = hyperparameters["env_id"]
        check_env_id(env_id, source)
    env = make_env(env_id, render_mode)
    h_size = hyperparameters.get("h_size")
    if not isinstance(h_size, list) or not all(isinstance(size, int) and 0 < size <= 2**16 for size in h_size):
        fail(f"{source}: its hyperparameters.json has no h_size, a list of the hidden layers' sizes")
    agent = Agent(env.observation_space.shape[0], int(env.action_space.n), h_size)
    state_dict = load_tensors(find_package(source) / MODEL_FILE, source)
    if not isinstance(state_dict, dict):
        fail(f"{source}: {MODEL_FILE} holds a {type(state_dict).__name__}, not a state_dict")
    for name, tensor in agent.state_dict().items():
        shape = tuple(getattr(state_dict.get(name), "shape", ()))
        if shape != tuple(tensor.shape):
            fail(f"{source}: {name} in {MODEL_FILE} has shape {shape}, this agent's has {tuple(tensor.shape)}")
    try:
        agent.load_state_dict(state_dict)
    except RuntimeError as error:
        fail(f"{source}: {MODEL_FILE} does not fit: {' '.join(str(error).split())}")
    return agent, env


def load_from_hub(repo_id, filename):
    """Download a file of tensors from the Hub and load it without running anything in it."""
    check_repo_id(repo_id)
    try:
        path = hf_hub_download(repo_id, filename)
    except RemoteEntryNotFoundError:
        fail(f"{repo_id} has no file {filename}")
    except (HTTPError, OSError) as error:
        fail(hub_problem(error, repo_id))
    return load_tensors(Path(path), repo_id)


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
    """Train, evaluate, or push, as the flags say. Returns the trained agent."""
    args = parse_args(argv)
    seeds = range(args.seed + EVAL_SEED, args.seed + EVAL_SEED + args.n_eval_episodes)
    if args.push:
        if not Path(args.push).exists():
            fail(f"--push {args.push}: there is no such folder")
        package = find_package(args.push)
        read_package(package)  # so that a folder that is none is refused before the Hub hears of it
        check_hub_access(args.repo_id)
        return push_to_hub(package, args.repo_id)
    if args.evaluate == "random":
        env = make_env(args.env_id, "human" if args.render else "rgb_array")
        return evaluate(env, random_policy(env, args.seed), args, seeds)
    if args.evaluate:
        agent, env = load_agent(args.evaluate, args.env_id, "human" if args.render else "rgb_array")
        return evaluate(env, make_policy(agent, args.deterministic_eval, args.seed), args, seeds)

    env = make_env(args.env_id, "rgb_array")
    if args.repo_id:
        check_hub_access(args.repo_id)
    run_folder = Path(args.resume) if args.resume else new_run_folder(args)
    msg.info(f"{ALGORITHM} on {args.env_id}, into {run_folder}")
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in hyperparameters_of(args).items()), 120))
    (run_folder / SCRIPT).write_bytes(script_source().encode())  # now: the file may be edited while it trains
    with resumable(run_folder):
        agent = train(args, run_folder)
        policy = make_policy(agent, args.deterministic_eval, args.seed)
        package_to_hub(
            agent,
            policy,
            env,
            args.env_id,
            hyperparameters_of(args),
            seeds,
            run_folder,
            repo_id=args.repo_id,
            logs=run_folder,
        )
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
