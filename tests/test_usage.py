"""The table of modes means what it says, and --help is made of it."""

import ast
import pathlib
import shlex

import pytest

from cxa_jax.usage import MODES, format_help

ROOT = pathlib.Path(__file__).parents[1]
HELPS = {flag: f"what {flag} is" for mode in MODES.values() for flag in mode.flags} | {"mode": "what to do"}


@pytest.mark.parametrize("name", MODES)
def test_targets_exist_and_take_as_many_arguments(name):
    module, function = MODES[name].target.split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert len(found.args.args) == len(MODES[name].arguments)


@pytest.mark.parametrize("name", MODES)
def test_examples_use_flags_of_their_mode(name):
    program, script, *flags = shlex.split(MODES[name].example)
    assert (program, script) == ("python", "launch.py")
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert given.pop("mode", "train") == name
    assert {flag.split(".")[0] for flag in given} <= set(MODES[name].flags)
    if "config" in MODES[name].flags:
        assert (ROOT / given["config"]).is_file()


def test_every_mode_and_every_flag_is_shown():
    text = format_help("Title", HELPS | {"num_lions": "of several modes\nor none"})
    assert text.startswith("Title\n")
    for name, mode in MODES.items():
        assert f"--mode={name}" in text and mode.example in text and mode.summary in text
    for flag, words in HELPS.items():
        assert flag == "mode" or words in text
    assert text.index("Flags of more than one mode") < text.index("of several modes or none")
    assert "Flags of more than one mode" not in format_help("Title", HELPS)


def test_a_flag_without_help_is_a_mistake():
    with pytest.raises(KeyError):
        format_help("Title", {})
