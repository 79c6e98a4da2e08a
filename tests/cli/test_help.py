"""Help: groups, examples and suggestions."""

from __future__ import annotations

import shlex

import click
import pytest
from click.shell_completion import ShellComplete

from sskt.cli.help import GroupedCommand
from sskt.cli.main import COMMANDS, cli, run
from sskt.teacher_cache.errors import UnknownName

CONTEXT = click.Context(cli, info_name="sskt")
LISTED = [name for name in COMMANDS if name != "token"]  # token is a group of three commands


def command(name: str) -> GroupedCommand:
    found = cli.get_command(CONTEXT, name)
    assert isinstance(found, GroupedCommand)
    return found


@pytest.mark.parametrize("name", LISTED)
def test_a_command_has_two_examples_whose_options_exist(name: str) -> None:
    found = command(name)
    assert len(found.examples) == 2
    for example in found.examples:
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("sskt", name)
        context = click.Context(found, info_name=f"sskt {name}")
        found.make_parser(context).parse_args(arguments)
        assert f"  {example}" in found.get_help(context).splitlines()


@pytest.mark.parametrize("name", [n for n in LISTED if len(command(n).params) > 12])
def test_each_option_of_a_long_command_is_in_one_group(name: str) -> None:
    found = command(name)
    grouped = [option for group in found.groups.values() for option in group]
    own = {p.name for p in found.params if isinstance(p, click.Option)} - {"as_json"}
    assert own <= set(grouped), "not in a group"
    assert len(grouped) == len(set(grouped)), "in two groups"


@pytest.mark.parametrize("name", LISTED)
def test_every_option_has_a_help_of_full_words(name: str) -> None:
    for parameter in command(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith((".", ")", "]")), f"{parameter.name}: {parameter.help}"


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("trainn", "'train'"), ("cach-teachers", "'cache-teachers'"), ("dataset", "'datasets'")],
)
def test_a_mistyped_command_is_suggested(
    typed: str, suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([typed]) == 2
    assert f"did you mean {suggested}" in capsys.readouterr().err


def test_a_mistyped_name_is_suggested() -> None:
    few = str(UnknownName("target", "stl-10", ["cifar10", "stl10", "shapes"]))
    assert few == "unknown target 'stl-10'; known: cifar10, stl10, shapes (did you mean 'stl10'?)"
    known = ["resnet50", "resnet18", *(f"{letter}_net" for letter in "abcdefghijklmnopqrstuvwxyz")]
    many = str(UnknownName("architecture", "resnet5O", known))
    assert "did you mean 'resnet50'" in many
    assert "z_net" not in many
    assert str(UnknownName("x", "zzz", ["a"], "or FILE")) == "unknown x 'zzz'; known: a; or FILE"


@pytest.mark.parametrize("name", ["policies", "models", "encodings", "recipes"])
def test_the_lists_print(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("name ")
    assert len(lines) > 4
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("sskt cache-teachers --target cif", ["cifar10", "cifar100"]),
        ("sskt cache-teachers --source pl", ["places365"]),
        ("sskt train --policy pad", ["pad-crop-flip"]),
        ("sskt train --model resnet3d1", ["resnet3d10", "resnet3d18"]),
        ("sskt train --recipe stl", ["stl10-resnet20"]),
        ("sskt cache-teachers --encoding u", ["u8"]),
        ("sskt exp", ["export", "export-model"]),
    ],
)
def test_names_are_completed(words: str, completed: list[str]) -> None:
    program, *arguments, incomplete = words.split()
    complete = ShellComplete(cli, {}, program, "_SSKT_COMPLETE")
    assert [one.value for one in complete.get_completions(arguments, incomplete)] == completed
