"""ppo.py: its math against the definitions, short runs through main, and what a mistake in the call looks like."""

import copy
import json
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

PLAIN = ["--num-envs=4", "--num-steps=128", "--num-minibatches=4", "--update-epochs=4"]  # instead of TUNED's row
PLAIN += ["--learning-rate=2.5e-4", "--clip-vloss", "--n-eval-episodes=2"]
ONE_UPDATE = [*PLAIN, "--total-timesteps=512"]
SHORT = [*PLAIN, "--num-steps=32", "--total-timesteps"]  # iterations of 128 steps


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv):
    """The folder of a run with these flags."""
    before = set(Path("runs").glob("*"))
    ppo.main(list(argv))
    (run_folder,) = set(Path("runs").glob("*")) - before
    return run_folder


def package(run_folder, name):
    return json.loads((run_folder / "hub" / f"{name}.json").read_text())


def weights(run_folder):
    return load_file(run_folder / "hub" / "model.safetensors")


def scalars(folder, tag):
    """The (step, value) pairs of one TensorBoard curve."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def count_frames(video):
    return sum(1 for _ in imageio.get_reader(video))


# --- the return math, against the definitions as explicit double sums


def value_after(values, dones, last_value, t, n):
    """V(s_{t+1}) as seen from step t: 0 if the episode ended there, and last_value behind the rollout's last row."""
    if dones[t, n]:
        return 0.0
    return values[t + 1, n] if t + 1 < len(values) else last_value[n]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 17, 3))
    dones, last_value = (rng.random((17, 3)) < 0.2).astype(np.float64), rng.normal(size=3)
    advantages, returns = ppo.compute_gae(rewards, values, dones, last_value, gamma, gae_lambda)
    for n in range(rewards.shape[1]):
        for t in range(len(rewards)):
            expected = 0.0
            for k in range(t, len(rewards)):  # A_t = sum_k (gamma lambda)^(k-t) delta_k, to the end of the episode
                delta = rewards[k, n] + gamma * value_after(values, dones, last_value, k, n) - values[k, n]
                expected += (gamma * gae_lambda) ** (k - t) * delta
                if dones[k, n]:
                    break
            assert advantages[t, n] == pytest.approx(expected, abs=1e-12)
            assert returns[t, n] == pytest.approx(expected + values[t, n], abs=1e-12)


def test_standardise_gives_each_minibatch_mean_0_and_deviation_1():
    advantages = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])
    expected = [[-1, 0, 1], [-10 / 300**0.5, -10 / 300**0.5, 20 / 300**0.5]]
    torch.testing.assert_close(ppo.standardise(advantages), torch.tensor(expected))
    assert torch.equal(ppo.standardise(torch.full((1, 4), 7.0)), torch.zeros(1, 4))


# --- the loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [
        (1.0, 1.0, True),  # where every epoch starts: the policy gradient
        (1.19, 1.0, True),
        (1.21, 1.0, False),  # more probable already, and more would pay: clipped
        (0.5, 1.0, True),  # wrongly less probable: the way back stays open
        (0.81, -1.0, True),
        (0.79, -1.0, False),  # less probable already, and less would pay: clipped
        (1.5, -1.0, True),
    ],
)
def test_clipping_stops_the_gradient_where_the_paper_says(ratio, advantage, has_gradient):
    log_probs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    objective = ppo.clipped_surrogate(log_probs, torch.zeros(1, dtype=torch.float64), advantages, 0.2)
    objective.backward()
    assert objective.item() == pytest.approx(min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage))
    assert log_probs.grad.item() == pytest.approx(ratio * advantage if has_gradient else 0.0)


def test_value_loss_is_the_worse_of_the_plain_and_the_clipped_error():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    assert ppo.value_loss(values, old_values, returns).item() == pytest.approx(
        np.mean((values - returns).numpy() ** 2) / 2
    )
    loss = ppo.value_loss(values.requires_grad_(), old_values, returns, clip_coef=0.2)
    loss.backward()
    clipped = values.detach().clamp(old_values - 0.2, old_values + 0.2)
    plain_error, clipped_error = (values.detach() - returns) ** 2, (clipped - returns) ** 2
    assert loss.item() == pytest.approx(torch.max(plain_error, clipped_error).mean().item() / 2)
    moves = plain_error >= clipped_error  # a clipped value does not
    torch.testing.assert_close(values.grad, (values.detach() - returns) * moves / 1000)


# --- the agent


def test_numpy_acting_is_the_network_and_samples_its_softmax():
    torch.manual_seed(0)
    agent = ppo.Agent(5, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)  # probabilities that differ
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(64, 5)).astype(np.float32)
    logits = agent.actor(torch.from_numpy(observations)).detach()
    layers = ppo.numpy_layers(agent.actor)
    assert ppo.act(layers, observations).tolist() == logits.argmax(dim=1).tolist()

    same = np.repeat(observations[:1], 100_000, axis=0)
    sampled = ppo.act(layers, same, rng.gumbel(size=(len(same), 3)))
    np.testing.assert_allclose(np.bincount(sampled) / len(same), logits[0].softmax(dim=0), atol=0.006)


@pytest.mark.parametrize("clip_vloss", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_update_ascends_equation_9_of_the_paper(clip_vloss, max_grad_norm):
    """On flat parameters as on separate ones, with autograd's gradient, clip_grad_norm_ and Adam."""
    torch.manual_seed(0)
    agent = ppo.Agent(4, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)  # an entropy that has a gradient
    reference = copy.deepcopy(agent)
    parameters = ppo.flatten_parameters(agent)
    adam = dict(lr=0.01, eps=1e-5)
    optimizer, its_optimizer = torch.optim.Adam([parameters], **adam), torch.optim.Adam(reference.parameters(), **adam)
    switch = "--clip-vloss" if clip_vloss else "--no-clip-vloss"
    args = ppo.parse_args([switch, "--max-grad-norm", str(max_grad_norm), "--ent-coef", "0.1", "--vf-coef", "0.7"])
    for _ in range(5):
        observations, actions = torch.randn(64, 4), torch.randint(3, (64,))
        old_log_probs, old_values, returns, advantages = batch = torch.randn(4, 64)
        old_log_probs -= 1.1
        ppo.update(agent, parameters, optimizer, (observations, actions, *batch), args)

        distribution = torch.distributions.Categorical(logits=reference.actor(observations))
        ratio = torch.exp(distribution.log_prob(actions) - old_log_probs)
        objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        values = reference.critic(observations)[:, 0]
        errors = (values - returns) ** 2
        if clip_vloss:
            clipped_values = old_values + (values - old_values).clamp(-0.2, 0.2)
            errors = torch.max(errors, (clipped_values - returns) ** 2)
        its_optimizer.zero_grad()
        (-objective + 0.7 * errors.mean() / 2 - 0.1 * distribution.entropy().mean()).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        its_optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], tensor)


# --- episode boundaries: an environment whose observations tell where they come from


class Counting(gym.Env):
    """Observation: (episode, step in it). The episode terminates, or is truncated, after its third step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, ends_by, render_mode=None):
        self.ends_by, self.episode, self.seeds = ends_by, -1, []

    def reset(self, seed=None, options=None):
        self.episode, self.step_in_episode = self.episode + 1, 0
        self.seeds.append(seed)
        return np.array([self.episode, 0], dtype=np.float32), {}

    def step(self, action):
        self.step_in_episode += 1
        ended = self.step_in_episode == 3
        observation = np.array([self.episode, self.step_in_episode], dtype=np.float32)
        return observation, 1.0, ended and self.ends_by == "termination", ended and self.ends_by == "time limit", {}


@pytest.mark.parametrize("ends_by", ["termination", "time limit"])
def test_no_transition_crosses_an_episode_and_only_time_limits_bootstrap(ends_by, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "make_env", lambda env_id, render_mode=None: Counting(ends_by))
    # A critic that is easy to follow: V(s) = 100 * step in the episode.
    monkeypatch.setattr(ppo.Agent, "__init__", agent_with_known_critic)
    seen = {}

    def spy(rewards, values, dones, last_value, gamma, gae_lambda):
        seen.update(rewards=rewards.copy(), values=values.copy(), dones=dones.copy(), last_value=last_value.copy())
        return compute_gae(rewards, values, dones, last_value, gamma, gae_lambda)

    compute_gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", spy)
    flags = "--gamma 0.5 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16"
    assert ppo.train(ppo.parse_args(flags.split()), tmp_path)[1] == 16

    # Steps 0, 1, 2 | 0, 1, 2 | 0, 1: never a last observation (step 3) as the state of a transition.
    assert seen["values"].T.tolist() == [[0, 100, 200, 0, 100, 200, 0, 100]] * 2
    assert seen["dones"].T.tolist() == [[0, 0, 1, 0, 0, 1, 0, 0]] * 2
    assert seen["last_value"].tolist() == [200, 200]
    # A time limit adds gamma * V(last observation) = 0.5 * 300 to the reward of that step; termination adds nothing.
    end = 151 if ends_by == "time limit" else 1
    assert seen["rewards"].T.tolist() == [[1, 1, end, 1, 1, end, 1, 1]] * 2


def agent_with_known_critic(self, n_observations, n_actions):
    torch.nn.Module.__init__(self)
    self.actor = torch.nn.Sequential(torch.nn.Linear(n_observations, n_actions))
    self.critic = torch.nn.Sequential(torch.nn.Linear(n_observations, 1))
    with torch.no_grad():
        self.critic[0].weight[:] = torch.tensor([[0.0, 100.0]])
        self.critic[0].bias[:] = 0.0


# --- short runs through main


def test_one_update_changes_the_parameters_and_leaves_a_complete_package():
    agent = ppo.main([*PLAIN, "--total-timesteps", "1000", "--n-eval-episodes", "1"])  # that is one batch of 512
    (run_folder,) = Path("runs").iterdir()
    assert run_folder.name.startswith("CartPole-v1__ppo__1__")
    hub = {str(path.relative_to(run_folder / "hub")) for path in (run_folder / "hub").rglob("*") if path.is_file()}
    (events,) = (path.name for path in run_folder.rglob("events.out.tfevents*"))  # TensorBoard shows the run once
    files = "README.md results.json hyperparameters.json model.safetensors config.json replay.mp4 ppo.py"
    assert hub == {*files.split(), f"logs/{events}"}
    assert (run_folder / "hub" / "ppo.py").read_bytes() == Path(ppo.__file__).read_bytes()

    torch.manual_seed(1)
    start = ppo.Agent(4, 2).state_dict()
    assert weights(run_folder).keys() == start.keys()
    for name, tensor in weights(run_folder).items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, agent.state_dict()[name])
        assert not torch.equal(tensor, start[name])

    for name in ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac"):
        ((step, value),) = scalars(run_folder / "hub" / "logs", f"losses/{name}")
        assert step == 512
        assert np.isfinite(value)
    for name in ("episodic_return", "episodic_length", "learning_rate", "SPS"):
        assert scalars(run_folder / "hub" / "logs", f"charts/{name}")

    # What it says of the steps is what was really taken.
    assert package(run_folder, "results")["global_step"] == 512
    assert package(run_folder, "hyperparameters")["total_timesteps"] == 512
    card = (run_folder / "hub" / "README.md").read_text()
    assert "512 steps" in card and "1000" not in card and "1,000" not in card

    # The replay is one whole episode that a browser plays. CartPole pays 1 per step; one frame more is the first.
    meta = imageio.get_reader(run_folder / "hub" / "replay.mp4").get_meta_data()
    assert (meta["codec"], meta["pix_fmt"].split("(")[0], meta["fps"]) == ("h264", "yuv420p", 50)
    assert count_frames(run_folder / "hub" / "replay.mp4") == package(run_folder, "results")["mean_reward"] + 1


def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not():
    first, again, other = (weights(run(*ONE_UPDATE, "--seed", seed)) for seed in ("1", "1", "2"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_every_algorithm_flag_trains():
    flags = "--no-norm-adv --no-clip-vloss --no-anneal-lr --gae-lambda 1 --target-kl 0.01 --capture-video"
    run_folder = run(*ONE_UPDATE, *flags.split(), "--no-deterministic-eval")
    (video,) = (run_folder / "videos").glob("*.mp4")
    assert count_frames(video) > 5
    assert scalars(run_folder / "hub" / "logs", "charts/learning_rate") == [(512, pytest.approx(2.5e-4))]
    assert "sampled actions" in (run_folder / "hub" / "README.md").read_text()


def test_target_kl_ends_the_epochs_of_a_rollout(monkeypatch):
    calls, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *args: calls.append(1) or update(*args))
    run(*ONE_UPDATE)
    assert len(calls) == 4 * 4
    calls.clear()
    run(*ONE_UPDATE, "--learning-rate", "0.1", "--target-kl", "0.001")
    assert len(calls) == 4


# --- environments and their settings


def test_the_plain_defaults_are_the_course_s():
    args = vars(ppo.parse_args(["--env-id", "MountainCar-v0"]))
    expected = dict(
        seed=1, torch_deterministic=True, cuda=True, track=False, capture_video=False, total_timesteps=97 * 512,
        learning_rate=2.5e-4, num_envs=4, num_steps=128, anneal_lr=True, gamma=0.99, gae_lambda=0.95, num_minibatches=4,
        update_epochs=4, norm_adv=True, clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5,
        target_kl=None, repo_id=None,
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("full_id", ["LunarLander-v2", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_an_id_without_its_version_is_completed_before_its_settings_are_looked_up(full_id, capsys):
    env_id = full_id.split("-")[0]
    args = vars(ppo.parse_args(["--env-id", env_id]))
    row = {"total_timesteps": 50_000, **ppo.TUNED.get(full_id, {})}
    row["total_timesteps"] -= row["total_timesteps"] % (args["num_envs"] * args["num_steps"])
    assert {name: args[name] for name in row} == row
    assert ppo.parse_args(["--env-id", env_id, "--num-envs", "2"]).num_envs == 2  # flags win over the row

    run_folder = run("--env-id", env_id, *ONE_UPDATE)
    assert run_folder.name.startswith(f"{full_id}__")
    assert package(run_folder, "hyperparameters")["env_id"] == package(run_folder, "results")["env_id"] == full_id
    card = (run_folder / "hub" / "README.md").read_text()
    assert f"- {full_id}\n" in card
    assert "LunarLander-v3" not in card
    untuned = [line for line in capsys.readouterr().out.splitlines() if "tuned" in line]
    assert bool(untuned) == (full_id not in ppo.TUNED)
    assert all(full_id in line for line in untuned)


def test_lunar_lander_v2_lives_on_without_warnings(recwarn):
    for _ in range(2):
        env = ppo.make_env("LunarLander-v2")
        assert env.spec.id == "LunarLander-v2"
        current = gym.make("LunarLander-v3")
        env.reset(seed=3)
        current.reset(seed=3)
        for action in (0, 1, 2, 3, 2, 2):
            np.testing.assert_array_equal(env.step(action)[0], current.step(action)[0])
    assert not [warning for warning in recwarn if "LunarLander" in str(warning.message)]


# --- the score and the replay


def test_evaluation_plays_each_seed_once_in_order_and_sums_rewards():
    env = Counting("termination")
    assert ppo.evaluate_agent(env, lambda observation: 1, [7, 5, 6]) == (3.0, 0.0)
    assert env.seeds == [7, 5, 6]


def test_the_score_is_of_a_fresh_environment_and_seeds_that_training_never_used(monkeypatch):
    resets, trained = [], []  # (environment, seed) of each reset to a seed; of those, the training's
    make_env, evaluate_agent = ppo.make_env, ppo.evaluate_agent

    class Recording(gym.Wrapper):
        def reset(self, *, seed=None, options=None):
            if seed is not None:
                resets.append((self, seed))
            return super().reset(seed=seed, options=options)

    def evaluate_after_training(*args):
        trained.extend(resets)
        resets.clear()
        return evaluate_agent(*args)

    monkeypatch.setattr(ppo, "make_env", lambda *args: Recording(make_env(*args)))
    monkeypatch.setattr(ppo, "evaluate_agent", evaluate_after_training)
    run(*ONE_UPDATE)
    assert len(trained) == 4 and len(resets) >= 2  # one per environment; one per episode, and the film's
    for ours, theirs in zip(zip(*trained), zip(*resets)):
        assert not set(ours) & set(theirs)


def test_no_two_training_seeds_are_scored_on_the_same_episodes(monkeypatch):
    played = []
    monkeypatch.setattr(ppo, "evaluate_agent", lambda *args: played.extend(args[-1]) or (0.0, 0.0))
    monkeypatch.setattr(ppo, "record_video", lambda *args, **kwargs: None)
    for seed in range(1, 10):
        ppo.main(["--evaluate", "random", "--n-eval-episodes", "1000", "--seed", str(seed)])
    assert len(set(played)) == len(played) == 9000
    assert min(played) > 9 + 1000  # and none of them is an environment's in training


@pytest.mark.parametrize("switch", ["--deterministic-eval", "--no-deterministic-eval"])
def test_evaluate_gives_the_score_of_the_package_to_the_last_digit(switch):
    run_folder = run(*ONE_UPDATE, switch)
    results = package(run_folder, "results")
    for source in (run_folder, run_folder / "hub"):
        score = ppo.main(["--evaluate", str(source)])
        assert score == {name: results[name] for name in ("mean_reward", "std_reward")}


def test_evaluate_random_scores_and_films_the_random_agent():
    score = ppo.main(["--evaluate", "random", "--n-eval-episodes", "20"])
    assert 10 < score["mean_reward"] < 40
    (replay,) = Path("runs").rglob("*.mp4")
    assert count_frames(replay) > 8


def test_frames_of_odd_size_make_a_film_too(tmp_path, capfd):
    class Odd(Counting):
        metadata = {"render_fps": 7}  # noqa: RUF012

        def render(self):
            return np.zeros((101, 51, 3), dtype=np.uint8)

    ppo.record_video(Odd("termination"), lambda observation: 0, tmp_path / "odd.mp4")
    meta = imageio.get_reader(tmp_path / "odd.mp4").get_meta_data()
    assert (meta["fps"], [side % 2 for side in meta["size"]]) == (7, [0, 0])
    assert capfd.readouterr() == ("", "")


# --- resume


def test_a_resumed_run_goes_on_where_it_was():
    run_folder = run(*SHORT, "512")
    assert ppo.load_checkpoint(run_folder)["global_step"] == 512
    code = "print('the code that trained the first half')"
    (run_folder / "ppo.py").write_text(code)
    ppo.main(["--resume", str(run_folder), "--total-timesteps", "1024", "--n-eval-episodes", "3"])
    assert list(Path("runs").iterdir()) == [run_folder]
    assert (run_folder / "ppo.py").read_text() == (run_folder / "hub" / "ppo.py").read_text() == code
    assert package(run_folder, "results")["n_eval_episodes"] == 3

    resumed = ppo.load_checkpoint(run_folder)
    assert resumed["global_step"] == package(run_folder, "results")["global_step"] == 1024
    assert resumed["args"]["total_timesteps"] == 1024
    updates = 8 * 4 * 4  # 8 iterations of 128 steps, 4 epochs, 4 minibatches
    assert resumed["optimizer"]["state"][0]["step"].item() == updates
    assert len(list((run_folder / "hub" / "logs").iterdir())) == 2
    curve = scalars(run_folder / "hub" / "logs", "charts/learning_rate")
    assert [step for step, _ in curve] == [128 * i for i in range(1, 9)]
    # The second half anneals as a run of 1024 steps does; the first half was annealed for 512.
    assert [value for _, value in curve[4:]] == pytest.approx([2.5e-4 * (1 - i / 8) for i in range(4, 8)])


def test_an_interrupted_run_resumes_into_the_steps_and_curves_of_an_undisturbed_one(monkeypatch, capsys):
    monkeypatch.setattr(ppo, "CHECKPOINT_SECONDS", 0)
    add_scalar = ppo.SummaryWriter.add_scalar

    def stop_at_384(writer, tag, value, step):
        add_scalar(writer, tag, value, step)
        if (tag, step) == ("charts/SPS", 384):
            raise KeyboardInterrupt  # after the events of step 384, before its checkpoint

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ppo.SummaryWriter, "add_scalar", stop_at_384)
        ppo.main([*SHORT, "1024"])
    assert stop.value.code == 130
    (run_folder,) = Path("runs").iterdir()
    assert f"--resume {run_folder}" in capsys.readouterr().err
    assert ppo.load_checkpoint(run_folder)["global_step"] == 256
    assert [path.name for path in (run_folder / "hub").iterdir()] == ["logs"]  # no package yet

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    ppo.main(["--resume", str(run_folder)])
    assert ppo.load_checkpoint(run_folder)["global_step"] == 1024
    assert scalars(run_folder / "hub" / "logs", "charts/learning_rate") == [
        (128 * i, pytest.approx(2.5e-4 * (1 - (i - 1) / 8))) for i in range(1, 9)
    ]
    assert (run_folder / "hub" / "replay.mp4").is_file()


def test_a_finished_run_is_not_resumed_with_fewer_steps_and_one_says_that_nothing_is_left(capsys):
    run_folder = run(*SHORT, "512")
    before, trained = package(run_folder, "results"), weights(run_folder)
    with pytest.raises(SystemExit):
        ppo.main(["--resume", str(run_folder), "--total-timesteps", "256"])
    assert "--total-timesteps" in capsys.readouterr().err
    assert package(run_folder, "results") == before

    ppo.main(["--resume", str(run_folder)])
    assert " 0 to go" in capsys.readouterr().out
    assert package(run_folder, "results")["global_step"] == 512
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(run_folder).items())


# --- mistakes in the call: one line, an exit code that is not 0, no run folder


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Pendulum-v1", "discrete actions"),
        ("--env-id FrozenLake-v1", "vector observations"),
        ("--env-id no_such_module:Thing-v0", "no_such_module"),
        ("--num-minibatches 3", "--num-minibatches"),
        ("--num-minibatches 1024", "--num-minibatches"),  # a minibatch of one step has no standard deviation
        ("--total-timesteps 100", "--total-timesteps"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--gamma 1.5", "--gamma"),
        ("--learning-rate nan", "--learning-rate"),
        ("--learning-rate fast", "--learning-rate"),
        ("--norm-adv perhaps", "perhaps"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--no-such-flag", "--no-such-flag"),
        ("--env-id", "--env-id"),
        ("--track", "wandb"),
        ("--render", "--evaluate"),
        ("--resume nowhere", "checkpoint.pt"),
    ],
)
def test_a_mistake_in_the_call_is_one_line(argv, says, capfd, monkeypatch):
    monkeypatch.setattr(ppo, "train", None)
    assert says in one_line(argv.split(), capfd)
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written_is_one_line_before_training(capfd, monkeypatch):
    monkeypatch.setattr(ppo, "train", None)
    Path("runs").write_text("a file in the way: root, too, can make no folder in it")
    assert "runs" in one_line(ONE_UPDATE, capfd)


def one_line(argv, capfd):
    """What main says on stderr to a mistake, which is all that it says."""
    with pytest.raises(SystemExit) as stop:
        ppo.main(argv)
    out, err = capfd.readouterr()
    assert stop.value.code in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    return err
