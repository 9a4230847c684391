"""reinforce.py: its math against the definitions, Pixelcopter against recordings of the original, runs through main."""

import json
import time
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reinforce

RECORDED = np.load(Path(__file__).parent / "data" / "pixelcopter_ple.npz")
PLAIN = ["--num-envs", "1", "--no-anneal-lr", "--no-norm-obs"]  # no row of TUNED
ONE_UPDATE = [*PLAIN, "--n-training-episodes", "1", "--n-eval-episodes", "2"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv):
    """The folder of a run with these flags."""
    before = set(Path("runs").glob("*"))
    reinforce.main(list(argv))
    (run_folder,) = set(Path("runs").glob("*")) - before
    return run_folder


def package(run_folder, name):
    return json.loads((run_folder / "hub" / f"{name}.json").read_text())


def weights(run_folder):
    return load_file(run_folder / "hub" / "model.safetensors")


def scalars(run_folder, tag):
    """The (step, value) pairs of one TensorBoard curve."""
    events = EventAccumulator(str(run_folder / "hub" / "logs")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def returns_by_definition(rewards, gamma):
    """G_t as an explicit double sum."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def finite_differences(function, vector, step=1e-6):
    """The gradient of a function of a float64 vector."""
    gradient = np.empty_like(vector)
    for i in range(len(vector)):
        there, back = vector.copy(), vector.copy()
        there[i] += step
        back[i] -= step
        gradient[i] = (function(there) - function(back)) / (2 * step)
    return gradient


# --- the math


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_are_the_discounted_sum_of_the_rewards_that_follow(gamma):
    for length in (1, 2, 17):
        rewards = np.random.default_rng(length).normal(size=length).tolist()
        returns = reinforce.discounted_returns(rewards, gamma)
        np.testing.assert_allclose(returns, returns_by_definition(rewards, gamma), atol=1e-12)


def test_returns_are_standardised_as_the_course_does():
    returns = np.random.default_rng(0).normal(3.0, 5.0, size=50)
    course = torch.from_numpy(returns)
    course = (course - course.mean()) / (course.std() + np.finfo(np.float32).eps)
    np.testing.assert_allclose(reinforce.standardise_returns(returns), course, atol=1e-12)
    assert np.std(reinforce.standardise_returns(returns), ddof=1) == pytest.approx(1.0)


@pytest.mark.parametrize("returns", [[7.0], [0.0], [2.5, 2.5], [0.0] * 9])
def test_a_single_return_and_equal_ones_are_standardised_to_zeros(returns):
    assert reinforce.standardise_returns(np.array(returns)).tolist() == [0.0] * len(returns)


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

    average = 0.0
    for states, actions, rewards in CORRIDOR:
        torch.nn.utils.vector_to_parameters(torch.tensor(start), policy.parameters())
        returns = torch.from_numpy(reinforce.discounted_returns(rewards, 1.0))
        observations = torch.from_numpy(np.eye(2)[list(states)])
        reinforce.update(agent, optimizer, observations, torch.tensor(actions), returns, 1)
        step = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().numpy() - start
        average += probability(start, states, actions) * step
    expected = finite_differences(lambda v: sum(probability(v, s, a) * sum(r) for s, a, r in CORRIDOR), start)
    np.testing.assert_allclose(average, expected, atol=1e-8)


def forward(vector, sizes, inputs):
    """The network of these layer sizes, its parameters in one float64 vector, written down once more in NumPy."""
    hidden = inputs
    for n_inputs, n_outputs in pairwise(sizes):
        weight, bias, vector = np.split(vector, [n_inputs * n_outputs, (n_inputs + 1) * n_outputs])
        hidden = np.maximum(hidden, 0) if hidden is not inputs else hidden
        hidden = hidden @ weight.reshape(n_outputs, n_inputs).T + bias
    return hidden


@pytest.mark.parametrize("num_envs", [1, 3])
def test_one_update_follows_the_finite_differences_of_the_objective(num_envs, monkeypatch, tmp_path):
    played, play_episodes = [], reinforce.play_episodes
    monkeypatch.setattr(reinforce, "play_episodes", lambda *args: played.extend(play_episodes(*args)) or played)
    # Plain gradient steps of size 1, so that the change of the parameters is the gradient.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr=lr))
    flags = [*PLAIN, "--lr", "1", "--h-size", "3", "--gamma", "0.9"]
    args = reinforce.parse_args([*flags, "--num-envs", str(num_envs), "--n-training-episodes", str(num_envs)])
    torch.manual_seed(args.seed)
    start = reinforce.Agent(4, 2, [3])
    agent, _ = reinforce.train(args, tmp_path)
    before, after = (torch.nn.utils.parameters_to_vector(a.parameters()).detach().double() for a in (start, agent))
    observations, actions, rewards = played
    returns = np.concatenate([returns_by_definition(episode, 0.9) for episode in rewards])
    returns = (returns - returns.mean()) / returns.std(ddof=1)

    def objective(vector):
        logits = forward(vector, [4, 3, 2], observations.astype(np.float64))
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        chosen = log_probs[range(len(logits)), actions]
        return (chosen * returns).sum() / num_envs

    expected = finite_differences(objective, before.numpy())
    np.testing.assert_allclose(after - before, expected, rtol=1e-3, atol=1e-4)


# --- the agent


def test_numpy_acting_is_the_network_and_samples_its_softmax():
    torch.manual_seed(0)
    agent = reinforce.Agent(5, 3, [16, 8])
    agent.mean, agent.std = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0.1, 1, 2, 3, 4])
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 3.0)  # probabilities that differ
    observations = np.random.default_rng(0).normal(3.0, 4.0, size=(64, 5)).astype(np.float32)
    logits = agent.actor((torch.from_numpy(observations) - agent.mean) / agent.std).detach()
    layers = reinforce.policy_layers(agent)
    assert reinforce.act(layers, observations).tolist() == logits.argmax(dim=1).tolist()
    assert len(set(logits.argmax(dim=1).tolist())) == 3

    same = np.repeat(observations[:1], 100_000, axis=0)
    sampled = reinforce.act(layers, same, np.random.default_rng(1).gumbel(size=(len(same), 3)))
    np.testing.assert_allclose(np.bincount(sampled, minlength=3) / len(same), logits[0].softmax(dim=0), atol=0.006)


class Counting(gym.Env):
    """Observation: (name, step). The episode ends after `length` steps; the reward is the number of the step.

    It returns the same array again and again, as environments may.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, name, length):
        self.state, self.length = np.array([name, 0], dtype=np.float32), length

    def reset(self, seed=None, options=None):
        self.state[1] = 0
        return self.state, {}

    def step(self, action):
        self.state[1] += 1
        return self.state, float(self.state[1]), bool(self.state[1] == self.length), False, {}


def test_a_batch_holds_each_episode_whole_in_the_order_of_time():
    envs = [Counting(name, length) for name, length in enumerate((3, 1, 99, 2))]
    layers = reinforce.policy_layers(reinforce.Agent(2, 2, [4]))
    observations, actions, rewards = reinforce.play_episodes(envs, layers, np.random.default_rng(0), max_t=5)
    expected = [(0, t) for t in range(3)] + [(1, 0)] + [(2, t) for t in range(5)] + [(3, 0), (3, 1)]
    assert [tuple(row) for row in observations.tolist()] == expected
    assert rewards == [[1, 2, 3], [1], [1, 2, 3, 4, 5], [1, 2]]
    assert (observations.dtype, actions.dtype, len(actions)) == (np.float32, np.int64, len(expected))


# --- Pixelcopter


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


def test_pixelcopter_s_levels_are_those_of_the_seed_alone_and_vectorised():
    envs = gym.make_vec("Pixelcopter-PLE-v0", num_envs=2, vectorization_mode="sync")
    alone = [reinforce.make_env("Pixelcopter-PLE-v0") for _ in range(2)]
    levels = [envs.reset(seed=7)[0].tolist()]
    assert [env.reset(seed=7 + i)[0].tolist() for i, env in enumerate(alone)] == levels[0]
    for action in [1, 0, 1, 1, 1, 0, 1, 1]:
        levels.append(envs.step([action] * 2)[0].tolist())
        assert [env.step(action)[0].tolist() for env in alone] == levels[-1]
    assert all(one != other for one, other in levels)


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


# --- runs through main


@pytest.mark.parametrize(
    ("env_id", "h_size", "flags"),
    [
        ("CartPole-v1", [16], ""),
        ("Pixelcopter-PLE-v0", [8, 4], "--h-size 8 4 --num-envs 4 --norm-obs --no-deterministic-eval"),
    ],
)
def test_four_episodes_change_the_parameters_and_leave_a_complete_run_folder(env_id, h_size, flags):
    run_folder = run(*ONE_UPDATE, "--env-id", env_id, "--n-training-episodes", "4", "--capture-video", *flags.split())
    assert run_folder.name.startswith(f"{env_id}__reinforce__1__")
    hub = run_folder / "hub"
    files = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    (events,) = (path.name for path in run_folder.rglob("events.out.tfevents*"))  # TensorBoard shows the run once
    expected = "README.md results.json hyperparameters.json model.safetensors config.json replay.mp4 reinforce.py"
    assert files == {*expected.split(), f"logs/{events}"}
    assert (hub / "reinforce.py").read_bytes() == Path(reinforce.__file__).read_bytes()
    n_updates = 1 if flags else 4
    assert len(list((run_folder / "videos").glob("*.mp4"))) == n_updates

    torch.manual_seed(1)
    trained, start = weights(run_folder), reinforce.Agent(7 if flags else 4, 2, h_size).state_dict()
    assert start.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, start[name]) == (name in ("mean", "std") and not flags)
    charts = [f"charts/{name}" for name in ("episodic_return", "episodic_length", "learning_rate", "SPS")]
    for name in [*charts, "losses/policy_loss", "losses/entropy"]:
        points = scalars(run_folder, name)
        assert len(points) == n_updates
        assert np.isfinite(points).all()

    meta = imageio.get_reader(hub / "replay.mp4").get_meta_data()
    assert (meta["fps"], meta["size"]) == ((30, (480, 480)) if flags else (50, (600, 400)))
    card = (hub / "README.md").read_text()
    assert ("sampled actions" in card, "cut off after 10,000 steps" in card) == (bool(flags), bool(flags))
    # The package rebuilds the policy, of any size, and gives its score again, also by the same sampled actions.
    assert reinforce.main(["--evaluate", str(run_folder)]).items() <= package(run_folder, "results").items()


def test_the_package_names_the_episodes_that_were_trained():
    run_folder = run("--num-envs", "8", "--n-training-episodes", "100", "--n-eval-episodes", "1")
    assert package(run_folder, "hyperparameters")["n_training_episodes"] == 96
    assert package(run_folder, "results")["global_step"] == scalars(run_folder, "charts/SPS")[-1][0]
    assert len(scalars(run_folder, "charts/SPS")) == 96 / 8


def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not():
    flags = [*ONE_UPDATE, "--n-training-episodes", "6", "--num-envs", "2", "--seed"]
    first, again, other = (weights(run(*flags, seed)) for seed in ("1", "1", "2"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name not in ("mean", "std"))


def test_environment_i_starts_at_seed_plus_i_and_then_goes_on(monkeypatch, tmp_path):
    seeds = []

    class Seeded(Counting):
        def reset(self, seed=None, options=None):
            seeds.append(seed)
            return super().reset()

    monkeypatch.setattr(reinforce, "make_env", lambda env_id: Seeded(0, 2))
    reinforce.train(reinforce.parse_args(["--seed", "5", "--num-envs", "3", "--n-training-episodes", "6"]), tmp_path)
    assert seeds == [5, 6, 7, *[None] * 6]


def test_cartpole_is_learned_in_seconds(tmp_path):
    agent, _ = reinforce.train(reinforce.parse_args([]), tmp_path)
    mean, std = reinforce.evaluate_agent(reinforce.make_env("CartPole-v1"), reinforce.make_policy(agent), range(20))
    assert mean - std >= 350


# --- flags


def test_the_plain_defaults_are_the_course_s_textbook_algorithm():
    args = vars(reinforce.parse_args(["--env-id", "Acrobot-v1"]))
    expected = dict(h_size=[16], n_training_episodes=1000, max_t=1000, gamma=1.0, lr=1e-2, num_envs=1)
    expected |= dict(norm_obs=False, anneal_lr=False)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("env_id", ["CartPole-v1", "CartPole", "Pixelcopter-PLE-v0", "Pixelcopter-PLE"])
def test_flags_win_over_the_tuned_row_and_the_row_over_the_defaults(env_id):
    args = vars(reinforce.parse_args(["--env-id", env_id, "--learning-rate", "0.5", "--h-size", "32"]))
    full_id = "CartPole-v1" if "CartPole" in env_id else "Pixelcopter-PLE-v0"
    row = {**reinforce.TUNED[full_id], "env_id": full_id, "lr": 0.5, "h_size": [32]}
    assert {name: args[name] for name in row} == row


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Pendulum-v1", "discrete actions"),
        ("--env-id FrozenLake-v1", "vector observations"),
        ("--h-size 64,x", "64,x"),
        ("--h-size 64 0", "--h-size 0"),
        ("--gamma 1.5", "--gamma 1.5"),
        ("--max-t 0", "--max-t 0"),
        ("--n-training-episodes 3 --num-envs 4", "less than one update"),
        ("--lr nan", "--lr nan"),
        ("--resume nowhere", "checkpoint.pt"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_leaves_nothing_behind(argv, says, capfd):
    with pytest.raises(SystemExit) as stop:
        reinforce.main(argv.split())
    out, err = capfd.readouterr()
    assert (stop.value.code in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert says in err
    assert not Path("runs").exists()


@pytest.mark.parametrize("config", [{}, {"h_size": 16}, {"h_size": [16, 0]}, {"h_size": [8]}])
def test_a_package_whose_sizes_are_not_the_model_s_is_refused_with_a_line(config, capfd):
    run_folder = run(*ONE_UPDATE, "--h-size", "4")
    (run_folder / "hub" / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        reinforce.load_agent(run_folder)
    assert (stop.value.code, capfd.readouterr().err.count("error: ")) == (2, 1)


# --- resume


def test_an_interrupted_run_resumes_where_it_was(monkeypatch, capfd):
    saved, save_checkpoint = [], reinforce.save_checkpoint

    def stop_at_third(*args, **state):
        saved.append(state["global_step"])
        if len(saved) == 3:  # after the events of the third update, before its checkpoint
            raise KeyboardInterrupt
        save_checkpoint(*args, **state)

    monkeypatch.setattr(reinforce, "CHECKPOINT_SECONDS", 0)
    flags = "--n-training-episodes 12 --num-envs 2 --anneal-lr --norm-obs --n-eval-episodes 1"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(reinforce, "save_checkpoint", stop_at_third)
        reinforce.main(flags.split())
    assert stop.value.code == 130
    (run_folder,) = Path("runs").iterdir()
    assert f"--resume {run_folder}" in capfd.readouterr().err
    stopped = reinforce.load_checkpoint(run_folder)
    assert (stopped["episodes"], stopped["global_step"]) == (4, saved[1])

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    reinforce.main(["--resume", str(run_folder)])
    assert [*Path("runs").iterdir()] == [run_folder]
    resumed = reinforce.load_checkpoint(run_folder)
    assert (resumed["episodes"], resumed["optimizer"]["state"][0]["step"].item()) == (12, 6)
    steps, learning_rates = zip(*scalars(run_folder, "charts/learning_rate"))
    assert learning_rates == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)])
    assert list(steps) == sorted(set(steps))
    assert (steps[1], steps[-1]) == (stopped["global_step"], resumed["global_step"])

    for refused in ("--n-training-episodes 10", "--h-size 8", "--env-id Acrobot-v1"):
        with pytest.raises(SystemExit):
            reinforce.main(["--resume", str(run_folder), *refused.split()])
    reinforce.main(["--resume", str(run_folder), "--n-training-episodes", "15"])
    assert reinforce.load_checkpoint(run_folder)["episodes"] == 14
