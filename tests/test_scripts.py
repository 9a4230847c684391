"""What all scripts have in common: copies that stay copies, headers that match requirements.txt, no shared code."""

import ast
import re
import sys
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))

# Where the scripts really differ. Everything else that has one name has one text.
MAY_DIFFER = {
    "parse_args",
    "make_env",
    "Agent",
    "Policy",
    "make_policy",
    "train",
    "save_agent",
    "load_agent",
    "load_from_hub",
    "main",
}


def definitions(path):
    """The source of each top-level function and class, by name."""
    source = path.read_text()
    named = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named[node.name] = ast.get_source_segment(source, node)
    return named


def requirements(lines):
    """{name: (extras, range)} of lines like `name[extra]>=1,<2; marker  # comment`."""
    parsed = {}
    for line in lines:
        name, extras, version = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]*)\])?([^;#\s]*).*", line).groups()
        parsed[name] = (set((extras or "").split(",")) - {""}, version)
    return parsed


def header(path):
    """The PEP 723 block, parsed as its specification says."""
    (block,) = re.findall(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", path.read_text())
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block[0].splitlines(True)))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_header_lists_what_the_script_imports_in_the_ranges_of_requirements_txt(path):
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match(r"\w", line)]
    known = requirements(lines)
    block = header(path)
    assert block["requires-python"] == ">=3.11"
    for name, (extras, version) in requirements(block["dependencies"]).items():
        assert extras <= known[name][0]
        if name == "torch":  # requirements.txt has the range that was tested; a script must not replace a newer one
            assert known[name][1].split(",")[0] == version
        else:
            assert known[name][1] == version

    roots = {node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)}
    roots |= {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    packages = {"PIL": "pillow", "cv2": "opencv-python-headless"}  # where the import has another name
    imported = {packages.get(root.split(".")[0], root.split(".")[0].replace("_", "-")) for root in roots}
    listed = {name.replace("_", "-") for name in requirements(block["dependencies"])}
    optional = {
        "wandb",
        "IPython",
        "pygame",
    }  # pygame: gymnasium's play and HumanRendering want it, and its extras bring it
    third_party = {name for name in imported if name.replace("-", "_") not in sys.stdlib_module_names} - optional
    # imageio-ffmpeg is imageio's backend for MP4: imported by it, not by us; torch brings the TensorBoard writer; of
    # gym-super-mario-bros only the game's file is used.
    assert third_party == listed - {"imageio-ffmpeg", "tensorboard", "gym-super-mario-bros"}


# What Colab ships, by pip-freeze.txt of https://github.com/googlecolab/backend-info (19 August 2026, Python 3.13).
COLAB = {
    "torch": "2.11.0+cpu",
    "gymnasium": "1.3.0",
    "numpy": "2.1.3",
    "tensorboard": "2.20.0",
    "huggingface_hub": "1.27.0",
    "imageio": "2.37.4",
    "imageio-ffmpeg": "0.6.0",
    "pillow": "11.3.0",
    "opencv-python-headless": "5.0.0.93",
    "tqdm": "4.67.3",
    "wasabi": "1.1.3",
}
NOT_ON_COLAB = {"stable-retro", "gym-super-mario-bros"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_colab_ships_need_not_be_replaced(path):
    for requirement in map(Requirement, header(path)["dependencies"]):
        if requirement.name not in NOT_ON_COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), requirement


def test_the_readme_s_colab_lines_replace_nothing():
    colab = (ROOT / "README.md").read_text().split("### Colab")[1].split("\n### ")[0]
    lines = re.findall(r"`%pip install -q (.*?)`", colab)
    asked = [Requirement(text) for line in lines for text in re.findall(r'"(.*?)"', line)]
    assert {requirement.name for requirement in asked} == {"gymnasium", *NOT_ON_COLAB}
    for requirement in asked:
        assert requirement.name in NOT_ON_COLAB or requirement.specifier.contains(COLAB[requirement.name])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_stands_alone(path):
    names = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_public_functions_say_what_they_do(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_functions_of_one_name_have_one_text():
    for one, other in combinations(SCRIPTS, 2):
        ours, theirs = definitions(one), definitions(other)
        for name in (ours.keys() & theirs.keys()) - MAY_DIFFER:
            assert ours[name] == theirs[name], f"{name} differs between {one.name} and {other.name}"


def test_rooms_stand_in_the_same_order():
    rooms = [
        "Flags", "The environment", "The agent", "The math", "Training", "Evaluation and replay",
        "The run folder, the package and the Hub", "Main",
    ]  # fmt: skip
    for path in SCRIPTS:
        titles = re.findall(r"(?m)^# -{100,}\n# (.*)\n# -{100,}$", path.read_text())
        assert titles == rooms
