"""ppo_mario.py: the game against recordings of the original, each wrapper by hand, the agent, which one is packaged."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, read, refused, run, wait_until
from gymnasium.utils.env_checker import check_env

import ppo_mario
from ppo_mario import SuperMarioBros

RECORDED = np.load(ROOT / "tests" / "data" / "super_mario_bros.npz")
STAGES = sorted(name.removeprefix("actions_") for name in RECORDED if name.startswith("actions_"))
STAGE = "SuperMarioBros-1-3-v0"  # over treetops, where a beginner falls soon
SMALL = f"--env-id {STAGE} --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --n-eval-episodes 1"
ONE_UPDATE = f"{SMALL} --total-timesteps 32"
FORKS = pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="workers are not forked here")


# --- the game


@pytest.mark.parametrize("stage", STAGES)
def test_the_game_plays_the_recorded_runs_of_the_original(stage):
    actions, log = RECORDED[f"actions_{stage}"], RECORDED[f"log_{stage}"]
    columns = dict(zip(["x_pos", "y_pos", "time", "score", "coins", "life", "flag_get", "world", "stage"], log.T))
    reward, done = log[:, 9], log[:, 10]
    env = SuperMarioBros(*map(int, stage.split("_")))
    clock = env.reset()[1]["time"]
    for k, action in enumerate(actions[:-1]):
        _, our_reward, terminated, truncated, info = env.step(action)
        for name in columns.keys() - {"time"}:
            assert info[name] == columns[name][k + 1], f"{name} at frame {k}"
        assert terminated == done[k + 1] and not truncated
        # The clock may tick up to three frames apart. But for its ticks, the rewards are the same.
        assert info["time"] in columns["time"][max(k - 2, 0) : k + 5]
        if k > 0:
            theirs = reward[k + 1] - min(columns["time"][k + 1] - columns["time"][k], 0)
            assert our_reward - min(info["time"] - clock, 0) == theirs or abs(theirs) > 13  # clipped
        clock = info["time"]
    env.close()


def test_the_environments_are_registered_and_pass_gymnasium_s_checks(recwarn):
    assert len(ppo_mario.IDS) == 4 * (1 + 32) and set(ppo_mario.IDS) <= set(gym.registry)
    with contextlib.closing(gym.make("SuperMarioBros-1-1-v0", action_set="simple", render_mode="rgb_array")) as env:
        assert not [str(warning.message) for warning in recwarn]  # such as advice to take -v3
        assert env.action_space.n == 7 and env.observation_space.shape == (224, 240, 3)
        check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)  # those two make a second emulator
        assert env.reset()[0][100, 20].tolist() == pytest.approx([88, 148, 248], abs=10)  # the sky
        assert env.render().shape == (448, 480, 3)
        with pytest.raises(gym.error.Error, match="AsyncVectorEnv"):
            gym.make("SuperMarioBros-1-1-v0")  # one emulator fits in one process
    with contextlib.closing(gym.make("SuperMarioBros-1-1")) as env:
        assert env.unwrapped.spec.id == "SuperMarioBros-1-1-v0"  # and not the rectangles of -v3
    for action_set in ("simpl", [], ["right"], [["right"]]):  # the original's names are no buttons of ours
        with pytest.raises(gym.error.Error, match="right, simple, complex"):
            gym.make("SuperMarioBros-1-1-v0", action_set=action_set)


def test_the_whole_game_has_three_lives_and_goes_on_after_a_death():
    env = SuperMarioBros(action_set="right")
    lives, rewards, terminated = [env.reset()[1]["life"]], [], False
    while not terminated:
        _, reward, terminated, _, info = env.step(1)  # into the first Goomba, again and again
        rewards.append(reward)
        if info["life"] != lives[-1]:
            lives.append(info["life"])
    assert lives == [2, 1, 0, 255] and (info["world"], info["stage"]) == (1, 1)
    assert min(rewards) == -15  # -25, clipped
    env.close()


@pytest.mark.parametrize("world", [1, 8])
def test_the_whole_game_goes_on_after_a_castle_s_end_and_ends_with_the_last(world):
    env = SuperMarioBros(world, 4)
    env.reset()
    env.world = env.stage = None
    env.write(0x0770, 2)  # the castle's end is playing,
    env.write(0x0772, 3)  # and Mario has come to whom he finds there
    _, _, terminated, _, info = env.step(0)
    assert info["flag_get"] and terminated == (world == 8) and env.flags == [True] * terminated
    if world == 1:
        info = env.step(0)[4]
        assert (info["world"], info["stage"], info["flag_get"]) == (2, 1, False)
    env.close()


def test_a_run_that_a_trained_agent_finished_reaches_the_flag_from_the_same_start_each_time():
    actions = np.load(ROOT / "tests" / "data" / "mario_1_1_flag.npy")  # of "right", each held for four frames
    env = SuperMarioBros(1, 1, action_set="right")
    starts = []
    for seed in (1, 2):
        starts.append(env.reset(seed=seed))
        total, terminated = 0.0, False
        for action in actions.repeat(ppo_mario.SKIP):
            assert not terminated or action == actions[-1]
            if not terminated:
                _, reward, terminated, _, info = env.step(action)
                total += reward
                assert info["flag_get"] == terminated
        assert terminated and info["x_pos"] == 3161 and info["life"] == 2
        assert total == (3161 - 40) - (400 - info["time"])  # the way, less the ticks of the clock
    assert np.array_equal(starts[0][0], starts[1][0]) and starts[0][1] == starts[1][1]
    env.close()


@pytest.mark.parametrize("version", range(4))
def test_all_four_drawings_are_played_and_actions_press_what_they_say(version):
    env = SuperMarioBros(1, 1, version, action_set=["START", "LEFT A B", "RIGHT"])
    pressed = [{button for button, on in zip(ppo_mario.BUTTONS, mask) if on} for mask in env.masks]
    assert pressed == [{"START"}, {"LEFT", "A", "B"}, {"RIGHT"}]
    env.reset()
    assert [env.step(2)[4]["x_pos"] for _ in range(20)][-1] > 40
    env.close()


def test_a_rom_that_is_missing_or_another_one_is_said_in_a_line(monkeypatch, capfd):
    real, v1 = ppo_mario.find_rom(0), f"{ONE_UPDATE} --env-id SuperMarioBros-1-1-v1"
    Path("other.nes").write_bytes(real.read_bytes()[:-1] + b"?")
    assert "nowhere.nes" in refused(ppo_mario, f"{ONE_UPDATE} --rom nowhere.nes", capfd)
    assert "ab30029efec6ccfc5d65dfda7fbc6e6489a80805" in refused(ppo_mario, f"{ONE_UPDATE} --rom other.nes", capfd)
    assert "4bf894b301f339bce306af4813923a9900d034d1" in refused(ppo_mario, f"{v1} --rom {real}", capfd)

    # 9.x of the package has only the first of the four files.
    Path("_roms").mkdir()
    shutil.copy(real, "_roms")
    package = type("Spec", (), {"origin": "__init__.py"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    assert "gym-super-mario-bros==7.4.0" in refused(ppo_mario, v1, capfd)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps" in refused(ppo_mario, ONE_UPDATE, capfd)


def test_a_run_with_a_rom_of_its_own_goes_on_without_naming_it_again(monkeypatch):
    shutil.copy(ppo_mario.find_rom(0), "mine.nes")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_folder = run(ppo_mario, f"{ONE_UPDATE} --rom mine.nes")
    ppo_mario.main(["--resume", str(run_folder), "--total-timesteps", "64"])
    assert ppo_mario.load_checkpoint(run_folder)["global_step"] == 64
    assert "rom" not in read(run_folder, "hyperparameters.json")  # whose place is nobody's matter


def test_the_game_is_found_without_importing_its_package():
    code = "import sys, ppo_mario; ppo_mario.find_rom(0); print('gym' in sys.modules, 'nes_py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n" and done.stderr == ""


# --- the wrappers, on a tape instead of the game


class Tape(gym.Env):
    """Plays back (x, score, reward, terminated) per frame; the screen of frame k is of brightness k; flag: a frame."""

    action_space = gym.spaces.Discrete(3)
    observation_space = gym.spaces.Box(0, 255, (224, 240, 3), np.uint8)
    render_mode = "rgb_array"

    def __init__(self, frames, flag=None, air=(), water=False):
        self.frames, self.flag, self.air, self.water, self.actions = frames, flag, air, water, []

    def now(self):
        x, score, reward, terminated = self.frames[self.k]
        info = {"world": 1, "stage": 1, "x_pos": x, "score": score, "flag_get": self.k == self.flag}
        return np.full((224, 240, 3), self.k, dtype=np.uint8), reward, terminated, False, info

    def reset(self, seed=None, options=None):
        self.k = (options or {}).get("moment", 0)
        return self.now()[0], self.now()[4]

    def moment(self):
        return self.k

    def is_in_the_air(self):
        return self.k in self.air

    def is_swimming(self):
        return self.water

    def has_left_the_stage(self):
        return False

    def lives(self):
        return 2

    def step(self, action):
        self.k += 1
        self.actions.append(action)
        return self.now()


def test_an_action_is_held_for_four_frames_whose_rewards_are_summed_and_which_are_all_rendered():
    tape = Tape([(40, 0, 0, False)] + [(40, 0, 2**k, k == 6) for k in range(7)])
    env = ppo_mario.SkipFrames(tape)
    env.reset()
    assert [frame[0, 0, 0] for frame in env.render()] == [0]
    observation, reward, terminated, _, _ = env.step(2)
    assert (observation[0, 0, 0], reward, terminated) == (4, 1 + 2 + 4 + 8, False)
    assert [frame[0, 0, 0] for frame in env.render()] == [1, 2, 3, 4]
    assert tape.actions == [2, 2, 2, 2]
    observation, reward, terminated, _, _ = env.step(1)  # the episode ends in the middle of it
    assert (observation[0, 0, 0], reward, terminated) == (7, 16 + 32 + 64, True)
    assert [frame[0, 0, 0] for frame in env.render()] == [5, 6, 7] and env.render()[0].shape == (448, 480, 3)


@pytest.mark.parametrize(("flag", "last"), [(6, 2 + 1 + 125), (None, 0)])
def test_rewards_are_shaped_by_points_and_the_flag_and_pay_when_mario_lands_and_a_death_nothing(flag, last):
    frames = [(40, 100, 0, False), (43, 300, 3, False), (44, 300, 4, False), (44, 340, 5, False), (45, 340, 6, False)]
    frames += [(46, 340, 2, False), (47, 340, 1, True)]
    env = ppo_mario.ShapeReward(Tape(frames, flag, air={2, 3, 5}))
    for _ in range(2):  # the points and the jump of the last episode are forgotten
        env.reset()
        rewards = [50 * env.step(0)[1] for _ in frames[1:]]
        assert rewards == pytest.approx([0, 0, 0, 3 + 200 / 40 + 4 + 5 + 40 / 40 + 6, 0, last])


def test_in_the_whole_game_a_flag_ends_the_action_and_is_paid_once():
    frames = [(40 + k, 0, 1, False) for k in range(12)]
    env = ppo_mario.ShapeReward(ppo_mario.SkipFrames(Tape(frames, flag=6, air=set(range(7)))))
    env.reset()
    steps = [env.step(0) for _ in range(3)]
    assert [(50 * reward, info["flag_get"]) for _, reward, _, _, info in steps] == [
        (0, False),
        (pytest.approx(4 + 2 + 125), True),
        (pytest.approx(4), False),  # Mario has landed, in the next stage
    ]


def test_a_swimmer_is_paid_at_once():
    env = ppo_mario.ShapeReward(Tape([(40, 100, 0, False), (43, 300, 3, False), (45, 300, 2, False)], water=True))
    env.reset()
    assert [50 * env.step(0)[1] for _ in range(2)] == pytest.approx([3 + 200 / 40, 2])


@pytest.mark.parametrize(("place", "ground"), [((1, 1), 79), ((2, 2), None)])
def test_mario_is_in_the_air_where_he_is_above_the_ground_and_never_in_water(place, ground):
    with contextlib.closing(SuperMarioBros(*place)) as env:
        env.reset()
        seen = []
        for frame in range(120):
            y = env.step(5 if frame % 20 < 10 else 0)[4]["y_pos"]  # A, from time to time
            seen.append((ground is not None and y > ground, env.is_in_the_air(), y))
        assert len({y for _, _, y in seen}) > 20
        assert all(above == in_the_air for above, in_the_air, _ in seen)


# Actions of an agent on 1-2, in one episode to the warp zone, above the ceiling, and in one to the flag.
TO_THE_WARP_ZONE = (
    "4444444444444333242333323433234312213041034132133333303333322200311333333333310332121033331333333133"
    "3321211333334001333333333333333333234244322224400042222224324503443410332003333322033333333333222220"
    "044440033522230033135551333333222200553"
)
TO_THE_FLAG = (
    "4444444444444333242333323413230314260041034102033333353313322220311333333333332332122122243333333311"
    "3333333333232111333342130303333333333333331232444022250000100004222244402423403304442242442444424422"
    "2222222242222222322242244244043033240333322000331130333322222004444400352225331333555113333332220055"
    "5531133333333633233633363666666666633003303232333333320325262523212223222222262222431342202222362123"
    "2221334333333252615350"
)


@pytest.mark.parametrize("stuck_steps", [None, 60])
@pytest.mark.parametrize(("actions", "flag"), [(TO_THE_WARP_ZONE, False), (TO_THE_FLAG, True)])
def test_who_leaves_a_stage_for_a_warp_zone_is_dead_in_training_and_only_there(actions, flag, stuck_steps):
    with contextlib.closing(ppo_mario.make_env("SuperMarioBros-1-2-v0", stuck_steps=stuck_steps)) as env:
        env.reset(seed=0)
        steps = [env.step(int(action)) for action in actions]
        assert not any(terminated or truncated for _, _, terminated, truncated, _ in steps[:-1])
        _, reward, terminated, _, info = steps[-1]
        assert info["flag_get"] == flag and terminated == (flag or stuck_steps is not None)
        assert stuck_steps is None or (reward > 2 if flag else reward == 0)
        assert env.unwrapped.flags == ([flag] if flag else [])  # to the game itself, who goes to the warp zone lives on
        env.reset()
        while len(env.unwrapped.flags) == flag:  # runs to a wall, and in the end to his death
            env.step(3)
        assert env.unwrapped.flags == ([True, False] if flag else [False])


def test_flags_of_other_worlds_do_not_count_but_in_the_whole_game():
    for world, flag in ((2, False), (None, True)):
        with contextlib.closing(ppo_mario.make_env("SuperMarioBros-1-2-v0")) as env:
            env.reset()
            for action in TO_THE_FLAG[:-1]:
                env.step(int(action))
            env.unwrapped.world = world  # as if the episode had begun there
            _, _, terminated, _, info = env.step(int(TO_THE_FLAG[-1]))
            assert info["flag_get"] and terminated == (world is not None)
            while not terminated:  # runs on, until all three lives are lost
                _, _, terminated, _, _ = env.step(3)
            assert env.unwrapped.flags == [flag]


def test_in_training_an_episode_of_the_whole_game_is_one_life():
    lengths = []
    for stuck_steps in (None, 60):
        with contextlib.closing(ppo_mario.make_env("SuperMarioBros-v0", stuck_steps=stuck_steps)) as env:
            env.reset(seed=0)
            rewards, terminated = [], False
            while not terminated:  # runs and jumps
                _, reward, terminated, truncated, _ = env.step(4 if len(rewards) % 20 < 12 else 3)
                rewards.append(reward)
                assert not truncated
            lengths.append(len(rewards))
    assert rewards[-1] == 0 and sum(rewards) > 0 and lengths[1] < lengths[0]


def test_an_episode_that_comes_no_further_ends():
    places = [40, 41, 41, 40, 42, 42, 42, 42, 42]
    env = ppo_mario.EndWhenStuck(Tape([(x, 0, 1.0, False) for x in places]), stuck_steps=3)
    for _ in range(2):
        env.reset()
        steps = [env.step(0) for _ in places[1:]]
        assert [terminated for _, _, terminated, _, _ in steps] == [False] * 6 + [True] * 2
        assert not any(truncated for _, _, _, truncated, _ in steps)
        assert [reward for _, reward, _, _, _ in steps] == [1.0] * 8


def test_every_second_training_episode_starts_at_one_of_the_places_of_before_from_where_mario_lived_on():
    env = ppo_mario.StartAnywhere(Tape([(8 * k, 0, 0.0, k == 98) for k in range(99)]))
    starts, wholes = [], []
    for episode in range(400):
        env.reset(seed=None if episode else 1)
        starts.append(env.unwrapped.k)
        terminated = False
        while not terminated:
            *_, terminated, _, info = env.step(0)
            assert info["whole"] == (starts[-1] == 0)  # the curves are of these
        wholes.append(info["whole"])
    assert wholes[0] and abs(np.mean(wholes) - 0.5) < 4 * 0.5 / 400**0.5
    elsewhere = np.array(starts)[~np.array(wholes)]
    places, visits = np.unique(elsewhere // 8, return_counts=True)  # 64 pixels are 8 of these steps
    assert set(elsewhere % 10) == {0} and elsewhere.max() == 60  # of each tenth step, 30 before the end at the latest
    assert len(places) == 6 and visits.min() > visits.max() / 3  # 10 to 60, each in a place of its own


def test_a_moment_of_the_game_goes_on_as_it_did_the_first_time():
    actions = np.random.default_rng(1).choice([1, 2, 3, 4], size=300)  # of the simple ones, those to the right
    with contextlib.closing(SuperMarioBros(1, 1)) as env:
        env.reset()
        for action in actions[:100]:
            screen = env.step(action)[0]
        moment = env.moment()
        first = [env.step(action) for action in actions[100:]]
        assert np.array_equal(env.reset(options={"moment": moment})[0], screen)
        again = [env.step(action) for action in actions[100:]]
        assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, again))
        assert first[-1][4]["x_pos"] > 150 and env.reset()[1]["x_pos"] == 40


def test_a_small_grey_screen_has_the_brightness_of_the_large_one():
    screen = np.zeros((224, 240, 3), dtype=np.uint8)
    screen[:112] = [200, 100, 50]
    small = ppo_mario.small_grey(screen)
    assert small.shape == (84, 84) and small.dtype == np.uint8
    assert np.all(small[:42] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)) and np.all(small[42:] == 0)


def test_the_network_sees_four_observations_and_only_training_is_shaped_and_ends_when_stuck(monkeypatch):
    tape = [(40, 4 * k, 1.0, False) for k in range(99)]
    monkeypatch.setattr(ppo_mario, "SuperMarioBros", lambda *_: Tape(tape, water=True))  # in which each step pays
    training, evaluation = (ppo_mario.make_env(STAGE, stuck_steps=n) for n in (2, None))
    shaped = (4 + 16 / 40) / 50
    for env, reward, ends in ((training, shaped, [False, True]), (evaluation, 4, [False, False])):
        observation, _ = env.reset()
        assert observation.shape == (4, 84, 84) and observation.dtype == np.uint8 and not observation.any()
        steps = [env.step(0) for _ in range(2)]
        assert [step[1] for step in steps] == pytest.approx([reward] * 2)
        assert [step[2] for step in steps] == ends
        assert [step[0][:, 0, 0].tolist() for step in steps] == [[0, 0, 0, 4], [0, 0, 4, 8]]  # the newest last


# --- the agent


def test_deciding_is_the_network_and_samples_its_softmax():
    torch.manual_seed(1)
    agent = ppo_mario.Agent(5)
    with torch.no_grad():
        agent.actor.weight.mul_(100)  # far from uniform
    rng = np.random.default_rng(1)
    observations = rng.integers(256, size=(3, 4, 84, 84), dtype=np.uint8)
    logits, values = agent(torch.from_numpy(observations))
    probabilities = torch.softmax(logits, dim=1).detach().numpy()

    actions, log_probs, our_values = ppo_mario.decide(agent, observations)
    assert np.array_equal(actions, probabilities.argmax(axis=1)) and actions.dtype == np.int64
    assert np.allclose(our_values, values.detach(), atol=1e-5)
    assert np.allclose(np.exp(log_probs), probabilities.max(axis=1), atol=1e-5)
    sampled = [ppo_mario.decide(agent, observations[:1], rng.gumbel(size=(1, 5)))[0][0] for _ in range(800)]
    shares = np.bincount(sampled, minlength=5) / 800
    assert np.abs(shares - probabilities[0]).max() < 4 * 0.5 / 800**0.5


@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_a_policy_samples_the_softmax_of_the_logits_over_the_temperature(temperature):
    agent = ppo_mario.Agent(5)
    torch.nn.init.orthogonal_(agent.actor.weight, 3.0)
    observation = np.random.default_rng(1).integers(256, size=(4, 84, 84), dtype=np.uint8)
    logits = agent(torch.from_numpy(observation[None]))[0][0].detach()
    expected = torch.softmax(logits / max(temperature, 1e-6), dim=-1).numpy()
    policy = ppo_mario.make_policy(agent, temperature, seed=1)
    shares = np.bincount([policy(observation) for _ in range(800)], minlength=5) / 800
    assert np.abs(shares - expected).max() <= (4 * 0.5 / 800**0.5 if temperature else 0)
    at_one = torch.softmax(logits, dim=-1).numpy()
    assert temperature == 1 or np.abs(expected - at_one).max() > 0.08  # else this would not tell them apart


@pytest.mark.parametrize("persistence", [0.0, 0.75, 1.0])
def test_noise_persists_as_often_as_is_said_and_still_samples_the_softmax(persistence):
    noise = ppo_mario.persistent_noise(np.random.default_rng(1), (101, 400, 3), persistence)
    kept = noise[1:] == noise[:-1]
    assert np.array_equal(kept.any(axis=2), kept.all(axis=2))  # for all actions or for none
    assert abs(kept.mean() - persistence) <= 4 * (persistence * (1 - persistence) / 40_000) ** 0.5
    assert len(np.unique(noise[0])) == 1200  # each environment has its own
    probabilities = np.array([0.7, 0.2, 0.1])
    shares = np.bincount((np.log(probabilities) + noise[-1]).argmax(axis=1), minlength=3) / 400
    assert np.abs(shares - probabilities).max() < 4 * 0.5 / 400**0.5


# --- training


class Counting(gym.Env):
    """Episodes have as many steps as the first seed says; step k shows k and pays k."""

    action_space = gym.spaces.Discrete(3)
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.length, self.k = seed or self.length, 0
        return np.zeros((4, 84, 84), dtype=np.uint8), {}

    def step(self, action):
        self.k += 1
        info = {"whole": True, "furthest_x": self.k, "flag_get": False, "episode": {"r": 0.0, "l": self.k}}
        observation = np.full((4, 84, 84), self.k, dtype=np.uint8)
        return observation, float(self.k), self.k == self.length, False, info


def test_no_transition_crosses_an_episode(monkeypatch, tmp_path):
    seen, compute_gae, decide = [], ppo_mario.compute_gae, ppo_mario.decide

    def spy(*args):
        seen.extend(array.T.tolist() for array in args[:4])
        return compute_gae(*args)

    def easy_to_follow(agent, observations, noise=0.0):  # V(s) = 100 * step in the episode
        return *decide(agent, observations, noise)[:2], observations[:, 0, 0, 0] * np.float32(100)

    monkeypatch.setattr(ppo_mario, "compute_gae", spy)
    monkeypatch.setattr(ppo_mario, "decide", easy_to_follow)
    monkeypatch.setattr(ppo_mario, "make_env", lambda *_: Counting())
    flags = "--gamma 0.5 --seed 3 --num-envs 3 --num-steps 8 --num-minibatches 2 --total-timesteps 24"
    ppo_mario.train(ppo_mario.parse_args(flags.split()), tmp_path)

    # Episodes of 3, 4 and 5 steps in the three environments, the first two of which are one half.
    rewards, values, dones, last_value = seen
    assert values == [[0, 100, 200, 0, 100, 200, 0, 100], [0, 100, 200, 300] * 2, [0, 100, 200, 300, 400, 0, 100, 200]]
    assert dones == [[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1] * 2, [0, 0, 0, 0, 1, 0, 0, 0]]
    assert last_value == [200, 0, 300]
    assert rewards == [[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4] * 2, [1, 2, 3, 4, 5, 1, 2, 3]]


# --- runs through main


@pytest.mark.parametrize(("variable", "threads"), [("", 3), ("4,2", 4)])
def test_the_update_takes_the_threads_that_the_process_may_use(monkeypatch, variable, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    run(ppo_mario, ONE_UPDATE)
    assert taken == [1, threads, 1]


ENDS = {  # of a run of process pid, and the exit code; a terminal's Ctrl-C reaches all its processes
    "a killed worker": (lambda pid, workers: os.kill(workers[0], signal.SIGKILL), 1),
    "Ctrl-C": (lambda pid, workers: os.killpg(pid, signal.SIGINT), 1),
    "SIGTERM": (lambda pid, workers: os.kill(pid, signal.SIGTERM), 1),
    "kill -9": (lambda pid, workers: os.kill(pid, signal.SIGKILL), -9),
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux's /proc")
@pytest.mark.parametrize("name", ENDS)
def test_however_a_run_ends_it_leaves_no_process_one_line_and_can_go_on(name):
    end, code = ENDS[name]
    command = [sys.executable, ROOT / "ppo_mario.py", *SMALL.split(), "--total-timesteps", "1000000"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        wait_until(lambda: process.poll() is not None or [*Path().glob("runs/*/checkpoint.pt")])
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        end(process.pid, [int(worker) for worker in workers])
        _, err = process.communicate(timeout=30)
    (run_folder,) = Path("runs").iterdir()
    assert process.returncode == code
    if code != -9:
        (line,) = [line for line in err.splitlines() if "step/s" not in line]  # but for the progress
        says = "error: an environment's worker process has died" if "worker" in name else "error: stopped"
        assert line.startswith(says) and line.endswith(f"; go on with: --resume {run_folder}")
    # Of a kill -9 they hear by themselves.
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    total = ppo_mario.load_checkpoint(run_folder)["global_step"] + 32
    ppo_mario.main(["--resume", str(run_folder), "--total-timesteps", str(total)])
    assert ppo_mario.load_checkpoint(run_folder)["global_step"] == total


@FORKS
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_workers_start_is_not_lost(number):
    """What a signal's handler raises inside os.fork, where these hooks run, Python prints and drops."""
    program = (
        "import os, signal, sys, ppo_mario\n"
        f"once = [signal.{number}]\n"
        "os.register_at_fork(before=lambda: once and signal.raise_signal(once.pop()))\n"
        "ppo_mario.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *ONE_UPDATE.split()]
    done = subprocess.run(command, stderr=-1, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (1, "error: stopped\n")


@FORKS
def test_a_second_ctrl_c_does_not_wait_until_the_workers_have_started(monkeypatch):
    began = []

    def slow_start(*_, **__):
        for attempt in (1, 2, 3):
            began.append(attempt)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gym.vector, "AsyncVectorEnv", slow_start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), ppo_mario.worker_processes(Counting, [slice(0, 1)]):
            began.append("training")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert began == [1, 2]


def test_a_thread_can_train(tmp_path):
    with ThreadPoolExecutor(1) as pool:  # where Python lets nobody handle signals
        _, steps = pool.submit(ppo_mario.train, ppo_mario.parse_args(ONE_UPDATE.split()), tmp_path).result()
    assert steps == 32
