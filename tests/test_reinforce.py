"""reinforce.py: its math against the definitions, Pixelcopter against recordings of the original, a whole training."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Counting, run
from gymnasium.utils.env_checker import check_env

import reinforce

RECORDED = np.load(Path(__file__).parent / "data" / "pixelcopter_ple.npz")


def returns_by_definition(rewards, gamma):
    """G_t as an explicit double sum."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


# --- the math


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_are_the_discounted_sum_of_the_rewards_that_follow(gamma):
    for length in (1, 2, 17):
        rewards = np.random.default_rng(length).normal(size=length).tolist()
        returns = reinforce.discounted_returns(rewards, gamma)
        np.testing.assert_allclose(returns, returns_by_definition(rewards, gamma), atol=1e-12)


def test_returns_are_standardised_as_the_course_does_and_equal_ones_to_zeros():
    returns = np.random.default_rng(0).normal(3.0, 5.0, size=50)
    course = torch.from_numpy(returns)
    course = (course - course.mean()) / (course.std() + np.finfo(np.float32).eps)
    np.testing.assert_allclose(reinforce.standardise_returns(returns), course, atol=1e-12)
    for equal in ([7.0], [0.0], [2.5, 2.5], [0.0] * 9):
        assert reinforce.standardise_returns(np.array(equal)).tolist() == [0.0] * len(equal)


def test_merged_moments_are_those_of_all_observations_together():
    rng = np.random.default_rng(0)
    observations = (100.0 + rng.normal(size=(60, 3)) * [0.1, 1.0, 10.0]).astype(np.float32)
    mean, std, seen = torch.zeros(3), torch.ones(3), 0
    for batch in np.split(observations, [1, 9, 30]):
        mean, std = reinforce.merge_moments(mean, std, seen, torch.from_numpy(batch))
        seen += len(batch)
    np.testing.assert_allclose(mean, observations.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, observations.std(axis=0), rtol=1e-3)


# Two states in a row and two actions, of which the second one ends the episode in the first state already: (states,
# actions, rewards) of each episode that there is.
CORRIDOR = [((0,), (1,), (-2.0,)), ((0, 1), (0, 0), (1.0, 0.5)), ((0, 1), (0, 1), (1.0, 3.0))]


def test_on_average_the_update_is_the_gradient_of_the_expected_return():
    torch.manual_seed(0)
    policy = torch.nn.Linear(2, 2).double()
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().numpy()
    agent, optimizer = SimpleNamespace(actor=policy, mean=0.0, std=1.0), torch.optim.SGD(policy.parameters(), lr=1.0)

    def probability(vector, states, actions):
        weight, bias = vector[:4].reshape(2, 2), vector[4:]
        logits = np.eye(2)[list(states)] @ weight.T + bias
        chosen = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return np.prod(chosen[range(len(actions)), list(actions)])

    def expected_return(vector):
        return sum(probability(vector, states, actions) * sum(rewards) for states, actions, rewards in CORRIDOR)

    average = 0.0
    for states, actions, rewards in CORRIDOR:
        torch.nn.utils.vector_to_parameters(torch.tensor(start), policy.parameters())
        returns = torch.from_numpy(reinforce.discounted_returns(rewards, 1.0))
        observations = torch.from_numpy(np.eye(2)[list(states)])
        reinforce.update(agent, optimizer, observations, torch.tensor(actions), returns, 1)
        step = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().numpy() - start
        average += probability(start, states, actions) * step
    moves = np.eye(len(start)) * 1e-6
    expected = [(expected_return(start + move) - expected_return(start - move)) / 2e-6 for move in moves]
    np.testing.assert_allclose(average, expected, atol=1e-8)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_training_takes_the_gradient_step_for_the_returns_of_what_it_played(num_envs, monkeypatch, tmp_path):
    played, play_episodes = [], reinforce.play_episodes
    monkeypatch.setattr(reinforce, "play_episodes", lambda *args: played.extend(play_episodes(*args)) or played)
    # Plain gradient steps of size 1, so that the change of the parameters is the gradient.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr=lr))
    flags = f"--no-anneal-lr --lr 1 --gamma 0.9 --num-envs {num_envs} --n-training-episodes {num_envs}"
    args = reinforce.parse_args(flags.split())
    torch.manual_seed(args.seed)
    start = reinforce.Agent(4, 2)
    agent, _ = reinforce.train(args, tmp_path)
    observations, actions, rewards = played
    returns = torch.tensor([g for episode in rewards for g in returns_by_definition(episode, 0.9)])
    distribution = torch.distributions.Categorical(logits=start.actor(torch.from_numpy(observations)))
    log_probs = distribution.log_prob(torch.from_numpy(actions))
    (log_probs * (returns - returns.mean()) / returns.std()).sum().div(num_envs).backward()
    for before, after in zip(start.parameters(), agent.parameters(), strict=True):
        torch.testing.assert_close(after - before, before.grad, rtol=1e-3, atol=1e-4)


# --- the environments


def test_a_batch_holds_each_episode_whole_in_the_order_of_time():
    envs = [Counting(length, first_episode=name) for name, length in enumerate((3, 1, 99, 2))]
    layers = reinforce.policy_layers(reinforce.Agent(2, 2, [4]))
    observations, actions, rewards = reinforce.play_episodes(envs, layers, np.random.default_rng(0), max_t=5)
    expected = [(0, t) for t in range(3)] + [(1, 0)] + [(2, t) for t in range(5)] + [(3, 0), (3, 1)]
    assert [tuple(row) for row in observations.tolist()] == expected
    assert rewards == [[1, 2, 3], [1], [1, 2, 3, 4, 5], [1, 2]]
    assert (observations.dtype, actions.dtype, len(actions)) == (np.float32, np.int64, len(expected))


class Recorded:
    """A RandomState with the names that a gymnasium environment's generator has."""

    def __init__(self, seed):
        state = np.random.RandomState(seed)
        self.integers, self.uniform = state.randint, state.uniform


@pytest.mark.parametrize("seed", [0, 1, 4, 5, 6, 7])
def test_pixelcopter_plays_the_recorded_runs_of_the_original(seed):
    env = gym.make("Pixelcopter-PLE-v0").unwrapped
    env.np_random = Recorded(seed)
    observations, rewards, dones = [env.reset()[0]], [], []
    for action in RECORDED[f"act_{seed}"]:
        observation, reward, terminated, truncated, _ = env.step(action)
        assert not truncated
        rewards.append(reward)
        dones.append(terminated)
        observations.append(env.reset()[0] if terminated else observation)
    assert rewards == RECORDED[f"rew_{seed}"].tolist()
    assert dones == RECORDED[f"done_{seed}"].tolist()
    # Half a unit in the last place of a float32 between 32 and 64 is 2e-6.
    np.testing.assert_allclose(observations, RECORDED[f"obs_{seed}"], rtol=6e-8, atol=2e-7)


def test_pixelcopter_passes_gymnasium_s_checks_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("Pixelcopter-PLE-v0", render_mode="rgb_array").unwrapped)


def test_pixelcopter_s_observations_stay_in_their_space():
    env, rng = gym.make("Pixelcopter-PLE-v0").unwrapped, np.random.default_rng(0)
    for episode in range(200):
        (observation, _), probability_up, done = env.reset(seed=episode), rng.random(), False
        while not done:
            assert env.observation_space.contains(observation)
            observation, _, done, _, _ = env.step(int(rng.random() > probability_up))
        assert env.observation_space.contains(observation)


def test_pixelcopter_has_no_time_limit_but_evaluation_has_one_of_10000_frames():
    assert gym.make("Pixelcopter-PLE-v0").spec.max_episode_steps is None
    env = reinforce.make_env("Pixelcopter-PLE-v0")
    env.reset(seed=0)
    env.unwrapped.step = lambda action: (np.zeros(7, dtype=np.float32), 0.0, False, False, {})
    assert [env.step(1)[3] for _ in range(10_000)] == [False] * 9_999 + [True]


def test_a_frame_shows_the_copter_the_cave_and_the_block():
    env = gym.make("Pixelcopter-PLE-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=3)
    env.blocks, env.piece_y = [[32.0, 24]], [24] * 48
    expected = np.zeros((48, 48, 3), dtype=np.uint8)
    expected[:12] = expected[38:] = expected[20:29, 30:34] = [120, 240, 80]
    expected[23:25, 15:17] = 255
    frame = env.render()
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, expected.repeat(10, axis=0).repeat(10, axis=1))


# --- training


def test_environment_i_starts_at_seed_plus_i_and_then_goes_on(monkeypatch, tmp_path):
    envs = []
    monkeypatch.setattr(reinforce, "make_env", lambda env_id: envs.append(Counting(2)) or envs[-1])
    reinforce.train(reinforce.parse_args(["--seed", "5", "--num-envs", "3", "--n-training-episodes", "6"]), tmp_path)
    assert [env.seeds for env in envs] == [[5, None, None], [6, None, None], [7, None, None]]


def test_cartpole_is_learned_in_seconds(tmp_path):
    agent, _ = reinforce.train(reinforce.parse_args([]), tmp_path)
    mean, std = reinforce.evaluate_agent(reinforce.make_env("CartPole-v1"), reinforce.make_policy(agent), range(20))
    assert mean - std >= 350


def test_a_package_whose_sizes_are_not_the_model_s_is_refused_with_a_line():
    run_folder = run(reinforce, "--n-training-episodes 8 --n-eval-episodes 1 --h-size 4")
    for config in ({}, {"h_size": 16}, {"h_size": [16, 0]}, {"h_size": [8]}):
        (run_folder / "hub" / "config.json").write_text(json.dumps(config))
        with pytest.raises(OSError, match="the model does not fit"):
            reinforce.load_agent(run_folder)
