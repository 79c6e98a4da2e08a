"""The README and the pages: transcripts print what they show, other commands are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.ports import free_port
from support.transcripts import BLOCK, ROOT, Shell, agrees, pages, prepare, steps_of

from sskt.cli.main import cli

SHOWN = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def shell(tmp_path: Path, data: Path) -> Iterator[Shell]:
    prepare(tmp_path, data)
    shell = Shell(tmp_path, free_port())
    yield shell
    shell.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_transcript_prints_what_it_shows(page: Path, shell: Shell) -> None:
    for block in BLOCK.findall(page.read_text("utf-8")):
        for step in steps_of(block):
            found, status = shell.run(step.command)
            shown = "\n".join(found)
            assert agrees(step.output, found), f"$ {step.command}\n{shown}"
            refused = any(line.startswith("sskt: ") for line in step.output)
            assert (status != 0) == refused, f"$ {step.command}\n{shown}"


def shown_commands() -> list[tuple[str, str]]:
    """The commands of sskt in blocks that are shown only, with their page."""
    found = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        for block in SHOWN.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                at = re.search(r"\bsskt (?=[a-z])", line.partition(" #")[0])
                if at and not line.startswith(("pip", "git", "docker")):
                    command = line.partition(" #")[0][at.end() :]
                    found.append((str(page.relative_to(ROOT)), " ".join(command.split())))
    return found


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_the_options_of_a_shown_command_exist(page: str, command: str) -> None:
    name, *arguments = shlex.split(command)
    group = click.Context(cli)
    found = cli.get_command(group, name)
    assert found is not None, f"{page}: no command {name}"
    context = click.Context(found, info_name=name)
    found.make_parser(context).parse_args(arguments)


def test_commands_are_found() -> None:
    assert len(shown_commands()) > 15
    assert len(pages()) >= 5


@pytest.mark.parametrize(
    ("printed", "found", "same"),
    [
        (["1,000 labels (160/s)"], ["20 labels (3/s)"], True),
        (["size  1.3 MiB"], ["size 900 B"], True),
        (["a", "...", "z"], ["a", "b", "c", "z"], True),
        (["a.b900af679f53 1"], ["a.fa2702b7b171 2"], True),
        (["resnet20 is trained"], ["resnet18 is trained"], False),
        (["a", "b"], ["a"], False),
        ([], ["a"], False),
        (["test 15.8 %"], ["train 15.8 %"], False),
    ],
)
def test_what_may_differ(printed: list[str], found: list[str], same: bool) -> None:
    assert agrees(printed, found) is same
