"""PPO (Proximal Policy Optimization) in one file: trains an agent, scores it, films it and packages it for the Hub.

    python ppo.py                                                   # CartPole-v1, solved in seconds
    python ppo.py --env-id LunarLander-v2 --repo-id user/ppo        # train, score, film, push to the Hugging Face Hub
    python ppo.py --evaluate user/ppo                               # load it back, score it, film it
    torchrun --nproc-per-node 2 ppo.py --num-envs 64                # 32 environments in each of two processes
    tensorboard --logdir runs

The algorithm repeats three steps until --total-timesteps:
  1. Rollout: act with the current policy for --num-steps steps in each of --num-envs environments.
  2. Advantages: estimate how much better each action turned out than the critic expected (GAE).
  3. Update: a few epochs of minibatch gradient steps on the clipped surrogate objective, which takes away
     the incentive to move the policy far from the one that collected the data.

Papers: Proximal Policy Optimization Algorithms (Schulman et al., 2017, https://arxiv.org/abs/1707.06347),
High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016,
https://arxiv.org/abs/1506.02438), The 37 Implementation Details of Proximal Policy Optimization (Huang et al., 2022,
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/).
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
import atexit
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
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import EvalResult, HfApi, ModelCardData, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from wasabi import Printer

SCRIPT = "ppo.py"  # the name of this file in the package
ALGORITHM = "PPO"
CARD_TAGS = ["ppo", "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation", "deep-rl-course"]
CHECKPOINT_SECONDS = 10  # what a stop costs at the most, besides the iteration under way
EXPECTED = (gym.error.Error, HTTPError, ImportError, HFValidationError, SafetensorError, json.JSONDecodeError, OSError)
NEW_ON_RESUME = {"resume", "total_timesteps", "n_eval_episodes", "repo_id", "track", "cuda", "capture_video"}
IN_NOTEBOOK = "ipykernel" in sys.modules  # in a Jupyter or Colab cell
msg = Printer(pretty=sys.stdout.isatty())

# --- Flags -----------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, per environment. Flags on the command line win over the row.
FAST = dict(learning_rate=2.5e-3, num_minibatches=8, clip_vloss=False)
LUNAR_LANDER = dict(total_timesteps=1_000_000, learning_rate=2e-3, num_envs=32, num_steps=256, num_minibatches=16)
LUNAR_LANDER |= dict(reward_scale=0.05, gamma=0.995, gae_lambda=0.98, clip_vloss=False)
TUNED = {
    "CartPole-v1": dict(num_envs=8, update_epochs=8, **FAST),
    "Acrobot-v1": dict(total_timesteps=200_000, num_envs=16, update_epochs=6, **FAST),
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
    flag("--exp-name", default="ppo", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=int, default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", action=switch, default=True, help="deterministic cuDNN")
    flag("--cuda", action=switch, default=True, help="use a GPU if there is one")
    flag("--track", action=switch, default=False, help="log to Weights & Biases as well (pip install wandb)")
    flag("--capture-video", action=switch, default=False, help="film ten episodes on the way")
    flag("--total-timesteps", type=int, default=50_000, help="environment steps, all environments together")
    flag("--learning-rate", type=float, default=2.5e-4, help="step size of Adam")
    flag("--num-envs", type=int, default=4, help="environments stepped side by side, in all processes together")
    flag("--num-steps", type=int, default=128, help="steps per environment and rollout")
    flag("--anneal-lr", action=switch, default=True, help="the learning rate falls linearly to 0 at --total-timesteps")
    flag("--reward-scale", type=float, default=1.0, help="learn from rewards times this; scores stay the game's own")
    flag("--gamma", type=float, default=0.99, help="discount factor")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of GAE: 0 is TD(0), 1 is Monte Carlo")
    flag("--num-minibatches", type=int, default=4, help="minibatches per epoch")
    flag("--update-epochs", type=int, default=4, help="passes over the batch of each rollout")
    flag("--norm-adv", action=switch, default=True, help="standardise advantages per minibatch")
    flag("--clip-coef", type=float, default=0.2, help="epsilon of the clipped surrogate objective")
    flag("--clip-vloss", action=switch, default=True, help="clip the value loss as well")
    flag("--ent-coef", type=float, default=0.01, help="weight of the entropy bonus")
    flag("--vf-coef", type=float, default=0.5, help="weight of the value loss")
    flag("--max-grad-norm", type=float, default=0.5, help="clip the norm of the gradient to this")
    flag("--target-kl", type=float, help="end a rollout's epochs once approx_kl is above this")
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
        least = name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "n_eval_episodes")
        most = {"gamma": 1, "gae_lambda": 1, "n_eval_episodes": 10**6}.get(name, 2**63 - 1)
        if value == "" or (isinstance(value, int | float) and not least <= value <= most):
            parser.error(f"--{name.replace('_', '-')} {value!r} is out of range")
        if name not in NEW_ON_RESUME and checkpoint.get("args", {}).get(name, value) != value:
            parser.error(f"--{name.replace('_', '-')} cannot change on --resume")
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if (args.render and not (args.evaluate and has_display)) or (args.evaluate and WORLD_SIZE > 1):
        parser.error("--render goes with --evaluate and needs a display, and --evaluate is for one process")
    if args.evaluate:
        return args  # the rest is about training
    batch_size = args.num_envs * args.num_steps
    args.total_timesteps -= args.total_timesteps % batch_size  # whole iterations: what will really be trained
    if args.total_timesteps < max(batch_size, checkpoint.get("global_step", 0)):
        parser.error(f"--total-timesteps is less than one batch, {batch_size}, or than --resume's run has had already")
    if args.num_envs % WORLD_SIZE:
        parser.error(f"--num-envs {args.num_envs} is no multiple of {WORLD_SIZE}, the number of processes")
    parts = WORLD_SIZE * args.num_minibatches
    if batch_size % parts or batch_size == parts:
        parser.error(f"--num-envs {args.num_envs}, --num-minibatches: a batch must be {parts} parts of 2 or more")
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
    """Two separate networks: the actor's logits over the actions, and the critic's estimate of the return."""

    def __init__(self, n_observations, n_actions):
        super().__init__()
        self.critic = tanh_network(n_observations, 1, last_std=1.0)
        self.actor = tanh_network(n_observations, n_actions, last_std=0.01)  # close to uniform: no early favourites


def tanh_network(n_inputs, n_outputs, last_std):
    """Two hidden layers of 64 units."""
    hidden = [layer_init(nn.Linear(n_inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
    return nn.Sequential(*hidden, layer_init(nn.Linear(64, n_outputs), last_std))


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by std, zero bias (The 37 Implementation Details of PPO, detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


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


def act(layers, observations, noise=0.0):
    """Choose an action for each observation: the actor's forward pass in NumPy.

    For a few observations through a network this small, that takes a quarter of PyTorch's time. layers: from
    `numpy_layers`; observations: (N, n_observations); returns (N,) int64. Without noise: the most probable actions.
    With standard Gumbel noise, (N, n_actions): samples from softmax(logits), because argmax(logits + noise) is
    distributed so (the Gumbel-max trick).
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
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = 0.0 if deterministic else rng.gumbel(size=len(layers[-1][1]))
        return int(act(layers, np.asarray(observation, dtype=np.float32)[None], noise)[0])

    return policy


# --- The math --------------------------------------------------------------------------------------------------------
def compute_gae(rewards, values, dones, last_value, gamma, gae_lambda):
    """Generalized Advantage Estimation (Schulman et al., 2016, equations 11 and 16).

    rewards, values, dones: (T, N); values[t] = V(s_t); dones[t] = 1 where the episode ended with the action at t. Where
    a time limit ended it, rewards[t] has gamma * V of its last observation in it already. last_value: (N,), V of the
    observation after the last step. Returns (advantages, returns), both (T, N):
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


def clipped_surrogate(log_probs, old_log_probs, advantages, clip_coef):
    """The clipped surrogate objective, to be maximised (Schulman et al., 2017, equation 7). All arguments: (B,).

    The paper's min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A) is min(ratio * A, A + clip_coef * |A|):
    beyond that bound a ratio gains nothing, so its gradient ends there. At ratio 1 it is the policy gradient.
    """
    ratio = (log_probs - old_log_probs).exp()
    return torch.min(ratio * advantages, advantages + clip_coef * advantages.abs()).mean()


def value_loss(values, old_values, returns, clip_coef=None):
    """Half the mean squared error of the critic; with clip_coef, of each step the worse of it and the clipped one."""
    if clip_coef is None:
        return 0.5 * nn.functional.mse_loss(values, returns)
    # Where the clipped error is the worse, the clipped value is at its limit and has no gradient: none is recorded.
    clipped_values = values.detach().clamp(old_values - clip_coef, old_values + clip_coef)
    return 0.5 * (values - returns).square().clamp(min=(clipped_values - returns).square()).mean()


def standardise(advantages):
    """To mean 0 and standard deviation 1 for each of M minibatches; (M, B, W), that is B of each of W processes."""
    centred = advantages - advantages.mean(dim=(1, 2), keepdim=True)
    return centred / (advantages.std(dim=(1, 2), keepdim=True) + 1e-8)


# --- Training --------------------------------------------------------------------------------------------------------

# With torchrun, each of WORLD_SIZE processes has its part of the environments, and so of each minibatch. All begin with
# the same weights and take the same steps, along the mean of their gradients. Only process 0 speaks and writes.
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if dist.is_torchelastic_launched():
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    # nccl needs a GPU for each process. Left to itself, PyTorch takes nccl wherever it was built for GPUs.
    BACKEND = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "gloo"


def gather(items):
    """The items of all torchrun's processes in one list."""
    lists = [items] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def average(vector):
    """Replace a vector by its mean over all of torchrun's processes: all_reduce, but faster for small ones."""
    everyones = vector.new_empty(WORLD_SIZE, len(vector))
    work = dist.all_gather([*everyones], vector, async_op=True)
    while not (vector.is_cuda or work.is_completed()):  # to fall asleep and wake up would take longer than this does
        os.sched_yield()
    work.wait()  # raises an error if there was one
    torch.mean(everyones, dim=0, out=vector)


def follow(argv):
    """What the processes other than 0 do: train along with it, by its flags. Returns the agent."""
    if {"-h", "--help"} & {*(sys.argv if argv is None else argv)}:
        sys.exit()
    sys.stdout = io.StringIO()
    dist.init_process_group(BACKEND)  # waits for process 0, which looks for mistakes first
    args = gather([None])[0]  # process 0's
    agent, _ = train(args, run_folder=None)
    atexit.register(os._exit, 0)  # Python's own way out meets gloo's threads, and aborts now and then
    return agent


def update(agent, parameters, optimizer, minibatch, args):
    """One gradient step on a minibatch, which ascends equation 9 of the paper: L^CLIP - c1 * L^VF + c2 * S.

    minibatch: observations, actions, old log-probabilities, old values, returns and advantages, a row for each step.
    Returns log-probabilities (B,) and the statistics {name: 0-d tensor}. Nothing here waits for the device.
    """
    observations, actions, old_log_probs, old_values, returns, advantages = minibatch
    log_probs, entropy = evaluate_actions(agent.actor, observations, actions)
    objective = clipped_surrogate(log_probs, old_log_probs, advantages, args.clip_coef)
    values = agent.critic(observations).squeeze(-1)
    v_loss = value_loss(values, old_values, returns, args.clip_coef if args.clip_vloss else None)
    loss = args.vf_coef * v_loss - objective - args.ent_coef * entropy

    parameters.grad.zero_()
    loss.backward()
    if WORLD_SIZE > 1:
        average(parameters.grad)
    parameters.grad[None].renorm_(2, 0, args.max_grad_norm)  # clip_grad_norm_, in one kernel
    optimizer.step()
    losses = {"value_loss": v_loss.detach(), "policy_loss": -objective.detach(), "entropy": entropy.detach()}
    return log_probs.detach(), losses


@torch.enable_grad()  # in a notebook, a Ctrl-C inside no_grad() may leave gradients off: this puts them back
def train(args, run_folder):
    """Train an agent with PPO; with --resume, go on from the checkpoint in run_folder. Checkpoints and curves go there.

    Returns the agent and the number of steps it was trained for.
    """
    torch.set_num_threads(1)  # sharing work this small between threads costs more than it saves
    torch.backends.cudnn.deterministic = args.torch_deterministic
    gpus = torch.cuda.device_count() if args.cuda else 0
    device = torch.device(f"cuda:{LOCAL_RANK % gpus}" if gpus else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # everything random after that, in all processes alike: actions, minibatches
    num_envs = args.num_envs // WORLD_SIZE
    mine = slice(RANK * num_envs, (RANK + 1) * num_envs)  # this process's environments

    # SAME_STEP: where an episode ends, the environment returns the next one's first observation in the same step, and
    # the old one's last observation in infos. So every transition in the batch lies inside one episode.
    how = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False}  # the rollout keeps its own copy
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args.env_id)] * num_envs, **how)
    n_observations, n_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    agent = Agent(n_observations, n_actions).to(device)
    parameters = flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    global_step = 0
    env_seeds = [args.seed + i for i in range(args.num_envs)]
    if args.resume:
        checkpoint = gather([None if RANK else load_checkpoint(run_folder)])[0]
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step = checkpoint["global_step"]
        msg.info(f"Resumed after {global_step:,} steps, {args.total_timesteps - global_step:,} to go")
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # not the first episodes again

    # The rollout: T = num_steps rows, N = num_envs columns. Observations have row T too, after the last action.
    shape = (args.num_steps, num_envs)
    observations = np.zeros((args.num_steps + 1, num_envs, n_observations), dtype=np.float32)
    observations[-1], _ = envs.reset(seed=env_seeds[mine])
    actions, rewards, dones = (np.zeros(shape, dtype=kind) for kind in (np.int64, np.float32, np.float32))
    episode_returns, episode_lengths = np.zeros(num_envs), np.zeros(num_envs)
    last_checkpoint = 0.0
    # flush_secs: for so long, a Ctrl-C in a bad moment waits for TensorBoard's thread.
    logs = {"log_dir": run_folder and run_folder / "hub" / "logs", "flush_secs": 2, "purge_step": global_step + 1}
    with (
        nullcontext() if RANK else SummaryWriter(**logs) as writer,
        nullcontext() if RANK else progress_bar(args.total_timesteps, global_step, "step") as bar,
    ):
        if RANK == 0:
            writer.add_text("hyperparameters", f"```\n{json.dumps(hyperparameters_of(args), indent=2)}\n```")
        for iteration in range(global_step // batch_size, num_iterations):
            learning_rate = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate

            # 1. Rollout: run the current policy for T steps in each of the N environments.
            layers = numpy_layers(agent.actor)
            noise = rng.gumbel(size=(args.num_steps, args.num_envs, n_actions))[:, mine]
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
            # Standardised advantages do not change with the scale. But large returns give the critic large gradients,
            # and as its and the actor's are clipped together, little would be left for the actor.
            rewards *= args.reward_scale

            # 2. Advantages. Acting computed actions and nothing else: the values and log-probabilities of the whole
            #    rollout come from one pass over it, while the policy is still the one that acted.
            visited = [observations.reshape(-1, n_observations), *(last[None] for _, _, last in cut_off)]
            visited = torch.from_numpy(np.concatenate(visited).astype(np.float32, copy=False)).to(device)
            old_observations, old_actions = visited[: actions.size], torch.from_numpy(actions.reshape(-1)).to(device)
            with torch.no_grad():
                values = agent.critic(visited).squeeze(-1).cpu().numpy()
                old_log_probs, _ = evaluate_actions(agent.actor, old_observations, old_actions)
            values, last_value, cut_off_values = np.split(values, [actions.size, actions.size + num_envs])
            values = values.reshape(rewards.shape)
            # A time limit is not a failure: the episode would have gone on to earn the value of its last observation.
            for (t, i, _), value in zip(cut_off, cut_off_values):
                rewards[t, i] += args.gamma * value
            advantages, returns = compute_gae(rewards, values, dones, last_value, args.gamma, args.gae_lambda)

            # 3. Update: a gradient step for each minibatch. One shuffle per epoch; the minibatches are its rows.
            batch = [old_observations, old_actions, old_log_probs]
            advantages = np.stack(gather([advantages.reshape(-1)]), axis=1)  # a column for each process
            batch += [torch.from_numpy(a).to(device) for a in (values.reshape(-1), returns.reshape(-1), advantages)]
            orders = np.stack([rng.permutation(actions.size) for _ in range(args.update_epochs)])
            for order in torch.from_numpy(orders).to(device):
                minibatches = [column[order].unflatten(0, (args.num_minibatches, -1)) for column in batch]
                if args.norm_adv:
                    minibatches[-1] = standardise(minibatches[-1])
                minibatches[-1] = minibatches[-1][..., RANK]
                for minibatch in zip(*minibatches):
                    log_probs, losses = update(agent, parameters, optimizer, minibatch, args)
                log_ratio = log_probs - minibatch[2]  # how far has the policy moved from the one that acted?
                losses["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
                losses["clipfrac"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
                if args.target_kl is not None and np.mean(gather([losses["approx_kl"].item()])) > args.target_kl:
                    break

            # 4. Statistics, of process 0's last minibatch (or its batch) and read once per iteration: in step 3 nothing
            #    but --target-kl has made the host wait for the device.
            finished = gather(finished)
            if RANK > 0:
                continue
            curves = {f"losses/{name}": value.item() for name, value in losses.items()}
            curves["losses/explained_variance"] = 1 - np.var(returns - values) / max(np.var(returns), 1e-8)
            curves["charts/learning_rate"] = learning_rate
            if finished:  # the means over the episodes that ended in this iteration
                curves["charts/episodic_return"], curves["charts/episodic_length"] = np.mean(finished, axis=0)
                bar.set_postfix_str(f"return {curves['charts/episodic_return']:.2f}", refresh=False)
            bar.update(batch_size)
            curves["charts/SPS"] = (bar.n - bar.initial) / bar.format_dict["elapsed"]
            for name, value in curves.items():
                writer.add_scalar(name, value, global_step)
            writer.flush()  # else TensorBoard's thread writes during the rollout, and takes the GIL at every step of it

            if time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS or iteration == num_iterations - 1:
                state = dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), rng=rng.bit_generator.state)
                save_checkpoint(run_folder, args, global_step=global_step, **state)
                last_checkpoint = time.monotonic()
            if args.capture_video and (iteration + 1) * 10 // num_iterations > iteration * 10 // num_iterations:
                policy = make_policy(agent, deterministic=False, seed=args.seed)
                record_video(make_env(args.env_id, "rgb_array"), policy, run_folder / f"videos/step-{global_step}.mp4")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
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
        for number in (signal.SIGINT, signal.SIGTERM):  # a kill is a Ctrl-C; of torchrun's processes, only 0 answers it
            signal.signal(number, signal.SIG_DFL if RANK else signal.default_int_handler)
        # A full disk would be told twice: by TensorBoard's thread with a traceback, by this one with its one line.
        threading.excepthook = lambda hook: isinstance(hook.exc_value, OSError) or threading.__excepthook__(hook)
    run_folder = None
    try:
        if RANK > 0:
            return follow(argv)
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
        if WORLD_SIZE > 1:
            dist.init_process_group(BACKEND)
            gather([args])  # these flags hold for all
        agent, global_step = train(args, run_folder)
        partial = run_folder / "hub.partial"  # the package, as long as it is not complete
        results = score_and_film(env, film_env, make_policy(agent, args.deterministic_eval, first_seed), seeds, partial)
        actions = "the most probable" if args.deterministic_eval else "sampled"
        results["scored_with"] = f"{actions} actions, on seeds that training never used"
        copy.deepcopy(agent).save_pretrained(partial)  # a copy, for parameters that are no views of one vector
        package_to_hub(run_folder, args, results | {"env_name": args.env_id, "global_step": global_step})
        return agent
    except (KeyboardInterrupt, RuntimeError, *EXPECTED) as error:
        if isinstance(error, RuntimeError) and not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise  # not the end of another process, but a bug
        if WORLD_SIZE > 1 and RANK == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, while we leave
        time.sleep(5 * (RANK > 0))  # in most cases process 0 says the same
        can_resume = run_folder and (run_folder / "checkpoint.pt").is_file()
        why = " ".join(str(error).split()) or "stopped"
        hub = "Hugging Face Hub: " if isinstance(error, HTTPError) else ""
        dead = "another process has ended: " if isinstance(error, RuntimeError) else ""
        sys.exit(f"error: {hub}{dead}{why}{f'; go on with: --resume {run_folder}' if can_resume else ''}")


if __name__ == "__main__":
    agent = main()
