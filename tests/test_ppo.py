"""ppo.py: its math against the definitions, one-update runs through main, what a mistake in the call looks like."""

import json
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

SCRIPT = Path(ppo.__file__)
ONE_UPDATE = ["--tuned", "False", "--total-timesteps", "512", "--n-eval-episodes", "2"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folders():
    return sorted(Path("runs").glob("*"))


def weights(run_folder):
    return torch.load(run_folder / "hub" / "model.pt", weights_only=True)


def scalars(folder, tag):
    """The (step, value) pairs of one TensorBoard curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def count_frames(video):
    return sum(1 for _ in imageio.get_reader(video))


# --- the return math, against the definitions as explicit double sums


def random_rollout(rng, steps=17, envs=3):
    rewards, values = rng.normal(size=(2, steps, envs))
    dones = (rng.random((steps, envs)) < 0.2).astype(np.float64)
    return rewards, values, dones, rng.normal(size=envs)


def value_after(values, dones, last_value, t, n):
    """V(s_{t+1}) as seen from step t: 0 if the episode ended there, and last_value behind the rollout's last row."""
    if dones[t, n]:
        return 0.0
    return values[t + 1, n] if t + 1 < len(values) else last_value[n]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, gae_lambda):
    rewards, values, dones, last_value = random_rollout(np.random.default_rng(0))
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


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_are_the_discounted_sum_of_rewards(gamma):
    rewards, _, dones, last_value = random_rollout(np.random.default_rng(1))
    returns = ppo.compute_returns(rewards, dones, last_value, gamma)
    for n in range(rewards.shape[1]):
        for t in range(len(rewards)):
            expected = 0.0
            for k in range(t, len(rewards)):
                expected += gamma ** (k - t) * rewards[k, n]
                if dones[k, n]:
                    break
            else:
                expected += gamma ** (len(rewards) - t) * last_value[n]
            assert returns[t, n] == pytest.approx(expected, abs=1e-12)


def test_gae_with_lambda_1_is_returns_minus_values():
    rewards, values, dones, last_value = random_rollout(np.random.default_rng(2))
    advantages, returns = ppo.compute_gae(rewards, values, dones, last_value, 0.97, 1.0)
    monte_carlo = ppo.compute_returns(rewards, dones, last_value, 0.97)
    np.testing.assert_allclose(returns, monte_carlo, atol=1e-12)
    np.testing.assert_allclose(advantages, monte_carlo - values, atol=1e-12)


def test_standardise_gives_each_minibatch_mean_0_and_deviation_1():
    advantages = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])
    expected = [[-1, 0, 1], [-10 / 300**0.5, -10 / 300**0.5, 20 / 300**0.5]]
    torch.testing.assert_close(ppo.standardise(advantages), torch.tensor(expected))
    assert torch.equal(ppo.standardise(torch.full((1, 4), 7.0)), torch.zeros(1, 4))


# --- the loss


def test_at_ratio_1_the_objective_has_the_policy_gradient():
    advantages = torch.tensor([1.5, -2.0, 0.0, 3.0])
    log_probs = torch.tensor([-0.1, -1.0, -2.0, -0.5], requires_grad=True)
    objective = ppo.clipped_surrogate(log_probs, log_probs.detach(), advantages, 0.2)
    objective.backward()
    assert objective.item() == pytest.approx(advantages.mean().item())
    torch.testing.assert_close(log_probs.grad, advantages / 4)  # d/dtheta of mean(log pi * A)


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [
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


def test_value_loss_takes_the_worse_of_the_plain_and_the_clipped_error():
    values, old_values, returns = torch.tensor([[1.0, 0.1, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert ppo.value_loss(values, old_values, returns).item() == pytest.approx(0.5 * (0 + 0.81 + 4) / 3)
    clipped = ppo.value_loss(values, old_values, returns, clip_coef=0.2).item()
    assert clipped == pytest.approx(0.5 * (0.64 + 0.81 + 4) / 3)


def test_value_loss_has_the_gradient_of_the_worse_error():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    ppo.value_loss(values, old_values, returns, clip_coef=0.2).backward()
    for value, old_value, ret, grad in zip(*map(torch.Tensor.tolist, (values, old_values, returns, values.grad))):
        clipped = min(max(value, old_value - 0.2), old_value + 0.2)
        expected = value - ret if (value - ret) ** 2 >= (clipped - ret) ** 2 else 0.0  # a clipped value does not move
        assert grad == pytest.approx(expected / 1000)


def test_policy_change_estimates_the_kl_divergence():
    old, new = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.25, 0.45, 0.3]).log()
    actions = torch.multinomial(old.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    approx_kl, old_approx_kl, clipfrac = ppo.policy_change(new[actions], old[actions], clip_coef=0.2)
    kl = (old.exp() * (old - new)).sum().item()
    assert approx_kl.item() == pytest.approx(kl, rel=0.02)
    assert old_approx_kl.item() == pytest.approx(kl, rel=0.2)
    assert clipfrac.item() == pytest.approx(0.2, abs=0.005)  # only the first action's ratio, 1.25, is outside


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


def test_acting_refuses_a_network_that_it_would_compute_wrongly():
    with pytest.raises(TypeError, match="ReLU"):
        ppo.numpy_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))


def test_log_probabilities_and_entropy_are_those_of_a_categorical_distribution():
    torch.manual_seed(0)
    agent = ppo.Agent(4, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)
    observations, actions = torch.randn(32, 4), torch.randint(3, (32,))
    log_probs, entropy = ppo.evaluate_actions(agent.actor, observations, actions)
    distribution = torch.distributions.Categorical(logits=agent.actor(observations))
    torch.testing.assert_close(log_probs, distribution.log_prob(actions))
    torch.testing.assert_close(entropy, distribution.entropy().mean())


def test_flat_parameters_train_as_separate_ones_do():
    torch.manual_seed(0)
    separate, flat = ppo.Agent(4, 2), ppo.Agent(4, 2)
    flat.load_state_dict(separate.state_dict())
    vector = ppo.flatten_parameters(flat)
    optimizers = torch.optim.Adam(separate.parameters(), lr=0.01), torch.optim.Adam([vector], lr=0.01)
    observations = torch.randn(64, 4)
    for _ in range(5):
        for agent, optimizer in zip((separate, flat), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            (agent.actor(observations).square().sum() + agent.critic(observations).square().sum()).backward()
            if agent is flat:
                vector.grad[None].renorm_(2, 0, 0.5)
            else:
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    for name, tensor in separate.state_dict().items():
        torch.testing.assert_close(flat.state_dict()[name], tensor)


# --- episode boundaries: an environment whose observations tell where they come from


class Counting(gym.Env):
    """Observation: (episode, step in it). The episode terminates, or is truncated, after its third step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, ends_by, render_mode=None):
        self.ends_by, self.episode = ends_by, -1

    def reset(self, seed=None, options=None):
        self.episode, self.step_in_episode = self.episode + 1, 0
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
    flags = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--total-timesteps", "16"]
    ppo.train(ppo.parse_args(["--tuned", "False", "--gamma", "0.5", *flags]), tmp_path)

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


def test_truncation_and_termination_of_the_same_episode_by_hand():
    # Rewards 1, 1; values 10, 20; the last observation is worth 30; gamma 0.5, lambda 0.5.
    rewards, values, dones = np.array([[1.0], [1.0]]), np.array([[10.0], [20.0]]), np.array([[0.0], [1.0]])
    terminated, _ = ppo.compute_gae(rewards, values, dones, np.array([99.0]), 0.5, 0.5)
    bootstrap = np.array([[0.0], [0.5 * 30.0]])
    truncated, _ = ppo.compute_gae(rewards + bootstrap, values, dones, np.array([99.0]), 0.5, 0.5)
    # delta_1 = 1 - 20 = -19, or 1 + 15 - 20 = -4; delta_0 = 1 + 10 - 10 = 1; A_0 = delta_0 + delta_1 / 4
    assert terminated.ravel().tolist() == [1 - 19 / 4, -19]
    assert truncated.ravel().tolist() == [1 - 4 / 4, -4]


# --- one-update runs through main


def test_one_update_changes_the_parameters_and_leaves_a_complete_run_folder():
    agent = ppo.main(ONE_UPDATE)
    (run_folder,) = run_folders()
    assert run_folder.name.startswith("CartPole-v1__ppo__1__")
    hub = {str(path.relative_to(run_folder / "hub")) for path in (run_folder / "hub").rglob("*") if path.is_file()}
    (events,) = (path.name for path in run_folder.glob("events.out.tfevents*"))
    files = {"README.md", "results.json", "hyperparameters.json", "model.pt", "replay.mp4", "ppo.py"}
    assert hub == {*files, f"logs/{events}"}
    assert (run_folder / "hub" / "ppo.py").read_bytes() == SCRIPT.read_bytes()

    torch.manual_seed(1)
    start = ppo.Agent(4, 2).state_dict()
    for name, tensor in weights(run_folder).items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, agent.state_dict()[name])
        assert not torch.equal(tensor, start[name])

    for name in ("value_loss", "policy_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac"):
        ((step, value),) = scalars(run_folder, f"losses/{name}")
        assert step == 512
        assert np.isfinite(value)
    for name in ("episodic_return", "episodic_length", "learning_rate", "SPS"):
        assert scalars(run_folder, f"charts/{name}")

    results = json.loads((run_folder / "hub" / "results.json").read_text())
    assert results["n_eval_episodes"] == 2
    assert results["env_id"] == "CartPole-v1"


def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not():
    for seed in ("1", "1", "2"):
        ppo.main([*ONE_UPDATE, "--seed", seed])
    first, again, other = map(weights, sorted(run_folders(), key=lambda folder: folder.name.split("__")[2:]))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_every_algorithm_flag_trains():
    flags = "--gae False --norm-adv False --clip-vloss False --anneal-lr False --target-kl 0.01 --capture-video"
    ppo.main([*ONE_UPDATE, "--deterministic-eval", "False", *flags.split()])
    (run_folder,) = run_folders()
    (video,) = (run_folder / "videos").glob("*.mp4")
    assert count_frames(video) > 5
    assert scalars(run_folder, "charts/learning_rate") == [(512, pytest.approx(2.5e-4))]
    assert "sampled actions" in (run_folder / "hub" / "README.md").read_text()


def test_target_kl_ends_the_epochs_of_a_rollout(monkeypatch):
    calls = []
    clipped_surrogate = ppo.clipped_surrogate
    monkeypatch.setattr(ppo, "clipped_surrogate", lambda *args: calls.append(1) or clipped_surrogate(*args))
    ppo.main(ONE_UPDATE)
    assert len(calls) == 4 * 4
    calls.clear()
    ppo.main([*ONE_UPDATE, "--learning-rate", "0.1", "--target-kl", "0.001"])
    assert len(calls) == 4


# --- the tuned table


def test_flags_win_over_the_tuned_row_and_the_row_over_the_defaults():
    row = ppo.TUNED["LunarLander-v2"]
    assert ppo.parse_args(["--env-id", "LunarLander-v2"]).num_envs == row["num_envs"] != 4
    assert ppo.parse_args(["--env-id", "LunarLander-v2", "--num-envs", "8"]).num_envs == 8
    assert ppo.parse_args(["--env-id", "LunarLander-v2", "--tuned", "False"]).num_envs == 4


def test_the_plain_defaults_are_the_course_s():
    args = vars(ppo.parse_args(["--tuned", "False"]))
    expected = dict(
        seed=1, torch_deterministic=True, cuda=True, track=False, capture_video=False, env_id="CartPole-v1",
        total_timesteps=50_000, learning_rate=2.5e-4, num_envs=4, num_steps=128, anneal_lr=True, gae=True, gamma=0.99,
        gae_lambda=0.95, num_minibatches=4, update_epochs=4, norm_adv=True, clip_coef=0.2, clip_vloss=True,
        ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, target_kl=None, repo_id=None,
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("argv", "value"), [(["--gae"], True), (["--gae", "True"], True), (["--gae", "False"], False)])
def test_booleans_take_a_bare_flag_or_a_word(argv, value):
    assert ppo.parse_args(argv).gae is value


# --- retired environments


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


def test_the_card_of_lunar_lander_v2_calls_it_so():
    ppo.main([*ONE_UPDATE, "--env-id", "LunarLander-v2"])
    (run_folder,) = run_folders()
    card = (run_folder / "hub" / "README.md").read_text()
    assert "- LunarLander-v2\n" in card
    assert "LunarLander-v3" not in card


# --- the replay


def test_the_replay_is_one_whole_episode_that_a_browser_plays():
    ppo.main([*ONE_UPDATE, "--env-id", "CartPole-v1"])
    (run_folder,) = run_folders()
    args = ppo.parse_args(["--evaluate", str(run_folder)])
    agent, env = ppo.load_agent(run_folder)
    policy = ppo.make_policy(agent)
    length, (observation, _), done = 0, env.reset(seed=args.seed + ppo.EVAL_SEED), False
    while not done:
        observation, _, terminated, truncated, _ = env.step(policy(observation))
        length, done = length + 1, terminated or truncated

    replay = run_folder / "hub" / "replay.mp4"
    meta = imageio.get_reader(replay).get_meta_data()
    assert (meta["codec"], meta["pix_fmt"].split("(")[0], meta["fps"]) == ("h264", "yuv420p", 50)
    assert meta["size"] == (600, 400)
    assert count_frames(replay) == length + 1


def test_odd_frames_lose_a_row_rather_than_their_sharpness(tmp_path, capfd):
    class Odd(Counting):
        metadata = {"render_fps": 7}  # noqa: RUF012

        def render(self):
            frame = np.zeros((101, 51, 3), dtype=np.uint8)
            frame[:, ::2] = 255
            return frame

    ppo.record_video(Odd("termination"), lambda observation: 0, tmp_path / "odd.mp4")
    meta = imageio.get_reader(tmp_path / "odd.mp4").get_meta_data()
    assert (meta["size"], meta["fps"]) == ((50, 100), 7)
    assert capfd.readouterr() == ("", "")


# --- evaluation


def test_evaluation_plays_each_seed_once_in_order_and_sums_rewards():
    seeds_seen = []

    class Seeded(Counting):
        def reset(self, seed=None, options=None):
            seeds_seen.append(seed)
            return super().reset()

    mean, std = ppo.evaluate_agent(Seeded("termination"), lambda observation: 1, 3, seeds=[7, 5, 6])
    assert (mean, std) == (3.0, 0.0)
    assert seeds_seen == [7, 5, 6]


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
    ppo.main(ONE_UPDATE)
    assert len(trained) == 4 and len(resets) >= 2  # one per environment; one per episode, and the film's
    for ours, theirs in zip(zip(*trained), zip(*resets)):
        assert not set(ours) & set(theirs)


@pytest.mark.parametrize("deterministic", ["True", "False"])
def test_evaluate_gives_the_score_of_the_package_to_the_last_digit(deterministic):
    ppo.main([*ONE_UPDATE, "--deterministic-eval", deterministic])
    (run_folder,) = run_folders()
    results = json.loads((run_folder / "hub" / "results.json").read_text())
    for source in (run_folder, run_folder / "hub"):
        assert ppo.main(["--evaluate", str(source)]) == (results["mean_reward"], results["std_reward"])


def test_evaluate_random_scores_and_films_the_random_agent():
    mean, _ = ppo.main(["--evaluate", "random", "--n-eval-episodes", "20"])
    assert 10 < mean < 40
    assert (run_folders()[0] / "replay.mp4").stat().st_size > 1000


# --- resume


def test_a_resumed_run_goes_on_where_it_was():
    flags = ["--tuned", "False", "--n-eval-episodes", "1", "--num-envs", "4", "--num-steps", "32"]
    ppo.main([*flags, "--total-timesteps", "512"])
    (run_folder,) = run_folders()
    checkpoint = ppo.load_checkpoint(run_folder)
    assert checkpoint["global_step"] == 512
    ppo.main(["--resume", str(run_folder), "--total-timesteps", "1024"])
    assert run_folders() == [run_folder]

    resumed = ppo.load_checkpoint(run_folder)
    assert resumed["global_step"] == 1024
    assert resumed["args"]["total_timesteps"] == 1024
    updates = 8 * 4 * 4  # 8 iterations of 128 steps, 4 epochs, 4 minibatches
    assert resumed["optimizer"]["state"][0]["step"].item() == updates
    curve = scalars(run_folder, "charts/learning_rate")
    assert [step for step, _ in curve] == [128 * i for i in range(1, 9)]
    # The second half anneals as a run of 1024 steps does; the first half was annealed for 512.
    assert [value for _, value in curve[4:]] == pytest.approx([2.5e-4 * (1 - i / 8) for i in range(4, 8)])
    assert len(list((run_folder / "hub" / "logs").iterdir())) == 2


def test_an_interrupted_run_resumes_into_the_steps_and_curves_of_an_undisturbed_one(monkeypatch):
    flags = ["--tuned", "False", "--n-eval-episodes", "1", "--num-envs", "4", "--num-steps", "32"]
    monkeypatch.setattr(ppo, "CHECKPOINT_SECONDS", 0)

    class StopAt(ppo.Progress):
        def update(self, now, recent_returns):
            super().update(now, recent_returns)
            if now == 384:
                raise KeyboardInterrupt  # after the events of step 384, before its checkpoint

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ppo, "Progress", StopAt)
        ppo.main([*flags, "--total-timesteps", "1024"])
    assert stop.value.code == 130
    (run_folder,) = run_folders()
    assert ppo.load_checkpoint(run_folder)["global_step"] == 256
    assert not (run_folder / "hub").exists()

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    ppo.main(["--resume", str(run_folder)])
    assert ppo.load_checkpoint(run_folder)["global_step"] == 1024
    assert scalars(run_folder, "charts/learning_rate") == [
        (128 * i, pytest.approx(2.5e-4 * (1 - (i - 1) / 8))) for i in range(1, 9)
    ]
    assert (run_folder / "hub" / "replay.mp4").is_file()


# --- mistakes in the call: one line, exit code 2, no run folder


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Pendulum-v1", "discrete actions"),
        ("--env-id FrozenLake-v1", "vector observations"),
        ("--env-id no_such_module:Thing-v0", "no_such_module"),
        ("--num-minibatches 3 --tuned False", "does not divide"),
        ("--total-timesteps 100", "less than one batch"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--num-minibatches 512 --tuned False", "standardised"),
        ("--gamma 1.5", "between 0 and 1"),
        ("--learning-rate nan", "--learning-rate"),
        ("--learning-rate fast", "invalid float value"),
        ("--gae perhaps", "neither True nor False"),
        ("--seed -1", "--seed"),
        ("--no-such-flag", "--no-such-flag"),
        ("--env-id", "expected one argument"),
        ("--repo-id justaname", "user/name"),
        ("--repo-id a//b", "repo id"),
        ("--track", "pip install wandb"),
        ("--render", "--evaluate"),
        ("--evaluate random --render", "display"),
        ("--evaluate nowhere", "neither a folder here nor a repo id"),
        ("--resume nowhere", "checkpoint.pt"),
        ("--push nowhere --repo-id user/name", "no such folder"),
        ("--push nowhere", "--repo-id"),
        ("--push a --evaluate b/c --repo-id user/name", "one of them"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(argv, says, capfd, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stop:
        ppo.main(argv.split())
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert not Path("runs").exists()
