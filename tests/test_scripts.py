"""What all scripts have in common: copies that stay copies, headers that match requirements.txt, no shared code."""

import ast
import re
import sys
import tomllib
from itertools import combinations

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

SCRIPTS = sorted(ROOT.glob("*.py"))
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)

# Where the scripts really differ. Everything else that has one name has one text.
MAY_DIFFER = {"parse_args", "make_env", "Agent", "act", "make_policy"}
MAY_DIFFER |= {"update", "train", "load_agent", "main"}


def definitions(path):
    """The source of each top-level function and class, by name."""
    source = path.read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def header(path):
    """The PEP 723 block, parsed as its specification says."""
    (block,) = re.findall(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", path.read_text())
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block[0].splitlines(True)))


def imports(path):
    """The names of the packages that a script imports, anywhere in it."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


GAME = "gym-super-mario-bros"  # only the game's file is used; with its dependencies it would want a C++ compiler


@every_script
def test_the_header_lists_what_the_script_imports_in_the_ranges_of_requirements_txt(path):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known = {one.name: one for one in (Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line))}
    assert GAME not in known
    block = header(path)
    assert block["requires-python"] == ">=3.11"
    listed = {one.name: one for one in map(Requirement, block["dependencies"])}
    if game := listed.pop(GAME, None):
        assert str(game.specifier) == "==7.4.0"
        (override,) = block["tool"]["uv"]["override-dependencies"]
        assert override.startswith("nes-py") and "never" in override
    for name, one in listed.items():
        assert one.extras <= known[name].extras
        if name == "torch":  # requirements.txt has the range that was tested; a script must not replace a newer one
            assert str(one.specifier) in str(known[name].specifier).split(",")
        else:
            assert one.specifier == known[name].specifier

    packages = {"cv2": "opencv-python-headless", "huggingface_hub": "huggingface_hub"}
    imported = {packages.get(name, name.replace("_", "-")) for name in imports(path) - sys.stdlib_module_names}
    # imageio-ffmpeg is imageio's backend for MP4: imported by it, not by us; torch brings the TensorBoard writer.
    assert imported - {"wandb", "IPython"} == listed.keys() - {"imageio-ffmpeg", "tensorboard"}


# What Colab ships, by pip-freeze.txt of https://github.com/googlecolab/backend-info (19 August 2026, Python 3.13).
COLAB = dict(torch="2.11.0+cpu", gymnasium="1.3.0", numpy="2.1.3", tensorboard="2.20.0", huggingface_hub="1.27.0")
COLAB |= dict(safetensors="0.8.0", imageio="2.37.4", tqdm="4.67.3", wasabi="1.1.3")
COLAB |= {"imageio-ffmpeg": "0.6.0", "opencv-python-headless": "5.0.0.93"}


@every_script
def test_what_colab_ships_need_not_be_replaced(path):
    readme = (ROOT / "README.md").read_text().split("### Colab")[1].split("\n### ")[0]
    asked = [text for line in re.findall(r"`%pip install (.*?)`", readme) for text in re.findall(r'"(.*?)"', line)]
    assert asked
    for requirement in map(Requirement, [*header(path)["dependencies"], *asked]):
        if requirement.name not in ("stable-retro", GAME):  # which are not there
            assert requirement.specifier.contains(COLAB[requirement.name]), requirement


@every_script
def test_every_script_stands_alone(path):
    assert not imports(path) & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("one, other", [*combinations(SCRIPTS, 2)], ids=lambda path: path.name)
def test_functions_of_one_name_have_one_text(one, other):
    ours, theirs = definitions(one), definitions(other)
    differ = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differ <= MAY_DIFFER


@every_script
def test_rooms_stand_in_the_same_order(path):
    rooms = ["Flags", "The environment", "The agent", "The math", "Training", "Evaluation and replay"]
    rooms += ["The run folder, the package and the Hub", "Main"]
    assert re.findall(r"(?m)^# --- (.*) -{10,}$", path.read_text()) == rooms
