"""PPO plays Super Mario Bros. from pixels, in one file: trains an agent, scores it, films it and packages it.

    python ppo_mario.py                                                     # learns to finish stage 1-1
    python ppo_mario.py --env-id SuperMarioBros-1-2-v0 --repo-id user/mario # another stage, pushed to the Hub
    python ppo_mario.py --evaluate user/mario                               # load it back, score it, film it
    torchrun --nproc-per-node 8 ppo_mario.py --num-envs 64                  # 8 environments in each of eight processes
    tensorboard --logdir runs

The algorithm is that of ppo.py: roll out the current policy, estimate advantages (GAE), take minibatch steps on the
clipped surrogate objective. What is new here comes from the pixels: the game, the wrappers that make of its screen what
a network can learn from, a convolutional network, and environments in worker processes.

Papers: Proximal Policy Optimization Algorithms (Schulman et al., 2017, https://arxiv.org/abs/1707.06347),
High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016,
https://arxiv.org/abs/1506.02438), Human-level control through deep reinforcement learning (Mnih et al., 2015), which
has the wrappers and the network. The game's memory map and rewards are those of gym-super-mario-bros (Kauten, 2018).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "gymnasium[classic-control]>=1.2,<2", "stable-retro>=1.0,<2; sys_platform != 'win32'",
#     "gym-super-mario-bros==7.4.0; sys_platform != 'win32'", "opencv-python-headless>=4.10,<6", "numpy>=2,<3",
#     "tensorboard>=2.18,<3", "huggingface_hub>=1.20,<3", "safetensors>=0.4.3,<1", "imageio>=2.36,<3",
#     "imageio-ffmpeg>=0.6,<1", "tqdm>=4.66,<5", "wasabi>=1.1,<2",
# ]
#
# [tool.uv]
# override-dependencies = ["nes-py; sys_platform == 'never'"]  # the emulator of that package, in C++ and not used
# ///

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import cv2
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import stable_retro
import torch
import torch.distributed as dist
from huggingface_hub import EvalResult, HfApi, ModelCardData, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from wasabi import Printer

SCRIPT = "ppo_mario.py"  # the name of this file in the package
ALGORITHM = "PPO"
CARD_TAGS = ["ppo", "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation", "deep-rl-course"]
CHECKPOINT_SECONDS = 10  # what a stop costs at the most, besides the iteration under way
EXPECTED = (gym.error.Error, HTTPError, ImportError, HFValidationError, SafetensorError, json.JSONDecodeError, OSError)
NEW_ON_RESUME = {"resume", "rom", "total_timesteps", "n_eval_episodes", "repo_id", "track", "cuda", "capture_video"}
IN_NOTEBOOK = "ipykernel" in sys.modules  # in a Jupyter or Colab cell
msg = Printer(pretty=sys.stdout.isatty())

# --- Flags -----------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, per environment. Flags on the command line win over the row.
TUNED = {"SuperMarioBros-v0": dict(total_timesteps=10_000_000)}  # the whole game, a guess: it has not been trained yet


def parse_args(argv=None):
    """Read the flags: the command line wins over a saved run's flags or the TUNED row, those over the defaults here."""
    about = dict(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(SCRIPT, description=__doc__.splitlines()[0], add_help=False, **about)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    whole_game = "SuperMarioBros-<world>-<stage>-v0, or SuperMarioBros-v0, the whole game"
    flag("--env-id", type=with_version, default="SuperMarioBros-1-1-v0", help=whole_game)
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", metavar="RUN_FOLDER", help="go on from the checkpoint of an interrupted run, with its flags")
    either("--evaluate", metavar="SOURCE", help="no training: score and film a run folder, a Hub repo id, or 'random'")
    flag("--render", action=switch, default=False, help="with --evaluate: play in a window")
    flag("--rom", metavar="PATH", help="the game's .nes file; without it that of the package gym-super-mario-bros")
    flag("--exp-name", default="ppo_mario", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=int, default=1, help="seed of everything random; the game itself has no chance in it")
    flag("--torch-deterministic", action=switch, default=True, help="deterministic cuDNN")
    flag("--cuda", action=switch, default=True, help="use a GPU if there is one")
    flag("--track", action=switch, default=False, help="log to Weights & Biases as well (pip install wandb)")
    flag("--capture-video", action=switch, default=False, help="film ten episodes on the way")
    flag("--action-set", choices=ACTION_SETS, default="simple", help="combinations of buttons: 5, 7 or 12")
    flag("--stuck-steps", type=int, default=60, help="training ends an episode so long without progress")
    flag("--total-timesteps", type=int, default=800_000, help="environment steps, all environments together")
    flag("--learning-rate", type=float, default=5e-4, help="step size of Adam")
    flag("--num-envs", type=int, default=8, help="environments side by side, each in its process, in all")
    flag("--num-steps", type=int, default=128, help="steps per environment and rollout")
    flag("--anneal-lr", action=switch, default=True, help="the learning rate falls linearly to 0 at --total-timesteps")
    flag("--gamma", type=float, default=0.95, help="discount factor")
    flag("--gae-lambda", type=float, default=1.0, help="lambda of GAE: 0 is TD(0), 1 is Monte Carlo")
    flag("--num-minibatches", type=int, default=4, help="minibatches per epoch")
    flag("--update-epochs", type=int, default=4, help="passes over the batch of each rollout")
    flag("--norm-adv", action=switch, default=True, help="standardise advantages per minibatch")
    flag("--clip-coef", type=float, default=0.2, help="epsilon of the clipped surrogate objective")
    flag("--barrier-coef", type=float, default=0.003, help="weight of the log barrier, which falls linearly to 0")
    flag("--persistence", type=float, default=0.75, help="how likely a step keeps the last one's noise, falls to 0")
    flag("--vf-coef", type=float, default=0.5, help="weight of the value loss")
    flag("--max-grad-norm", type=float, default=0.5, help="clip the norm of the gradient to this")
    flag("--target-kl", type=float, help="end a rollout's epochs once approx_kl is above this")
    flag("--n-eval-episodes", type=int, default=100, help="episodes that the score is measured over")
    flag("--temperature", type=float, default=0.7, help="scored actions: 1 samples as in training, 0 takes the best")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")

    argv = argv if argv is not None else [] if IN_NOTEBOOK else sys.argv[1:]  # a kernel's own arguments are not ours
    known, _ = parser.parse_known_args(argv)  # --env-id, --resume and --evaluate decide the defaults of all the others
    flag("-h", "--help", action="help", help="show this, with the defaults for --env-id, and exit")
    checkpoint = load_checkpoint(known.resume) if known.resume else {}
    saved = checkpoint.get("args", TUNED.get(known.env_id, {}))
    if known.evaluate and known.evaluate != "random":
        saved = open_package(known.evaluate, known.env_id)[1]
    parser.set_defaults(**{name: saved[name] for name in saved.keys() & {"rom", *hyperparameters_of(known)}})
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "n_eval_episodes", "stuck_steps")
        most = {"gamma": 1, "gae_lambda": 1, "persistence": 1, "n_eval_episodes": 10**6}.get(name, 2**63 - 1)
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

SKIP = 4  # frames that an action is held for: deciding 15 times a second is enough, and costs a quarter
STACK = 4  # observations that the network sees at once: one picture does not show where things are going
SIDE = 84  # pixels of an observation's side
SCALE = 2  # a rendered frame is that much larger than the console's

BUTTONS = ["B", None, "SELECT", "START", "UP", "DOWN", "LEFT", "RIGHT", "A"]  # in the emulator's order
RIGHT = ["", "RIGHT", "RIGHT A", "RIGHT B", "RIGHT A B"]  # A jumps, B runs
ACTION_SETS = {  # the original's three lists
    "right": RIGHT,
    "simple": [*RIGHT, "A", "LEFT"],
    "complex": [*RIGHT, "A", "LEFT", "LEFT A", "LEFT B", "LEFT A B", "DOWN", "UP"],
}

ROMS = [  # the version of an environment's id says how much is drawn: its file in gym-super-mario-bros, and the SHA-1
    ("super-mario-bros.nes", "ab30029efec6ccfc5d65dfda7fbc6e6489a80805"),  # -v0: everything
    ("super-mario-bros-downsample.nes", "4bf894b301f339bce306af4813923a9900d034d1"),  # -v1: a plain background
    ("super-mario-bros-pixel.nes", "63a520bf1a2911d7f3c343cbda42c1969e0ae184"),  # -v2: a few colours
    ("super-mario-bros-rectangle.nes", "b0e9b156a51017c33a6b76708fc71395f8d32b15"),  # -v3: rectangles
]


def find_rom(version, path=None):
    """The game's file for -v{version}: the one at path, or that of the package gym-super-mario-bros.

    That package is not imported, for it brings the retired gym. A gymnasium.error.Error or OSError says what is wrong.
    """
    name, sha1 = ROMS[version]
    if path is None:
        package = importlib.util.find_spec("gym_super_mario_bros")
        path = package and package.origin and Path(package.origin).parent / "_roms" / name  # a mere folder has none
        if path is None or not path.is_file():
            how = "pip install --no-deps gym-super-mario-bros==7.4.0 brings it, or pass your own file with --rom PATH"
            raise gym.error.DependencyNotInstalled(f"there is no {name} yet: {how}")
    path = Path(path)
    if path.suffix != ".nes" or hashlib.sha1(path.read_bytes()).hexdigest() != sha1:
        raise gym.error.Error(f"--rom {path}: -v{version} is played on a .nes file whose SHA-1 is {sha1}")
    return path


class SuperMarioBros(gym.Env):
    """Super Mario Bros., rule for rule that of gym-super-mario-bros 7.4, on the NES core of stable-retro.

    Each step is one frame of 1/60 s. Observations: the screen, (224, 240, 3) uint8. Actions: indices into action_set, a
    name of ACTION_SETS or a list like theirs. Reward: how far Mario has come to the right, less the ticks of the clock,
    less 25 for a death, within [-15, 15]. With a world (1 to 8) and a stage (1 to 4) an episode is one life there, and
    ends at the flag; without, it is the whole game with its three lives. version: of ROMS; rom: path of a file.

    One emulator fits in one process: `close` it before the next is made. Raises gymnasium.error.Error where there is
    one already, where there is no such action_set, and where `find_rom` does.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012

    def __init__(self, world=None, stage=None, version=0, action_set="simple", rom=None, render_mode=None):
        actions = ACTION_SETS.get(action_set) if isinstance(action_set, str) else action_set
        if not actions or not {*" ".join(map(str, actions)).split()} <= {*BUTTONS}:
            raise gym.error.Error(f"action_set={action_set!r} is not {', '.join(ACTION_SETS)} or a list like theirs")
        masks = [[button in action.split() for button in BUTTONS] for action in [*actions, "", "START"]]
        *self.masks, self.nothing, self.start_button = np.array(masks, dtype=np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.masks))
        self.observation_space = gym.spaces.Box(0, 255, (224, 240, 3), np.uint8)
        self.render_mode = render_mode
        self.world, self.stage = world, stage
        try:
            self.emulator = stable_retro.RetroEmulator(str(find_rom(version, rom)))
        except RuntimeError as error:
            raise gym.error.Error(f"{error}, or to put several into a gymnasium.vector.AsyncVectorEnv") from error
        self.game_data = stable_retro.data.GameData()
        self.emulator.configure_data(self.game_data)
        self.memory = self.game_data.memory
        self.skip_start_screen()
        self.screen = self.emulator.get_screen()
        self.start = self.moment()
        self.flags = []  # of each episode that ended, whether it came to a flag

    # To know more of the game, add a line to `info`, such as "speed": self.read(0x0057), a name and an address in
    # the console's memory. There is a map of it at https://datacrystal.tcrf.net/wiki/Super_Mario_Bros./RAM_map.
    def read(self, address, kind="|u1"):
        """The number at this address; kind: |u1 is a byte, >n3 three decimal digits in a byte each."""
        return self.memory.extract(address, kind)

    def write(self, address, byte):
        """Change the byte at this address."""
        self.memory.assign(address, "|u1", byte)

    def clock(self):
        """The game's time left, in its ticks of 0.4 s."""
        return self.read(0x07F8, ">n3")

    def lives(self):
        """How many lives are left after this one, 255 in the end."""
        return self.read(0x075A)

    def x(self):
        """How far Mario is from the left end of the area that he is in, in pixels."""
        return self.read(0x006D) * 256 + self.read(0x0086)

    def y(self):
        """How high Mario is, in pixels: 79 on the ground; above the screen it goes on from 255."""
        y = 255 - self.read(0x03B8)
        return y if self.read(0x00B5) else 255 + y

    def is_swimming(self):
        """Whether Mario is under water."""
        return self.read(0x0704) != 0

    def is_in_the_air(self):
        """Whether Mario jumps or falls: neither stands, nor climbs, nor swims."""
        return self.read(0x001D) in (1, 2) and not self.is_swimming()

    def is_dying(self):
        """Whether Mario is in the dying animation, dead, or falling into a hole."""
        return self.read(0x000E) in (0x06, 0x0B) or self.read(0x00B5) > 1

    def is_world_over(self):
        """Whether a castle's end is playing."""
        return self.read(0x0770) == 2

    def is_at_flag(self):
        """Whether the stage is finished: a castle's end, or sliding down its flagpole."""
        # 3 is to climb a vine as well as to slide down a pole, but there one of the five enemies around is the castle's
        # flag, 0x31, or Bowser, 0x2D.
        slides = self.read(0x001D) == 3 and any(self.read(enemy) in (0x2D, 0x31) for enemy in range(0x0016, 0x001B))
        return slides or self.is_world_over()

    def has_left_the_stage(self):
        """Whether Mario, who is to finish a stage, ran past its end above the ceiling, to the pipes to other worlds."""
        return self.stage is not None and self.read(0x06D6) > 0 and self.y() >= 255

    def advance(self, mask):
        """Emulate one frame with these buttons pressed."""
        self.emulator.set_button_mask(mask, 0)
        self.emulator.step()

    def skip_start_screen(self):
        """From power on to the first frame that can be played, in the stage that was asked for."""
        while self.clock():  # the memory is full of noise until the game has cleared it
            self.advance(self.nothing)
        self.advance(self.start_button)
        self.advance(self.nothing)
        while not self.clock():
            self.advance(self.start_button)
            if self.world is not None:
                # Worlds 1, 2, 4 and 7 have the way down the pipe as an area of its own before their second stage.
                area = self.stage + (self.stage > 1 and self.world in (1, 2, 4, 7))
                for address, value in ((0x075F, self.world), (0x075C, self.stage), (0x0760, area)):
                    self.write(address, value - 1)
            self.advance(self.nothing)
            self.write(0x07A0, 0)  # the time that the black screen with the lives is shown
        last = self.clock()
        while self.clock() >= last:
            last = self.clock()
            self.advance(self.start_button)
            self.advance(self.nothing)

    def reset(self, *, seed=None, options=None):
        """Back to the start, which is always the same, or with options={"moment": ...} to what `moment` returned."""
        super().reset(seed=seed)
        state, screen = (options or {}).get("moment", self.start)
        self.emulator.set_state(state)
        self.last_x, self.last_clock, self.came_to_a_flag = self.x(), self.clock(), False
        self.screen = screen.copy()
        return self.screen, self.info()

    def step(self, action):
        """Play one frame."""
        self.advance(self.masks[action])
        x, clock = self.x(), self.clock()
        progress = x - self.last_x if abs(x - self.last_x) <= 5 else 0  # more is a change of area, not a way gone
        dying = self.is_dying()
        reward = progress + min(clock - self.last_clock, 0) - 25 * dying
        self.last_x, self.last_clock = x, clock
        info = self.info()
        if self.world is None:  # ends when no life is left, or with the last castle, whose end would last for ever
            terminated = info["life"] == 0xFF or (info["world"] == 8 and self.is_world_over())
        else:
            terminated = dying or info["flag_get"]
        # Who takes a pipe to another world, instead of a stage's flag, may go on to a flag there.
        self.came_to_a_flag |= info["flag_get"] and self.world in (None, info["world"])
        if terminated:
            self.flags.append(self.came_to_a_flag)
        else:
            self.skip_scenes()
        self.screen = self.emulator.get_screen()
        return self.screen, float(min(max(reward, -15), 15)), terminated, False, info

    def skip_scenes(self):
        """Pass over what cannot be played: dying, entering pipes, the walk into the castle, black screens."""
        if self.is_dying():  # and there are lives left
            self.write(0x000E, 0x06)
            self.advance(self.nothing)
        if self.world is None and self.is_world_over():
            clock = self.clock()
            while self.clock() == clock:
                self.advance(self.nothing)
        if 1 < self.read(0x06DE) < 255:  # the time that a change of area takes
            self.write(0x06DE, 1)
        while self.read(0x000E) in (0, 1, 2, 3, 4, 5, 7) or self.is_world_over():
            self.write(0x07A0, 0)
            self.advance(self.nothing)

    def moment(self):
        """The game as it is now, for `reset` to come back to: the emulator's state, and the screen."""
        return self.emulator.get_state(), self.screen

    def info(self):
        """What the original tells about the game."""
        return {
            "coins": self.read(0x07ED, ">n2"),
            "flag_get": self.is_at_flag(),
            "life": self.lives(),
            "score": self.read(0x07DE, ">n6"),
            "stage": self.read(0x075C) + 1,
            "status": {0: "small", 1: "tall"}.get(self.read(0x0756), "fireball"),
            "time": self.clock(),
            "world": self.read(0x075F) + 1,
            "x_pos": self.x(),
            "y_pos": self.y(),
        }

    def render(self):
        """The screen, enlarged."""
        return self.screen.repeat(SCALE, axis=0).repeat(SCALE, axis=1)

    def close(self):
        """Let go of the emulator, so that this process can have another."""
        self.emulator = self.game_data = self.memory = None


# All environments, whose observations are the screen and whose steps are frames: {id: (world, stage, version)}.
IDS = {f"SuperMarioBros-v{version}": (None, None, version) for version in range(len(ROMS))}
for place in itertools.product(range(1, 9), range(1, 5), range(len(ROMS))):
    IDS["SuperMarioBros-{}-{}-v{}".format(*place)] = place
for env_id, place in IDS.items():
    kwargs = dict(zip(("world", "stage", "version"), place))
    spec = gym.registry[env_id] = gym.envs.registration.EnvSpec(env_id, SuperMarioBros, kwargs=kwargs)
    if spec.version > 0:  # or gymnasium.make would advise -v3, the rectangles, to who asks for -v0
        spec.version = None


def with_version(env_id):
    """The id with its version, -v0 where it has none."""
    return f"{env_id}-v0" if f"{env_id}-v0" in IDS else env_id


class SkipFrames(gym.Wrapper):
    """Hold each action for SKIP frames, and sum up their rewards; `render` gives the frames, all of them."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.frames = [observation]
        return observation, info

    def step(self, action):
        self.frames, total = [], 0.0
        for _ in range(SKIP):
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.frames.append(observation)
            total += reward
            if terminated or truncated or info["flag_get"]:  # in the whole game, the next frame is the next stage's
                break
        return observation, total, terminated, truncated, info

    def render(self):
        return [frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1) for frame in self.frames]


class ShapeReward(gym.Wrapper):
    """Reward points too, and a stage's flag, as much as to run on for ever would. It all pays when Mario lands.

    Else the fall into a hole pays almost as well as the way across, and the last step before the edge better than a
    jump in time, which mostly fails at first. A death ends the episode, in the whole game, too: it costs all that could
    still have been earned, and no more. A fine teaches who dies at every try to try no more, or to put it off. To leave
    a stage over its ceiling, for a warp zone, where its flag is not, is a death. A swimmer is paid at once. A fiftieth
    of it all: returns vary by about 1 then, and the critic's gradient does not drown the actor's in what they share.
    """

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.score, self.owed, self.in_the_air = info["score"], 0.0, self.unwrapped.is_in_the_air()
        self.lives = self.unwrapped.lives()
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.owed += reward + (info["score"] - self.score) / 40
        self.score = info["score"]
        was_in_the_air, self.in_the_air = self.in_the_air, self.unwrapped.is_in_the_air()
        lives, self.lives = self.lives, self.unwrapped.lives()
        terminated |= self.unwrapped.has_left_the_stage() or self.lives < lives
        if info["flag_get"]:
            reward, self.owed = self.owed + 125, 0.0
        elif not terminated and (self.unwrapped.is_swimming() or (was_in_the_air and not self.in_the_air)):
            reward, self.owed = self.owed, 0.0
        else:
            reward = 0.0
        return observation, reward / 50, terminated, truncated, info


class EndWhenStuck(gym.Wrapper):
    """End an episode that has come no further for so many steps, like a death: what leads into a trap must cost there.

    A truncation would be bootstrapped from the critic, to which a trap is worth what looks like it.
    """

    def __init__(self, env, stuck_steps):
        super().__init__(env)
        self.stuck_steps = stuck_steps

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.furthest, self.waited = (info["world"], info["stage"], info["x_pos"]), 0
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        place = (info["world"], info["stage"], info["x_pos"])
        self.waited = 0 if place > self.furthest else self.waited + 1
        self.furthest = max(place, self.furthest)
        info["furthest_x"] = self.furthest[2]
        return observation, reward, terminated or self.waited >= self.stuck_steps, truncated, info


class StartAnywhere(gym.Wrapper):
    """Begin an episode, with probability 1/2, at one of the places that earlier ones came to, each equally likely.

    So a stage is learned all at once, and not its beginning first (Tavakoli et al., 2018, Ecoffet et al., 2021). A
    place is 64 pixels of a stage. Of each, the latest moment is kept after which Mario lived on for some 30 steps;
    --resume begins without any.
    """

    def __init__(self, env):
        super().__init__(env)
        self.moments = {}  # of each place

    def reset(self, **kwargs):
        self.whole = not self.moments or self.np_random.random() < 0.5
        if not self.whole:
            kwargs["options"] = {"moment": [*self.moments.values()][self.np_random.integers(len(self.moments))]}
        self.trail, self.steps = deque(), 0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        if self.steps % 10 == 0:
            place = info["world"], info["stage"], info["x_pos"] // 64
            self.trail.append((place, self.unwrapped.moment()))
            if len(self.trail) > 3:
                self.moments.update([self.trail.popleft()])
        return observation, reward, terminated, truncated, info | {"whole": self.whole}


def small_grey(screen):
    """The screen in grey, SIDE x SIDE: all that it takes to play, in a twentieth of the bytes."""
    return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def make_env(env_id, action_set="simple", rom=None, render_mode=None, stuck_steps=None):
    """Make one environment with its wrappers: observations are (STACK, SIDE, SIDE) uint8, steps SKIP frames long.

    stuck_steps: for training, with shaped rewards; without, rewards, starts and ends are the game's own. A
    gymnasium.error.Error says what is wrong with its name or its ROM.
    """
    if env_id not in IDS:
        raise gym.error.Error(f"{env_id}: this script knows SuperMarioBros-v0 and SuperMarioBros-1-1-v0 to -8-4-v0")
    # Not by its id: where worker processes are spawned, a notebook's class comes with the job, its registry does not.
    env = SuperMarioBros(*IDS[env_id], action_set, rom, "rgb_array")
    if render_mode == "human":
        env = gym.wrappers.HumanRendering(env)
    env = SkipFrames(env)
    if stuck_steps is not None:
        env = gym.wrappers.RecordEpisodeStatistics(StartAnywhere(EndWhenStuck(ShapeReward(env), stuck_steps)))
    env = gym.wrappers.TransformObservation(env, small_grey, gym.spaces.Box(0, 255, (SIDE, SIDE), np.uint8))
    return gym.wrappers.FrameStackObservation(env, STACK)


def make_worker_env(*args):
    """`make_env` in a worker process, where Ctrl-C and SIGTERM are the main process's to answer."""
    if multiprocessing.parent_process():
        # A terminal sends Ctrl-C to all processes at once. Of torchrun's, those other than process 0 do not handle it.
        signal.signal(signal.SIGINT, signal.SIG_DFL if RANK else signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has inherited our handlers
    return make_env(*args)


# --- The agent -------------------------------------------------------------------------------------------------------
class Agent(nn.Module, PyTorchModelHubMixin):
    """The network of Mnih et al. (2015) with half its channels, for half the time, as one for actor and critic."""

    def __init__(self, n_actions):
        super().__init__()
        first = layer_init(nn.Conv2d(STACK, 16, kernel_size=8, stride=4))
        second = layer_init(nn.Conv2d(16, 32, kernel_size=4, stride=2))
        third = layer_init(nn.Conv2d(32, 32, kernel_size=3))
        last = layer_init(nn.Linear(32 * 7 * 7, 512))
        convolutions = (first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())
        self.features = nn.Sequential(*convolutions, nn.Flatten(), last, nn.ReLU())
        self.actor = layer_init(nn.Linear(512, n_actions), std=0.01)  # close to uniform: no early favourites
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions take half the time so

    def forward(self, observations):
        """(B, STACK, SIDE, SIDE) uint8 -> logits (B, n_actions) and values (B,)."""
        pixels = observations.contiguous(memory_format=torch.channels_last).float().div_(255)
        features = self.features(pixels)
        return self.actor(features), self.critic(features).squeeze(-1)


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by std, zero bias (The 37 Implementation Details of PPO, detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def decide(agent, observations, noise=0.0):
    """Choose an action for each observation: (N,) int64, and with it its log-probability and the value, (N,) float32.

    observations: (N, STACK, SIDE, SIDE) uint8; all arrays are NumPy's. Without noise: the most probable actions. With
    standard Gumbel noise, (N, n_actions): samples from softmax(logits), because argmax(logits + noise) is distributed
    so (the Gumbel-max trick).
    """
    logits, values = agent(torch.from_numpy(observations).to(agent.actor.weight.device))
    log_probs = torch.log_softmax(logits, dim=-1)
    answer = torch.cat([log_probs, values[:, None]], dim=1).cpu().numpy()  # in one piece: one wait for a GPU, not two
    actions = (answer[:, :-1] + noise).argmax(axis=-1)
    return actions, np.take_along_axis(answer, actions[:, None], axis=1)[:, 0], answer[:, -1]


def persistent_noise(rng, shape, persistence):
    """Standard Gumbel noise, (T, N, n_actions), of which a step keeps that of the step before at times.

    It does so with the probability persistence. A wide gap takes a jump that is held for many steps in a row, which new
    noise at each step hardly ever does (of continuous actions: Hollenstein et al., 2024). PPO takes the noise for
    new at each step, so persistence falls to 0 in the end.
    """
    noise = rng.gumbel(size=shape)
    kept = rng.random(shape[:2]) < persistence
    for t in range(1, len(noise)):
        noise[t, kept[t]] = noise[t - 1, kept[t]]
    return noise


def make_policy(agent, temperature=0.7, seed=0):
    """The agent as a function `observation -> action`, for evaluation and video; seed: of the sampled actions.

    They are samples from softmax(logits / temperature): at 1 as in training, at 0 the most probable ones.
    """
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = temperature * rng.gumbel(size=(1, agent.actor.out_features))
        return int(decide(agent, observation[None], noise)[0][0])

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


def update(agent, optimizer, minibatch, barrier_coef, args):
    """One gradient step on a minibatch, which ascends equation 9 of the paper: L^CLIP - c1 * L^VF + c2 * S.

    In the place of the entropy bonus S is a log barrier (Agarwal et al., 2021, https://arxiv.org/abs/1908.00261), the
    mean log-probability of all n actions. As the probability p of one falls, the gradient of S for its logit vanishes,
    -p * (log p + S), and an action that was given up never comes back. That of the barrier does not: 1 / n - p.
    minibatch: observations, actions, old log-probabilities, returns and advantages, a row for each step.
    Returns log-probabilities (B,) and the statistics {name: 0-d tensor}. Nothing here waits for the device.
    """
    observations, actions, old_log_probs, returns, advantages = minibatch
    logits, values = agent(observations)
    log_probs = torch.log_softmax(logits, dim=-1)
    entropy = (log_probs.exp() * log_probs).sum() / -len(log_probs)
    barrier = log_probs.mean()
    log_probs = log_probs.gather(1, actions[:, None]).squeeze(-1)
    objective = clipped_surrogate(log_probs, old_log_probs, advantages, args.clip_coef)
    v_loss = 0.5 * nn.functional.mse_loss(values, returns)
    loss = args.vf_coef * v_loss - objective - barrier_coef * barrier

    optimizer.zero_grad()
    loss.backward()
    for parameter in agent.parameters() if WORLD_SIZE > 1 else ():  # the mean over all processes
        dist.all_reduce(parameter.grad)
        parameter.grad /= WORLD_SIZE
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    losses = {"value_loss": v_loss.detach(), "policy_loss": -objective.detach(), "entropy": entropy.detach()}
    return log_probs.detach(), losses


@torch.enable_grad()  # in a notebook, a Ctrl-C inside no_grad() may leave gradients off: this puts them back
def train(args, run_folder):
    """Train an agent with PPO; with --resume, go on from the checkpoint in run_folder. Checkpoints and curves go there.

    Returns the agent and the number of steps that the training took.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # for this process
    threads = int((os.environ.get("OMP_NUM_THREADS") or str(cores)).split(",")[0])
    torch.set_flush_denormal(True)  # Adam's averages for units that never fire fade into numbers that CPUs are slow at
    torch.backends.cudnn.deterministic = args.torch_deterministic
    gpus = torch.cuda.device_count() if args.cuda else 0
    device = torch.device(f"cuda:{LOCAL_RANK % gpus}" if gpus else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # actions and minibatches, in all processes alike; starts have their own
    num_envs = args.num_envs // WORLD_SIZE
    mine = slice(RANK * num_envs, (RANK + 1) * num_envs)  # this process's environments

    # One emulator fits in one process, so each environment has its own. They are two halves that take turns: while the
    # network decides for one, the workers play the other. SAME_STEP: where an episode ends, the environment returns the
    # next one's first observation in the same step, and the old one's last observation in infos. So every transition in
    # the batch lies inside one episode.
    make = functools.partial(make_worker_env, args.env_id, args.action_set, args.rom, None, args.stuck_steps)
    half = (num_envs + 1) // 2
    columns = [slice(0, half), slice(half, num_envs)][:num_envs]
    n_actions = len(ACTION_SETS[args.action_set])
    agent = Agent(n_actions).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    global_step = 0
    recent = deque(maxlen=100)  # (return, flag) of the episodes that ended last
    if args.resume:
        checkpoint = gather([None if RANK else load_checkpoint(run_folder)])[0]
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step = checkpoint["global_step"]
        recent.extend(checkpoint["recent"])
        msg.info(f"Resumed after {global_step:,} steps, {args.total_timesteps - global_step:,} to go")

    # The rollout: T = num_steps rows, N = num_envs columns. Observations have row T too, after the last action.
    shape = (args.num_steps, num_envs)
    observations = np.zeros((args.num_steps + 1, num_envs, STACK, SIDE, SIDE), dtype=np.uint8)
    actions = np.zeros(shape, dtype=np.int64)
    log_probs, values, rewards, dones = (np.zeros(shape, dtype=np.float32) for _ in range(4))
    last_checkpoint = 0.0
    # flush_secs: for so long, a Ctrl-C in a bad moment waits for TensorBoard's thread.
    logs = {"log_dir": run_folder and run_folder / "hub" / "logs", "flush_secs": 2, "purge_step": global_step + 1}
    with (
        worker_processes(make, columns) as halves,  # first, before TensorBoard has a thread, as to fork is safe without
        contextlib.nullcontext() if RANK else SummaryWriter(**logs) as writer,
        contextlib.nullcontext() if RANK else progress_bar(args.total_timesteps, global_step, "step") as bar,
    ):
        if RANK == 0:
            writer.add_text("hyperparameters", f"```\n{json.dumps(hyperparameters_of(args), indent=2)}\n```")
        for envs, column in zip(halves, columns):
            seed = args.seed + global_step + mine.start + column.start  # after --resume, not the first starts again
            observations[-1, column], _ = envs.reset(seed=seed)
        for iteration in range(global_step // batch_size, num_iterations):
            to_go = 1 - iteration / num_iterations
            learning_rate = args.learning_rate * (to_go if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate

            # 1. Rollout: run the current policy for T steps in each of the N environments.
            noise = persistent_noise(rng, (args.num_steps, args.num_envs, n_actions), args.persistence * to_go)[:, mine]
            observations[0] = observations[-1]
            finished = []  # (return, length, furthest x, flag) of each episode that began at the start and ended
            for t in range(args.num_steps + 1):
                for envs, column in zip(halves, columns):
                    if t > 0:  # the answer to the actions before, in which nothing is truncated
                        observations[t, column], rewards[t - 1, column], terminated, _, infos = envs.step_wait()
                        dones[t - 1, column] = terminated
                        for j in np.flatnonzero(terminated):
                            last = infos["final_info"]
                            if last["whole"][j]:
                                sums = last["episode"]["r"][j], last["episode"]["l"][j]
                                finished.append((*sums, last["furthest_x"][j], last["flag_get"][j]))
                    if t < args.num_steps:
                        choice = decide(agent, observations[t, column], noise[t, column])
                        actions[t, column], log_probs[t, column], values[t, column] = choice
                        envs.step_async(actions[t, column])
            global_step += batch_size

            # 2. Advantages. A jump pays when Mario lands, some 20 steps later. Lambda 1 credits it with gamma^20 of it,
            #    a third; lambda 0.95 would with an eighth, and leave the rest to the critic, who learns it late.
            last_value = decide(agent, observations[-1])[2]
            advantages, returns = compute_gae(rewards, values, dones, last_value, args.gamma, args.gae_lambda)

            # 3. Update: a gradient step for each minibatch. One shuffle per epoch; the minibatches are its rows. The
            #    workers wait, so it gets all the cores.
            torch.set_num_threads(threads)
            batch = [array.reshape(-1, *array.shape[2:]) for array in (observations[:-1], actions, log_probs, returns)]
            batch.append(np.stack(gather([advantages.reshape(-1)]), axis=1))  # a column for each process
            batch = [torch.from_numpy(array).to(device) for array in batch]
            orders = np.stack([rng.permutation(actions.size) for _ in range(args.update_epochs)])
            for order in torch.from_numpy(orders).to(device):
                minibatches = [array[order].unflatten(0, (args.num_minibatches, -1)) for array in batch]
                if args.norm_adv:
                    minibatches[-1] = standardise(minibatches[-1])
                minibatches[-1] = minibatches[-1][..., RANK]
                for minibatch in zip(*minibatches):
                    new_log_probs, losses = update(agent, optimizer, minibatch, args.barrier_coef * to_go, args)
                log_ratio = new_log_probs - minibatch[2]  # how far has the policy moved from the one that acted?
                losses["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
                losses["clipfrac"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
                if args.target_kl is not None and np.mean(gather([losses["approx_kl"].item()])) > args.target_kl:
                    break
            torch.set_num_threads(1)

            # 4. Statistics, of process 0's last minibatch (or its batch) and read once per iteration: in step 3 nothing
            #    but --target-kl has made the host wait for the device.
            finished = gather(finished)
            if RANK > 0:
                continue
            curves = {f"losses/{name}": value.item() for name, value in losses.items()}
            curves["losses/explained_variance"] = 1 - np.var(returns - values) / max(np.var(returns), 1e-8)
            curves["charts/learning_rate"] = learning_rate
            if finished:  # of the episodes that ended in this iteration, but the flags of the last hundred
                ended_returns, ended_lengths, ended_x, ended_flags = np.array(finished, dtype=float).T
                recent.extend(zip(ended_returns.tolist(), ended_flags.tolist()))
                mean_return, curves["charts/flag_rate"] = np.mean(recent, axis=0)
                curves |= {"charts/episodic_return": ended_returns.mean(), "charts/furthest_x": ended_x.max()}
                curves["charts/episodic_length"] = ended_lengths.mean()
                bar.set_postfix_str(f"return {mean_return:.2f}", refresh=False)
            bar.update(batch_size)
            curves["charts/SPS"] = (bar.n - bar.initial) / bar.format_dict["elapsed"]
            for name, value in curves.items():
                writer.add_scalar(name, value, global_step)
            writer.flush()  # else TensorBoard's thread writes during the rollout, and takes the GIL at every step of it

            if time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS or iteration == num_iterations - 1:
                state = dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), rng=rng.bit_generator.state)
                save_checkpoint(run_folder, args, global_step=global_step, recent=[*recent], **state)
                last_checkpoint = time.monotonic()
            if args.capture_video and (iteration + 1) * 10 // num_iterations > iteration * 10 // num_iterations:
                with contextlib.closing(make_env(args.env_id, args.action_set, args.rom)) as env:
                    record_video(env, make_policy(agent, 1.0), run_folder / f"videos/step-{global_step}.mp4")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return agent.cpu(), global_step


@contextlib.contextmanager
def worker_processes(make, columns):
    """An AsyncVectorEnv for each slice of columns, whose processes end with the block; signals wait while they start.

    Raises an OSError that says so where one of them has died by itself.
    """
    how = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False}  # the rollout keeps its own copy
    halves, signals = [], []
    forks = multiprocessing.get_start_method() == "fork" and threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if forks}

    def put_off(number, _):
        signals.append(number)
        signal.signal(number, handlers[number])  # who asks twice does not want to wait

    try:
        try:  # what a signal's handler raises in a hook of os.fork, Python drops: signals wait until all have started
            for number in handlers:
                signal.signal(number, put_off)
            for column in columns:
                halves.append(gym.vector.AsyncVectorEnv([make] * (column.stop - column.start), **how))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for number in signals:
                signal.raise_signal(number)
        yield halves
    except (EOFError, ConnectionError) as error:
        raise OSError("an environment's worker process has died, perhaps for want of memory") from error
    finally:
        for envs in halves:
            for process in envs.processes:
                process.kill()
                process.join()
            envs.closed = True  # its own `close` waits for an answer of each worker, which a dead one does not give


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


def score_with_flags(env, policy, seeds, folder=None):
    """`score_and_film`, and the share of the episodes that came to the flag, in the whole game to one at least."""
    score = score_and_film(env, env, policy, seeds, folder)
    score["flag_rate"] = float(np.mean(env.unwrapped.flags[: len(seeds)]))  # without the film's
    msg.good(f"flag_rate {score['flag_rate']:.2f}")
    return score


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


def load_agent(source, env_id=None, action_set=None, rom=None, render_mode=None):
    """Load the agent of a run folder or a Hub repo id: returns it and an environment, by default its training's."""
    package, flags = open_package(source, env_id)
    action_set = action_set or flags.get("action_set")
    try:
        agent = Agent.from_pretrained(package, strict=True, n_actions=len(ACTION_SETS[action_set]))
    except (SafetensorError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise OSError(f"{source}: the model does not fit the action set {action_set}: {error!s:.300}") from error
    return agent, make_env(env_id or flags["env_id"], action_set, rom, render_mode)


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
        torch.set_num_threads(1)  # while acting: a few observations are too little to share, and workers need the cores
        if RANK > 0:
            return follow(argv)
        args = parse_args(argv)
        first_seed = (args.seed + 1) * 1_000_000  # a block for each training seed, which training never uses
        seeds = range(first_seed, first_seed + args.n_eval_episodes)
        options = dict(action_set=args.action_set, rom=args.rom, render_mode="human" if args.render else "rgb_array")
        if args.evaluate and args.evaluate != "random":
            agent, env = load_agent(args.evaluate, args.env_id, **options)
            policy = make_policy(agent, args.temperature, first_seed)
        else:
            env = make_env(args.env_id, **options)  # what is wrong with it is said now
            env.action_space.seed(args.seed)
            policy = lambda _: env.action_space.sample()  # noqa: E731
        with contextlib.closing(env):
            if args.evaluate:
                return score_with_flags(env, policy, seeds, None if args.render else new_folder(args, "evaluate"))

        run_folder = start_run(args)
        if WORLD_SIZE > 1:
            dist.init_process_group(BACKEND)
            gather([args])  # these flags hold for all
        agent, global_step = train(args, run_folder)
        partial = run_folder / "hub.partial"  # the package, as long as it is not complete
        with contextlib.closing(make_env(args.env_id, **options)) as env:
            results = score_with_flags(env, make_policy(agent, args.temperature, first_seed), seeds, partial)
        flags = f"{results['flag_rate'] * args.n_eval_episodes:.0f} of them came to the flag"
        actions = f"actions of a softmax at a temperature of {args.temperature:g}"
        results["scored_with"] = f"{actions}, from the game's one start; {flags}"
        agent.save_pretrained(partial)
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
