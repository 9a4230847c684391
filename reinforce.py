"""REINFORCE (Monte-Carlo policy gradient) in one file: trains, scores, films and packages an agent.

    python reinforce.py                                                       # CartPole-v1, solved in seconds
    python reinforce.py --env-id Pixelcopter-PLE-v0 --repo-id user/copter     # train, score, film, push to the Hub
    python reinforce.py --evaluate user/copter                                # load it back, score it, film it
    tensorboard --logdir runs

The policy pi(a | s, theta) is a network that gives each action a probability. The algorithm repeats, for each episode:
  1. Generate an episode S_0, A_0, R_1, ..., S_{T-1}, A_{T-1}, R_T, following the policy.
  2. For each step t of it, sum up what followed: G_t = R_{t+1} + gamma * R_{t+2} + gamma^2 * R_{t+3} + ...
  3. Make actions that were followed by high returns more probable, those that were followed by low ones less so:
     theta <- theta + learning_rate * sum over t of G_t * gradient of ln pi(A_t | S_t, theta)

With --num-envs each update averages over episodes played side by side: fewer updates, each in a better direction.

Sources: Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992);
Reinforcement Learning: An Introduction (Sutton and Barto, 2nd edition, 2018,
http://incompleteideas.net/book/the-book.html), sections 13.3 and 13.4.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "gymnasium[classic-control]>=1.2,<2", "numpy>=2,<3", "tensorboard>=2.18,<3",
#     "huggingface_hub>=1.20,<3", "safetensors>=0.4.3,<1", "imageio>=2.36,<3", "imageio-ffmpeg>=0.6,<1",
#     "tqdm>=4.66,<5", "wasabi>=1.1,<2",
# ]
# ///

import argparse
import dataclasses
import io
import json
import linecache
import math
import os
import signal
import sys
import threading
import time
from bisect import bisect_left
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from wasabi import Printer

SCRIPT = "reinforce.py"  # the name of this file in the package
ALGORITHM = "Reinforce"
CARD_TAGS = ["reinforce", "reinforcement-learning", "custom-implementation", "deep-rl-class"]
CHECKPOINT_SECONDS = 10  # what a stop costs at the most, besides the update under way
EXPECTED = (gym.error.Error, HTTPError, ImportError, HFValidationError, SafetensorError, json.JSONDecodeError, OSError)
MAX_STEPS = 10_000  # where an environment has no time limit of its own, so that a perfect player comes to an end
NEW_ON_RESUME = {"resume", "n_training_episodes", "n_eval_episodes", "repo_id", "track", "cuda", "capture_video"}
IN_NOTEBOOK = "ipykernel" in sys.modules  # in a Jupyter or Colab cell
msg = Printer(pretty=sys.stdout.isatty())

# --- Flags -----------------------------------------------------------------------------------------------------------

# What differs from the defaults below, which are the course's, per environment. Flags on the command line win over the
# row. Averaging over several episodes and a learning rate that falls make the last policy a good one. In Pixelcopter,
# where positions are 24 times as large as momentum, learning needs standardised observations: without them the policy
# soon climbs straight into the ceiling, always, and then there is nothing left to learn from. With the course's gamma,
# 0.99, it learns far more slowly.
COPTER = dict(h_size=[64, 128], n_training_episodes=24_000, max_t=10_000, gamma=0.95, lr=4e-3, num_envs=16)
TUNED = {
    "CartPole-v1": dict(n_training_episodes=1_600, num_envs=8, anneal_lr=True, norm_obs=True),
    "Pixelcopter-PLE-v0": dict(anneal_lr=True, norm_obs=True, **COPTER),
}


def parse_args(argv=None):
    """Read the flags: the command line wins over a saved run's flags or the TUNED row, those over the defaults here."""
    about = dict(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(SCRIPT, description=__doc__.splitlines()[0], add_help=False, **about)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--env-id", type=full_id, default="CartPole-v1", help="any with vector observations and discrete actions")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", metavar="RUN_FOLDER", help="go on from the checkpoint of an interrupted run, with its flags")
    either("--evaluate", metavar="SOURCE", help="no training: score and film a run folder, a Hub repo id, or 'random'")
    flag("--render", action=switch, default=False, help="with --evaluate: play in a window")
    flag("--exp-name", default="reinforce", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=int, default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", action=switch, default=True, help="deterministic cuDNN")
    flag("--cuda", action=switch, default=True, help="use a GPU if there is one")
    flag("--track", action=switch, default=False, help="log to Weights & Biases as well (pip install wandb)")
    flag("--capture-video", action=switch, default=False, help="film ten episodes on the way")
    flag("--n-training-episodes", type=int, default=1000, help="episodes, all environments together")
    flag("--max-t", type=int, default=1000, help="in training, an episode is cut off after this many steps")
    flag("--num-envs", type=int, default=1, help="episodes per update, played side by side")
    flag("--h-size", type=int, nargs="+", default=[16], help="units of each hidden layer: 16, or 64 128 for two layers")
    flag("--lr", "--learning-rate", type=float, default=1e-2, help="step size of Adam")
    flag("--anneal-lr", action=switch, default=False, help="the learning rate falls linearly to 0 over the training")
    flag("--gamma", type=float, default=1.0, help="discount factor")
    flag("--norm-obs", action=switch, default=False, help="standardise observations by what training has seen so far")
    flag("--n-eval-episodes", type=int, default=100, help="episodes that the score is measured over")
    flag("--deterministic-eval", action=switch, default=True, help="score the most probable actions, or sampled ones")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")

    argv = argv if argv is not None else [] if IN_NOTEBOOK else sys.argv[1:]  # a kernel's own arguments are not ours
    known, _ = parser.parse_known_args(argv)  # --env-id, --resume and --evaluate decide the defaults of all the others
    flag("-h", "--help", action="help", help="show this, with the defaults for --env-id, and exit")
    checkpoint = load_checkpoint(known.resume) if known.resume else {}
    saved = checkpoint.get("args", TUNED.get(known.env_id, {}))
    if known.evaluate and known.evaluate != "random":
        saved = open_package(known.evaluate, known.env_id)[1]
    parser.set_defaults(**{name: saved[name] for name in saved.keys() & hyperparameters_of(known).keys()})
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = name in ("max_t", "num_envs", "h_size", "n_eval_episodes")
        most = {"gamma": 1, "n_eval_episodes": 10**6}.get(name, 2**63 - 1)
        for number in value if isinstance(value, list) else [value]:
            if number == "" or (isinstance(number, int | float) and not least <= number <= most):
                parser.error(f"--{name.replace('_', '-')} {number!r} is out of range")
        if name not in NEW_ON_RESUME and checkpoint.get("args", {}).get(name, value) != value:
            parser.error(f"--{name.replace('_', '-')} cannot change on --resume")
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if args.render and not (args.evaluate and has_display):
        parser.error("--render goes with --evaluate, and needs a display")
    if args.evaluate:
        return args  # the rest is about training
    args.n_training_episodes -= args.n_training_episodes % args.num_envs  # whole updates: what will really be trained
    if args.n_training_episodes < max(args.num_envs, checkpoint.get("episodes", 0)):
        parser.error(f"--n-training-episodes is less than one update's {args.num_envs}, or than --resume's run has had")
    return args


# --- The environment -------------------------------------------------------------------------------------------------

# The name that leaderboards and model cards know. What v3 changed is the observation bounds and how it resets.
gym.registry.setdefault("LunarLander-v2", dataclasses.replace(gym.spec("LunarLander-v3"), id="LunarLander-v2"))


def full_id(env_id):
    """An id with its version: CartPole-v1, the newest, for CartPole; LunarLander-v2, which leaderboards know."""
    return next((known for known in reversed(gym.registry) if known.rpartition("-v")[0] == env_id), env_id)


def make_env(env_id, render_mode=None):
    """Make one environment. A gymnasium.error.Error says what is wrong with its name, or its spaces for this script.

    Where it has no time limit of its own, it gets one of MAX_STEPS.
    """
    if render_mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames need no display, but SDL looks for one
    spec = gym.registry.get(env_id, env_id)  # given the id alone, gymnasium warns where it is old
    env = gym.make(spec, render_mode=render_mode, disable_env_checker=True)
    if "rgb_array" not in env.metadata.get("render_modes", ()) or "render_fps" not in env.metadata:
        raise gym.error.Error(f"{env_id}: it cannot be filmed, which takes render mode rgb_array and a render_fps")
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        raise gym.error.Error(f"{env_id}: this script needs discrete actions, and its are {env.action_space}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        raise gym.error.Error(f"{env_id}: this script needs vector observations, and its are {env.observation_space}")
    return env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, MAX_STEPS)


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

        # The copter's 2 x 2 and a block's 4 x 9 pixels overlap. The cave counts by the copter's exact height, where a
        # piece's pixels [x - 2, x + 2) overlap its [15, 17).
        crashed = y < 6 or y > 42
        for block_x, block_y in self.blocks:
            crashed |= 14 <= block_x < 19 and -4 <= int(y) - block_y <= 5
        for piece_y in self.piece_y[bisect_left(self.piece_x, 14) : bisect_left(self.piece_x, 19)]:
            crashed |= y - 2.4 <= piece_y - 12 or y >= piece_y + 12

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

    def _observation(self):
        x, y = min(block for block in self.blocks if block[0] > 16)
        middle = self.piece_y[bisect_left(self.piece_x, 14)]
        state = self.y, self.momentum, self.y - (middle - 12), middle + 12 - self.y, x - 16, y, y + 9
        return np.array(state, dtype=np.float32)


gym.registry["Pixelcopter-PLE-v0"] = gym.envs.registration.EnvSpec("Pixelcopter-PLE-v0", Pixelcopter)


# --- The agent -------------------------------------------------------------------------------------------------------
class Agent(nn.Module, PyTorchModelHubMixin):
    """The policy: a network from observations to the logits of the actions, with hidden layers of the sizes h_size.

    The observations' mean and standard deviation are part of the model: it is trained on standardised ones.
    """

    def __init__(self, n_observations, n_actions, h_size=(16,)):
        super().__init__()
        sizes = pairwise([n_observations, *h_size, n_actions])
        layers = [layer for n_inputs, n_outputs in sizes for layer in (nn.Linear(n_inputs, n_outputs), nn.ReLU())]
        self.actor = nn.Sequential(*layers[:-1])
        self.register_buffer("mean", torch.zeros(n_observations))
        self.register_buffer("std", torch.ones(n_observations))


def policy_layers(agent):
    """The weights of the policy as [(weight, bias), ...] NumPy arrays, for `act`.

    Standardising the observations is an affine map, so it goes into the first layer.
    """
    layers = [(layer.weight.detach(), layer.bias.detach()) for layer in agent.actor if isinstance(layer, nn.Linear)]
    weight, bias = layers[0]
    weight = weight / agent.std
    layers[0] = weight, bias - weight @ agent.mean
    return [(weight.cpu().numpy().T, bias.cpu().numpy()) for weight, bias in layers]


def act(layers, observations, noise=0.0):
    """Choose an action for each observation: the policy's forward pass in NumPy.

    For a few observations through a network this small, that takes a quarter of PyTorch's time. layers: from
    `policy_layers`; observations: (N, n_observations); returns (N,) int64. Without noise: the most probable actions.
    With standard Gumbel noise, (N, n_actions): samples from softmax(logits), because argmax(logits + noise) is
    distributed so (the Gumbel-max trick).
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
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = 0.0 if deterministic else rng.gumbel(size=len(layers[-1][1]))
        return int(act(layers, np.asarray(observation, dtype=np.float32)[None], noise)[0])

    return policy


# --- The math --------------------------------------------------------------------------------------------------------
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


def merge_moments(mean, std, n, batch):
    """The mean and standard deviation (n_observations,) of n observations and a batch, (B, n_observations), together.

    Chan et al., 1979 (Updating Formulae and a Pairwise Algorithm for Computing Sample Variances). A deviation below
    0.001 is taken for that, lest a constant be blown up.
    """
    share, difference = len(batch) / (n + len(batch)), batch.mean(dim=0) - mean
    variance = (1 - share) * (std.square() + share * difference.square()) + share * batch.var(dim=0, correction=0)
    return mean + share * difference, variance.sqrt().clamp(min=1e-3)


# --- Training --------------------------------------------------------------------------------------------------------
def play_episodes(envs, layers, rng, max_t):
    """Play one episode in each environment, side by side, with sampled actions. An episode that has ended waits.

    Filling the batch with new episodes instead would be faster and wrong: those that end early would be in it more
    often than their share.

    layers: of the policy; max_t: where an episode is cut off. Returns (observations, actions, rewards): float32
    (B, n_observations) and int64 (B,), one episode behind the other, and a list of each episode's rewards.
    """
    current = [env.reset()[0] for env in envs]
    observations, actions, players = [], [], []  # a row for each t: of the episodes that are still going on
    rewards = [[] for _ in envs]
    playing = list(range(len(envs)))
    while playing and len(players) < max_t:
        batch = np.array([current[i] for i in playing], dtype=np.float32)
        chosen = act(layers, batch, rng.gumbel(size=(len(playing), len(layers[-1][1]))))
        observations.append(batch)
        actions.append(chosen)
        players.append(playing)
        for i, action in zip(playing, chosen.tolist()):
            current[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(float(reward))
            if terminated or truncated:
                playing = [other for other in playing if other != i]
    order = np.argsort(np.concatenate(players), kind="stable")  # by episode, and within it by time
    return np.concatenate(observations)[order], np.concatenate(actions)[order], rewards


def update(agent, optimizer, observations, actions, returns, n_episodes):
    """theta <- theta + learning_rate * G_t * gradient of ln pi(A_t | S_t, theta), for all steps of n_episodes at once.

    observations: (B, n_observations); actions, returns: (B,). Returns statistics, {name: 0-d tensor}.

    What this ascends is the mean over the episodes of the sum over t of G_t * ln pi(A_t | S_t, theta), whose gradient
    is on average that of the expected return (the policy gradient theorem; Sutton and Barto, 2018, equations 13.5 and
    13.8), but for the scale, and a small bias, that standardising brings. The book's algorithm has a factor gamma^t
    besides, which nearly nobody applies, the course neither: it would all but ignore what happens late in an episode.
    """
    log_probs, entropy = evaluate_actions(agent.actor, (observations - agent.mean) / agent.std, actions)
    objective = (returns * log_probs).sum() / n_episodes
    optimizer.zero_grad()
    (-objective).backward()
    optimizer.step()
    return {"policy_loss": -objective.detach(), "entropy": entropy.detach()}


@torch.enable_grad()  # in a notebook, a Ctrl-C inside no_grad() may leave gradients off: this puts them back
def train(args, run_folder):
    """Train an agent with REINFORCE; with --resume, go on from the checkpoint in run_folder, where checkpoints and
    curves go. Returns the agent and the number of steps it was trained for.
    """
    torch.set_num_threads(1)  # sharing work this small between threads costs more than it saves
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # the actions

    # Initialise the policy parameters theta.
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    agent = Agent(envs[0].observation_space.shape[0], int(envs[0].action_space.n), args.h_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True)

    num_updates = args.n_training_episodes // args.num_envs
    episodes = global_step = 0
    env_seeds = [args.seed + i for i in range(args.num_envs)]
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        episodes, global_step = checkpoint["episodes"], checkpoint["global_step"]
        msg.info(f"Resumed after {episodes:,} episodes, {args.n_training_episodes - episodes:,} to go")
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # not the first episodes again
    for env, seed in zip(envs, env_seeds):
        env.reset(seed=seed)  # from here on, each draws its own episodes

    first_step, last_checkpoint = global_step, 0.0
    # flush_secs: for so long, a Ctrl-C in a bad moment waits for TensorBoard's thread.
    logs = {"log_dir": run_folder / "hub" / "logs", "flush_secs": 2, "purge_step": global_step + 1}
    with SummaryWriter(**logs) as writer, progress_bar(args.n_training_episodes, episodes, "episode") as bar:
        writer.add_text("hyperparameters", f"```\n{json.dumps(hyperparameters_of(args), indent=2)}\n```")
        # Loop forever (for each episode; with --num-envs, for each batch of episodes):
        for iteration in range(episodes // args.num_envs, num_updates):
            learning_rate = args.lr * (1 - iteration / num_updates if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate

            # 1. Generate an episode S_0, A_0, R_1, ..., S_{T-1}, A_{T-1}, R_T, following pi(. | ., theta).
            observations, actions, rewards = play_episodes(envs, policy_layers(agent), rng, args.max_t)

            # 2. Loop for each step of the episode: the return G_t.
            returns = np.concatenate([discounted_returns(episode, args.gamma) for episode in rewards])
            returns = standardise_returns(returns).astype(np.float32)

            # 3. theta <- theta + learning_rate * G_t * gradient of ln pi(A_t | S_t, theta).
            batch = [torch.from_numpy(array).to(device) for array in (observations, actions, returns)]
            losses = update(agent, optimizer, *batch, args.num_envs)
            if args.norm_obs:  # only now, for the update is one of the policy that acted
                agent.mean, agent.std = merge_moments(agent.mean, agent.std, global_step, batch[0])
            global_step += len(observations)
            episodes = (iteration + 1) * args.num_envs

            # 4. Statistics: the means over these episodes.
            curves = {f"losses/{name}": value.item() for name, value in losses.items()}
            curves["charts/learning_rate"] = learning_rate
            curves["charts/episodic_return"] = np.mean([sum(episode) for episode in rewards])
            curves["charts/episodic_length"] = len(observations) / args.num_envs
            bar.set_postfix_str(f"return {curves['charts/episodic_return']:.2f}", refresh=False)
            bar.update(args.num_envs)
            curves["charts/SPS"] = (global_step - first_step) / bar.format_dict["elapsed"]
            for name, value in curves.items():
                writer.add_scalar(name, value, global_step)
            writer.flush()  # else TensorBoard's thread writes during the episode, and takes the GIL at every step of it

            if time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS or iteration == num_updates - 1:
                state = dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), rng=rng.bit_generator.state)
                save_checkpoint(run_folder, args, episodes=episodes, global_step=global_step, **state)
                last_checkpoint = time.monotonic()
            if args.capture_video and (iteration + 1) * 10 // num_updates > iteration * 10 // num_updates:
                policy = make_policy(agent, deterministic=False, seed=args.seed)
                record_video(make_env(args.env_id, "rgb_array"), policy, run_folder / f"videos/step-{global_step}.mp4")
    return agent, global_step


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


def load_agent(source, env_id=None, render_mode=None):
    """Load the agent of a run folder or a Hub repo id: returns it and an environment, by default its training's."""
    package, flags = open_package(source, env_id)
    env = make_env(env_id or flags["env_id"], render_mode)
    sizes = {"n_observations": env.observation_space.shape[0], "n_actions": int(env.action_space.n)}
    try:
        return Agent.from_pretrained(package, strict=True, **sizes), env
    except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:
        raise OSError(f"{source}: the model does not fit {env.spec.id}: {error!s:.300}") from error


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
        first_seed = (args.seed + 1) * 1_000_000  # a block for each training seed, which training never uses
        seeds = range(first_seed, first_seed + args.n_eval_episodes)
        render_mode = "human" if args.render else None  # could it be drawn, LunarLander would simulate each spark
        film_env = None if args.render else make_env(args.env_id, "rgb_array")
        if args.evaluate and args.evaluate != "random":
            agent, env = load_agent(args.evaluate, args.env_id, render_mode)
            policy = make_policy(agent, args.deterministic_eval, first_seed)
        else:
            env = make_env(args.env_id, render_mode)  # what is wrong with it is said now
            env.action_space.seed(args.seed)
            policy = lambda _: env.action_space.sample()  # noqa: E731
        if args.evaluate:
            return score_and_film(env, film_env, policy, seeds, None if args.render else new_folder(args, "evaluate"))

        run_folder = start_run(args)
        if args.env_id not in TUNED and not args.resume:
            msg.warn(f"There are no tuned settings for {args.env_id}: the plain defaults hold")
        agent, global_step = train(args, run_folder)
        partial = run_folder / "hub.partial"  # the package, as long as it is not complete
        results = score_and_film(env, film_env, make_policy(agent, args.deterministic_eval, first_seed), seeds, partial)
        actions = "the most probable" if args.deterministic_eval else "sampled"
        results["scored_with"] = f"{actions} actions, on seeds that training never used"
        agent.save_pretrained(partial)
        package_to_hub(run_folder, args, results | {"env_name": args.env_id, "global_step": global_step})
        return agent
    except (KeyboardInterrupt, *EXPECTED) as error:
        can_resume = run_folder and (run_folder / "checkpoint.pt").is_file()
        why = " ".join(str(error).split()) or "stopped"
        hub = "Hugging Face Hub: " if isinstance(error, HTTPError) else ""
        sys.exit(f"error: {hub}{why}{f'; go on with: --resume {run_folder}' if can_resume else ''}")


if __name__ == "__main__":
    agent = main()
