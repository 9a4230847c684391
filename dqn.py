"""DQN (Deep Q-Network) in one file: trains an agent, scores it, films it and packages it for the Hub.

    python dqn.py                                                   # CartPole-v1
    python dqn.py --env-id LunarLander-v2 --repo-id user/dqn        # train, score, film, push to the Hugging Face Hub
    python dqn.py --evaluate user/dqn                               # load it back, score it, film it
    tensorboard --logdir runs

This is q_learning.py with a network in the table's place: it maps a state to Q(s, a), the return to expect from action
a there and the best actions ever after. What a network needs, and a table does not:
  - Batches. A step that corrects one value of a network moves all others with it, so it is taken for many at once.
  - The replay buffer. Steps that follow each other are alike, and a network that learns from them alone forgets the
    rest. So batches are drawn at random from the last --buffer-size steps.
  - The target network. An older copy of the network says what the next state is worth; or else the targets would run
    away from the values that follow them.

Papers: Human-level control through deep reinforcement learning (Mnih et al., 2015), Deep Reinforcement Learning with
Double Q-learning (van Hasselt et al., 2016, https://arxiv.org/abs/1509.06461), Temporally-Extended Epsilon-Greedy
Exploration (Dabney et al., 2021, https://arxiv.org/abs/2006.01782; what --explore-duration is after).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "gymnasium[box2d,classic-control]>=1.2,<2", "numpy>=2,<3", "tensorboard>=2.18,<3",
#     "huggingface_hub>=1.20,<3", "safetensors>=0.4.3,<1", "imageio>=2.36,<3", "imageio-ffmpeg>=0.6,<1",
#     "tqdm>=4.66,<5", "wasabi>=1.1,<2",
# ]
# ///

import argparse
import copy
import dataclasses
import io
import json
import linecache
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's `act` is no faster on two cores, but busy on both

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

SCRIPT = "dqn.py"  # the name of this file in the package
ALGORITHM = "DQN"
CARD_TAGS = ["dqn", "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation", "deep-rl-course"]
CHECKPOINT_SECONDS = 10  # what a stop costs at the most, besides the iteration under way
CURVE_STEPS = 1000  # environment steps between two points of the curves
EXPECTED = (gym.error.Error, HTTPError, ImportError, HFValidationError, SafetensorError, json.JSONDecodeError, OSError)
NEW_ON_RESUME = {"resume", "total_timesteps", "n_eval_episodes", "repo_id", "track", "cuda", "capture_video"}
IN_NOTEBOOK = "ipykernel" in sys.modules  # in a Jupyter or Colab cell
msg = Printer(pretty=sys.stdout.isatty())

# --- Flags -----------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, per environment. Flags on the command line win over the row. The reward
# scales keep most errors below 1, where the loss is quadratic: beyond, where it is linear, an episode's end, CartPole's
# fall or the 100 points for LunarLander's rest, would weigh too little.
# CartPole's environments are cheap: six steps for each gradient step show the edge of the track often enough.
CARTPOLE = dict(total_timesteps=240_000, anneal_lr=True, num_envs=8, h_size=[256, 256], batch_size=64, tau=0.1)
CARTPOLE |= dict(reward_scale=0.02, buffer_size=100_000, target_network_frequency=48, end_e=0.01)
CARTPOLE |= dict(exploration_fraction=0.05, learning_starts=1_000, train_frequency=48, gradient_steps=8)
ACROBOT = dict(total_timesteps=200_000, learning_rate=1e-3, anneal_lr=True, num_envs=8, h_size=[128, 128], tau=0.01)
ACROBOT |= dict(buffer_size=100_000, target_network_frequency=8, exploration_fraction=0.1, reward_scale=0.1)
ACROBOT |= dict(learning_starts=1_000, train_frequency=8, gradient_steps=4)
# To be found by chance, MountainCar's goal takes long runs in one direction.
MOUNTAIN_CAR = dict(total_timesteps=200_000, learning_rate=5e-4, anneal_lr=True, num_envs=4, h_size=[128, 128])
MOUNTAIN_CAR |= dict(buffer_size=100_000, target_network_frequency=64, exploration_fraction=0.2, explore_duration=20)
MOUNTAIN_CAR |= dict(learning_starts=1_000, train_frequency=16, gradient_steps=8, reward_scale=0.02)
# Here gamma is low enough that values that are too high do not keep each other up.
LUNAR_LANDER = dict(total_timesteps=600_000, learning_rate=1e-3, anneal_lr=True, num_envs=8, h_size=[128, 128])
LUNAR_LANDER |= dict(reward_scale=0.01, gamma=0.98, tau=0.01, buffer_size=200_000, target_network_frequency=8)
LUNAR_LANDER |= dict(end_e=0.02, exploration_fraction=0.05, learning_starts=5_000, train_frequency=8, gradient_steps=2)
TUNED = {
    "CartPole-v1": CARTPOLE,
    "Acrobot-v1": ACROBOT,
    "MountainCar-v0": MOUNTAIN_CAR,
    "LunarLander-v2": LUNAR_LANDER,
    "LunarLander-v3": LUNAR_LANDER,
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
    flag("--exp-name", default="dqn", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=int, default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", action=switch, default=True, help="deterministic cuDNN")
    flag("--cuda", action=switch, default=True, help="use a GPU if there is one")
    flag("--track", action=switch, default=False, help="log to Weights & Biases as well (pip install wandb)")
    flag("--capture-video", action=switch, default=False, help="film ten episodes on the way")
    flag("--total-timesteps", type=int, default=500_000, help="environment steps, all environments together")
    flag("--learning-rate", type=float, default=2.5e-4, help="step size of Adam")
    flag("--anneal-lr", action=switch, default=False, help="the learning rate falls linearly to 0 at --total-timesteps")
    flag("--num-envs", type=int, default=1, help="environments stepped side by side")
    flag("--h-size", type=int, nargs="+", default=[120, 84], help="units of each hidden layer")
    flag("--buffer-size", type=int, default=10_000, help="steps that the replay buffer holds")
    flag("--reward-scale", type=float, default=1.0, help="learn from rewards times this; scores stay the game's own")
    flag("--gamma", type=float, default=0.99, help="discount factor")
    flag("--tau", type=float, default=1.0, help="how far the target network moves to the network: 1 is a copy")
    flag("--target-network-frequency", type=int, default=500, help="steps between two moves of the target network")
    flag("--batch-size", type=int, default=128, help="steps that a gradient step is taken on")
    flag("--start-e", type=float, default=1.0, help="epsilon, the share of random actions, at the start")
    flag("--end-e", type=float, default=0.05, help="epsilon in the end")
    flag("--exploration-fraction", type=float, default=0.5, help="share of --total-timesteps over which epsilon falls")
    flag("--explore-duration", type=float, default=1.0, help="steps that a random action is kept for, on average")
    flag("--learning-starts", type=int, default=10_000, help="steps before the first gradient step")
    flag("--train-frequency", type=int, default=10, help="steps between two rounds of gradient steps")
    flag("--gradient-steps", type=int, default=1, help="gradient steps in a round")
    flag("--double-q", action=switch, default=True, help="Double DQN: one network picks the next action, one rates it")
    flag("--n-eval-episodes", type=int, default=100, help="episodes that the score is measured over")
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
        least = name.endswith(("_envs", "_size", "_frequency", "_steps", "_duration", "_episodes"))
        unit = ("gamma", "tau", "start_e", "end_e", "exploration_fraction")
        most = 1 if name in unit else 10**6 if name == "n_eval_episodes" else 2**63 - 1
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
    if args.train_frequency % args.num_envs or args.buffer_size % args.num_envs:
        parser.error(f"--train-frequency and --buffer-size must be multiples of --num-envs {args.num_envs}")
    args.total_timesteps -= args.total_timesteps % args.train_frequency  # whole iterations: what will really be trained
    if args.total_timesteps < checkpoint.get("global_step", 0) or args.total_timesteps <= args.learning_starts:
        parser.error("--total-timesteps is less than --resume's run has had already, or ends before --learning-starts")
    return args


# --- The environment -------------------------------------------------------------------------------------------------

# The name that leaderboards and model cards know. What v3 changed is the observation bounds and how it resets.
gym.registry.setdefault("LunarLander-v2", dataclasses.replace(gym.spec("LunarLander-v3"), id="LunarLander-v2"))


def full_id(env_id):
    """An id with its version: CartPole-v1, the newest, for CartPole; LunarLander-v2, which leaderboards know."""
    return next((known for known in reversed(gym.registry) if known.rpartition("-v")[0] == env_id), env_id)


def make_env(env_id, render_mode=None):
    """Make one environment. A gymnasium.error.Error says what is wrong with its name, or its spaces for this script."""
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
    return env


# --- The agent -------------------------------------------------------------------------------------------------------
class Agent(nn.Module, PyTorchModelHubMixin):
    """The network: from observations (B, n_observations) to the values Q(s, a) of all actions, (B, n_actions)."""

    def __init__(self, n_observations, n_actions, h_size=(120, 84)):
        super().__init__()
        sizes = pairwise([n_observations, *h_size, n_actions])
        layers = [layer for n_inputs, n_outputs in sizes for layer in (nn.Linear(n_inputs, n_outputs), nn.ReLU())]
        self.q_network = nn.Sequential(*layers[:-1])

    def forward(self, observations):
        return self.q_network(observations)


def flatten_parameters(module):
    """Move all parameters into one flat vector, and their gradients into its .grad; returns the vector.

    The module works as before, each parameter a view of its stretch of the vector. But one kernel now zeroes all
    gradients and one steps all weights: in networks this small, the number of kernels is what an update costs.
    """
    parameters = list(module.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat, parameters)
    for parameter, grad in zip(parameters, flat.grad.split([parameter.numel() for parameter in parameters])):
        parameter.grad = grad.view_as(parameter)
    return flat


def numpy_layers(network):
    """The weights of a network's linear layers as [(weight, bias), ...] NumPy arrays, for `act`."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in linear]


def act(layers, observations):
    """Choose the action of the highest value for each observation: the network's forward pass in NumPy.

    For a few observations through a network this small, that takes a quarter of PyTorch's time. layers: from
    `numpy_layers`; observations: (N, n_observations); returns (N,) int64.
    """
    hidden = observations
    for weight, bias in layers[:-1]:
        hidden = np.maximum(hidden @ weight + bias, 0.0)
    weight, bias = layers[-1]
    return (hidden @ weight + bias).argmax(axis=-1)


def make_policy(agent):
    """The agent as a function `observation -> action`, for evaluation and video: the action of the highest value."""
    layers = numpy_layers(agent.q_network)
    return lambda observation: int(act(layers, np.asarray(observation, dtype=np.float32)[None])[0])


# --- The math --------------------------------------------------------------------------------------------------------
def linear_schedule(start, end, duration, step):
    """Epsilon falls linearly from start to end within so many steps, and stays there."""
    return end if step >= duration else start + (end - start) * step / duration


def td_targets(rewards, next_values, terminated, gamma):
    """What a step showed its action to be worth: r + gamma * Q(s', a') (Mnih et al., 2015, algorithm 1).

    next_values: Q(s', a') of the best action a' in the state s' that the step led to. After a terminal state nothing
    follows, so the target is the reward alone. A time limit is no such end: the target of a truncated step bootstraps
    like any other.
    """
    return rewards + gamma * (1 - terminated) * next_values


# --- Training --------------------------------------------------------------------------------------------------------
def update(agent, target, parameters, optimizer, minibatch, args):
    """One gradient step on a minibatch: the Bellman update of q_learning.py, for a network. target: an older agent.

    minibatch: observations and next observations (B, n_observations), actions, rewards and terminated (B, 1), all
    float32. Returns statistics, {name: 0-d tensor}. Nothing here waits for the device.
    """
    observations, next_observations, actions, rewards, terminated = minibatch
    with torch.no_grad():
        next_values = target(next_observations)
        # The highest of several estimates tends to be too high: its error may be why it is the highest. So Double DQN
        # takes the action that the network thinks best, with the value that the target network gives it.
        best = (agent(next_observations) if args.double_q else next_values).argmax(dim=1, keepdim=True)
        targets = td_targets(rewards, next_values.gather(1, best), terminated, args.gamma)
    values = agent(observations).gather(1, actions.long())
    loss = nn.functional.smooth_l1_loss(values, targets)  # beyond an error of 1 linear: the paper clips the gradient

    parameters.grad.zero_()
    loss.backward()
    optimizer.step()
    return {"td_loss": loss.detach(), "q_values": values.detach().mean()}


@torch.enable_grad()  # in a notebook, a Ctrl-C inside no_grad() may leave gradients off: this puts them back
def train(args, run_folder):
    """Train an agent with DQN; with --resume, go on from the checkpoint in run_folder. Checkpoints and curves go there.

    Returns the agent and the number of steps it was trained for. The replay buffer takes 4 * (2 * n_observations + 3)
    bytes for each of --buffer-size steps, in memory and in the checkpoint: 15 MB for LunarLander's 200 thousand.
    """
    torch.set_num_threads(1)  # sharing work this small between threads costs more than it saves
    torch.set_flush_denormal(True)  # Adam's averages for units that never fire fade into numbers that CPUs are slow at
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # everything random after that: actions and minibatches

    # SAME_STEP: where an episode ends, the environment returns the next one's first observation in the same step, and
    # the old one's last observation in infos. So every transition in the buffer lies inside one episode.
    how = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False}  # the buffer keeps its own copy
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args.env_id)] * args.num_envs, **how)
    n_observations, n_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    agent = Agent(n_observations, n_actions, args.h_size).to(device)
    target = copy.deepcopy(agent)
    parameters, target_parameters = flatten_parameters(agent), flatten_parameters(target)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, fused=True)

    # The replay buffer: a row for each step, written round and round.
    columns = [n_observations, n_observations, 1, 1, 1]  # observation, next observation, action, reward, terminated
    buffer = np.zeros((args.buffer_size, sum(columns)), dtype=np.float32)

    num_iterations = args.total_timesteps // args.train_frequency
    global_step = 0
    env_seeds = [args.seed + i for i in range(args.num_envs)]
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        agent.load_state_dict(checkpoint["agent"])
        target.load_state_dict(checkpoint["target"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step = checkpoint["global_step"]
        buffer[: len(checkpoint["buffer"])] = checkpoint["buffer"].numpy()
        msg.info(f"Resumed after {global_step:,} steps, {args.total_timesteps - global_step:,} to go")
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # not the first episodes again

    observations, _ = envs.reset(seed=env_seeds)
    held = rng.integers(n_actions, size=args.num_envs)  # the random action that each is at, or -1: the network acts
    episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs)
    round_shape = (args.train_frequency // args.num_envs, args.num_envs)  # steps between two rounds of gradient steps
    finished, losses = [], {}  # (return, length) of each episode that ended since the last point of the curves
    exploration_steps = args.exploration_fraction * args.total_timesteps
    last_checkpoint = 0.0
    # flush_secs: for so long, a Ctrl-C in a bad moment waits for TensorBoard's thread.
    logs = {"log_dir": run_folder / "hub" / "logs", "flush_secs": 2, "purge_step": global_step + 1}
    with SummaryWriter(**logs) as writer, progress_bar(args.total_timesteps, global_step, "step") as bar:
        writer.add_text("hyperparameters", f"```\n{json.dumps(hyperparameters_of(args), indent=2)}\n```")
        for iteration in range(global_step // args.train_frequency, num_iterations):
            # 1. Act, epsilon-greedily, and remember what happened.
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
            layers = numpy_layers(agent.q_network)
            draws = rng.random(round_shape) * args.explore_duration
            random_actions = rng.integers(n_actions, size=round_shape)
            for draw, random_action in zip(draws, random_actions):
                # Who acts, chance or the network, is drawn anew with probability 1 / explore_duration, else it goes on.
                held = np.where(draw < 1, np.where(draw < epsilon, random_action, -1), held)
                actions = np.where(held < 0, act(layers, observations), held)
                rows = buffer[global_step % args.buffer_size :][: args.num_envs]
                rows[:, :n_observations] = observations
                # As a list: environments check each action, and Python's integers in a tenth of the time of NumPy's.
                observations, rewards, terminated, truncated, infos = envs.step(actions.tolist())
                rows[:, n_observations:-3] = observations
                rows[:, -3], rows[:, -2], rows[:, -1] = actions, rewards * args.reward_scale, terminated
                global_step += args.num_envs
                episode_returns += rewards
                episode_lengths += 1
                for i in np.flatnonzero(terminated | truncated):
                    rows[i, n_observations:-3] = infos["final_obs"][i]
                    finished.append((float(episode_returns[i]), float(episode_lengths[i])))
                    episode_returns[i] = episode_lengths[i] = 0

            # 2. Learn: gradient steps on minibatches of what is remembered.
            learning_rate = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate
            if global_step > args.learning_starts:
                drawn = rng.integers(min(global_step, args.buffer_size), size=(args.gradient_steps, args.batch_size))
                for minibatch in torch.from_numpy(buffer[drawn]).to(device):
                    losses = update(agent, target, parameters, optimizer, minibatch.split(columns, dim=1), args)
                if global_step % args.target_network_frequency < args.train_frequency:
                    target_parameters.lerp_(parameters, args.tau)

            # 3. Statistics, read now and then: the host has to wait for the device to read them.
            bar.update(args.train_frequency)
            is_last = iteration == num_iterations - 1
            if global_step % CURVE_STEPS < args.train_frequency or is_last:
                curves = {f"losses/{name}": value.item() for name, value in losses.items()}
                curves |= {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
                if finished:  # the means over the episodes that ended since the last point
                    curves["charts/episodic_return"], curves["charts/episodic_length"] = np.mean(finished, axis=0)
                    bar.set_postfix_str(f"return {curves['charts/episodic_return']:.2f}", refresh=False)
                    finished.clear()
                curves["charts/SPS"] = (bar.n - bar.initial) / bar.format_dict["elapsed"]
                for name, value in curves.items():
                    writer.add_scalar(name, value, global_step)
                writer.flush()  # else TensorBoard's thread writes while the agent acts, and takes the GIL at every step

            if time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS or is_last:
                state = dict(agent=agent.state_dict(), target=target.state_dict(), optimizer=optimizer.state_dict())
                state |= dict(rng=rng.bit_generator.state, buffer=torch.from_numpy(buffer[:global_step]))
                save_checkpoint(run_folder, args, global_step=global_step, **state)
                last_checkpoint = time.monotonic()
            if args.capture_video and (iteration + 1) * 10 // num_iterations > iteration * 10 // num_iterations:
                video = run_folder / f"videos/step-{global_step}.mp4"
                record_video(make_env(args.env_id, "rgb_array"), make_policy(agent), video)
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
            policy = make_policy(agent)
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
        results = score_and_film(env, film_env, make_policy(agent), seeds, partial)
        results["scored_with"] = "the actions of the highest value, on seeds that training never used"
        copy.deepcopy(agent).save_pretrained(partial)  # a copy, for parameters that are no views of one vector
        package_to_hub(run_folder, args, results | {"env_name": args.env_id, "global_step": global_step})
        return agent
    except (KeyboardInterrupt, *EXPECTED) as error:
        can_resume = run_folder and (run_folder / "checkpoint.pt").is_file()
        why = " ".join(str(error).split()) or "stopped"
        hub = "Hugging Face Hub: " if isinstance(error, HTTPError) else ""
        sys.exit(f"error: {hub}{why}{f'; go on with: --resume {run_folder}' if can_resume else ''}")


if __name__ == "__main__":
    agent = main()
