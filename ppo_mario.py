"""PPO plays Super Mario Bros. from pixels, in one file: trains an agent, scores it, films it and packages it.

    python ppo_mario.py                                                     # learns to finish stage 1-1
    python ppo_mario.py --env-id SuperMarioBros-1-2-v0 --repo-id user/mario # another stage, pushed to the Hub
    python ppo_mario.py --evaluate user/mario                               # load it back, score it, film it
    python ppo_mario.py --play                                              # play yourself: arrows, Z, X, Enter
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
#     "torch>=2.6",
#     "gymnasium[classic-control]>=1.2,<2",
#     "stable-retro>=1.0,<2; sys_platform != 'win32'",
#     "gym-super-mario-bros==7.4.0; sys_platform != 'win32'",
#     "opencv-python-headless>=4.10,<6",
#     "numpy>=2,<3",
#     "tensorboard>=2.18,<3",
#     "huggingface_hub>=1.20,<3",
#     "imageio>=2.36,<3",
#     "imageio-ffmpeg>=0.6,<1",
#     "tqdm>=4.66,<5",
#     "wasabi>=1.1,<2",
# ]
#
# [tool.uv]
# override-dependencies = ["nes-py; sys_platform == 'never'"]  # the emulator of that package, in C++ and not used
# ///

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import linecache
import math
import multiprocessing
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
    import cv2
    import gymnasium as gym
    import imageio.v2 as imageio
    import numpy as np
    import stable_retro
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

SCRIPT = "ppo_mario.py"  # the name of this file in the package
ALGORITHM = "PPO"
CARD_TAGS = ["ppo", "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation", "deep-rl-course"]
MODEL_FILE = "model.pt"
CHECKPOINT_SECONDS = 30  # what a crash costs at the most, besides the iteration under way
FINALISTS = 2  # of the six agents of the second half of training, so many are played again for the package
EVAL_SEED = 1_000_000  # evaluation plays seeds seed + EVAL_SEED, + 1, ...; training starts from seed, + 1, ...
NOT_SAVED = ("resume", "evaluate", "render", "push", "play", "rom")  # flags that say what to do now and here

msg = Printer(pretty=sys.stdout.isatty())
asked_to_stop = []  # the signals that came while a run was on

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# What differs from the plain defaults below, per environment. Flags on the command line win over the row.
TUNED = {
    "SuperMarioBros-v0": dict(total_timesteps=10_000_000),  # the whole game: what is learned is its beginning
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
    help_env_id = "SuperMarioBros-<world>-<stage>-v0, or SuperMarioBros-v0, the whole game"
    flag("--env-id", type=full_id, default="SuperMarioBros-1-1-v0", help=help_env_id)
    flag("--tuned", **switch, default=True, help="start from --env-id's row of TUNED")
    flag("--resume", metavar="RUN_FOLDER", help="go on from the checkpoint of an interrupted run, with its flags")
    flag("--evaluate", metavar="SOURCE", help="no training: score and film a run folder, a Hub repo id, or 'random'")
    flag("--push", metavar="RUN_FOLDER", help="no training: upload this run's package to --repo-id")
    flag("--play", **switch, default=False, help="no training: play yourself, with arrows, Z, X and Enter")
    known, _ = first.parse_known_args(argv)
    if sum(map(bool, (known.resume, known.evaluate, known.push, known.play))) > 1:
        fail("--resume, --evaluate, --push and --play are four jobs: give one of them")

    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        description=__doc__.splitlines()[0],
        parents=[first],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("experiment").add_argument
    flag("--exp-name", default="ppo_mario", help="name of this experiment, part of the run folder's name")
    flag("--seed", type=number(int, 0), default=1, help="seed of everything random; environment i starts at seed + i")
    flag("--torch-deterministic", **switch, default=True, help="deterministic cuDNN")
    flag("--cuda", **switch, default=True, help="use a GPU if there is one")
    flag("--track", **switch, default=False, help="log to Weights & Biases as well")
    flag("--wandb-project-name", default="deep-rl", help="project on Weights & Biases")
    flag("--wandb-entity", help="entity (team) on Weights & Biases")
    flag("--capture-video", **switch, default=False, help="film ten episodes on the way")

    flag = parser.add_argument_group("game").add_argument
    flag("--rom", metavar="PATH", help="the game's .nes file; without it that of the package gym-super-mario-bros")
    flag(
        "--action-set",
        choices=ACTION_SETS,
        default="right",
        help="what the agent can press: run right, ... everything",
    )
    flag(
        "--stuck-steps", type=number(int, 1), default=150, help="training truncates an episode so long without progress"
    )

    flag = parser.add_argument_group("algorithm").add_argument
    flag("--total-timesteps", type=number(int, 1), default=1_000_000, help="steps, all environments together")
    flag("--learning-rate", type=number(float, 0), default=5e-4, help="step size of Adam")
    flag("--num-envs", type=number(int, 1), default=8, help="environments side by side, each in its process")
    flag("--num-steps", type=number(int, 1), default=256, help="steps per environment and rollout")
    flag("--anneal-lr", **switch, default=True, help="the learning rate falls linearly to 0")
    flag("--gamma", type=number(float, 0, 1), default=0.95, help="discount factor")
    flag("--gae-lambda", type=number(float, 0, 1), default=0.95, help="lambda of GAE: 0 is TD(0), 1 is Monte Carlo")
    flag("--num-minibatches", type=number(int, 1), default=8, help="minibatches per epoch")
    flag("--update-epochs", type=number(int, 1), default=4, help="passes over the batch of each rollout")
    flag("--norm-adv", **switch, default=True, help="standardise advantages per minibatch")
    flag("--clip-coef", type=number(float, 0), default=0.2, help="epsilon of the clipped surrogate objective")
    flag("--clip-vloss", **switch, default=True, help="clip the value loss as well")
    flag("--ent-coef", type=number(float, 0), default=0.01, help="weight of the entropy bonus")
    flag("--vf-coef", type=number(float, 0), default=0.5, help="weight of the value loss")
    flag("--max-grad-norm", type=number(float, 0), default=0.5, help="clip the norm of the gradient to this")
    flag("--shared-network", **switch, default=True, help="one convolutional network for actor and critic; False: two")
    flag("--target-kl", type=number(float, 0), help="end a rollout's epochs once approx_kl is above this")

    flag = parser.add_argument_group("evaluation and the Hugging Face Hub").add_argument
    flag("--n-eval-episodes", type=number(int, 1), default=100, help="episodes that the score is measured over")
    flag("--deterministic-eval", **switch, default=False, help="argmax; False: sample, as the game has no chance")
    flag("--repo-id", help="model repository on the Hub to push to, user/name; without it nothing is sent")
    flag("--render", **switch, default=False, help="with --evaluate: play in a window")

    saved = {}
    if known.resume:
        checkpoint = load_checkpoint(known.resume)
        saved = checkpoint["args"]
    elif known.evaluate and known.evaluate != "random":
        saved = load_hyperparameters(known.evaluate)
    elif known.tuned:
        parser.set_defaults(**TUNED.get(known.env_id, {}))
    # Saved flags go through the parser like those of the command line, which checks their names and values.
    for name in saved.keys() & set(NOT_SAVED) - {"rom"}:
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
    args.total_timesteps -= args.total_timesteps % batch_size  # what is trained are whole batches
    if known.resume and args.total_timesteps < checkpoint["global_step"]:
        fail(f"--total-timesteps {args.total_timesteps}: {known.resume} has {checkpoint['global_step']} steps already")
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

SKIP = 4  # frames that an action is held for: deciding 15 times a second is enough, and costs a quarter
STACK = 4  # observations that the network sees at once: one picture does not show where things are going
SIDE = 84  # pixels of an observation's side
SCALE = 2  # a rendered frame is that much larger than the console's

BUTTONS = ["B", None, "SELECT", "START", "UP", "DOWN", "LEFT", "RIGHT", "A"]  # in the emulator's order
ACTION_SETS = {  # the original's three lists: A jumps, B runs
    "right": ["", "RIGHT", "RIGHT A", "RIGHT B", "RIGHT A B"],
    "simple": ["", "RIGHT", "RIGHT A", "RIGHT B", "RIGHT A B", "A", "LEFT"],
    "complex": [
        "", "RIGHT", "RIGHT A", "RIGHT B", "RIGHT A B", "A", "LEFT", "LEFT A", "LEFT B", "LEFT A B", "DOWN", "UP",
    ],
}  # fmt: skip
KEYS = {"UP": "UP", "DOWN": "DOWN", "LEFT": "LEFT", "RIGHT": "RIGHT", "z": "B", "x": "A", "RETURN": "START"}  # --play

ROMS = [  # the version of an environment's id says how much is drawn: its file in gym-super-mario-bros, and the SHA-1
    ("super-mario-bros.nes", "ab30029efec6ccfc5d65dfda7fbc6e6489a80805"),  # -v0: everything
    ("super-mario-bros-downsample.nes", "4bf894b301f339bce306af4813923a9900d034d1"),  # -v1: a plain background
    ("super-mario-bros-pixel.nes", "63a520bf1a2911d7f3c343cbda42c1969e0ae184"),  # -v2: a few colours
    ("super-mario-bros-rectangle.nes", "b0e9b156a51017c33a6b76708fc71395f8d32b15"),  # -v3: rectangles
]


def find_rom(version, path=None):
    """The game's file for -v{version}: the one at path, or the one in the package gym-super-mario-bros.

    That package is not imported, for it brings the retired gym. Raises gymnasium.error.Error where there is no such
    file, or another one.
    """
    name, sha1 = ROMS[version]
    if path is None:
        package = importlib.util.find_spec("gym_super_mario_bros")
        path = package and Path(package.origin).parent / "_roms" / name
        if path is None or not path.is_file():
            raise gym.error.DependencyNotInstalled(
                f"there is no {name} yet: pip install --no-deps gym-super-mario-bros==7.4.0 brings it, "
                "or pass your own file with --rom PATH"
            )
    path = Path(path)
    if not path.is_file():
        raise gym.error.Error(f"--rom {path}: there is no such file")
    if path.suffix != ".nes" or hashlib.sha1(path.read_bytes()).hexdigest() != sha1:
        raise gym.error.Error(f"--rom {path}: -v{version} is played on a file .nes whose SHA-1 is {sha1}")
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
        if actions is None:
            raise gym.error.Error(f"action_set={action_set!r} is none of {', '.join(ACTION_SETS)}")
        *self.masks, self.nothing, self.start_button = (
            np.array([button in action.split() for button in BUTTONS], dtype=np.uint8)
            for action in [*actions, "", "START"]
        )
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
        self.first_state, self.first_screen = self.emulator.get_state(), self.emulator.get_screen()

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

    def x(self):
        """How far Mario is from the stage's beginning, in pixels."""
        return self.read(0x006D) * 256 + self.read(0x0086)

    def y(self):
        """How high Mario is, in pixels from the bottom; above the screen it goes on from 255."""
        y = 255 - self.read(0x03B8)
        return y if self.read(0x00B5) else 255 + y

    def is_dying(self):
        """Whether Mario is in the dying animation, dead, or falling into a hole."""
        return self.read(0x000E) in (0x06, 0x0B) or self.read(0x00B5) > 1

    def is_world_over(self):
        """Whether a castle's end is playing."""
        return self.read(0x0770) == 2

    def is_at_flag(self):
        """Whether the stage is finished: a castle's end, or sliding down its flagpole (0x31; Bowser is 0x2D)."""
        if self.read(0x001D) != 3:
            return self.is_world_over()
        # Climbing a vine is 3 as well as sliding, so one of the five enemies around must be the flagpole.
        return self.is_world_over() or any(self.read(enemy) in (0x2D, 0x31) for enemy in range(0x0016, 0x001B))

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
        """Back to the start, which is always the same."""
        super().reset(seed=seed)
        self.emulator.set_state(self.first_state)
        self.last_x, self.last_clock = self.x(), self.clock()
        self.screen = self.first_screen.copy()
        return self.screen, self.info()

    def step(self, action):
        """Play one frame."""
        self.advance(self.masks[action])
        x, clock = self.x(), self.clock()
        progress = x - self.last_x if abs(x - self.last_x) <= 5 else 0  # a jump is another area, not a way gone
        dying = self.is_dying()
        reward = progress + min(clock - self.last_clock, 0) - 25 * dying
        self.last_x, self.last_clock = x, clock
        info = self.info()
        if self.world is None:
            terminated = info["life"] == 0xFF  # none left
        else:
            terminated = dying or info["flag_get"]
        if not terminated:
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

    def info(self):
        """What the original tells about the game."""
        return {
            "coins": self.read(0x07ED, ">n2"),
            "flag_get": self.is_at_flag(),
            "life": self.read(0x075A),
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
        return enlarged(self.screen)

    def close(self):
        """Let go of the emulator, so that this process can have another."""
        self.emulator = self.game_data = self.memory = None


def enlarged(screen):
    """A frame at SCALE times its size."""
    return screen.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


# All environments, whose observations are the screen and whose steps are frames: {id: (world, stage, version)}.
IDS = {f"SuperMarioBros-v{version}": (None, None, version) for version in range(len(ROMS))}
for world, stage, version in itertools.product(range(1, 9), range(1, 5), range(len(ROMS))):
    IDS[f"SuperMarioBros-{world}-{stage}-v{version}"] = (world, stage, version)
for env_id, (world, stage, version) in IDS.items():
    kwargs = {"world": world, "stage": stage, "version": version}
    spec = gym.registry[env_id] = gym.envs.registration.EnvSpec(env_id, SuperMarioBros, kwargs=kwargs)
    if version > 0:  # or gymnasium.make would advise -v3, the rectangles, to who asks for -v0
        spec.version = None


def full_id(env_id):
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
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info

    def render(self):
        return [enlarged(frame) for frame in self.frames]


class ShapeReward(gym.Wrapper):
    """Reward what the game itself rewards too: points, and the flag; a death costs. A tenth of it suits the critic."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.score = info["score"]
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward += (info["score"] - self.score) / 40
        self.score = info["score"]
        if terminated:
            reward += 50 if info["flag_get"] else -50
        return observation, reward / 10, terminated, truncated, info


class EndWhenStuck(gym.Wrapper):
    """Truncate an episode that has come no further for so many steps: rather than wait for the clock, start anew."""

    def __init__(self, env, stuck_steps):
        super().__init__(env)
        self.stuck_steps = stuck_steps

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.place, self.furthest, self.waited = (info["world"], info["stage"]), info["x_pos"], 0
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        place = (info["world"], info["stage"])
        if place != self.place or info["x_pos"] > self.furthest:
            self.place, self.furthest, self.waited = place, info["x_pos"], 0
        else:
            self.waited += 1
        return observation, reward, terminated, truncated or self.waited >= self.stuck_steps, info


class SmallGrey(gym.ObservationWrapper):
    """The screen in grey, SIDE x SIDE: all that it takes to play, in a twentieth of the bytes."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (SIDE, SIDE), np.uint8)

    def observation(self, screen):
        return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


class CountFlags(gym.Wrapper):
    """Note in `flags` for each episode whether it ended at the flag."""

    def __init__(self, env):
        super().__init__(env)
        self.flags = []

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.flags.append(info["flag_get"])
        return observation, reward, terminated, truncated, info

    def flag_rate(self):
        """The share of the episodes so far that ended at the flag, as a metric of the score."""
        return {"flag_rate": float(np.mean(self.flags))}


def make_game(env_id, action_set, rom=None):
    """Make the bare game, whose steps are frames. Exits with one line where there is no such stage, or not its ROM.

    It is made from the class and not by its id, which a worker process need not know: where processes are spawned, a
    class of a notebook comes with the job, but what the notebook registered does not.
    """
    if full_id(env_id) not in IDS:
        fail(f"--env-id {env_id}: this script knows SuperMarioBros-v0 and SuperMarioBros-1-1-v0 to -8-4-v0")
    world, stage, version = IDS[full_id(env_id)]
    try:
        return SuperMarioBros(world, stage, version, action_set, rom, "rgb_array")
    except gym.error.Error as error:
        fail(f"--env-id {env_id}: {error}")


def make_env(env_id, action_set="right", rom=None, render_mode=None, stuck_steps=None):
    """Make one environment with its wrappers: observations are (STACK, SIDE, SIDE) uint8, steps SKIP frames long.

    stuck_steps: for training, with shaped rewards; without, rewards and ends are the game's own. Exits with one line
    where `make_game` does.
    """
    if render_mode == "human" and not has_display():
        fail("--render opens a window, and there is no display here")
    env = make_game(env_id, action_set, rom)
    if render_mode == "human":
        env = gym.wrappers.HumanRendering(env)
    env = SkipFrames(env)
    if stuck_steps is not None:
        env = EndWhenStuck(ShapeReward(env), stuck_steps)
    return CountFlags(gym.wrappers.FrameStackObservation(SmallGrey(env), STACK))


def make_worker_env(*args):
    """`make_env` in a worker process, where Ctrl-C and SIGTERM are the main process's to answer."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has inherited our handlers
    return make_env(*args)


# ---------------------------------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Convolutional features of the screen, and on them the actor's logits and the critic's estimate of the return.

    shared: one set of features for both; else the critic has its own.
    """

    def __init__(self, n_actions, shared=True):
        super().__init__()
        self.actor_features = features()
        self.critic_features = None if shared else features()
        self.actor = layer_init(nn.Linear(512, n_actions), std=0.01)  # close to uniform at the start
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions take half the time so

    def forward(self, observations):
        """(B, STACK, SIDE, SIDE) uint8 -> logits (B, n_actions) and values (B,)."""
        pixels = observations.contiguous(memory_format=torch.channels_last).float().div_(255)
        hidden = self.actor_features(pixels)
        logits = self.actor(hidden)
        if self.critic_features is not None:
            hidden = self.critic_features(pixels)
        return logits, self.critic(hidden).squeeze(-1)


def features():
    """The network of Mnih et al. (2015) with half its channels, for half the time: pixels to (B, 512)."""
    return nn.Sequential(
        layer_init(nn.Conv2d(STACK, 16, kernel_size=8, stride=4)),
        nn.ReLU(),
        layer_init(nn.Conv2d(16, 32, kernel_size=4, stride=2)),
        nn.ReLU(),
        layer_init(nn.Conv2d(32, 32, kernel_size=3)),
        nn.ReLU(),
        nn.Flatten(),
        layer_init(nn.Linear(32 * 7 * 7, 512)),
        nn.ReLU(),
    )


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
    device = agent.actor.weight.device
    logits, values = agent(torch.from_numpy(observations).to(device))
    log_probs = torch.log_softmax(logits, dim=-1)
    answer = torch.cat([log_probs, values[:, None]], dim=1).cpu().numpy()  # in one piece: one wait for a GPU, not two
    actions = (answer[:, :-1] + noise).argmax(axis=-1)
    return actions, np.take_along_axis(answer, actions[:, None], axis=1)[:, 0], answer[:, -1]


def evaluate_choices(logits, actions):
    """Log-probabilities (B,) of the actions (B,) under the logits (B, n_actions), and the mean entropy."""
    log_probs = torch.log_softmax(logits, dim=-1)
    entropy = (log_probs.exp() * log_probs).sum() / -len(log_probs)
    return log_probs.gather(1, actions[:, None]).squeeze(-1), entropy


def make_policy(agent, deterministic=False, seed=0):
    """The agent as a function `observation -> action`, for evaluation and video; seed: of the sampled actions."""
    rng = np.random.default_rng(seed)

    def policy(observation):
        noise = 0.0 if deterministic else rng.gumbel(size=(1, agent.actor.out_features))
        return int(decide(agent, observation[None], noise)[0][0])

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
    """Train an agent with PPO and return the best one; with --resume, go on from the checkpoint in run_folder.

    Writes TensorBoard events, checkpoint.pt and, with --capture-video, videos/ into run_folder.
    """
    torch.set_num_threads(1)  # while acting: a few observations are too little to share, and the workers need the cores
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # to this process
    threads = int((os.environ.get("OMP_NUM_THREADS") or str(available)).split(",")[0])
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # the initial weights
    rng = np.random.default_rng(args.seed)  # everything random after that: actions and minibatches

    # One emulator fits in one process, so each environment has its own. They are two halves that take turns: while the
    # network decides for one, the workers play the other. SAME_STEP: where an episode ends, the environment returns the
    # next one's first observation in the same step, and the old one's last observation in infos. So every transition in
    # the batch lies inside one episode.
    make_training_env = functools.partial(
        make_worker_env, args.env_id, args.action_set, args.rom, None, args.stuck_steps
    )
    half = (args.num_envs + 1) // 2
    columns = [slice(0, half), slice(half, args.num_envs)][: args.num_envs]
    halves = [
        gym.vector.AsyncVectorEnv(
            [make_training_env] * (column.stop - column.start),
            copy=False,  # the rollout keeps its own copy
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        )
        for column in columns
    ]
    n_actions = int(halves[0].single_action_space.n)
    agent = Agent(n_actions, args.shared_network).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    global_step = 0
    # Learning from pixels goes up and down: the package gets the best agent of the second half, not the last.
    finalists = []  # the best so far by recent_returns: dicts of their mean, the step and the weights
    recent_returns = deque(maxlen=100)  # of the episodes that ended last
    recent_flags = deque(maxlen=100)
    if args.resume:
        checkpoint = load_checkpoint(run_folder)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.bit_generator.state = checkpoint["rng"]
        global_step, finalists = checkpoint["global_step"], checkpoint["finalists"]
        recent_returns.extend(checkpoint["recent_returns"])
        recent_flags.extend(checkpoint["recent_flags"])

    def save_checkpoint():
        state = {
            "script": SCRIPT,
            "args": hyperparameters_of(args) | {"rom": args.rom},
            "global_step": global_step,
            "agent": agent.state_dict(),
            "finalists": finalists,
            "optimizer": optimizer.state_dict(),
            "rng": rng.bit_generator.state,
            "recent_returns": list(recent_returns),
            "recent_flags": list(recent_flags),
        }
        save_tensors(state, run_folder / "checkpoint.tmp")
        os.replace(run_folder / "checkpoint.tmp", run_folder / "checkpoint.pt")  # atomic: never half a checkpoint

    # The rollout: T = num_steps rows, N = num_envs columns. Observations have row T too, after the last action.
    shape = (args.num_steps, args.num_envs)
    observations = np.zeros((args.num_steps + 1, args.num_envs, STACK, SIDE, SIDE), dtype=np.uint8)
    actions = np.zeros(shape, dtype=np.int64)
    log_probs_then, values = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    episode_returns = np.zeros(args.num_envs)
    episode_lengths = np.zeros(args.num_envs)
    finished, cut_off = [], []  # (return, length, furthest x, flag) and (t, i, last observation) of episodes that ended

    def receive(t, envs, column):
        """The answer to the actions at t of half the environments."""
        observations[t + 1, column], rewards[t, column], terminated, truncated, infos = envs.step_wait()
        dones[t, column] = terminated | truncated
        episode_returns[column] += rewards[t, column]
        episode_lengths[column] += 1
        for j in np.flatnonzero(terminated | truncated):
            i, last = column.start + j, infos["final_info"]
            if not terminated[j]:
                cut_off.append((t, i, infos["final_obs"][j]))
            finished.append((episode_returns[i], episode_lengths[i], last["x_pos"][j], last["flag_get"][j]))
            episode_returns[i] = episode_lengths[i] = 0

    if args.track:
        start_wandb(args, run_folder)
    save_checkpoint()
    last_checkpoint = time.monotonic()
    with (
        closing_workers(halves),
        SummaryWriter(run_folder, purge_step=global_step + 1 if args.resume else None) as writer,
        Progress(num_iterations * batch_size, global_step) as progress,
    ):
        for envs, column in zip(halves, columns):
            observations[-1, column], _ = envs.reset(seed=args.seed + column.start)
        writer.add_text("hyperparameters", markdown_table(hyperparameters_of(args)))
        for iteration in range(global_step // batch_size, num_iterations):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate

            # 1. Rollout: run the current policy for T steps in each of the N environments.
            noise = rng.gumbel(size=(*shape, n_actions))
            observations[0] = observations[-1]
            finished.clear()
            cut_off.clear()
            for t in range(args.num_steps + 1):
                for envs, column in zip(halves, columns):
                    if t > 0:
                        receive(t - 1, envs, column)
                    if t < args.num_steps:
                        choice = decide(agent, observations[t, column], noise[t, column])
                        actions[t, column], log_probs_then[t, column], values[t, column] = choice
                        envs.step_async(actions[t, column])
            global_step += batch_size

            # 2. Advantages.
            last_value = decide(agent, observations[-1])[2]
            # Truncation is not a failure: the episode would have gone on to earn the value of its last observation.
            for t, i, observation in cut_off:
                rewards[t, i] += args.gamma * decide(agent, observation[None])[2][0]
            advantages, returns = compute_gae(rewards, values, dones, last_value, args.gamma, args.gae_lambda)

            # 3. Update: minibatch gradient steps that maximise equation 9 of the paper. The workers wait, so it gets
            #    all the cores.
            torch.set_num_threads(threads)
            batch = [observations[:-1], actions, log_probs_then, values, returns, advantages]
            batch = [torch.from_numpy(array.reshape(batch_size, *array.shape[2:])).to(device) for array in batch]
            orders = np.stack([rng.permutation(batch_size) for _ in range(args.update_epochs)])
            for order in torch.from_numpy(orders).to(device):
                # One shuffle per epoch; the minibatches are the rows of what it gives.
                minibatches = [column[order].unflatten(0, (-1, minibatch_size)) for column in batch]
                if args.norm_adv:
                    minibatches[-1] = standardise(minibatches[-1])
                for mb_obs, mb_actions, mb_log_probs, mb_values, mb_returns, mb_advantages in zip(*minibatches):
                    logits, new_values = agent(mb_obs)
                    log_probs, entropy = evaluate_choices(logits, mb_actions)
                    objective = clipped_surrogate(log_probs, mb_log_probs, mb_advantages, args.clip_coef)
                    v_loss = value_loss(new_values, mb_values, mb_returns, args.clip_coef if args.clip_vloss else None)
                    loss = args.vf_coef * v_loss - objective - args.ent_coef * entropy

                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()

                approx_kl, old_approx_kl, clipfrac = policy_change(log_probs.detach(), mb_log_probs, args.clip_coef)
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break

            torch.set_num_threads(1)

            # 4. Statistics of the last minibatch, read once per iteration: so far nothing in the minibatch loop but
            #    --target-kl has made the host wait for the device.
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
            if finished:  # over the episodes that ended in this iteration
                ended_returns, ended_lengths, ended_x, ended_flags = np.array(finished, dtype=float).T
                recent_returns.extend(ended_returns.tolist())
                recent_flags.extend(ended_flags.tolist())
                writer.add_scalar("charts/episodic_return", ended_returns.mean(), global_step)
                writer.add_scalar("charts/episodic_length", ended_lengths.mean(), global_step)
                writer.add_scalar("charts/furthest_x", ended_x.max(), global_step)
                writer.add_scalar("charts/flag_rate", np.mean(recent_flags), global_step)
            progress.update(global_step, recent_returns)

            tenth = (iteration + 1) * 10 // num_iterations
            if tenth > iteration * 10 // num_iterations:
                if args.capture_video:
                    with contextlib.closing(make_env(args.env_id, args.action_set, args.rom, "rgb_array")) as env:
                        record_video(env, make_policy(agent), run_folder / "videos" / f"step-{global_step}.mp4")
                if tenth >= 5:
                    mean_return = float(np.mean(recent_returns)) if recent_returns else -math.inf
                    weights = {name: tensor.cpu().clone() for name, tensor in agent.state_dict().items()}
                    candidate = {"mean_return": mean_return, "step": global_step, "weights": weights}
                    finalists = sorted([candidate, *finalists], key=lambda one: one["mean_return"], reverse=True)
                    finalists = finalists[:FINALISTS]
            is_due = time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS
            if is_due or asked_to_stop or iteration + 1 == num_iterations:
                save_checkpoint()
                last_checkpoint = time.monotonic()
            stop_if_asked()
    return best_of(finalists, agent, args, run_folder)


def best_of(finalists, agent, args, run_folder):
    """Give the agent the weights of the finalist that scores best, each over n_eval_episodes anew, and return it.

    What the finalists were chosen by may have been luck, so it counts no more. The same goes for this score: that of
    the package is measured once more, with other sampled actions.
    """
    msg.info(f"Playing {args.n_eval_episodes} episodes with each of the {len(finalists)} best agents")
    scores = []
    with SummaryWriter(run_folder) as writer:
        for finalist in finalists:
            agent.load_state_dict(finalist["weights"])
            policy = make_policy(agent, args.deterministic_eval, seed=[args.seed, args.total_timesteps])
            with contextlib.closing(make_env(args.env_id, args.action_set, args.rom)) as env:
                mean_reward, _ = evaluate_agent(env, policy, args.n_eval_episodes, range(args.n_eval_episodes))
            writer.add_scalar("eval/mean_reward", mean_reward, finalist["step"])
            writer.add_scalar("eval/flag_rate", env.flag_rate()["flag_rate"], finalist["step"])
            scores.append(mean_reward)
    agent.load_state_dict(finalists[np.argmax(scores)]["weights"])
    return agent


@contextlib.contextmanager
def closing_workers(halves):
    """End the worker processes in any case; where one has died by itself, raise an OSError that says so."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise OSError("An environment's worker process has died, perhaps for want of memory") from error
    finally:
        for envs in halves:
            for process in envs.processes:
                process.terminate()
                process.join()
            envs.closed = True  # its own `close` waits for an answer of each worker, which a dead one does not give


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


def play(env_id, rom=None):
    """--play: the keyboard is the controller, until the window is closed or Escape is pressed."""
    if not has_display():
        fail("--play opens a window, and there is no display here")
    import pygame  # which gymnasium's rendering uses too; learning does not

    with warnings.catch_warnings(action="ignore"):  # it would like to plot as well
        from gymnasium.utils import play as keyboard

    combinations = [names for n in range(1, 5) for names in itertools.combinations(KEYS, n)]  # of keys held at a time
    action_set = ["", *(" ".join(KEYS[name] for name in names) for names in combinations)]
    actions = {tuple(getattr(pygame, f"K_{name}") for name in names): i for i, names in enumerate(combinations, 1)}
    with contextlib.closing(make_game(env_id, action_set, rom)) as env:
        keyboard.play(env, zoom=1.5, keys_to_action=actions, noop=0)


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


def load_agent(source, env_id=None, rom=None, render_mode=None):
    """Load the agent of a run folder or a Hub repo id: returns it and an environment for it.

    env_id: by default the one it was trained on; rom: path of the game's file, where the package has it not.
    """
    hyperparameters = load_hyperparameters(source)
    action_set = hyperparameters.get("action_set")
    if action_set not in ACTION_SETS:
        fail(f"{source}: its hyperparameters.json has no action_set, one of {', '.join(ACTION_SETS)}")
    env = make_env(env_id or hyperparameters["env_id"], action_set, rom, render_mode)
    agent = Agent(int(env.action_space.n), bool(hyperparameters.get("shared_network")))
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
    torch.set_num_threads(1)  # one observation at a time is too little to share
    render_mode = "human" if args.render else "rgb_array"
    if args.play:
        return play(args.env_id, args.rom)
    if args.evaluate:
        if args.evaluate == "random":
            env = make_env(args.env_id, args.action_set, args.rom, render_mode)
            policy = random_policy(env, args.seed)
        else:
            agent, env = load_agent(args.evaluate, args.env_id, args.rom, render_mode)
            policy = make_policy(agent, args.deterministic_eval, args.seed)
        with contextlib.closing(env):
            score = evaluate(env, policy, args, seeds, metrics=env.flag_rate)
        if not args.render:
            msg.info(f"Mario {'reaches' if env.flags[-1] else 'does not reach'} the flag in the replay")
        return score

    make_env(args.env_id, args.action_set, args.rom).close()  # whatever is wrong with it is said now
    if args.repo_id:
        check_hub_access(args.repo_id)
    run_folder = Path(args.resume) if args.resume else new_run_folder(args)
    msg.info(f"{ALGORITHM} on {args.env_id}, into {run_folder}")
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in hyperparameters_of(args).items()), 120))
    (run_folder / SCRIPT).write_bytes(script_source().encode())  # now: the file may be edited while it trains
    with resumable(run_folder):
        agent = train(args, run_folder)
        policy = make_policy(agent, args.deterministic_eval, args.seed)
        with contextlib.closing(make_env(args.env_id, args.action_set, args.rom, "rgb_array")) as env:
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
                metrics=env.flag_rate,
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
