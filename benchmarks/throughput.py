"""How fast the scripts are: beside their peers at identical hyperparameters, and beside their limit, stepping alone.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py                              # everything but what the two flags below add
    python benchmarks/throughput.py --cleanrl PATH ppo           # one section, with a checkout of CleanRL beside us
    python benchmarks/throughput.py --nes-py PYTHON mario        # PYTHON has gym-super-mario-bros==7.4.0 and numpy<2

Each run is a process of its own and does its contestant's whole training loop, with logging, statistics and
checkpoints. Contestants alternate, the figures are medians, and the memory is what all processes of a run hold at the
most (proportional set size, Linux). Everything runs on the CPU, with one thread for PyTorch: for networks this small
more threads make each of the contestants slower. What comes out is printed and kept in benchmarks/throughput.json.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent.resolve()
RESULTS = HERE / "throughput.json"
sys.path.insert(0, str(HERE.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything runs on the CPU, here and in the processes to come

CLEANRL = dict(learning_rate=2.5e-4, num_envs=4, num_steps=128, num_minibatches=4, update_epochs=4, ent_coef=0.01)
CLEANRL_DQN = dict(learning_rate=2.5e-4, buffer_size=10_000, batch_size=128, target_network_frequency=500)
CLEANRL_DQN |= dict(learning_starts=10_000, train_frequency=10, exploration_fraction=0.5, end_e=0.05)
ZOO_DQN = dict(learning_rate=6.3e-4, buffer_size=50_000, batch_size=128, target_network_frequency=250)  # LunarLander
ZOO_DQN |= dict(learning_starts=0, train_frequency=4, exploration_fraction=0.12, end_e=0.1)
LUNAR_LANDER = dict(num_envs=16, num_steps=1024, num_minibatches=256, gamma=0.999, gae_lambda=0.98)  # the course's


# ---------------------------------------------------------------------------------------------------------------------
# The contestants: functions that run in a process of their own and return steps per second
# ---------------------------------------------------------------------------------------------------------------------


def ours(script, *flags):
    """Train with one of the scripts."""
    script = importlib.import_module(script)
    with scratch_folder() as folder, quiet():
        script.train(script.parse_args(list(flags)), folder)
        return last_scalar("charts/SPS", folder)


def ours_torchrun(script, processes, *flags):
    """Train with one of the scripts in so many processes, as a user would: from the command line."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with scratch_folder() as folder:
        command = [sys.executable, *(launch if processes > 1 else []), HERE.parent / script, "--n-eval-episodes=1"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {script} has failed: {done.stderr}")
        return last_scalar("charts/SPS", folder)


def ours_twice(script, *flags):
    """Two trainings at once that exchange nothing: what two processes could do together at the most."""
    with multiprocessing.Pool(2) as both:
        return sum(both.starmap(ours_torchrun, [(script, 1, *flags)] * 2))


def ours_ppo(env_id, steps, **settings):
    """Train with ppo.py; settings: what differs from CleanRL's defaults, given in the place of TUNED's row."""
    return ours("ppo", "--anneal-lr", "--clip-vloss", *flags_of(env_id, steps, **{**CLEANRL, **settings}))


def ours_dqn(env_id, steps, h_size, gradient_steps, **settings):
    """Train with dqn.py; settings: given in the place of TUNED's row."""
    same = ["--no-double-q", "--no-anneal-lr", "--num-envs=1", "--tau=1", "--reward-scale=1"]
    same += [f"--gradient-steps={gradient_steps}"]
    return ours("dqn", *same, "--h-size", *map(str, h_size), *flags_of(env_id, steps, **settings))


def stable_baselines3(env_id, steps, num_envs=4, num_steps=128, num_minibatches=4, gamma=0.99, gae_lambda=0.95):
    """Train with Stable-Baselines3's PPO, told everything that CleanRL has as its default."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    with scratch_folder() as folder:
        model = PPO(
            "MlpPolicy",
            make_vec_env(env_id, num_envs),
            n_steps=num_steps,
            batch_size=num_envs * num_steps // num_minibatches,
            n_epochs=4,
            learning_rate=lambda left: 2.5e-4 * left,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range_vf=0.2,
            ent_coef=0.01,
            tensorboard_log=str(folder),
        )
        started = time.perf_counter()
        model.learn(steps)
        return model.num_timesteps / (time.perf_counter() - started)


def stable_baselines3_dqn(env_id, steps, h_size, gradient_steps, **settings):
    """Train with Stable-Baselines3's DQN, told the same; it clips the norm of the gradient besides, to 10."""
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    names = dict(train_frequency="train_freq", target_network_frequency="target_update_interval")
    names |= dict(end_e="exploration_final_eps")
    settings = {names.get(name, name): value for name, value in settings.items()}
    with scratch_folder() as folder:
        settings |= dict(policy_kwargs={"net_arch": h_size}, gradient_steps=gradient_steps, tensorboard_log=str(folder))
        model = DQN("MlpPolicy", make_vec_env(env_id, 1), **settings)
        started = time.perf_counter()
        model.learn(steps)
        return model.num_timesteps / (time.perf_counter() - started)


def cleanrl(checkout, script, env_id, steps, **settings):
    """Train with CleanRL's ppo.py or dqn.py, as it stands in its repository.

    Its dqn.py looks for an entry in the infos that Gymnasium 1 no longer has, and would end at the first time limit.
    """
    import gymnasium as gym
    import torch

    class WithFinalObservation(gym.vector.SyncVectorEnv):
        def step(self, actions):
            observations, *rest, infos = super().step(actions)
            return observations, *rest, infos | {"final_observation": observations}

    gym.vector.SyncVectorEnv = WithFinalObservation
    torch.set_num_threads(1)
    with scratch_folder() as folder, quiet():
        sys.argv = [script, *flags_of(env_id, steps, **settings)]
        sys.path.insert(0, str(Path(checkout)))
        runpy.run_path(str(Path(checkout) / "cleanrl" / script), run_name="__main__")
        return last_scalar("charts/SPS", folder)


def flags_of(env_id, steps, **settings):
    flags = dict(env_id=env_id, total_timesteps=steps, **settings)
    return [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def stepping_vectors(env_id, steps, num_envs):
    """Random actions in the environments of ppo.py, side by side, and nothing else."""
    import gymnasium as gym

    import ppo

    envs = gym.vector.SyncVectorEnv([lambda: ppo.make_env(env_id)] * num_envs, copy=False)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample().tolist() for _ in range(steps // num_envs)]
    envs.reset(seed=1)
    started = time.perf_counter()
    for row in actions:
        envs.step(row)
    return len(actions) * num_envs / (time.perf_counter() - started)


def course_reinforce(episodes):
    """The loop of the course's unit 4 on CartPole: one network call, one sample and one log-probability per step."""
    import gymnasium as gym
    import numpy as np
    import torch
    from torch import nn
    from torch.distributions import Categorical

    torch.set_num_threads(1)
    torch.manual_seed(1)
    env = gym.make("CartPole-v1", disable_env_checker=True)
    policy = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2), nn.Softmax(dim=1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    steps = 0
    started = time.perf_counter()
    for episode in range(episodes):
        log_probs, rewards = [], []
        state, _ = env.reset(seed=1 if episode == 0 else None)
        for _ in range(1000):
            choice = Categorical(policy(torch.from_numpy(state).float().unsqueeze(0)))
            action = choice.sample()
            log_probs.append(choice.log_prob(action))
            state, reward, terminated, truncated, _ = env.step(action.item())
            rewards.append(reward)
            if terminated or truncated:
                break
        returns, following = [], 0.0
        for reward in reversed(rewards):
            following = reward + 1.0 * following
            returns.insert(0, following)
        returns = torch.tensor(returns)
        returns = (returns - returns.mean()) / (returns.std() + np.finfo(np.float32).eps.item())
        loss = torch.cat([-log_prob * ret for log_prob, ret in zip(log_probs, returns)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += len(rewards)
    return steps / (time.perf_counter() - started)


def course_q_learning(episodes):
    """The loop of the course's unit 2 on Taxi, with its hyperparameters: a NumPy table, indexed at every step."""
    import numpy as np

    import q_learning

    env = q_learning.make_env("Taxi-v3")
    np.random.seed(1)
    random.seed(1)
    env.action_space.seed(1)
    table = np.zeros((env.observation_space.n, env.action_space.n))
    env.reset(seed=1)
    steps = 0
    started = time.perf_counter()
    for episode in range(episodes):
        epsilon = 0.05 + (1.0 - 0.05) * np.exp(-0.005 * episode)
        state, _ = env.reset()
        for _ in range(99):
            greedy = random.uniform(0, 1) > epsilon
            action = np.argmax(table[state][:]) if greedy else env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            target = reward + 0.95 * np.max(table[following])
            table[state][action] = table[state][action] + 0.7 * (target - table[state][action])
            steps += 1
            if terminated or truncated:
                break
            state = following
    return steps / (time.perf_counter() - started)


def stepping_taxi(episodes):
    """The very episodes of `ours` on Taxi once more, from their recorded actions: stepping and nothing else."""
    import q_learning

    played, choose = [], q_learning.epsilon_greedy_policy

    def recording(*arguments):
        played.append(choose(*arguments))
        return played[-1]

    q_learning.epsilon_greedy_policy = recording
    args = q_learning.parse_args(["--env-id", "Taxi-v3", "--n-training-episodes", str(episodes)])
    with scratch_folder() as folder, quiet():
        q_learning.train(args, folder)
    env = q_learning.make_env(args.env_id, args.map_name, args.is_slippery, args.max_steps)
    env.reset(seed=args.seed)
    actions = iter(played)
    started = time.perf_counter()
    for _ in range(episodes):
        env.reset()
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(next(actions))
            done = terminated or truncated
    return len(played) / (time.perf_counter() - started)


def stepping_pixelcopter(steps):
    """Random actions in the Pixelcopter of reinforce.py."""
    import reinforce

    env = reinforce.make_env("Pixelcopter-PLE-v0")
    env.action_space.seed(1)
    actions = [int(env.action_space.sample()) for _ in range(steps)]
    env.reset(seed=1)
    started = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - started)


def mario_actions(frames):
    """Random actions to the right, held for four frames each."""
    rng = random.Random(1)
    return [action for _ in range(frames // 4) for action in [rng.randrange(5)] * 4]


def our_mario(frames):
    """Frames of the Super Mario Bros. of ppo_mario.py, with reward and info."""
    import ppo_mario

    env = ppo_mario.SuperMarioBros(1, 1, action_set="right")
    env.reset()
    started = time.perf_counter()
    for action in mario_actions(frames):
        _, _, terminated, _, _ = env.step(action)
        if terminated:
            env.reset()
    return frames / (time.perf_counter() - started)


def nes_py_mario(frames):
    """The same frames of gym-super-mario-bros 7.4 on nes-py. Runs under an interpreter that has these."""
    import gym_super_mario_bros
    from gym_super_mario_bros.actions import RIGHT_ONLY
    from nes_py.wrappers import JoypadSpace

    env = JoypadSpace(gym_super_mario_bros.make("SuperMarioBros-1-1-v0").unwrapped, RIGHT_ONLY)
    env.reset()
    started = time.perf_counter()
    for action in mario_actions(frames):
        _, _, done, _ = env.step(action)
        if done:
            env.reset()
    return frames / (time.perf_counter() - started)


def elsewhere(python, function, *args):
    """Run one of the functions above under another interpreter."""
    program = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import throughput; print(throughput.{function}(*{args}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {python} cannot run {function}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def quiet():
    """Without what a run prints; a traceback comes after it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def scratch_folder():
    """A temporary working directory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def last_scalar(tag, folder):
    """The last value of a curve in the TensorBoard events somewhere below the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_folder = next(folder.rglob("events.out.tfevents.*")).parent
    return EventAccumulator(str(run_folder)).Reload().Scalars(tag)[-1].value


# ---------------------------------------------------------------------------------------------------------------------
# The sections: {name of a comparison: {contestant: function}}, we first
# ---------------------------------------------------------------------------------------------------------------------


def ppo_section(options):
    comparisons = {}
    for env_id, peers_id, steps, settings in (
        ("CartPole-v1", "CartPole-v1", 100_000, {}),
        ("LunarLander-v2", "LunarLander-v3", 131_072, LUNAR_LANDER),
    ):
        comparisons[f"PPO on {env_id}"] = {
            "ppo.py": partial(ours_ppo, env_id, steps, **settings),
            "Stable-Baselines3": partial(stable_baselines3, peers_id, steps, **settings),
            "stepping alone": partial(stepping_vectors, env_id, steps, settings.get("num_envs", 4)),
        }
        if options.cleanrl:
            run = partial(cleanrl, options.cleanrl, "ppo.py", peers_id, steps, **settings)
            comparisons[f"PPO on {env_id}"]["CleanRL"] = run
    return comparisons


def dqn_section(options):
    comparisons = {}
    for env_id, peers_id, steps, network, settings in (
        ("CartPole-v1", "CartPole-v1", 100_000, dict(h_size=[120, 84], gradient_steps=1), CLEANRL_DQN),
        ("LunarLander-v2", "LunarLander-v3", 20_000, dict(h_size=[256, 256], gradient_steps=4), ZOO_DQN),
    ):
        comparisons[f"DQN on {env_id}"] = {
            "dqn.py": partial(ours_dqn, env_id, steps, **network, **settings),
            "Stable-Baselines3": partial(stable_baselines3_dqn, peers_id, steps, **network, **settings),
            "stepping alone": partial(stepping_vectors, env_id, steps, 1),
        }
    if options.cleanrl:  # its network is the one of its defaults
        run = partial(cleanrl, options.cleanrl, "dqn.py", "CartPole-v1", 100_000, **CLEANRL_DQN)
        comparisons["DQN on CartPole-v1"]["CleanRL"] = run
    return comparisons


def num_envs_section(options):
    comparisons = {}
    for num_envs in (1, 2, 4, 8, 16, 32, 64):
        steps = 12_800 if num_envs < 4 else 32_768
        comparisons[f"PPO on CartPole-v1, {num_envs} x 128 steps"] = {
            "ppo.py": partial(ours_ppo, "CartPole-v1", steps, num_envs=num_envs),
            "Stable-Baselines3": partial(stable_baselines3, "CartPole-v1", steps, num_envs=num_envs),
            "stepping alone": partial(stepping_vectors, "CartPole-v1", steps, num_envs),
        }
    return comparisons


def reinforce_section(options):
    course_flags = ["--n-training-episodes=1000", "--num-envs=1", "--no-anneal-lr", "--no-norm-obs"]  # not TUNED's row
    return {
        "REINFORCE on CartPole-v1": {
            "reinforce.py, the course's settings": partial(ours, "reinforce", *course_flags),
            "the course's loop": partial(course_reinforce, 300),
            "reinforce.py": partial(ours, "reinforce"),
        },
        "Pixelcopter-PLE-v0, frames under random actions": {"reinforce.py": partial(stepping_pixelcopter, 500_000)},
    }


def q_learning_section(options):
    episodes = 20_000
    return {
        "Q-learning on Taxi-v3": {
            "q_learning.py": partial(ours, "q_learning", "--env-id", "Taxi-v3", "--n-training-episodes", str(episodes)),
            "the course's loop": partial(course_q_learning, episodes),
            "stepping alone": partial(stepping_taxi, episodes),
        }
    }


def mario_section(options):
    frames = 12_000
    short = ["--total-timesteps=40960", "--n-eval-episodes=1"]  # the latter are played after what is measured
    nes_py = {"nes-py": partial(elsewhere, options.nes_py, "nes_py_mario", frames)} if options.nes_py else {}
    return {
        "Super Mario Bros., frames with reward and info": {"ppo_mario.py": partial(our_mario, frames), **nes_py},
        "PPO on SuperMarioBros-1-1-v0": {"ppo_mario.py": partial(ours, "ppo_mario", *short)},
    }


def torchrun_section(options):
    lunar_lander, mario = ["--env-id=LunarLander-v2", "--total-timesteps=245760"], ["--total-timesteps=40960"]
    counts = {f"{processes} process{'es' * (processes > 1)}": processes for processes in (1, 2)}
    return {
        "PPO on LunarLander-v2, 32 environments in all": {
            name: partial(ours_torchrun, "ppo.py", n, *lunar_lander, "--num-envs=32") for name, n in counts.items()
        },
        "PPO on LunarLander-v2, 32 environments in each process": {
            name: partial(ours_torchrun, "ppo.py", n, *lunar_lander, f"--num-envs={32 * n}")
            for name, n in counts.items()
        }
        | {"2 trainings": partial(ours_twice, "ppo.py", *lunar_lander, "--num-envs=32")},
        "PPO on SuperMarioBros-1-1-v0, 8 environments in all": {
            name: partial(ours_torchrun, "ppo_mario.py", n, *mario) for name, n in counts.items()
        },
    }


SECTIONS = {
    "ppo": ppo_section,
    "dqn": dqn_section,
    "num_envs": num_envs_section,
    "reinforce": reinforce_section,
    "q_learning": q_learning_section,
    "mario": mario_section,
    "torchrun": torchrun_section,
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def run(function):
    """Call a function in a process of its own; returns what it returns, and the memory in MiB held at the most."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function))
    process.start()
    sender.close()
    most = 0
    while not receiver.poll(2):  # looking costs the run time
        most = max(most, memory(process.pid))
    try:
        return receiver.recv(), most
    except EOFError:
        sys.exit(f"error: {function} has failed, see above")
    finally:
        process.join()


def send_result(sender, function):
    # A spawned process would spawn its own workers too; a user's run starts them as the platform does.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    sender.send(function())


def memory(pid):
    """Proportional set size of a process and all that it has started, in MiB."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    return total / 2**20


def compare(title, contestants, runs):
    """Let the contestants alternate, print a table of their medians, ratios to the first one first."""
    rates = {name: [] for name in contestants}
    peaks = dict.fromkeys(contestants, 0)
    for _ in range(runs):
        for name, function in contestants.items():
            rate, peak = run(function)
            rates[name].append(round(rate))
            peaks[name] = max(peaks[name], round(peak))
    first = statistics.median(next(iter(rates.values())))
    print(f"\n{title}\n\n| | ours is ... times as fast | steps/s, median of {runs} | all runs | MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in rates.items():
        median = statistics.median(values)
        all_runs, mib = " ".join(map(str, values)), peaks[name] or "not seen"
        print(f"| {name} | {first / median:.2f} | {median:,.0f} | {all_runs} | {mib} |")
    sys.stdout.flush()
    return {name: {"steps_per_second": rates[name], "peak_mib": peaks[name] or None} for name in contestants}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--runs", type=int, default=5, help="runs of each contestant")
    parser.add_argument("--cleanrl", metavar="PATH", help="a checkout of CleanRL, whose ppo.py takes part")
    parser.add_argument("--nes-py", metavar="PYTHON", help="an interpreter with gym-super-mario-bros==7.4.0, numpy<2")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if options.cleanrl:
        options.cleanrl = str(Path(options.cleanrl).resolve())
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for section in options.sections or SECTIONS:
        comparisons = SECTIONS[section](options)
        kept[section] = {title: compare(title, contestants, options.runs) for title, contestants in comparisons.items()}
        kept[section]["machine"] = f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}"
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
