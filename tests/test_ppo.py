"""ppo.py: its math against the definitions, episode boundaries, flags of the algorithm, what a score is of."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Counting, curves_of, run

import ppo
import ppo_mario

ONE_UPDATE = "--num-envs 4 --num-steps 128 --total-timesteps 512 --n-eval-episodes 2"


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
    torch.testing.assert_close(ppo.standardise(advantages[..., None])[..., 0], torch.tensor(expected))
    parts = torch.stack([advantages[:, :2], advantages[:, 1:]], dim=2)  # of two processes: the row 1, 2, 2, 3
    expected = torch.tensor([[-1, 0], [0, 1]]) * 1.5**0.5
    torch.testing.assert_close(ppo.standardise(parts)[0], expected)
    assert torch.equal(ppo.standardise(torch.full((1, 4, 1), 7.0)), torch.zeros(1, 4, 1))


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


@pytest.mark.parametrize(("script", "clip_vloss"), [(ppo, True), (ppo, False), (ppo_mario, False)])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_update_ascends_equation_9_of_the_paper(script, clip_vloss, max_grad_norm):
    """On flat parameters as on separate ones, with autograd's gradient and clip_grad_norm_."""
    torch.manual_seed(0)
    agent = ppo.Agent(4, 3) if script is ppo else ppo_mario.Agent(3)
    last_layer = agent.actor[-1] if script is ppo else agent.actor
    torch.nn.init.orthogonal_(last_layer.weight, 1.0)  # an entropy and a barrier that have gradients
    reference = copy.deepcopy(agent)
    parameters = [ppo.flatten_parameters(agent)] if script is ppo else [*agent.parameters()]
    optimizer, its_optimizer = (torch.optim.SGD(those, lr=0.1) for those in (parameters, reference.parameters()))
    start = copy.deepcopy(reference.state_dict())
    switches = [] if script is ppo_mario else ["--clip-vloss"] if clip_vloss else ["--no-clip-vloss"]
    switches += ["--ent-coef" if script is ppo else "--barrier-coef", "0.1", "--max-grad-norm", str(max_grad_norm)]
    args = script.parse_args([*switches, "--vf-coef", "0.7"])
    for _ in range(5):
        actions = torch.randint(3, (64,))
        old_log_probs, old_values, returns, advantages = batch = torch.randn(4, 64)
        old_log_probs -= 1.1
        if script is ppo:
            observations = torch.randn(64, 4)
            ppo.update(agent, parameters[0], optimizer, (observations, actions, *batch), args)
            logits, values = reference.actor(observations), reference.critic(observations)[:, 0]
        else:
            observations = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8)
            minibatch = (observations, actions, old_log_probs, returns, advantages)
            ppo_mario.update(agent, optimizer, minibatch, args.barrier_coef, args)
            logits, values = reference(observations)

        distribution = torch.distributions.Categorical(logits=logits)
        ratio = torch.exp(distribution.log_prob(actions) - old_log_probs)
        objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        errors = (values - returns) ** 2
        if clip_vloss:
            clipped_values = old_values + (values - old_values).clamp(-0.2, 0.2)
            errors = torch.max(errors, (clipped_values - returns) ** 2)
        if script is ppo:
            bonus = distribution.entropy()
        else:  # its log barrier: up to a constant, the divergence from the policy that chooses all actions alike
            uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits))
            bonus = -torch.distributions.kl_divergence(uniform, distribution)
        its_optimizer.zero_grad()
        (-objective + 0.7 * errors.mean() / 2 - 0.1 * bonus.mean()).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        its_optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert (agent.state_dict()[name] - tensor).norm() < 0.01 * (tensor - start[name]).norm()


# --- short runs


@pytest.mark.parametrize("cut_off", [False, True])
def test_no_transition_crosses_an_episode_and_only_time_limits_bootstrap(cut_off, monkeypatch, tmp_path):
    seen, compute_gae = {}, ppo.compute_gae

    def spy(rewards, values, dones, last_value, gamma, gae_lambda):
        seen.update(rewards=rewards.copy(), values=values.copy(), dones=dones.copy(), last_value=last_value.copy())
        return compute_gae(rewards, values, dones, last_value, gamma, gae_lambda)

    def easy_to_follow(n_inputs, n_outputs, last_std):  # V(s) = 100 * step in the episode
        layer = torch.nn.Linear(n_inputs, n_outputs)
        layer.weight.data, layer.bias.data = torch.tensor([[0.0, 100.0]]).repeat(n_outputs, 1), torch.zeros(n_outputs)
        return torch.nn.Sequential(layer)

    monkeypatch.setattr(ppo, "compute_gae", spy)
    monkeypatch.setattr(ppo, "tanh_network", easy_to_follow)
    monkeypatch.setattr(ppo, "make_env", lambda env_id, render_mode=None: Counting(3, cut_off))
    flags = "--gamma 0.5 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16"
    assert ppo.train(ppo.parse_args(flags.split()), tmp_path)[1] == 16

    # Steps 0, 1, 2 | 0, 1, 2 | 0, 1: never a last observation (step 3) as the state of a transition.
    assert seen["values"].T.tolist() == [[0, 100, 200, 0, 100, 200, 0, 100]] * 2
    assert seen["dones"].T.tolist() == [[0, 0, 1, 0, 0, 1, 0, 0]] * 2
    assert seen["last_value"].tolist() == [200, 200]
    # A time limit adds gamma * V(last observation) = 0.5 * 300 to the reward of that step; termination adds nothing.
    end = 3 + 150 if cut_off else 3
    assert seen["rewards"].T.tolist() == [[1, 2, end, 1, 2, end, 1, 2]] * 2


def test_the_flags_of_the_algorithm_reach_the_training(monkeypatch):
    calls, update, standardise = [], ppo.update, ppo.standardise
    monkeypatch.setattr(ppo, "update", lambda *args: calls.append("update") or update(*args))
    monkeypatch.setattr(ppo, "standardise", lambda *args: calls.append("standardise") or standardise(*args))
    run_folder = run(ppo, f"{ONE_UPDATE} --num-minibatches 4 --update-epochs 3")
    assert calls == ["standardise", *["update"] * 4] * 3
    evaluate = ["--evaluate", str(run_folder), "--n-eval-episodes", "20"]
    greedy, sampled = (ppo.main([*evaluate, switch]) for switch in ("--deterministic-eval", "--no-deterministic-eval"))
    assert greedy != sampled

    calls.clear()
    flags = "--no-norm-adv --no-anneal-lr --learning-rate 0.1 --target-kl 0.001"
    run_folder = run(ppo, f"{ONE_UPDATE} --total-timesteps 1024 --num-minibatches 4 {flags}")
    assert calls == ["update"] * 4 * 2  # --target-kl ends the epochs of a rollout
    assert curves_of(run_folder)["charts/learning_rate"] == [(step, pytest.approx(0.1)) for step in (512, 1024)]


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
    env = Counting(3)
    assert ppo.evaluate_agent(env, lambda observation: 1, [7, 5, 6]) == (1 + 2 + 3, 0)
    assert env.seeds == [7, 5, 6]


def test_the_score_is_of_a_fresh_environment_and_seeds_that_training_never_used(resets, monkeypatch):
    trained, evaluate_agent = [], ppo.evaluate_agent

    def evaluate_after_training(*args):
        if not trained:
            trained.extend(resets)
            resets.clear()
        return evaluate_agent(*args)

    monkeypatch.setattr(ppo, "evaluate_agent", evaluate_after_training)
    run(ppo, ONE_UPDATE)
    assert len(trained) == 4 and len(resets) == 3  # one per environment; one per episode, and the film's
    for ours, theirs in zip(zip(*trained), zip(*resets)):
        assert not set(ours) & set(theirs)
