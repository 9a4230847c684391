"""What holds for every script, by runs of its main in this process: seeds, parameters, flags, mistakes in the call."""

from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import Counting, curves_of, read, refused, run, weights

import dqn
import ppo
import ppo_mario
import q_learning
import reinforce

STAGE = "SuperMarioBros-1-3-v0"  # over treetops, where a beginner falls soon
SHORT = {
    ppo: "--n-eval-episodes 1 --num-envs 4 --num-steps 128 --total-timesteps 512",
    reinforce: "--n-eval-episodes 1 --num-envs 4 --n-training-episodes 4",
    dqn: "--n-eval-episodes 1 --total-timesteps 512 --learning-starts 100",
    q_learning: "--n-eval-episodes 1 --n-training-episodes 300",
    ppo_mario: f"--n-eval-episodes 1 --env-id {STAGE} --num-envs 2 --num-steps 16 --total-timesteps 32",
}
gym.register("Dark-v0", lambda render_mode=None: Counting(3))  # has no render modes


@pytest.mark.parametrize("script", SHORT)
def test_the_same_seed_gives_the_same_parameters_and_another_seed_does_not(script):
    agents = [script.main(f"{SHORT[script]} --seed {seed}".split()) for seed in (1, 1, 2)]
    agents = [{"weight": agent["qtable"]} if script is q_learning else agent.cpu().state_dict() for agent in agents]
    names = [name for name in agents[0] if name.endswith("weight")]  # biases may all be what they were at the start
    assert names
    for first, again, other in ([agent[name] for agent in agents] for name in names):
        assert (first == again).all() and not (first == other).all()


COPTER = "--env-id Pixelcopter-PLE-v0 --h-size 8 4 --no-deterministic-eval"


@pytest.mark.parametrize(
    ("script", "flags", "sizes", "film"),
    [
        (ppo, "", (4, 2), (50, (600, 400))),
        (reinforce, "", (4, 2), (50, (600, 400))),
        (reinforce, COPTER, (7, 2, [8, 4]), (30, (480, 480))),
        (dqn, "", (4, 2, (256, 256)), (50, (600, 400))),
        (dqn, "--h-size 8 --no-double-q", (4, 2, [8]), (50, (600, 400))),
        (ppo_mario, "", (7,), (60, (480, 448))),
    ],
)
def test_one_update_changes_all_parameters_and_the_package_plays_as_it_was_scored(
    script, flags, sizes, film, monkeypatch
):
    record_video, films = script.record_video, []

    def after_the_checkpoint(env, policy, path, seed=None):  # so that a Ctrl-C meanwhile loses nothing
        films.append(path.name)
        assert (path.parent.parent / "checkpoint.pt").exists()
        return record_video(env, policy, path, seed)

    with monkeypatch.context() as patch:
        patch.setattr(script, "record_video", after_the_checkpoint)
        run_folder = run(script, f"{SHORT[script]} {flags} --seed 3 --capture-video")
    torch.manual_seed(3)
    start, trained = script.Agent(*sizes).state_dict(), weights(run_folder)
    assert start.keys() == trained.keys()
    for name, array in trained.items():
        assert np.isfinite(array).all() and array.shape == start[name].shape
        assert not np.array_equal(array, start[name])

    results, curves = read(run_folder, "results.json"), curves_of(run_folder)
    losses = {"losses/td_loss", "losses/q_values"} if script is dqn else {"losses/policy_loss", "losses/entropy"}
    assert curves.keys() >= {"charts/learning_rate", "charts/SPS"} | losses
    for ((step, value),) in curves.values():
        assert step == results["global_step"] and np.isfinite(value)
    assert films[-2:] == [f"step-{results['global_step']}.mp4", "replay.mp4"]
    assert (run_folder / "videos" / films[-2]).exists()
    replay = imageio.get_reader(run_folder / "hub" / "replay.mp4")
    meta = replay.get_meta_data()
    assert (meta["codec"], meta["pix_fmt"].split("(")[0]) == ("h264", "yuv420p")  # which a browser plays
    assert (meta["fps"], meta["size"]) == film
    if film[0] == 50:  # CartPole pays 1 per step; one frame more is the first
        assert replay.count_frames() == results["mean_reward"] + 1
    assert script.main(["--evaluate", str(run_folder)]).items() <= results.items()


@pytest.mark.parametrize("script", [ppo, reinforce, dqn, ppo_mario])
def test_a_ctrl_c_inside_no_grad_leaves_gradients_on(script, monkeypatch):
    def stopped_update(*_):
        torch.set_grad_enabled(False)  # an interrupt within no_grad's own __exit__ keeps it from switching back
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "update", stopped_update)
    with pytest.raises(SystemExit, match="error: stopped"):
        script.main(SHORT[script].split())
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # for the tests that follow
    assert left_on


@pytest.mark.parametrize("script", [ppo, reinforce])
def test_numpy_acting_is_the_network_and_samples_its_softmax(script):
    torch.manual_seed(0)
    agent = script.Agent(5, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 3.0)  # probabilities that differ
    observations = np.random.default_rng(0).normal(3.0, 4.0, size=(64, 5)).astype(np.float32)
    inputs = torch.from_numpy(observations)
    if script is reinforce:
        agent.mean, agent.std = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0.1, 1, 2, 3, 4])
        inputs = (inputs - agent.mean) / agent.std
    logits = agent.actor(inputs).detach()
    layers = ppo.numpy_layers(agent.actor) if script is ppo else reinforce.policy_layers(agent)
    assert script.act(layers, observations).tolist() == logits.argmax(dim=1).tolist()
    assert len({*logits.argmax(dim=1).tolist()}) == 3

    same = np.repeat(observations[:1], 100_000, axis=0)
    sampled = script.act(layers, same, np.random.default_rng(1).gumbel(size=(len(same), 3)))
    np.testing.assert_allclose(np.bincount(sampled, minlength=3) / len(same), logits[0].softmax(dim=0), atol=0.006)


# --- flags


IDS = [(ppo, full_id) for full_id in ("LunarLander-v2", "Acrobot-v1", "MountainCar-v0")]
IDS += [(dqn, full_id) for full_id in ("LunarLander-v2", "MountainCar-v0")]
IDS += [(reinforce, full_id) for full_id in ("CartPole-v1", "Pixelcopter-PLE-v0")]
IDS += [(q_learning, full_id) for full_id in ("FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v3")]
IDS += [(ppo_mario, full_id) for full_id in ("SuperMarioBros-v0", "SuperMarioBros-1-4-v0")]
UNTUNED = {(ppo, "MountainCar-v0"), (ppo_mario, "SuperMarioBros-1-4-v0")}


@pytest.mark.parametrize(("script", "full_id"), IDS)
def test_an_id_without_its_version_is_completed_and_gets_its_settings_but_flags_win(script, full_id):
    env_id = full_id.rpartition("-v")[0]
    args = vars(script.parse_args(["--env-id", env_id]))
    rows = [row for name, row in script.TUNED.items() if name.startswith(full_id)]
    assert len(rows) == ((script, full_id) not in UNTUNED)
    expected = {"env_id": full_id, "n_eval_episodes": 100} | (rows[0] if rows else {})  # 100 as README says
    if "total_timesteps" in expected:
        at_once = args["train_frequency"] if script is dqn else args["num_envs"] * args["num_steps"]
        expected["total_timesteps"] -= expected["total_timesteps"] % at_once
    assert {name: args[name] for name in expected} == expected
    assert vars(script.parse_args(["--env-id", env_id, "--gamma", "0.5"])) == args | {"gamma": 0.5}


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (ppo, "--env-id Nope-v0", "Nope"),
        (ppo, "--env-id Pendulum-v1", "discrete actions"),
        (ppo, "--env-id FrozenLake-v1", "vector observations"),
        (ppo, "--env-id Dark-v0", "cannot be filmed"),
        (ppo, "--env-id no_such_module:Thing-v0", "no_such_module"),
        (ppo, "--num-minibatches 3", "--num-minibatches"),
        (ppo, "--num-minibatches 1024", "--num-minibatches"),  # a minibatch of one step has no standard deviation
        (ppo, "--total-timesteps 100", "--total-timesteps"),
        (ppo, "--gamma 1.5", "--gamma"),
        (ppo, "--learning-rate nan", "--learning-rate"),
        (ppo, "--learning-rate fast", "--learning-rate"),
        (ppo, "--seed -1", "--seed"),
        (ppo, "--seed 99999999999999999999", "--seed"),
        (ppo, "--no-such-flag", "--no-such-flag"),
        (ppo, "--track", "wandb"),
        (ppo, "--render", "--evaluate"),
        (ppo, "--resume nowhere", "checkpoint.pt"),
        (reinforce, "--h-size 64,x", "64,x"),
        (reinforce, "--h-size 64 0", "--h-size 0"),
        (reinforce, "--max-t 0", "--max-t 0"),
        (reinforce, "--n-training-episodes 3 --num-envs 4", "less than one update"),
        (dqn, "--num-envs 4 --train-frequency 10", "--train-frequency"),
        (dqn, "--num-envs 4 --train-frequency 4 --buffer-size 10", "--buffer-size"),
        (dqn, "--total-timesteps 5 --learning-starts 0", "--total-timesteps"),
        (dqn, "--total-timesteps 1000 --learning-starts 1000", "--learning-starts"),
        (dqn, "--tau 1.5", "--tau 1.5"),
        (q_learning, "--env-id CartPole-v1", "discrete observations"),
        (q_learning, "--env-id Taxi-v3 --map-name 8x8", "belong to FrozenLake"),
        (q_learning, "--learning-rate 2", "--learning-rate"),
        (q_learning, "--n-training-episodes 0", "--n-training-episodes"),
        (ppo_mario, "--env-id CartPole-v1", "SuperMarioBros-1-1-v0 to -8-4-v0"),
        (ppo_mario, "--env-id SuperMarioBros-9-1-v0", "SuperMarioBros-1-1-v0 to -8-4-v0"),
        (ppo_mario, "--action-set all", "right"),
        (ppo_mario, "--stuck-steps 0", "--stuck-steps"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_leaves_nothing_behind(script, flags, says, capfd, monkeypatch):
    monkeypatch.setattr(script, "train", None)
    assert says in refused(script, flags, capfd)


def test_a_folder_that_cannot_be_written_is_one_line_before_training(capfd, monkeypatch):
    monkeypatch.setattr(ppo, "train", None)
    Path("runs").write_text("a file in the way: root, too, can make no folder in it")
    assert "runs" in refused(ppo, "", capfd)


# --- evaluation


@pytest.mark.parametrize("script", [ppo, reinforce, q_learning, dqn])
def test_no_two_training_seeds_are_scored_on_the_same_episodes(script, monkeypatch):
    played = []
    monkeypatch.setattr(script, "evaluate_agent", lambda *args: played.extend(args[-1]) or (0.0, 0.0))
    monkeypatch.setattr(script, "record_video", lambda *args, **kwargs: None)
    for seed in range(1, 10):
        script.main(["--evaluate", "random", "--n-eval-episodes", "1000", "--seed", str(seed)])
    assert len(set(played)) == len(played) == 9000
    assert min(played) > 9 + 1000  # and none of them is an environment's in training


@pytest.mark.parametrize("script", [ppo, reinforce, q_learning, dqn])
def test_the_score_is_played_where_nothing_is_drawn_and_the_film_where_it_is(script, resets):
    script.main(["--evaluate", "random", "--n-eval-episodes", "2"])
    assert [env.render_mode for env, _ in resets] == [None, None, "rgb_array"]
    assert resets[-1][1] == resets[0][1]


@pytest.mark.parametrize(
    ("script", "flags", "low", "high"),
    [(ppo, "--n-eval-episodes 20", 10, 40), (ppo_mario, f"--n-eval-episodes 1 --env-id {STAGE}", 0, 1000)],
)
def test_the_random_agent_is_scored_and_filmed(script, flags, low, high, capsys):
    score = script.main(f"--evaluate random {flags}".split())
    assert low < score["mean_reward"] < high and not score.get("flag_rate")
    (replay,) = Path("runs").rglob("*.mp4")
    assert f", into {replay.parent}\n" in capsys.readouterr().out
    assert imageio.get_reader(replay).count_frames() > 8
