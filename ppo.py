"""PPO (Proximal Policy Optimization) in one file: trains an agent, scores it, films it and packages it for the Hub.

    python ppo.py                                                   # CartPole-v1, solved in seconds
    python ppo.py --env-id LunarLander-v2 --repo-id user/ppo        # train, score, film, push to the Hugging Face Hub
    python ppo.py --evaluate user/ppo                               # load it back, score it, film it
    tensorboard --logdir runs

The algorithm repeats three steps until --total-timesteps:
  1. Rollout: act with the current policy for --num-steps steps in each of --num-envs environments.
  2. Advantages: estimate how much better each action turned out than the critic expected (GAE).
  3. Update: a few epochs of minibatch gradient steps on the clipped surrogate objective, which takes away
     the incentive to move the policy far from the one that collected the data.

Papers: Proximal Policy Optimization Algorithms (Schulman et al., 2017, https://arxiv.org/abs/1707.06347),
High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016,
https://arxiv.org/abs/1506.02438), The 37 Implementation Details of PPO (Huang et al., 2022).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6",
#     "gymnasium[box2d,classic-control]>=1.2,<2",
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

SCRIPT = "ppo.py"  # the name of this file in the package
ALGORITHM = "PPO"
CARD_TAGS = ["ppo", "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation", "deep-rl-course"]
MODEL_FILE = "model.pt"
CHECKPOINT_SECONDS = 10  # what a crash costs at the most, besides the iteration under way
EVAL_SEED = 1_000_000  # evaluation plays seeds seed + EVAL_SEED, + 1, ...; training starts from seed, + 1, ...
NOT_SAVED = ("resume", "evaluate", "render", "push")  # flags that say what to do now, not how the agent was trained

msg = Printer(pretty=sys.stdout.isatty())
asked_to_stop = []  # the signals that came while a run was on

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, per environment. Flags on the command line win over the row.
LUNAR_LANDER = dict(
    total_timesteps=1_000_000,
    learning_rate=2e-3,
    anneal_lr=False,
    num_envs=32,
    num_steps=256,
    num_minibatches=16,
    gamma=0.999,
    gae_lambda=0.98,
    clip_vloss=False,
    ent_coef=0.001,
)
TUNED = {
    "CartPole-v1": dict(learning_rate=2.5e-3, num_envs=8, num_minibatches=8, update_epochs=8, clip_vloss=False),
    "Acrobot-v1": dict(
        total_timesteps=200_000,
        learning_rate=2.5e-3,
        num_envs=16,
        num_minibatches=8,
        update_epochs=6,
        clip_vloss=False,
    ),
    "LunarLander-v2": LUNAR_LANDER,
    "LunarLander-v3": LUNAR_LANDER,
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
    flag("--exp-name", default="ppo", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=number(int, 0), default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", **switch, default=True, help="deterministic cuDNN")
    flag("--cuda", **switch, default=True, help="use a GPU if there is one")
    flag("--track", **switch, default=False, help="log to Weights & Biases as well")
    flag("--wandb-project-name", default="deep-rl", help="project on Weights & Biases")
    flag("--wandb-entity", help="entity (team) on Weights & Biases")
    flag("--capture-video", **switch, default=False, help="film ten episodes on the way")

    flag = parser.add_argument_group("algorithm").add_argument
    flag("--total-timesteps", type=number(int, 1), default=50_000, help="environment steps, all environments together")
    flag("--learning-rate", type=number(float, 0), default=2.5e-4, help="step size of Adam")
    flag("--num-envs", type=number(int, 1), default=4, help="environments stepped side by side")
    flag("--num-steps", type=number(int, 1), default=128, help="steps per environment and rollout")
    flag("--anneal-lr", **switch, default=True, help="the learning rate falls linearly to 0")
    flag("--gae", **switch, default=True, help="GAE; False: bootstrapped returns - values")
    flag("--gamma", type=number(float, 0, 1), default=0.99, help="discount factor")
    flag("--gae-lambda", type=number(float, 0, 1), default=0.95, help="lambda of GAE: 0 is TD(0), 1 is Monte Carlo")
    flag("--num-minibatches", type=number(int, 1), default=4, help="minibatches per epoch")
    flag("--update-epochs", type=number(int, 1), default=4, help="passes over the batch of each rollout")
    flag("--norm-adv", **switch, default=True, help="standardise advantages per minibatch")
    flag("--clip-coef", type=number(float, 0), default=0.2, help="epsilon of the clipped surrogate objective")
    flag("--clip-vloss", **switch, default=True, help="clip the value loss as well")
    flag("--ent-coef", type=number(float, 0), default=0.01, help="weight of the entropy bonus")
    flag("--vf-coef", type=number(float, 0), default=0.5, help="weight of the value loss")
    flag("--max-grad-norm", type=number(float, 0), default=0.5, help="clip the norm of the gradient to this")
    flag("--target-kl", type=number(float, 0), help="end a rollout's epochs once approx_kl is above this")

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
        changeable = {"total_timesteps", "repo_id", "track", "wandb_project_name", "wandb_entity", "capture_video"}
        for name, value in vars(before).items():
            if getattr(args, name) != value and name not in changeable.union(NOT_SAVED):
                fail(f"--{name.replace('_', '-')} cannot change on --resume: the run was started with {value}")
    if args.render and not args.evaluate:
        fail("--render goes with --evaluate")
    if args.push and not args.repo_id:
        fail("--push needs --repo-id user/name, the repository to push to")
    if args.repo_id:
        check_repo_id(args.repo_id)
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide the batch, num_envs * num_steps = {batch_size}")
    if args.norm_adv and batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be standardised: fewer --num-minibatches, or --norm-adv False")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one batch, num_envs * num_steps = {batch_size}")
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


def make_env(env_id, render_mode=None):
    """Make one environment; retired names get the current version under their old name.

    Exits with one line where Gymnasium does not know the name, or the spaces are not what this script can learn.
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
    """Two separate networks: the actor's logits over the actions, and the critic's estimate of the return."""

    def __init__(self, n_observations, n_actions):
        super().__init__()
        self.critic = nn.Sequential(
            layer_init(nn.Linear(n_observations, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )
        self.actor = nn.Sequential(
            layer_init(nn.Linear(n_observations, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, n_actions), std=0.01),  # close to uniform at the start: no early favourites
        )


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by std, zero bias (The 37 Implementation Details of PPO, detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def flatten_parameters(module):
    """Move all parameters into one flat vector, and their gradients into its .grad; returns the vector.

    The module works as before, each parameter a view of its stretch of the vector. But one kernel now clips all
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
    """The weights of a Linear-Tanh-...-Linear network as [(weight, bias), ...] NumPy arrays, for `act`."""
    for layer in network:
        if not isinstance(layer, nn.Linear | nn.Tanh):
            raise TypeError(f"{layer}: `act` does not know this layer; teach it there too")
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in linear]


def act(layers, observations, noise=0.0):
    """Choose an action for each observation: the actor's forward pass in NumPy.

    For a few observations through a network this small, NumPy takes a quarter of PyTorch's time, and a GPU would
    cost a round trip per step.

    layers: from `numpy_layers`; observations: (N, n_observations); returns (N,) int64. Without noise: the most
    probable actions. With standard Gumbel noise, (N, n_actions): samples from softmax(logits), because
    argmax(logits + noise) is distributed so (the Gumbel-max trick).
    """
    hidden = observations
    for weight, bias in layers[:-1]:
        hidden = np.tanh(hidden @ weight + bias)
    weight, bias = layers[-1]
    return (hidden @ weight + bias + noise).argmax(axis=-1)


def evaluate_actions(actor, observations, actions):
    """Log-probabilities (B,) of the actions (B,) in the observations (B, n_observations), and the mean entropy."""
    log_probs = torch.log_softmax(actor(observations), dim=-1)
    entropy = (log_probs.exp() * log_probs).sum() / -len(log_probs)
    return log_probs.gather(1, actions[:, None]).squeeze(-1), entropy


def make_policy(agent, deterministic=True, seed=0):
    """The agent as a function `observation -> action`, for evaluation and video; seed: of the sampled actions."""
    layers = numpy_layers(agent.actor)
    n_actions = len(layers[-1][1])
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = 0.0 if deterministic else rng.gumbel(size=(1, n_actions))
        return int(act(layers, np.asarray(observation, dtype=np.float32)[None], noise)[0])

    return policy


# ---------------------------------------------------------------------------------------------------------------------
# The math
# ---------------------------------------------------------------------------------------------------------------------


def compute_gae(rewards, values, dones, last_value, gamma, gae_lambda):
    """Generalized Advantage Estimation (Schulman et al., 2016, equations 11, 12 and 16).

    rewards, values, dones: (T, N); values[t] = V(s_t); dones[t] = 1 where the episode ended with the action at t.
    last_value: (N,), V of the observation after the last step. Returns (advantages, returns), both (T, N):
        delta_t = r_t + gamma * V(s_{t+1}) * (1 - done_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}
        R_t     = A_t + V(s_t), the TD(lambda) target of the critic
    """
    not_done = 1.0 - dones
    next_values = np.concatenate([values[1:], last_value[None]])
    deltas = rewards + gamma * next_values * not_done - values
    advantages = np.empty_like(deltas)
    advantage = np.zeros_like(last_value)
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + gamma * gae_lambda * not_done[t] * advantage
    return advantages, advantages + values


def compute_returns(rewards, dones, last_value, gamma):
    """Discounted returns, bootstrapped where the rollout ends: R_t = r_t + gamma * (1 - done_t) * R_{t+1}.

    rewards, dones: (T, N); last_value: (N,), V of the observation after the last step. Returns (T, N).
    """
    returns = np.empty_like(rewards)
    following = last_value
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * (1.0 - dones[t]) * following
    return returns


def clipped_surrogate(log_probs, old_log_probs, advantages, clip_coef):
    """The clipped surrogate objective, to be maximised (Schulman et al., 2017, equation 7). All arguments: (B,).

    The paper's min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A) is min(ratio * A, A + clip_coef * |A|):
    no step may gain more than that bound, so there its gradient ends. At ratio 1 it is the policy gradient.
    """
    ratio = (log_probs - old_log_probs).exp()
    return torch.min(ratio * advantages, advantages + clip_coef * advantages.abs()).mean()


def value_loss(values, old_values, returns, clip_coef=None):
    """Half the mean squared error of the critic; with clip_coef, the worse of it and the clipped one. All: (B,)."""
    if clip_coef is None:
        return 0.5 * nn.functional.mse_loss(values, returns)
    # Where the clipped error is the worse, the clipped value is at its limit and has no gradient: none is recorded.
    clipped_values = values.detach().clamp(old_values - clip_coef, old_values + clip_coef)
    return 0.5 * (values - returns).square().clamp(min=(clipped_values - returns).square()).mean()


def standardise(advantages):
    """Each row of (M, B), a minibatch's advantages, to mean 0 and standard deviation 1."""
    centred = advantages - advantages.mean(dim=1, keepdim=True)
    return centred / (advantages.std(dim=1, keepdim=True) + 1e-8)


def policy_change(log_probs, old_log_probs, clip_coef):
    """How far the policy has moved from the one that collected the batch, as 0-d tensors.

    Returns (approx_kl, old_approx_kl, clipfrac): two estimates of KL(old || new), the first unbiased with low
    variance (Schulman, http://joschu.net/blog/kl-approx.html), and the share of ratios outside the clip range.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    return (ratio - 1 - log_ratio).mean(), -log_ratio.mean(), ((ratio - 1).abs() > clip_coef).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, run_folder):
    """Train an agent with PPO and return it; with --resume, go on from the checkpoint in run_folder.

    Writes TensorBoard events, checkpoint.pt and, with --capture-video, videos/ into run_folder.
    """
    torch.set_num_threads(1)  # sharing work this small between threads costs more than it saves
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # everything random after that: actions and minibatches

    # SAME_STEP: where an episode ends, the environment returns the next one's first observation in the same step, and
    # the old one's last observation in infos. So every transition in the batch lies inside one episode.
    envs = gym.vector.SyncVectorEnv(
        [lambda: make_env(args.env_id)] * args.num_envs,
        copy=False,  # the rollout keeps its own copy
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    n_observations, n_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    agent = Agent(n_observations, n_actions).to(device)
    parameters = flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)

    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    global_step = 0
    recent_returns = deque(maxlen=100)  # of the episodes that ended last
    env_seeds = [args.seed + i for i in range(args.num_envs)]
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step = checkpoint["global_step"]
        recent_returns.extend(checkpoint["recent_returns"])
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # not the first episodes again

    def save_checkpoint():
        state = {
            "script": SCRIPT,
            "args": hyperparameters_of(args),
            "global_step": global_step,
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": rng.bit_generator.state,
            "recent_returns": list(recent_returns),
        }
        save_tensors(state, run_folder / "checkpoint.tmp")
        os.replace(run_folder / "checkpoint.tmp", run_folder / "checkpoint.pt")  # atomic: never half a checkpoint

    # The rollout: T = num_steps rows, N = num_envs columns. Observations have row T too, after the last action.
    observations = np.zeros((args.num_steps + 1, args.num_envs, n_observations), dtype=np.float32)
    actions = np.zeros((args.num_steps, args.num_envs), dtype=np.int64)
    rewards = np.zeros((args.num_steps, args.num_envs), dtype=np.float32)
    dones = np.zeros((args.num_steps, args.num_envs), dtype=np.float32)
    observations[-1], _ = envs.reset(seed=env_seeds)
    episode_returns = np.zeros(args.num_envs)
    episode_lengths = np.zeros(args.num_envs)

    if args.track:
        start_wandb(args, run_folder)
    save_checkpoint()
    last_checkpoint = time.monotonic()
    with (
        contextlib.closing(envs),
        SummaryWriter(run_folder, purge_step=global_step + 1 if args.resume else None) as writer,
        Progress(num_iterations * batch_size, global_step) as progress,
    ):
        writer.add_text("hyperparameters", markdown_table(hyperparameters_of(args)))
        for iteration in range(global_step // batch_size, num_iterations):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate

            # 1. Rollout: run the current policy for T steps in each of the N environments.
            layers = numpy_layers(agent.actor)
            noise = rng.gumbel(size=(args.num_steps, args.num_envs, n_actions))
            observations[0] = observations[-1]
            finished = []  # (return, length) of each episode that ended
            cut_off = []  # (t, i, last observation) of each episode that ended by a time limit
            for t in range(args.num_steps):
                actions[t] = act(layers, observations[t], noise[t])
                # As a list: environments check each action, and Python's integers in a tenth of the time of NumPy's.
                observations[t + 1], rewards[t], terminated, truncated, infos = envs.step(actions[t].tolist())
                dones[t] = terminated | truncated
                episode_returns += rewards[t]
                episode_lengths += 1
                for i in np.flatnonzero(dones[t]):
                    if not terminated[i]:
                        cut_off.append((t, i, infos["final_obs"][i]))
                    finished.append((float(episode_returns[i]), float(episode_lengths[i])))
                    episode_returns[i] = episode_lengths[i] = 0
            global_step += batch_size

            # 2. Advantages. Acting computed actions and nothing else: the values and log-probabilities of the whole
            #    rollout come from one pass over it, while the policy is still the one that acted.
            visited = [observations.reshape(-1, n_observations), *(last[None] for _, _, last in cut_off)]
            visited = torch.from_numpy(np.concatenate(visited).astype(np.float32, copy=False)).to(device)
            old_observations, old_actions = visited[:batch_size], torch.from_numpy(actions.reshape(-1)).to(device)
            with torch.no_grad():
                values = agent.critic(visited).squeeze(-1).cpu().numpy()
                old_log_probs, _ = evaluate_actions(agent.actor, old_observations, old_actions)
            values, last_value, cut_off_values = np.split(values, [batch_size, batch_size + args.num_envs])
            values = values.reshape(rewards.shape)
            # A time limit is not a failure: the episode would have gone on to earn the value of its last observation.
            for (t, i, _), value in zip(cut_off, cut_off_values):
                rewards[t, i] += args.gamma * value
            if args.gae:
                advantages, returns = compute_gae(rewards, values, dones, last_value, args.gamma, args.gae_lambda)
            else:
                returns = compute_returns(rewards, dones, last_value, args.gamma)
                advantages = returns - values

            # 3. Update: minibatch gradient steps that maximise equation 9 of the paper.
            batch = [old_observations, old_actions, old_log_probs]
            batch += [torch.from_numpy(array.reshape(-1)).to(device) for array in (values, returns, advantages)]
            orders = np.stack([rng.permutation(batch_size) for _ in range(args.update_epochs)])
            for order in torch.from_numpy(orders).to(device):
                # One shuffle per epoch; the minibatches are the rows of what it gives.
                minibatches = [column[order].unflatten(0, (-1, minibatch_size)) for column in batch]
                if args.norm_adv:
                    minibatches[-1] = standardise(minibatches[-1])
                for mb_obs, mb_actions, mb_log_probs, mb_values, mb_returns, mb_advantages in zip(*minibatches):
                    log_probs, entropy = evaluate_actions(agent.actor, mb_obs, mb_actions)
                    objective = clipped_surrogate(log_probs, mb_log_probs, mb_advantages, args.clip_coef)
                    new_values = agent.critic(mb_obs).squeeze(-1)
                    v_loss = value_loss(new_values, mb_values, mb_returns, args.clip_coef if args.clip_vloss else None)
                    loss = args.vf_coef * v_loss - objective - args.ent_coef * entropy

                    parameters.grad.zero_()
                    loss.backward()
                    parameters.grad[None].renorm_(2, 0, args.max_grad_norm)  # clip_grad_norm_, in one kernel
                    optimizer.step()

                approx_kl, old_approx_kl, clipfrac = policy_change(log_probs.detach(), mb_log_probs, args.clip_coef)
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break

            # 4. Statistics of the last minibatch, read once per iteration: so far nothing but --target-kl has made the
            #    host wait for the device.
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/SPS", progress.rate(global_step), global_step)
            writer.add_scalar("losses/value_loss", v_loss.item(), global_step)
            writer.add_scalar("losses/policy_loss", -objective.item(), global_step)
            writer.add_scalar("losses/entropy", entropy.item(), global_step)
            writer.add_scalar("losses/approx_kl", approx_kl.item(), global_step)
            writer.add_scalar("losses/old_approx_kl", old_approx_kl.item(), global_step)
            writer.add_scalar("losses/clipfrac", clipfrac.item(), global_step)
            unexplained = np.var(returns - values) / max(np.var(returns), 1e-8)
            writer.add_scalar("losses/explained_variance", 1 - unexplained, global_step)
            if finished:  # the means over the episodes that ended in this iteration
                mean_return, mean_length = np.mean(finished, axis=0)
                writer.add_scalar("charts/episodic_return", mean_return, global_step)
                writer.add_scalar("charts/episodic_length", mean_length, global_step)
                recent_returns.extend(episode_return for episode_return, _ in finished)
            writer.flush()  # else TensorBoard's thread writes during the rollout, and takes the GIL at every step of it
            progress.update(global_step, recent_returns)

            tenth = (iteration + 1) * 10 // num_iterations
            if args.capture_video and tenth > iteration * 10 // num_iterations:
                with contextlib.closing(make_env(args.env_id, "rgb_array")) as env:
                    policy = make_policy(agent, deterministic=False, seed=args.seed)
                    record_video(env, policy, run_folder / "videos" / f"step-{global_step}.mp4")
            is_due = time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS
            if is_due or asked_to_stop or iteration == num_iterations - 1:
                save_checkpoint()
                last_checkpoint = time.monotonic()
            stop_if_asked()
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
    if env_id is None:
        env_id = load_hyperparameters(source)["env_id"]
        check_env_id(env_id, source)
    env = make_env(env_id, render_mode)
    agent = Agent(env.observation_space.shape[0], int(env.action_space.n))
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
