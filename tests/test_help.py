"""Every script's --help: lines of 100 columns, a text for each option, and examples that its own parser takes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from medssl import compare
from medssl.engine.helptext import arrange
from medssl.study import plan

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "def get_parser" in path.read_text()]
SCRIPTS += [f"preprocess.{path.stem}" for path in sorted(ROOT.glob("preprocess/*.py")) if "Parser(" in path.read_text()]
BENCHMARKS = [
    f"benchmarks.{path.stem}" for path in sorted(ROOT.glob("benchmarks/*.py")) if "Parser(" in path.read_text()
]


def parser_of(script):
    return importlib.import_module(f"medssl.{script}").get_parser()


def test_all_scripts_are_here():
    assert len(SCRIPTS) > 25
    assert {"train_concl", "compare", "preprocess.tiles", "demo"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_reads_well(script):
    parser = parser_of(script)
    text = parser.format_help()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for action in parser._actions:
        assert action.help, action.option_strings
    before, _, examples = text.partition("\nexamples:\n")
    assert len(re.findall(r"^  (?:python|torchrun) ", examples, flags=re.M)) >= 2
    assert not re.search(r"^\s*(?:python|torchrun) ", before, flags=re.M)


@pytest.mark.parametrize("script", [*SCRIPTS, *BENCHMARKS])
def test_many_options_are_grouped(script):
    """Under "options:" many would stand in one heap: more than six have groups with names, and only --help is left."""
    parser = parser_of(script)
    groups = {group.title: len(group._group_actions) for group in parser._action_groups if group._group_actions}
    own = sum(groups.values()) - 1  # less --help
    if own > 6:
        assert groups.pop("options") == 1
        groups.pop("positional arguments", None)
        assert len(groups) >= 2
        assert all(f"\n{title}:\n" in parser.format_help() for title in groups)


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_are_taken(script):
    examples = parser_of(script).format_help().partition("\nexamples:\n")[2].replace(" \\\n", " ")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    own = 0
    for line in lines:
        if line.startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        words = words[words.index("--") + 1 :] if words[0] == "torchrun" else words[1:]
        name = words[0].removesuffix(".py").replace("/", ".")
        own += name == script
        if name == "compare":
            args, rest = compare.get_parser().parse_known_args(words[1:])
            for task in args.task:
                plan.TASKS[task].script.get_parser().parse_args(rest)
        else:
            parser_of(name).parse_args(words[1:])
    assert own >= 1


def test_a_docstring_is_arranged():
    assert arrange("") == ("", "")
    text, examples = arrange(
        """One line
that goes on.

  python a.py --b 1 2 --name "x y"      (no data)
  python a.py --very-long-option with-a-very-long-value --another-long-option with-another-long-value
      --last 1 2 3

  key   short
  name  a text that is so long that it does not fit into the hundred columns that a terminal has, and must go on

The end.
"""
    )
    assert text == (
        "One line that goes on.\n\n  key   short\n"
        "  name  a text that is so long that it does not fit into the hundred columns that a terminal has,\n"
        "        and must go on\n\nThe end."
    )
    assert examples == (
        'examples:\n  # no data\n  python a.py --b 1 2 --name "x y"\n'
        "  python a.py --very-long-option with-a-very-long-value \\\n"
        "      --another-long-option with-another-long-value --last 1 2 3"
    )
