"""reinforce.py: its math against the definitions, Pixelcopter against recordings of the original, runs through main."""

import itertools
import json
import signal
import time
import warnings
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reinforce

RECORDED = np.load(Path(__file__).parent / "data" / "pixelcopter_ple.npz")
RECORDED_SEEDS = [0, 1, 4, 5, 6, 7]
ONE_UPDATE = ["--tuned", "False", "--n-training-episodes", "1", "--n-eval-episodes", "2"]


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


def test_returns_take_linear_time():
    # A million steps: a quadratic loop would take a day.
    assert reinforce.discounted_returns([1.0] * 1_000_000, 1.0)[0] == 1_000_000


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
        mean, std = reinforce.merge_moments(mean, std, seen, batch)
        seen += len(batch)
    np.testing.assert_allclose(mean, observations.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, observations.std(axis=0), rtol=1e-3)


class Corridor:
    """Two states in a row and two actions, of which the second one ends the episode in the first state already."""

    rewards = ((1.0, -2.0), (0.5, 3.0))

    def trajectories(self):
        """Each (states, actions, rewards)."""
        yield (0,), (1,), (self.rewards[0][1],)
        for last in (0, 1):
            yield (0, 1), (0, last), (self.rewards[0][0], self.rewards[1][last])


def test_on_average_the_update_is_the_gradient_of_the_expected_return():
    torch.manual_seed(0)
    policy = torch.nn.Linear(2, 2).double()
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().numpy()
    observations = np.eye(2)

    def probability(vector, states, actions):
        weight, bias = vector[:4].reshape(2, 2), vector[4:]
        logits = observations[list(states)] @ weight.T + bias
        chosen = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return np.prod(chosen[range(len(actions)), list(actions)])

    def expected_return(vector):
        return sum(probability(vector, s, a) * sum(r) for s, a, r in Corridor().trajectories())

    for states, actions, rewards in Corridor().trajectories():
        log_probs, _ = reinforce.evaluate_actions(
            policy, torch.from_numpy(observations[list(states)]), torch.tensor(actions)
        )
        returns = torch.from_numpy(reinforce.discounted_returns(rewards, 1.0))
        (probability(start, states, actions) * reinforce.policy_objective(log_probs, returns, 1)).backward()
    gradient = torch.nn.utils.parameters_to_vector([parameter.grad for parameter in policy.parameters()])
    np.testing.assert_allclose(gradient, finite_differences(expected_return, start), atol=1e-8)


def forward(vector, sizes, inputs):
    """The network of these layer sizes, its parameters in one float64 vector, written down once more in NumPy."""
    hidden = inputs
    for n_inputs, n_outputs in itertools.pairwise(sizes):
        weight, bias, vector = np.split(vector, [n_inputs * n_outputs, (n_inputs + 1) * n_outputs])
        hidden = np.maximum(hidden, 0) if hidden is not inputs else hidden
        hidden = hidden @ weight.reshape(n_outputs, n_inputs).T + bias
    return hidden


@pytest.mark.parametrize("num_envs", [1, 3])
def test_one_update_follows_the_finite_differences_of_the_objective(num_envs, monkeypatch, tmp_path):
    played = {}

    def spy(*args):
        played["observations"], played["actions"], played["rewards"] = play_episodes(*args)
        return played["observations"], played["actions"], played["rewards"]

    play_episodes = reinforce.play_episodes
    monkeypatch.setattr(reinforce, "play_episodes", spy)
    # Plain gradient steps of size 1, so that the change of the parameters is the gradient.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr=lr))
    flags = ["--tuned", "False", "--lr", "1", "--h-size", "3", "--gamma", "0.9"]
    flags += ["--num-envs", str(num_envs), "--n-training-episodes", str(num_envs)]
    args = reinforce.parse_args(flags)
    torch.manual_seed(args.seed)
    start = reinforce.Agent(4, 2, [3])
    agent = reinforce.train(args, tmp_path)
    before, after = (torch.nn.utils.parameters_to_vector(a.parameters()).detach().double() for a in (start, agent))
    observations = played["observations"].astype(np.float64)
    returns = np.concatenate([returns_by_definition(rewards, 0.9) for rewards in played["rewards"]])
    returns = (returns - returns.mean()) / returns.std(ddof=1)

    def objective(vector):
        logits = forward(vector, [4, 3, 2], observations)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        chosen = log_probs[range(len(logits)), played["actions"]]
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
    assert reinforce.choose_actions(layers, observations).tolist() == logits.argmax(dim=1).tolist()
    assert len(set(logits.argmax(dim=1).tolist())) == 3

    same = np.repeat(observations[:1], 100_000, axis=0)
    sampled = reinforce.choose_actions(layers, same, np.random.default_rng(1).gumbel(size=(len(same), 3)))
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


@pytest.mark.parametrize("seed", RECORDED_SEEDS)
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
    env = gym.make("Pixelcopter-PLE-v0").unwrapped
    rng = np.random.default_rng(0)
    for episode in range(200):
        observation, _ = env.reset(seed=episode)
        probability_up, done = rng.random(), False
        while not done:
            assert env.observation_space.contains(observation)
            observation, _, done, _, _ = env.step(int(rng.random() > probability_up))
        assert env.observation_space.contains(observation)


def test_pixelcopter_s_levels_are_those_of_the_seed_alone_and_vectorised():
    envs = gym.make_vec("Pixelcopter-PLE-v0", num_envs=3, vectorization_mode="sync")
    together, _ = envs.reset(seed=7)
    actions = np.random.default_rng(0).integers(2, size=(30, 3))
    alone = [reinforce.make_env("Pixelcopter-PLE-v0") for _ in range(3)]
    assert [env.reset(seed=7 + i)[0].tolist() for i, env in enumerate(alone)] == together.tolist()
    ended = np.zeros(3, dtype=bool)
    for row in actions:
        together, _, terminated, _, _ = envs.step(row)
        for i in np.flatnonzero(~ended):
            assert alone[i].step(row[i])[0].tolist() == together[i].tolist()
        ended |= terminated
        if ended.all():
            break
    assert ended.any()
    assert together[0].tolist() != together[1].tolist()


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
    frame = env.render()
    assert (frame.shape, frame.dtype) == ((480, 480, 3), np.uint8)
    white, green, black = [255, 255, 255], [120, 240, 80], [0, 0, 0]
    small = frame[5::10, 5::10]
    assert np.array_equal(small.repeat(10, axis=0).repeat(10, axis=1), frame)
    np.testing.assert_array_equal(
        np.argwhere((small == white).all(axis=-1)), [[y, x] for y in (23, 24) for x in (15, 16)]
    )
    assert (small[:12] == green).all()
    assert (small[38:] == green).all()
    assert (small[20:29, 30:34] == green).all()
    assert (small[12:38, 17:30] == black).all()
    assert (small[12:38, 34:] == black).all()


# --- runs through main


@pytest.mark.parametrize(
    ("env_id", "h_size", "flags"),
    [
        ("CartPole-v1", [16], []),
        ("Pixelcopter-PLE-v0", [64, 128], ["--h-size", "64,128", "--num-envs", "4", "--norm-obs", "--gamma", "0.99"]),
    ],
)
def test_one_update_changes_the_parameters_and_leaves_a_complete_run_folder(env_id, h_size, flags):
    agent = reinforce.main([*ONE_UPDATE, "--env-id", env_id, "--n-training-episodes", "4", *flags, "--capture-video"])
    (run_folder,) = run_folders()
    assert run_folder.name.startswith(f"{env_id}__reinforce__1__")
    hub = run_folder / "hub"
    files = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    (events,) = (path.name for path in run_folder.glob("events.out.tfevents*"))
    expected = {"README.md", "results.json", "hyperparameters.json", "model.pt", "replay.mp4", "reinforce.py"}
    assert files == {*expected, f"logs/{events}"}
    assert (hub / "reinforce.py").read_bytes() == Path(reinforce.__file__).read_bytes()
    assert len(list((run_folder / "videos").glob("*.mp4"))) == (1 if flags else 4)

    torch.manual_seed(1)
    n_observations = agent.actor[0].in_features
    start = reinforce.Agent(n_observations, 2, h_size).state_dict()
    assert start.keys() == weights(run_folder).keys()
    for name, tensor in weights(run_folder).items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, agent.state_dict()[name])
        assert torch.equal(tensor, start[name]) == (name in ("mean", "std") and not flags)

    curves = ["charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS"]
    curves += ["losses/policy_loss", "losses/entropy"]
    for name in curves:
        points = scalars(run_folder, name)
        assert len(points) == (1 if flags else 4)
        assert np.isfinite([value for _, value in points]).all()

    card = (hub / "README.md").read_text()
    for tag in (env_id, "reinforce", "reinforcement-learning", "custom-implementation", "deep-rl-class"):
        assert f"- {tag}\n" in card
    results = json.loads((hub / "results.json").read_text())
    assert results["n_eval_episodes"] == 2
    # hyperparameters.json rebuilds the policy, of any size
    assert reinforce.main(["--evaluate", str(run_folder)]) == (results["mean_reward"], results["std_reward"])


def test_a_pixelcopter_replay_has_the_game_s_frame_rate_and_size():
    env = reinforce.make_env("Pixelcopter-PLE-v0", "rgb_array")
    reinforce.record_video(env, lambda observation: 1, Path("replay.mp4"), seed=0)
    meta = imageio.get_reader("replay.mp4").get_meta_data()
    assert (meta["fps"], meta["size"]) == (30, (480, 480))


def test_sampled_evaluation_gives_its_score_again():
    reinforce.main([*ONE_UPDATE, "--deterministic-eval", "False"])
    (run_folder,) = run_folders()
    results = json.loads((run_folder / "hub" / "results.json").read_text())
    assert "sampled actions" in (run_folder / "hub" / "README.md").read_text()
    assert reinforce.main(["--evaluate", str(run_folder)]) == (results["mean_reward"], results["std_reward"])


def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not():
    for seed in ("1", "1", "2"):
        reinforce.main([*ONE_UPDATE, "--n-training-episodes", "6", "--num-envs", "2", "--seed", seed])
    first, again, other = map(weights, sorted(run_folders(), key=lambda folder: folder.name.split("__")[2:]))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name not in ("mean", "std"))


def test_environment_i_starts_at_seed_plus_i_and_then_goes_on(monkeypatch, tmp_path):
    seeds = []

    class Seeded(Counting):
        def reset(self, seed=None, options=None):
            seeds.append(seed)
            return super().reset()

    monkeypatch.setattr(reinforce, "make_env", lambda env_id: Seeded(0, 2))
    flags = ["--tuned", "False", "--seed", "5", "--num-envs", "3", "--n-training-episodes", "6"]
    reinforce.train(reinforce.parse_args(flags), tmp_path)
    assert seeds == [5, 6, 7, *[None] * 6]


def test_an_episode_of_one_step_does_no_harm(monkeypatch, tmp_path):
    monkeypatch.setattr(reinforce, "make_env", lambda env_id: Counting(0, 1))
    agent = reinforce.train(reinforce.parse_args(["--tuned", "False", "--n-training-episodes", "3"]), tmp_path)
    torch.manual_seed(1)
    for name, tensor in reinforce.Agent(2, 2, [16]).state_dict().items():
        assert torch.equal(agent.state_dict()[name], tensor)


def test_cartpole_is_learned_in_seconds(tmp_path):
    agent = reinforce.train(reinforce.parse_args([]), tmp_path)
    env = reinforce.make_env("CartPole-v1")
    mean, std = reinforce.evaluate_agent(env, reinforce.make_policy(agent), 20, range(1000, 1020))
    assert mean - std >= 350


# --- flags


def test_the_plain_defaults_are_the_course_s_textbook_algorithm():
    args = vars(reinforce.parse_args(["--tuned", "False"]))
    expected = dict(
        env_id="CartPole-v1", h_size=[16], n_training_episodes=1000, max_t=1000, gamma=1.0, lr=1e-2, num_envs=1,
        norm_obs=False, anneal_lr=False,
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_flags_win_over_the_tuned_row_and_the_row_over_the_defaults():
    pixelcopter = ["--env-id", "Pixelcopter-PLE-v0"]
    assert reinforce.parse_args(pixelcopter).h_size == [64, 128]
    assert reinforce.parse_args([*pixelcopter, "--h-size", "32"]).h_size == [32]
    assert reinforce.parse_args([*pixelcopter, "--tuned", "False"]).h_size == [16]
    assert reinforce.parse_args(["--learning-rate", "0.5"]).lr == reinforce.parse_args(["--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--env-id Nope-v0", "Nope"),
        ("--env-id Pendulum-v1", "discrete actions"),
        ("--h-size 64,x", "neither one layer's size"),
        ("--h-size 0", "neither one layer's size"),
        ("--gamma 1.5", "between 0 and 1"),
        ("--max-t 0", "--max-t"),
        ("--n-training-episodes 3 --num-envs 4", "less than one update"),
        ("--lr nan", "--lr"),
        ("--evaluate nowhere", "neither a folder here nor a repo id"),
        ("--resume nowhere", "checkpoint.pt"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(argv, says, capfd):
    with pytest.raises(SystemExit) as stop:
        reinforce.main(argv.split())
    out, err = capfd.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not Path("runs").exists()


@pytest.mark.parametrize("h_size", [None, 16, [16, 0], [8]])
def test_a_package_whose_sizes_are_not_the_model_s_is_refused_with_a_line(h_size, capfd):
    reinforce.main(ONE_UPDATE)
    (run_folder,) = run_folders()
    path = run_folder / "hub" / "hyperparameters.json"
    values = json.loads(path.read_text())
    del values["h_size"]
    path.write_text(json.dumps(values if h_size is None else {**values, "h_size": h_size}))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        reinforce.load_agent(run_folder)
    err = capfd.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert ("has shape" if h_size == [8] else "no h_size") in err


# --- resume


def die():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stop_at_third", "kept"), [(die, 2), (lambda: signal.raise_signal(signal.SIGINT), 3)])
def test_an_interrupted_run_resumes_where_it_was(stop_at_third, kept, monkeypatch):
    monkeypatch.setattr(reinforce, "CHECKPOINT_SECONDS", 0)

    class Stopping(reinforce.Progress):
        def update(self, now, recent_returns):
            super().update(now, recent_returns)
            if now == 6:
                stop_at_third()  # after the events of the third update, before its checkpoint

    flags = ["--tuned", "False", "--n-training-episodes", "12", "--num-envs", "2", "--anneal-lr", "--norm-obs"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(reinforce, "Progress", Stopping)
        reinforce.main([*flags, "--n-eval-episodes", "1"])
    assert stop.value.code == 130
    (run_folder,) = run_folders()
    stopped = reinforce.load_checkpoint(run_folder)
    assert stopped["update"] == kept

    time.sleep(1)  # TensorBoard reads the events files in the order of the seconds in their names
    reinforce.main(["--resume", str(run_folder)])
    assert run_folders() == [run_folder]
    resumed = reinforce.load_checkpoint(run_folder)
    assert resumed["update"] == resumed["optimizer"]["state"][0]["step"].item() == 6
    curve = scalars(run_folder, "charts/learning_rate")
    assert [value for _, value in curve] == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)])
    steps = [step for step, _ in curve]
    assert steps == sorted(set(steps))
    assert (steps[kept - 1], steps[-1]) == (stopped["global_step"], resumed["global_step"])
    assert (run_folder / "hub" / "replay.mp4").is_file()

    with pytest.raises(SystemExit):
        reinforce.main(["--resume", str(run_folder), "--lr", "1"])
    reinforce.main(["--resume", str(run_folder), "--n-training-episodes", "14"])
    assert reinforce.load_checkpoint(run_folder)["update"] == 7
