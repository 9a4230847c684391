"""Train every task over several seeds, as a user would, keep what came out, and draw it.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/results.py train                   # all tasks; or: train ppo-cartpole ppo-lunarlander
    python benchmarks/results.py train --jobs 2 reinforce-pixelcopter   # two runs side by side, where time is no matter
    OMP_NUM_THREADS=1 python benchmarks/results.py train --jobs 2 mario-1-1 mario-1-2   # threads of two runs, at odds
    python benchmarks/results.py ablate --jobs 2         # ppo-lunarlander, changed in one thing at a time
    python benchmarks/results.py draw                    # docs/learning-curves.png, ablation.png, mario-stages.png
    python benchmarks/results.py table                   # the table of the README
    python benchmarks/results.py stages                  # the table of the stages of Super Mario Bros.
    python benchmarks/results.py film NAME runs/...      # docs/NAME.gif, from the replay of a run, or of several

Every run is a whole command in a process of its own, in the folder that you are in. What it scored, how long it took
and its learning curve go to benchmarks/results.json; a run of the same task and seed replaces the older one.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent
RESULTS = HERE / "results.json"
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))
keeping = threading.Lock()  # one at a time changes the file

SEEDS = (1, 2, 3, 4, 5)
FRESH = tuple(range(101, 121))  # had no part in the choice of settings
TASKS = {  # what the README's table calls it, the command, the seeds
    "dqn-cartpole": ("CartPole-v1", "dqn.py", range(501, 521)),
    "dqn-acrobot": ("Acrobot-v1", "dqn.py --env-id Acrobot-v1", FRESH[:5]),
    "dqn-mountaincar": ("MountainCar-v0", "dqn.py --env-id MountainCar-v0", range(116, 121)),
    "dqn-lunarlander": ("LunarLander-v2", "dqn.py --env-id LunarLander-v2", range(141, 161)),
    "ppo-cartpole": ("CartPole-v1", "ppo.py", FRESH),
    "ppo-acrobot": ("Acrobot-v1", "ppo.py --env-id Acrobot-v1", FRESH),
    "ppo-lunarlander": ("LunarLander-v2", "ppo.py --env-id LunarLander-v2", FRESH),
    "reinforce-cartpole": ("CartPole-v1", "reinforce.py", FRESH),
    "reinforce-pixelcopter": ("Pixelcopter-PLE-v0", "reinforce.py --env-id Pixelcopter-PLE-v0", SEEDS[:3]),
    "q-frozenlake": ("FrozenLake-v1 4x4, no slipping", "q_learning.py", SEEDS),
    "q-frozenlake-8x8": ("FrozenLake-v1 8x8, no slipping", "q_learning.py --map-name 8x8", SEEDS),
    "q-frozenlake-slippery": (
        "FrozenLake-v1 4x4, slippery",
        "q_learning.py --is-slippery --n-eval-episodes 1000",
        SEEDS,
    ),
    "q-frozenlake8x8": (
        "FrozenLake8x8-v1, slippery",
        "q_learning.py --env-id FrozenLake8x8-v1 --n-eval-episodes 1000",
        SEEDS,
    ),
    "q-cliffwalking": ("CliffWalking-v1", "q_learning.py --env-id CliffWalking-v1", SEEDS),
    "q-taxi": ("Taxi-v3", "q_learning.py --env-id Taxi-v3", SEEDS),
}
STAGES = [(world, stage) for world in range(1, 9) for stage in range(1, 5)]
for world, stage in STAGES:
    env_id = f"SuperMarioBros-{world}-{stage}-v0"
    command = "ppo_mario.py" + f" --env-id {env_id}" * ((world, stage) != (1, 1))
    TASKS[f"mario-{world}-{stage}"] = (env_id, command, SEEDS[:3] if world == 1 else SEEDS[:1])
ABLATED = "ppo-lunarlander"
CHANGES = {  # what each ablation is called, and what it adds to the command
    "no truncation": "",  # a time limit counts as failure, see `without_truncation`
    "no GAE": "--gae-lambda 1",
    "no clipping": "--clip-coef 1e6",
    "no annealing": "--no-anneal-lr",
    "no reward scale": "--reward-scale 1",
}
PATCHED = [
    "-c",
    f"import sys; sys.path[:0] = [{str(HERE)!r}]; import results; results.without_truncation(sys.argv[1:])",
]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(task, command, seed, jobs, program=()):
    """Run one command with this seed, and keep what is worth keeping of it.

    program: what to start in the script's place, which gets the script's flags.
    """
    script, *flags = shlex.split(command)
    name = f"seed-{seed}-{time.time_ns()}"  # by which its folder is found
    flags += ["--seed", str(seed), "--exp-name", name]
    commit = commit_of(script)  # now, and not an hour later
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *(program or [str(ROOT / script)]), *flags], stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"error: {command} --seed {seed} ended with exit code {done.returncode}")
    (run_folder,) = Path("runs").glob(f"*__{name}__*")
    results = summary(task, command, seed, run_folder, seconds, jobs) | {"commit": commit}
    with keeping:
        keep(results)


def commit_of(script):
    """The commit that changed the script last, and -dirty where the file differs from it."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "log", "-1", "--format=%h", "--", script]).stdout.strip()
    return commit + "-dirty" * (git(["git", "diff", "--quiet", "HEAD", "--", script]).returncode != 0)


def summary(task, command, seed, run_folder, seconds, jobs):
    """What is worth keeping of a finished run: its score, its times, its learning curve."""
    results = json.loads((run_folder / "hub" / "results.json").read_text())
    curves, training_seconds = events_of(run_folder / "hub" / "logs")
    result = {
        "task": task,
        "command": f"python {command} --seed {seed}",
        "seed": seed,
        "mean_reward": results["mean_reward"],
        "std_reward": results["std_reward"],
        "n_eval_episodes": results["n_eval_episodes"],
        **({"flag_rate": results["flag_rate"]} if "flag_rate" in results else {}),
        "training_seconds": round(training_seconds, 1),
        "command_seconds": round(seconds, 1),
        "runs_side_by_side": jobs,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}",
        "curve": thin(curves["charts/episodic_return"]),
    }
    if "charts/flag_rate" in curves:
        result["flag_curve"] = thin(curves["charts/flag_rate"])
    return result


def events_of(logs):
    """The curves of a run, {tag: [(step, value), ...]}, and the seconds from their first event to their last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    curves, times = {}, []
    for tag in events.Tags()["scalars"]:
        curves[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        times += [event.wall_time for event in events.Scalars(tag)]
    return curves, max(times) - events.Tensors("hyperparameters/text_summary")[0].wall_time


def thin(curve, points=100):
    """A curve as the means of at most so many stretches of equal length in steps: [[step, mean], ...]."""
    steps, values = np.array(curve, dtype=float).T
    stretch = np.ceil(steps / steps[-1] * points).astype(int)
    return [[int(steps[stretch == i].max()), round(float(values[stretch == i].mean()), 4)] for i in np.unique(stretch)]


def keep(results):
    """Put a run's results into the file, in the place of the same task's and seed's."""
    kept = [run for run in load() if (run["task"], run["seed"]) != (results["task"], results["seed"])]
    kept = sorted([*kept, results], key=lambda run: (run["task"], run["seed"]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(run) for run in kept) + "\n]\n")
    print(f"{results['command']}: {results['mean_reward']:.2f} +/- {results['std_reward']:.2f}", flush=True)


def load(task=None):
    """The runs in the file, of one task or all."""
    runs = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    return [run for run in runs if task in (None, run["task"])]


def without_truncation(argv):
    """The main of a ppo.py to which a time limit is an end like any other, as it is to CleanRL's."""
    import gymnasium as gym

    import ppo

    class FailAtTimeLimit(gym.Wrapper):
        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            return observation, reward, terminated or truncated, False, info

    make_env = ppo.make_env
    ppo.make_env = lambda *args, **kwargs: FailAtTimeLimit(make_env(*args, **kwargs))
    ppo.main(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def draw():
    """docs/learning-curves.png, ablation.png and mario-stages.png, as far as there are runs."""
    left_out = {"q-frozenlake-8x8", "q-frozenlake-slippery", *(f"mario-{w}-{s}" for w, s in STAGES[1:])}
    tasks = [task for task in TASKS if load(task) and task not in left_out]
    rows = -(-len(tasks) // 5)
    figure, axes = new_figure(rows, 5, (14, 2.6 * rows))
    for ax, task in zip(axes.flat, tasks):
        name, command, _ = TASKS[task]
        script = command.split()[0]
        band(ax, load(task), "C0")
        ax.set_title(f"{name}\n{script}", fontsize=9)
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("return of an episode")
    save(figure, "learning-curves")

    draw_stages()
    if not any(load(f"ablation: {name}") for name in CHANGES):
        return
    figure, axes = new_figure(1, 1, (8, 4))
    for i, (name, task) in enumerate([("as it is", ABLATED), *((name, f"ablation: {name}") for name in CHANGES)]):
        if runs := load(task):
            scores = [run["mean_reward"] for run in runs]
            label = f"{name}: {mean_and_spread(scores, 0)} over {len(scores)} seeds"
            band(axes[0, 0], runs, f"C{i}", label=label)
    axes[0, 0].set_title(f"{TASKS[ABLATED][1]}, and one change at a time")
    axes[0, 0].set(xlabel="steps", ylabel="return of a training episode")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right", title="score of 100 greedy episodes")
    save(figure, "ablation")


def draw_stages():
    """docs/mario-stages.png: the flags in 100 episodes of every stage that was tried, of its worst seed."""
    figure, axes = new_figure(1, 1, (5.2, 3.2))
    flags = np.full((4, 8), np.nan)
    for world, stage in STAGES:
        if runs := load(f"mario-{world}-{stage}"):
            flags[stage - 1, world - 1] = worst = 100 * min(run["flag_rate"] for run in runs)
            axes[0, 0].text(world, stage, f"{worst:.0f}", ha="center", va="center")
    grid = np.arange(9) + 0.5
    axes[0, 0].pcolormesh(grid, grid[:5], flags, cmap="RdYlGn", vmin=0, vmax=100, alpha=0.6, edgecolors="white")
    axes[0, 0].set(xticks=range(1, 9), yticks=range(1, 5), xlabel="world", ylabel="stage", ylim=(4.5, 0.5))
    axes[0, 0].set(aspect="equal", facecolor="0.95")
    axes[0, 0].set_title("flags in 100 episodes, the worst seed's; empty: not tried")
    axes[0, 0].grid(visible=False)
    save(figure, "mario-stages")


def new_figure(rows, columns, size):
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": True})
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure, name):
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    print(DOCS / f"{name}.png")


def band(ax, runs, color, label=None):
    """The mean over the seeds, and from the lowest to the highest."""
    steps = np.linspace(0, min(run["curve"][-1][0] for run in runs), 101)[1:]
    curves = np.array([np.interp(steps, *np.array(run["curve"]).T) for run in runs])
    ax.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, linewidth=0)
    ax.plot(steps, curves.mean(axis=0), color=color, linewidth=1.5, label=label)


def mean_and_spread(scores, digits):
    """The mean over seeds +/- their standard deviation, as the sample of all seeds that they are (n - 1)."""
    spread = f"{np.std(scores, ddof=1):.{digits}f}" if len(scores) > 1 else "?"
    return f"{np.mean(scores):.{digits}f} +/- {spread}"


def table():
    """The results as the README's table has them: all seeds, their mean, the leaderboard's result and the times."""
    print("| task | command | score | mean - std | training |\n| --- | --- | --- | --- | --- |")
    for task, (name, command, _) in TASKS.items():
        if not (runs := load(task)):
            continue
        scores = [run["mean_reward"] for run in runs]
        results = [run["mean_reward"] - run["std_reward"] for run in runs]
        seconds = [run["training_seconds"] for run in runs]
        print(
            f"| {name} | `python {command}` | {mean_and_spread(scores, 2)} over {len(runs)} seeds "
            f"({' '.join(f'{score:.1f}' for score in scores)}) | {np.mean(results):.2f} "
            f"({' '.join(f'{result:.1f}' for result in results)}) | {min(seconds):.0f} to {max(seconds):.0f} s "
            f"(command {max(run['command_seconds'] for run in runs):.0f} s) |"
        )


def stages():
    """A table of the stages of Super Mario Bros. that were tried, a row for each seed."""
    print("| stage | seed | first flag within | half of 100 within | flags in 100 | training | commit |")
    print("|" + " --- |" * 7)
    for world, stage in STAGES:
        for run in load(f"mario-{world}-{stage}"):
            first, half = (
                next((f"{step:,} steps" for step, rate in run["flag_curve"] if rate >= least), "")
                for least in (1e-9, 0.5)
            )
            beside = ["", " beside another", " beside two"][run["runs_side_by_side"] - 1]
            minutes = f"{run['training_seconds'] / 60:.0f} min{beside}"
            flags = f"{100 * run['flag_rate']:.0f}"
            print(f"| {world}-{stage} | {run['seed']} | {first} | {half} | {flags} | {minutes} | {run['commit']} |")


def film(name, run_folders, seconds=6.0, speed=1.0, height=150, fps=20):
    """docs/NAME.gif: so many seconds of each run's replay, one after the other, small."""
    import imageio.v2 as imageio
    from PIL import Image

    frames = []
    for run_folder in run_folders:
        reader = imageio.get_reader(Path(run_folder) / "hub" / "replay.mp4")
        filmed_at = reader.get_meta_data()["fps"] * speed
        every = max(round(filmed_at / fps), 1)
        for frame in itertools.islice(reader, 0, int(seconds * filmed_at), every):
            image = Image.fromarray(frame)
            size = round(image.width * height / image.height), height
            frames.append(image.resize(size, Image.Resampling.LANCZOS).quantize(64, dither=0))
    path = DOCS / f"{name}.gif"
    durations = [1000 * every / filmed_at] * (len(frames) - 1) + [1000]  # a moment of rest before it starts anew
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    print(f"{path}, {len(frames)} frames, {path.stat().st_size / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("train", "ablate"):
        job = jobs.add_parser(name)
        job.add_argument("--jobs", type=int, default=1, help="runs side by side; their times are then no measure")
        job.add_argument("--seeds", type=int, nargs="+", help="by default the task's own")
        job.add_argument("names", nargs="*", help="by default all of them", metavar="NAME")
    for name in ("draw", "table", "stages"):
        jobs.add_parser(name)
    job = jobs.add_parser("film")
    job.add_argument("name")
    job.add_argument("run_folders", nargs="+", metavar="RUN_FOLDER")
    job.add_argument("--seconds", type=float, default=6.0, help="of the film, for each run")
    job.add_argument("--speed", type=float, default=1.0)
    job.add_argument("--fps", type=int, default=20)
    options = parser.parse_args()

    if options.job == "draw":
        return draw()
    if options.job == "table":
        return table()
    if options.job == "stages":
        return stages()
    if options.job == "film":
        return film(options.name, options.run_folders, options.seconds, options.speed, fps=options.fps)
    known = TASKS if options.job == "train" else CHANGES
    if unknown := set(options.names) - set(known):
        parser.error(f"no {', '.join(sorted(unknown))} among: {', '.join(known)}")
    runs = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in options.names or known:
            if options.job == "train":
                _, command, seeds = TASKS[name]
                task, program = name, ()
            else:
                _, command, seeds = TASKS[ABLATED]
                task, command = f"ablation: {name}", f"{command} {CHANGES[name]}".strip()
                program = PATCHED if name == "no truncation" else ()
            for seed in options.seeds or seeds:
                runs.append(pool.submit(train, task, command, seed, options.jobs, program))
        for run in runs:
            run.result()


if __name__ == "__main__":
    main()
