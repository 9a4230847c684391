"""dqn.py: its math against the definitions, what the replay buffer holds, when the target network moves."""

import copy
from itertools import groupby

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Counting, run

import dqn
import q_learning


def test_epsilon_falls_linearly_and_stays():
    schedule = [dqn.linear_schedule(1.0, 0.1, 4, step) for step in range(7)]
    assert schedule == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1])
    assert dqn.linear_schedule(1.0, 0.1, 0, 0) == 0.1


def test_targets_are_those_of_tabular_q_learning():
    rng = np.random.default_rng(0)
    rewards, terminated = rng.normal(size=50), (rng.random(50) < 0.3).astype(float)
    qtable = rng.normal(size=(50, 3))
    expected = []
    for i in range(50):
        table = [[0.0], qtable[i].tolist()]  # with a learning rate of 1, the new value is the target
        q_learning.q_learning_update(table, 0, 0, rewards[i], 1, terminated[i], learning_rate=1, gamma=0.9)
        expected.append(table[0][0])
    np.testing.assert_allclose(dqn.td_targets(rewards, qtable.max(axis=1), terminated, 0.9), expected)


@pytest.mark.parametrize("double_q", [True, False])
def test_update_is_a_step_of_adam_towards_the_target_of_the_paper(double_q):
    torch.manual_seed(0)
    agent, target = dqn.Agent(4, 3, [8]), dqn.Agent(4, 3, [8])
    reference = copy.deepcopy(agent)
    parameters = dqn.flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], lr=0.01)
    its_optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    args = dqn.parse_args(["--gamma", "0.9", "--double-q" if double_q else "--no-double-q"])
    differ = 0
    for _ in range(5):
        observations, next_observations = torch.randn(2, 64, 4)
        actions, rewards, ends = torch.randint(3, (64, 1)), torch.randn(64, 1), torch.rand(64, 1) < 0.3
        minibatch = observations, next_observations, actions.float(), rewards, ends.float()
        dqn.update(agent, target, parameters, optimizer, minibatch, args)

        loss = 0.0
        for i in range(64):
            rated, chosen = target(next_observations[i]).detach(), reference(next_observations[i])
            differ += int(rated.argmax() != chosen.argmax())
            following = rated[chosen.argmax()] if double_q else rated.max()
            goal = rewards[i, 0] + (0.0 if ends[i, 0] else 0.9 * following)
            error = (reference(observations[i])[actions[i, 0]] - goal).abs()
            loss = loss + (0.5 * error**2 if error < 1 else error - 0.5) / 64
        its_optimizer.zero_grad()
        loss.backward()
        its_optimizer.step()
    assert differ > 50  # the choice matters
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], tensor)


def test_numpy_acting_is_the_network():
    torch.manual_seed(0)
    agent = dqn.Agent(5, 3, [32, 16])
    torch.nn.init.orthogonal_(agent.q_network[-1].weight)  # values that differ
    observations = np.random.default_rng(0).normal(scale=4, size=(64, 5)).astype(np.float32)
    best = agent(torch.from_numpy(observations)).argmax(dim=1).tolist()
    assert dqn.act(dqn.numpy_layers(agent.q_network), observations).tolist() == best and len({*best}) == 3
    assert [dqn.make_policy(agent)(observation) for observation in observations] == best


def buffer_of(flags, tmp_path):
    """The rows of the replay buffer after a short training, as dicts."""
    dqn.train(dqn.parse_args(flags.split()), tmp_path)
    names = ("episode", "step", "next_episode", "next_step", "action", "reward", "terminated")
    return [dict(zip(names, row)) for row in dqn.load_checkpoint(tmp_path)["buffer"].tolist()]


@pytest.mark.parametrize("cut_off", [False, True])
def test_no_transition_crosses_an_episode_and_only_termination_ends_one(cut_off, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn, "make_env", lambda env_id, render_mode=None: Counting(3, cut_off))
    flags = "--num-envs 2 --train-frequency 4 --total-timesteps 20 --learning-starts 12 --reward-scale 1"
    rows = buffer_of(f"{flags} --start-e 0.5", tmp_path)
    assert [row["step"] for row in rows] == [step for t in range(10) for step in [t % 3] * 2]
    for row in rows:
        assert (row["next_episode"], row["next_step"]) == (row["episode"], row["step"] + 1)
        assert row["reward"] == row["next_step"]
        assert row["terminated"] == (row["next_step"] == 3 and not cut_off)
    assert {row["action"] for row in rows} == {0, 1}


def test_the_buffer_is_filled_round(monkeypatch, tmp_path):
    monkeypatch.setattr(dqn, "make_env", lambda env_id, render_mode=None: Counting(100))
    flags = "--num-envs 1 --train-frequency 4 --gradient-steps 1 --buffer-size 8"
    flags += " --total-timesteps 20 --learning-starts 19"
    assert [row["step"] for row in buffer_of(flags, tmp_path)] == [16, 17, 18, 19, 12, 13, 14, 15]


def test_a_random_action_is_kept_for_a_while_and_epsilon_stays_the_share_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(dqn, "make_env", lambda env_id, render_mode=None: Counting(10**6))
    monkeypatch.setattr(dqn, "act", lambda layers, observations: np.full(len(observations), 999))
    monkeypatch.setattr(Counting, "action_space", gym.spaces.Discrete(1000))
    flags = "--num-envs 2 --train-frequency 40000 --gradient-steps 1 --buffer-size 40000 --start-e 0.3 --end-e 0.3"
    flags += " --total-timesteps 40000 --learning-starts 39999 --explore-duration"
    for duration in (1, 8):
        actions = [row["action"] for row in buffer_of(f"{flags} {duration}", tmp_path)]
        chance = np.array(actions).reshape(-1, 2).T
        assert (chance < 999).mean() == pytest.approx(0.3, abs=0.03)
        kept = [len([*group]) for row in chance for action, group in groupby(row) if action < 999]
        assert np.mean(kept) == pytest.approx(duration, rel=0.1)
    all_by_chance = flags.replace("0.3", "1").replace("40000", "400").replace("39999", "399")
    actions = [row["action"] for row in buffer_of(f"{all_by_chance} 200", tmp_path)]
    assert np.mean(np.array(actions) == 999) < 0.02  # from the first step on


def test_the_target_network_follows_every_so_many_steps(monkeypatch):
    lags, update = [], dqn.update

    def spy(agent, target, *args):
        lags.append((agent.q_network[0].weight - target.q_network[0].weight).abs().max().item())
        return update(agent, target, *args)

    monkeypatch.setattr(dqn, "update", spy)
    flags = "--total-timesteps 80 --learning-starts 8 --train-frequency 8 --gradient-steps 1 --num-envs 2"
    flags += " --batch-size 4 --n-eval-episodes 1"
    run(dqn, f"{flags} --target-network-frequency 16 --tau 1")
    assert [lag == 0 for lag in lags] == [True, *[True, False] * 4]  # at steps 16, 24, ...; it moves after 16, 32, ...
    lags.clear()
    run(dqn, f"{flags} --target-network-frequency 8 --tau 0.5")
    assert lags[0] == 0 and min(lags[1:]) > 0
