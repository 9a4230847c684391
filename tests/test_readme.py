"""README.md: the scripts take its commands, its Python runs, and what it names is there."""

import importlib
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, flags_of, succeeded

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?s)```(\w+)\n(.*?)```", README)
PROSE = re.sub(r"(?s)```.*?```", "", README)
TOOLS = ("python", "torchrun", "uv", "pip", "hf", "tensorboard", "pytest")


def commands():
    """Every command of README, of its blocks and between its lines, as a list of words."""
    lines = [line.split("  #")[0] for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    lines += [span for span in re.findall(r"`([^`]+)`", PROSE) if span.split()[0] in TOOLS and " " in span]
    found = [shlex.split(command) for line in lines for command in line.split("&&") if command.strip()]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def script_of(words):
    """Where the name of one of our scripts stands in a command, or None."""
    return next((at for at, word in enumerate(words) if word in SCRIPTS), None)


OF_SCRIPTS = [words for words in commands() if script_of(words) is not None]
OF_TOOLS = [words for words in commands() if words[0] not in ("python", "uv")]  # uv is no requirement of ours
OF_BENCHMARKS = [words for words in commands() if words[0] == "python" and words not in OF_SCRIPTS]


@pytest.fixture(scope="module")
def finished(shell, tmp_path_factory):
    """A function: script -> the folder of a finished run of it, one for all tests of a script."""
    folders = {}

    def of(script):
        if script not in folders:
            cwd = tmp_path_factory.mktemp("finished")
            succeeded(shell.script(script, *flags_of(script), cwd=cwd))
            (folders[script],) = cwd.glob("runs/*")
        return str(folders[script])

    return of


def test_there_are_commands_of_every_kind():
    assert {words[script_of(words)] for words in OF_SCRIPTS} == {*SCRIPTS}
    assert {words[0] for words in OF_TOOLS + OF_SCRIPTS} == {*TOOLS}
    assert {Path(words[1]).name for words in OF_BENCHMARKS} >= {"throughput.py", "time_to_solve.py"}


@pytest.mark.parametrize("words", OF_SCRIPTS, ids=" ".join)
def test_a_script_takes_the_flags(words, finished):
    at = script_of(words)
    script, flags = words[at], words[at + 1 :]
    for name in {"--resume", "--evaluate"} & {*flags}:
        source = flags.index(name) + 1
        flags[source] = finished(script) if flags[source] in ("runs/...", "user/name") else flags[source]
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        return
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    for flag, value in pairwise(flags):
        if flag.startswith("--") and not value.startswith("--"):
            assert str(getattr(args, flag[2:].replace("-", "_"))) == value


@pytest.mark.parametrize("words", OF_TOOLS, ids=" ".join)
def test_a_tool_has_the_flags(words, shell):
    words = words[: script_of(words)]
    flags = [word for word in words if word.startswith("-")]
    subcommands = [word for word in words[1:3] if word.isalpha() and words[0] in ("pip", "hf")]
    text = succeeded(shell.run([words[0], *subcommands, "--help"])).stdout
    assert [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)] == []


@pytest.mark.parametrize("words", OF_BENCHMARKS, ids=" ".join)
def test_a_benchmark_has_the_flags_and_the_sections(words):
    text = (ROOT / words[1]).read_text()
    assert [word for word in words[2:] if f'"{word}"' not in text] == []


@pytest.mark.parametrize("command", ["python q_learning.py", "python ppo.py", "python ppo.py --evaluate random"])
def test_what_takes_seconds_runs(command, shell, tmp_path):
    words = shlex.split(command)
    assert words in commands()
    result = succeeded(shell.run([sys.executable, ROOT / words[1], *words[2:]], cwd=tmp_path))
    assert "mean_reward" in result.stdout and [*tmp_path.glob("runs/*")]


def test_the_python_runs(finished):
    (code,) = (block for language, block in BLOCKS if language == "python")
    names = {}
    exec(code.replace("user/name", finished("ppo.py")), names)
    assert 9 < names["mean_reward"] <= 500 and names["std_reward"] >= 0


def test_what_it_names_is_there():
    assert [path for path in re.findall(r'(?:\]\(|src=")([^)"#:]+)[)"#]', README) if not (ROOT / path).exists()] == []
    for test, path in re.findall(r"\[(test_\w+)\]\((\S+)\)", README):
        assert f"def {test}(" in (ROOT / path).read_text(), test
    anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)", README)]
    assert {*re.findall(r"\]\(#([^)]*)\)", README)} <= {*anchors}


def test_the_functions_to_read_are_in_the_files():
    lessons = re.findall(r"(?s)\*\*\[(\w+\.py)\]\(.*?\)\*\*(.*?)(?=\n- \*\*\[|\n## )", README)
    assert sorted(script for script, _ in lessons) == sorted(SCRIPTS)
    read = ""  # each lesson may speak of the files before
    for script, text in lessons:
        read += (ROOT / script).read_text()
        names = re.findall(r"`(\w+)`", text)
        assert names and [name for name in names if not re.search(rf"(?m)^(def|class) {name}\b", read)] == []
