"""ppo_mario.py: the game against recordings of the original, each wrapper by hand, the agent, runs through main."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mario

ROOT = Path(__file__).resolve().parent.parent
RECORDED = np.load(Path(__file__).parent / "data" / "super_mario_bros.npz")
STAGES = sorted(name.removeprefix("actions_") for name in RECORDED if name.startswith("actions_"))
STAGE = "SuperMarioBros-1-3-v0"  # over treetops, where a beginner falls soon
SMALL = (
    f"--env-id {STAGE} --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --n-eval-episodes 1".split()
)
ONE_UPDATE = [*SMALL, "--total-timesteps", "32"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two tests run at a time
    torch.set_num_threads(1)


def run_folders():
    return sorted(Path("runs").glob("*"))


def weights(run_folder):
    return torch.load(run_folder / "hub" / "model.pt", weights_only=True)


def scalars(folder, tag):
    """The (step, value) pairs of one TensorBoard curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- the game


@pytest.mark.parametrize("stage", STAGES)
def test_the_game_plays_the_recorded_runs_of_the_original(stage):
    actions, log = RECORDED[f"actions_{stage}"], RECORDED[f"log_{stage}"]
    columns = dict(zip(["x_pos", "y_pos", "time", "score", "coins", "life", "flag_get", "world", "stage"], log.T))
    reward, done = log[:, 9], log[:, 10]
    env = ppo_mario.SuperMarioBros(*map(int, stage.split("_")))
    _, info = env.reset()
    clock = info["time"]
    for k, action in enumerate(actions[:-1]):
        _, our_reward, terminated, truncated, info = env.step(action)
        for name in ("x_pos", "y_pos", "score", "coins", "life", "flag_get", "world", "stage"):
            assert info[name] == columns[name][k + 1], f"{name} at frame {k}"
        assert terminated == done[k + 1] and not truncated
        # The clock may tick up to three frames apart. But for its ticks, the rewards are the same.
        assert info["time"] in columns["time"][max(k - 2, 0) : k + 5]
        if k > 0:
            theirs = reward[k + 1] - min(columns["time"][k + 1] - columns["time"][k], 0)
            assert our_reward - min(info["time"] - clock, 0) == theirs or abs(theirs) > 13  # clipped
        clock = info["time"]
    env.close()


def test_the_environments_are_registered_and_pass_gymnasium_s_checks():
    assert len(ppo_mario.IDS) == 4 * (1 + 32) and set(ppo_mario.IDS) <= set(gym.registry)
    env = gym.make("SuperMarioBros-1-1-v0", action_set="simple", render_mode="rgb_array")
    assert env.action_space == gym.spaces.Discrete(7)
    assert env.observation_space == gym.spaces.Box(0, 255, (224, 240, 3), np.uint8)
    check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)  # those two make a second emulator
    env.reset()
    assert env.render().shape == (448, 480, 3)
    env.close()


def test_the_bare_environment_is_advised_against_by_nobody_and_says_what_is_wrong(recwarn):
    with contextlib.closing(gym.make("SuperMarioBros-1-1-v0")) as env:
        assert not [str(warning.message) for warning in recwarn]
        with pytest.raises(gym.error.Error, match="AsyncVectorEnv"):
            gym.make("SuperMarioBros-1-1-v0")  # one emulator fits in one process
    with contextlib.closing(gym.make("SuperMarioBros-1-1")) as env:
        assert env.unwrapped.spec.id == "SuperMarioBros-1-1-v0"  # and not the rectangles of -v3
    with pytest.raises(gym.error.Error, match="right, simple, complex"):
        gym.make("SuperMarioBros-1-1-v0", action_set="simpl")


def test_reset_goes_back_to_the_very_same_start():
    env = ppo_mario.SuperMarioBros(1, 1, action_set="right")
    first, first_info = env.reset()
    played = [env.step(4)[4] for _ in range(60)]
    again, again_info = env.reset(seed=5)
    assert np.array_equal(first, again) and first_info == again_info
    assert [env.step(4)[4] for _ in range(60)] == played
    assert played[-1]["x_pos"] > first_info["x_pos"] == 40
    env.close()


def test_one_frame_shows_mario_on_the_ground_under_a_blue_sky():
    env = ppo_mario.SuperMarioBros(1, 1)
    screen, _ = env.reset()
    assert screen.shape == (224, 240, 3) and screen.dtype == np.uint8
    red, green, blue = screen[100, 20].astype(int)
    assert blue > 200 and blue > red > 50 and blue > green  # the sky
    ground = screen[-10:].reshape(-1, 3).mean(axis=0)
    assert ground[0] > ground[2]  # bricks
    env.close()


def test_the_whole_game_has_three_lives_and_goes_on_after_a_death():
    env = ppo_mario.SuperMarioBros(action_set="right")
    _, info = env.reset()
    lives, rewards, terminated = [info["life"]], [], False
    for _ in range(3000):
        _, reward, terminated, _, info = env.step(1)  # into the first Goomba, again and again
        rewards.append(reward)
        if info["life"] != lives[-1]:
            lives.append(info["life"])
        if terminated:
            break
    assert terminated and lives == [2, 1, 0, 255]
    assert min(rewards) == -15  # -25, clipped
    assert (info["world"], info["stage"]) == (1, 1)
    env.close()


def test_a_run_that_a_trained_agent_finished_reaches_the_flag():
    actions = np.load(Path(__file__).parent / "data" / "mario_1_1_flag.npy")  # of "right", each held for four frames
    env = ppo_mario.SuperMarioBros(1, 1, action_set="right")
    _, info = env.reset()
    total, terminated, frames = 0.0, False, 0
    for action in actions.repeat(ppo_mario.SKIP):
        assert not terminated and not info["flag_get"]
        _, reward, terminated, _, info = env.step(action)
        total += reward
        frames += 1
        if terminated:
            break
    assert terminated and info["flag_get"] and info["x_pos"] == 3161 and info["life"] == 2
    assert frames > len(actions) * ppo_mario.SKIP - ppo_mario.SKIP
    assert total == (3161 - 40) - (400 - info["time"])  # the way, less the ticks of the clock
    env.close()


def test_every_action_set_presses_what_it_says():
    env = ppo_mario.SuperMarioBros(1, 1, action_set=["START", "LEFT A B"])
    pressed = [{button for button, on in zip(ppo_mario.BUTTONS, mask) if on} for mask in env.masks]
    assert pressed == [{"START"}, {"LEFT", "A", "B"}]
    env.close()
    assert {name: len(actions) for name, actions in ppo_mario.ACTION_SETS.items()} == dict(
        right=5, simple=7, complex=12
    )


# --- the ROM


def test_a_rom_that_is_missing_or_another_one_is_said_in_a_line(monkeypatch, capfd):
    real = ppo_mario.find_rom(0)

    def says(*flags):
        with pytest.raises(SystemExit) as stop:
            ppo_mario.main([*ONE_UPDATE, *flags])
        assert stop.value.code == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and not run_folders()
        return err

    assert "there is no such file" in says("--rom", "nowhere.nes")
    Path("README.md").write_text("no game")
    assert "there is no" not in says("--rom", "README.md")
    Path("other.nes").write_bytes(real.read_bytes()[:-1] + b"?")
    assert "ab30029efec6ccfc5d65dfda7fbc6e6489a80805" in says("--rom", "other.nes")
    assert "4bf894b301f339bce306af4813923a9900d034d1" in says("--rom", str(real), "--env-id", "SuperMarioBros-1-1-v1")

    # 9.x of the package has only the first of the four files.
    folder = Path("gym_super_mario_bros")
    (folder / "_roms").mkdir(parents=True)
    shutil.copy(real, folder / "_roms")
    package = type("Spec", (), {"origin": str(folder / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    assert "gym-super-mario-bros==7.4.0" in says("--env-id", "SuperMarioBros-1-1-v3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps" in says() and "--rom PATH" in says()


def test_a_run_with_a_rom_of_its_own_goes_on_without_naming_it_again(monkeypatch):
    shutil.copy(ppo_mario.find_rom(0), "mine.nes")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ppo_mario.main([*ONE_UPDATE, "--rom", "mine.nes"])
    (run_folder,) = run_folders()
    ppo_mario.main(["--resume", str(run_folder), "--total-timesteps", "64"])
    assert "mine.nes" not in (run_folder / "hub" / "hyperparameters.json").read_text()  # whose place is nobody's matter


@pytest.mark.parametrize("version", range(4))
def test_all_four_drawings_of_the_game_are_played(version):
    env = ppo_mario.SuperMarioBros(1, 1, version)
    env.reset()
    assert [env.step(1)[4]["x_pos"] for _ in range(20)][-1] > 40
    env.close()


def test_the_game_is_found_without_importing_its_package():
    code = "import sys, ppo_mario; ppo_mario.find_rom(0); print('gym' in sys.modules, 'nes_py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n" and done.stderr == ""


# --- the wrappers, on a tape instead of the game


class Tape(gym.Env):
    """Plays back (x, score, reward, terminated) per frame; the screen of frame k is all of brightness k."""

    action_space = gym.spaces.Discrete(3)
    observation_space = gym.spaces.Box(0, 255, (224, 240, 3), np.uint8)
    render_mode = "rgb_array"

    def __init__(self, frames, flag=False):
        self.frames, self.flag, self.actions = frames, flag, []

    def now(self):
        x, score, reward, terminated = self.frames[self.k]
        info = {"world": 1, "stage": 1, "x_pos": x, "score": score, "flag_get": terminated and self.flag}
        return np.full((224, 240, 3), self.k, dtype=np.uint8), reward, terminated, info

    def reset(self, seed=None, options=None):
        self.k = 0
        observation, _, _, info = self.now()
        return observation, info

    def step(self, action):
        self.k += 1
        self.actions.append(action)
        observation, reward, terminated, info = self.now()
        return observation, reward, terminated, False, info


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


@pytest.mark.parametrize(("flag", "bonus"), [(True, 50), (False, -50)])
def test_shaped_rewards_count_points_the_flag_and_a_death(flag, bonus):
    env = ppo_mario.ShapeReward(Tape([(40, 100, 0, False), (43, 300, 3, False), (44, 300, 1, True)], flag))
    env.reset()
    assert env.step(0)[1] == pytest.approx((3 + 200 / 40) / 10)
    assert env.step(0)[1] == pytest.approx((1 + bonus) / 10)
    env.reset()
    assert env.step(0)[1] == pytest.approx((3 + 200 / 40) / 10)  # the points of the last episode are forgotten


def test_an_episode_that_comes_no_further_is_truncated_and_nothing_else_changes():
    places = [40, 41, 41, 40, 42, 42, 42, 42, 42]
    env = ppo_mario.EndWhenStuck(Tape([(x, 0, 1.0, False) for x in places]), stuck_steps=3)
    for _ in range(2):
        env.reset()
        steps = [env.step(0) for _ in places[1:]]
        assert [truncated for _, _, _, truncated, _ in steps] == [False] * 6 + [True] * 2
        assert all(reward == 1 and not terminated for _, reward, terminated, _, _ in steps)


def test_a_small_grey_screen_has_the_brightness_of_the_large_one():
    env = ppo_mario.SmallGrey(Tape([]))
    screen = np.zeros((224, 240, 3), dtype=np.uint8)
    screen[:112] = [200, 100, 50]
    small = env.observation(screen)
    assert small.shape == (84, 84) and small.dtype == np.uint8
    assert np.all(small[:42] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)) and np.all(small[42:] == 0)


def test_the_network_sees_the_last_four_observations_the_newest_last(monkeypatch):
    tape = Tape([(40 + k, 0, 0, False) for k in range(20)])
    monkeypatch.setattr(ppo_mario, "SuperMarioBros", lambda *args: tape)
    env = ppo_mario.make_env("SuperMarioBros-1-1-v0")
    observation, _ = env.reset()
    assert observation.shape == (4, 84, 84) and observation.dtype == np.uint8 and not observation.any()
    assert [env.step(0)[0][:, 0, 0].tolist() for _ in range(4)] == [
        [0, 0, 0, 4], [0, 0, 4, 8], [0, 4, 8, 12], [4, 8, 12, 16],
    ]  # fmt: skip


def test_training_is_shaped_and_ends_when_stuck_and_evaluation_is_not(monkeypatch):
    def tape(*args):
        return Tape([(40, 4 * k, 1.0, False) for k in range(99)])

    monkeypatch.setattr(ppo_mario, "SuperMarioBros", tape)
    training, evaluation = (ppo_mario.make_env("SuperMarioBros-1-1-v0", stuck_steps=n) for n in (2, None))
    for env, reward, ends in ((training, (4 + 16 / 40) / 10, [False, True]), (evaluation, 4, [False, False])):
        env.reset()
        steps = [env.step(0) for _ in range(2)]
        assert [step[1] for step in steps] == pytest.approx([reward] * 2)
        assert [step[3] for step in steps] == ends


def test_flags_are_counted_per_episode():
    env = ppo_mario.CountFlags(Tape([(40, 0, 0, False), (41, 0, 0, True)], flag=True))
    for flag in (True, False, False, True):
        env.unwrapped.flag = flag
        env.reset()
        env.step(0)
        assert env.flags[-1] == flag
    assert env.flag_rate() == {"flag_rate": 0.5}


# --- the agent


@pytest.mark.parametrize("shared", [True, False])
def test_deciding_is_the_network_and_samples_its_softmax(shared):
    torch.manual_seed(1)
    agent = ppo_mario.Agent(5, shared)
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


def test_a_shared_network_is_one_and_separate_ones_are_two():
    shared, separate = (ppo_mario.Agent(7, shared) for shared in (True, False))
    count = [sum(parameter.numel() for parameter in agent.parameters()) for agent in (shared, separate)]
    assert count[1] - count[0] == sum(parameter.numel() for parameter in shared.actor_features.parameters())

    _, values = separate(torch.zeros((1, 4, 84, 84), dtype=torch.uint8))
    values.sum().backward()
    assert separate.actor_features[0].weight.grad is None and separate.critic_features[0].weight.grad is not None


# --- runs through main


def test_one_update_changes_the_parameters_and_leaves_a_complete_run_folder(capfd):
    ppo_mario.main([*ONE_UPDATE, "--seed", "3", "--capture-video"])
    (run_folder,) = run_folders()
    files = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()}
    package = {"README.md", "results.json", "hyperparameters.json", "model.pt", "replay.mp4", "ppo_mario.py"}
    assert {f"hub/{name}" for name in package} | {"checkpoint.pt", "videos/step-32.mp4"} <= files

    torch.manual_seed(3)
    before = ppo_mario.Agent(len(ppo_mario.ACTION_SETS["right"])).state_dict()
    after = weights(run_folder)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not any(torch.equal(before[name], after[name]) for name in before)
    for tag in ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"):
        ((step, value),) = scalars(run_folder, f"losses/{tag}")
        assert step == 32 and np.isfinite(value)

    results = json.loads((run_folder / "hub" / "results.json").read_text())
    assert results["env_name"] == STAGE and results["deterministic_eval"] is False
    assert set(results["metrics"]) == {"flag_rate"} and 0 <= results["metrics"]["flag_rate"] <= 1
    card = (run_folder / "hub" / "README.md").read_text()
    assert f"- {STAGE}" in card and "type: flag_rate" in card and "sampled actions" in card
    assert "rom" not in json.loads((run_folder / "hub" / "hyperparameters.json").read_text())

    video = imageio.get_reader(run_folder / "hub" / "replay.mp4").get_meta_data()
    assert video["fps"] == 60 and video["size"] == (480, 448) and video["codec"] == "h264"
    assert "flag_rate" in capfd.readouterr().out


def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not():
    for seed in ("1", "1", "2"):
        ppo_mario.main([*ONE_UPDATE, "--seed", seed])
    one, same, other = map(weights, run_folders())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "weight" in name)


def test_the_finalists_are_played_again_before_the_best_is_packaged_and_a_lucky_one_does_not_stay(monkeypatch):
    scores, played, seeds = {}, [], []
    make_policy = ppo_mario.make_policy

    def remember(agent, deterministic=False, seed=0):
        seeds.append(seed)
        return make_policy(agent, deterministic, seed)

    def score(env, policy, n_eval_episodes, seeds):
        env.flags = [False] * n_eval_episodes
        agent = policy.__closure__[0].cell_contents
        played.append(agent.state_dict()["actor.weight"].numpy().tobytes())
        return next(scores[played[-1]], 0.0), 0.0

    class Scores(dict):
        def __missing__(self, agent):  # the first agent is lucky once, the second is good
            return self.setdefault(agent, iter([[9.0, 9.0, 1.0], [5.0, 5.0]][len(self)]))

    scores = Scores()
    monkeypatch.setattr(ppo_mario, "make_policy", remember)
    monkeypatch.setattr(ppo_mario, "evaluate_agent", score)
    ppo_mario.main([*SMALL, "--total-timesteps", "32"])
    (run_folder,) = run_folders()
    assert played == [played[0]] * 2  # as a finalist and for the package, each time with other samples
    assert len(set(map(str, seeds))) == 2
    lucky = weights(run_folder)["actor.weight"]
    ppo_mario.main(["--resume", str(run_folder), "--total-timesteps", "64"])
    assert len(scores) == 2 and len(set(map(str, seeds))) == 3
    packaged = weights(run_folder)["actor.weight"]
    assert packaged.numpy().tobytes() == played[-1] and not torch.equal(packaged, lucky)
    assert sorted(value for _, value in scalars(run_folder, "eval/mean_reward")) == [1.0, 5.0, 9.0]


def test_the_finalists_are_the_best_of_the_second_half_of_training(monkeypatch):
    monkeypatch.setattr(ppo_mario, "evaluate_agent", lambda env, *args: (env.flags.append(False) or 1.0, 0.0))
    ppo_mario.main([*SMALL, "--total-timesteps", "640"])
    (run_folder,) = run_folders()
    finalists = ppo_mario.load_checkpoint(run_folder)["finalists"]
    assert len(finalists) == ppo_mario.FINALISTS and len({finalist["step"] for finalist in finalists}) == len(finalists)
    assert all(finalist["step"] % 64 == 0 and finalist["step"] >= 320 for finalist in finalists)
    assert finalists[0]["mean_return"] >= finalists[-1]["mean_return"]


@pytest.mark.parametrize(("variable", "threads"), [(None, 3), ("4,2", 4)])
def test_the_update_takes_the_threads_that_the_process_may_use(monkeypatch, variable, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    ppo_mario.main(ONE_UPDATE)
    assert set(taken) == {1, threads}


def test_an_interrupted_run_resumes_where_it_was(monkeypatch, capfd):
    real, calls = ppo_mario.compute_gae, []

    def interrupt_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(ppo_mario, "compute_gae", interrupt_at_second)
    with pytest.raises(SystemExit) as stop:
        ppo_mario.main([*SMALL, "--total-timesteps", "128"])
    assert stop.value.code == 130
    (run_folder,) = run_folders()
    assert f"--resume {run_folder}" in capfd.readouterr().err
    assert ppo_mario.load_checkpoint(run_folder)["global_step"] == 64

    ppo_mario.main(["--resume", str(run_folder)])
    assert run_folders() == [run_folder] and len(calls) == 4
    assert [step for step, _ in scalars(run_folder, "losses/entropy")] == [32, 64, 96, 128]
    rates = [value for _, value in scalars(run_folder, "charts/learning_rate")]
    assert rates == pytest.approx([5e-4 * (1 - k / 4) for k in range(4)], rel=1e-6)


def test_a_resumed_run_takes_no_fewer_steps_and_says_how_many_it_took(capfd):
    ppo_mario.main([*SMALL, "--total-timesteps", "95"])  # two batches of 32
    (run_folder,) = run_folders()
    said = json.loads((run_folder / "hub" / "hyperparameters.json").read_text())
    assert said["total_timesteps"] == ppo_mario.load_checkpoint(run_folder)["global_step"] == 64
    with pytest.raises(SystemExit) as stop:
        ppo_mario.main(["--resume", str(run_folder), "--total-timesteps", "32"])
    assert stop.value.code == 2 and "64" in capfd.readouterr().err
    assert json.loads((run_folder / "hub" / "hyperparameters.json").read_text()) == said


def children(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux's /proc")
def test_a_killed_worker_ends_the_run_with_a_line_and_leaves_no_process():
    command = [sys.executable, ROOT / "ppo_mario.py", *SMALL, "--total-timesteps", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (run_folders() and (run_folders()[0] / "checkpoint.pt").exists()):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        workers = children(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in err
    assert "worker process has died" in err and "--resume" in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


# --- the command line


def test_an_id_without_its_version_is_that_of_the_game_as_it_was_and_keeps_its_row():
    assert ppo_mario.parse_args(["--env-id", "SuperMarioBros-1-4"]).env_id == "SuperMarioBros-1-4-v0"
    args = ppo_mario.parse_args(["--env-id", "SuperMarioBros"])
    assert args.env_id == "SuperMarioBros-v0"
    assert args == ppo_mario.parse_args(["--env-id", "SuperMarioBros-v0"]) and args.total_timesteps > 9_000_000
    with contextlib.closing(ppo_mario.make_env("SuperMarioBros-1-3")) as env:
        assert (env.unwrapped.world, env.unwrapped.stage) == (1, 3)


def test_scores_are_over_a_hundred_episodes_where_nothing_else_is_said():
    assert ppo_mario.parse_args([]).n_eval_episodes == 100


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--env-id", "CartPole-v1"], "SuperMarioBros-1-1-v0 to -8-4-v0"),
        (["--env-id", "SuperMarioBros-9-1-v0"], "SuperMarioBros-1-1-v0 to -8-4-v0"),
        (["--action-set", "all"], "right"),
        (["--num-minibatches", "3"], "does not divide"),
        (["--play", "--evaluate", "random"], "four jobs"),
        (["--play"], "there is no display here"),
        (["--evaluate", "random", "--render"], "there is no display here"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(argv, says, monkeypatch, capfd):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as stop:
        ppo_mario.main(argv)
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
    assert not run_folders()


def test_playing_takes_the_keyboard_until_escape(monkeypatch):
    import pygame

    pressed = {10: (pygame.KEYDOWN, pygame.K_RIGHT), 11: (pygame.KEYDOWN, pygame.K_z), 50: (pygame.KEYDOWN, pygame.K_x)}
    pressed |= {70: (pygame.KEYUP, pygame.K_x), 71: (pygame.KEYUP, pygame.K_z), 72: (pygame.KEYUP, pygame.K_RIGHT)}
    pressed |= {73: (pygame.KEYDOWN, pygame.K_ESCAPE)}
    infos = []

    class Fingers(gym.Wrapper):
        def step(self, action):
            result = self.env.step(action)
            infos.append(result[4])
            if len(infos) in pressed:
                kind, key = pressed[len(infos)]
                pygame.event.post(pygame.event.Event(kind, key=key))
            return result

    make_game = ppo_mario.make_game
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(ppo_mario, "has_display", lambda: True)
    monkeypatch.setattr(ppo_mario, "make_game", lambda *args: Fingers(make_game(*args)))
    ppo_mario.main(["--play"])
    x, y = [info["x_pos"] for info in infos], [info["y_pos"] for info in infos]
    assert len(infos) == 73
    assert x[9] == x[0] and x[49] > x[9] + 60  # nothing held; running to the right
    assert y[49] == y[0] and max(y[50:70]) > y[0] + 30  # on the ground; jumping


def test_the_random_agent_is_scored_and_filmed(capfd):
    mean, std = ppo_mario.main(["--evaluate", "random", "--env-id", STAGE, "--n-eval-episodes", "1"])
    assert std == 0 and mean > 0
    (run_folder,) = run_folders()
    frames = imageio.get_reader(run_folder / "replay.mp4").count_frames()
    out = capfd.readouterr().out
    assert "flag_rate 0.00" in out and "does not reach the flag" in out and frames > 100
