"""How many seconds of wall clock until an agent is good: beside Stable-Baselines3, each as tuned as it comes.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/time_to_solve.py                   # both tasks, 5 seeds each
    python benchmarks/time_to_solve.py CartPole-v1 --seeds 1 2
    python benchmarks/time_to_solve.py LunarLander-v3 --only ppo.py torchrun      # one process, and two
    python benchmarks/time_to_solve.py LunarLander-v3 --only dqn.py "Stable-Baselines3 DQN"

Ours train with their row of TUNED, Stable-Baselines3 with the hyperparameters of its zoo (rl-baselines3-zoo,
hyperparams/ppo.yml and dqn.yml, April 2026; DQN on LunarLander for a million steps instead of 100 thousand, exploring
in the first 12 thousand as there). At every fiftieth of its training, the agent plays 100 greedy episodes on seeds that
training never used, with the clock stopped; it is done when their mean return reaches the bar. Both are judged by
the same function and have one thread for PyTorch. The clock starts where training starts, after the imports.
What comes out is printed and kept in benchmarks/time_to_solve.json, run by run; a run of the same seed replaces the
older one.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).parent.resolve()
RESULTS = HERE / "time_to_solve.json"
sys.path.insert(0, str(HERE.parent))

BARS = {"CartPole-v1": 475, "LunarLander-v3": 200}  # what Gymnasium calls solved
ZOO = {
    "CartPole-v1": dict(num_envs=8, total_timesteps=100_000, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98),
    "LunarLander-v3": dict(num_envs=16, total_timesteps=1_000_000, n_steps=1024, batch_size=64, gae_lambda=0.98),
}
ZOO["CartPole-v1"] |= dict(n_epochs=20, ent_coef=0.0)
ZOO["CartPole-v1"] |= dict(learning_rate=lambda left: 0.001 * left, clip_range=lambda left: 0.2 * left)
ZOO["LunarLander-v3"] |= dict(n_epochs=4, ent_coef=0.01, gamma=0.999)
ZOO_DQN = {
    "CartPole-v1": dict(total_timesteps=50_000, learning_rate=2.3e-3, batch_size=64, buffer_size=100_000),
    "LunarLander-v3": dict(total_timesteps=1_000_000, learning_rate=6.3e-4, batch_size=128, buffer_size=50_000),
}
ZOO_DQN["CartPole-v1"] |= dict(learning_starts=1000, target_update_interval=10, train_freq=256, gradient_steps=128)
ZOO_DQN["CartPole-v1"] |= dict(exploration_fraction=0.16, exploration_final_eps=0.04)
ZOO_DQN["LunarLander-v3"] |= dict(learning_starts=0, target_update_interval=250, train_freq=4, gradient_steps=-1)
ZOO_DQN["LunarLander-v3"] |= dict(exploration_fraction=0.012, exploration_final_eps=0.1)


class Solved(Exception):
    """Raised in the middle of training to end it."""


class Judge:
    """The clock, stopped while the agent is judged."""

    def __init__(self, env_id, total_timesteps):
        self.env_id, self.every = env_id, total_timesteps // 50
        self.next, self.judging = self.every, 0.0
        self.scores = []
        self.started = time.perf_counter()

    def look(self, steps, make_actor, last=False):
        """See whether it is time to judge, and if so, judge; make_actor returns a function (N, ...) -> N actions."""
        if steps < self.next and not last:
            return
        stopped = time.perf_counter()
        self.next += self.every
        self.scores.append((steps, mean_return(self.env_id, make_actor())))
        self.judging += time.perf_counter() - stopped
        if self.scores[-1][1] >= BARS[self.env_id]:
            raise Solved

    def seconds(self):
        return time.perf_counter() - self.started - self.judging


def mean_return(env_id, actor, episodes=100):
    """Of so many episodes, played side by side."""
    envs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id, disable_env_checker=True)] * episodes)
    observations, _ = envs.reset(seed=1_000_000)
    returns, playing = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while playing.any():
        observations, rewards, terminated, truncated, _ = envs.step(actor(observations).tolist())
        returns += rewards * playing
        playing &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def ours(env_id, seed, name="ppo"):
    """Train with ppo.py or dqn.py; returns the judge, who looks at `train`'s agent whenever the progress moves."""
    script = importlib.import_module(name)
    agents, make_agent, progress_bar = [], script.Agent, script.progress_bar

    def remember(*args):
        agents.append(make_agent(*args))
        return agents[-1]

    def progress_bar_with_judge(total, *args):
        def update_and_look(steps):
            update(steps)
            judge.look(bar.n, actor, last=bar.n == total)

        bar = progress_bar(total, *args)
        update, bar.update = bar.update, update_and_look
        return bar

    def actor():
        layers = script.numpy_layers(agents[0].actor if name == "ppo" else agents[0].q_network)
        return lambda observations: script.act(layers, observations)

    script.Agent, script.progress_bar = remember, progress_bar_with_judge
    args = script.parse_args(["--env-id", env_id, "--seed", str(seed), "--no-cuda"])
    judge = Judge(env_id, args.total_timesteps)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Solved):
        script.train(args, Path(folder))
    return judge


def torchrun(env_id, seed):
    """Train with ppo.py in two processes; returns what `race` does."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    program = f"import time_to_solve; time_to_solve.in_one_of_two({env_id!r}, {seed})"
    done = subprocess.run([sys.executable, *launch, "-c", program], cwd=HERE, capture_output=True, text=True)
    return json.loads(done.stdout)


def in_one_of_two(env_id, seed):
    """What torchrun's processes run. The judge sits in process 0, and while he judges, the other one waits."""
    import ppo

    torch.distributed.init_process_group("gloo")
    if ppo.RANK == 0:
        print(json.dumps(race(ours, env_id, seed)), flush=True)
    else:
        with contextlib.suppress(RuntimeError):  # process 0 is gone when it is solved
            ours(env_id, seed)
    os._exit(0)


def stable_baselines3(env_id, seed, name="PPO"):
    """Train with Stable-Baselines3's PPO or DQN; returns the judge."""
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    def actor():
        return lambda observations: model.predict(observations, deterministic=True)[0]

    class Look(BaseCallback):
        def _on_rollout_start(self):  # after the update before
            judge.look(self.num_timesteps, actor)

        def _on_step(self):
            return True

    torch.set_num_threads(1)
    settings = dict(ZOO[env_id] if name == "PPO" else ZOO_DQN[env_id])
    total_timesteps = settings.pop("total_timesteps")
    judge = Judge(env_id, total_timesteps)
    envs = make_vec_env(env_id, settings.pop("num_envs", 1), seed=seed)
    if name == "DQN":
        settings["policy_kwargs"] = {"net_arch": [256, 256]}
    model = getattr(stable_baselines3, name)("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    with contextlib.suppress(Solved):
        model.learn(total_timesteps, callback=Look())
        judge.look(model.num_timesteps, actor, last=True)
    return judge


def race(train, env_id, seed):
    """One training: whether it came to the bar, in how many seconds, and the scores on the way."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        judge = train(env_id, seed)
    solved = judge.scores[-1][1] >= BARS[env_id]
    return {"seed": seed, "solved": solved, "seconds": round(judge.seconds(), 1), "scores": judge.scores}


CONTESTANTS = {"ppo.py": ours, "torchrun": torchrun, "Stable-Baselines3": stable_baselines3}
CONTESTANTS |= {"dqn.py": partial(ours, name="dqn"), "Stable-Baselines3 DQN": partial(stable_baselines3, name="DQN")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env_ids", nargs="*", metavar="ENV_ID", help=f"of {', '.join(BARS)}; by default both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=["ppo.py", "Stable-Baselines3"])
    options = parser.parse_args()
    if unknown := set(options.env_ids) - set(BARS):
        parser.error(f"no bar for {', '.join(sorted(unknown))}")
    for env_id in options.env_ids or BARS:
        for seed in options.seeds:
            for name in options.only:
                if name == "torchrun":
                    keep(env_id, name, torchrun(env_id, seed))
                    continue
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own
                    keep(env_id, name, pool.apply(race, (CONTESTANTS[name], env_id, seed)))
        print(f"\n{env_id}, until 100 episodes return {BARS[env_id]} on average\n")
        print("| | median | seconds, seed by seed |\n| --- | --- | --- |")
        for name, runs in load()[env_id].items():
            seconds = [str(run["seconds"]) if run["solved"] else f"not in {run['seconds']}" for run in runs]
            median = np.median([run["seconds"] if run["solved"] else np.inf for run in runs])
            print(f"| {name} | {median:.1f} s | {'; '.join(seconds)} |", flush=True)


def load():
    """All that was ever measured: {environment: {contestant: [a run, ...]}}."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(env_id, name, run):
    """Put a run into the file, in the place of the same seed's."""
    kept = load()
    others = [other for other in kept.setdefault(env_id, {}).get(name, []) if other["seed"] != run["seed"]]
    kept[env_id][name] = sorted([*others, run], key=lambda run: run["seed"])
    RESULTS.write_text(json.dumps(kept) + "\n")
    print(f"{env_id}, {name}, seed {run['seed']}: {run['seconds']} s, score {run['scores'][-1][1]:.0f}", flush=True)


if __name__ == "__main__":
    main()
