"""``sskt``: commands are imported when they are called, so that --help answers at once."""

from __future__ import annotations

import importlib
import os
import sys

import click

from sskt.cli.help import SuggestingGroup
from sskt.teacher_cache.errors import SsktError, described, maintainers, printable
from sskt.teacher_cache.extras import missing_extra

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Labels": {
        "cache-teachers": (
            "sskt.cli.labels.cache_teachers",
            "Label a target with frozen sources, once.",
        ),
        "plan": ("sskt.cli.labels.plan", "Predict what labelling costs, and when the cache pays."),
        "ls": ("sskt.cli.labels.ls", "List the label sets of a cache."),
        "inspect": (
            "sskt.cli.labels.inspect",
            "Show one sample: its view, stored and recomputed labels.",
        ),
        "verify": ("sskt.cli.labels.verify", "Check label sets: checksums, rows, coverage."),
        "copy": ("sskt.cli.labels.copy", "Copy label sets between folders and object stores."),
        "rm": ("sskt.cli.labels.rm", "Delete label sets, or some of their view seeds."),
        "export": ("sskt.cli.labels.export", "Store a label set in another encoding."),
        "card": ("sskt.cli.labels.card", "Write the data card of a label set, for publishing."),
    },
    "Training": {
        "train": ("sskt.cli.training.train", "Train a network from soft labels, or from scratch."),
        "evaluate": ("sskt.cli.training.after", "Measure a trained network on a split."),
        "predict": ("sskt.cli.training.after", "Classify files with a trained network."),
        "export-model": ("sskt.cli.training.after", "Write a trained network for other programs."),
        "compare": ("sskt.cli.training.compare", "Compare runs: table, curves, significance."),
        "sweep": ("sskt.cli.training.sweep", "Train over temperatures and alphas."),
        "reproduce": ("sskt.cli.training.reproduce", "Reproduce a table or figure of the paper."),
        "demo": ("sskt.cli.training.demo", "Cache, train and compare on a rendered target."),
    },
    "Label server": {
        "serve": ("sskt.cli.serving.serve", "Serve the label sets of a cache over HTTP."),
        "token": ("sskt.cli.serving.token", "Create, list and revoke tokens."),
    },
    "What is here, and what is known by name": {
        "doctor": ("sskt.cli.known.doctor", "Check this installation and machine."),
        "bench": ("sskt.cli.known.bench", "Compare with other ways of doing the same."),
        "datasets": ("sskt.cli.known.datasets", "List the known targets and their layouts."),
        "sources": ("sskt.cli.known.sources", "List the known sources."),
        "policies": ("sskt.cli.known.names", "List the view policies and their parameters."),
        "models": ("sskt.cli.known.names", "List the target networks."),
        "encodings": ("sskt.cli.known.names", "List the encodings of soft labels."),
        "recipes": ("sskt.cli.known.names", "List the recipes that ship with sskt."),
    },
}
"""The commands: module and one line of help, by section of ``sskt --help``."""
COMMANDS = {name: found for section in SECTIONS.values() for name, found in section.items()}
INTERRUPTED = 130


class Lazy(SuggestingGroup):
    """Knows its commands by name and imports them when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", about) for name, (_, about) in commands.items()]
                )


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sskt")
def cli() -> None:
    """Label once with frozen teachers, train many times from the stored soft labels (SSKT).

    The two first commands: sskt cache-teachers --source SOURCE --target TARGET, and
    sskt train --target TARGET --tm.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors in one line; exit 2 for bad input, 1 for failure, 130 for Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs a command line; the exit status."""
    try:
        cli.main(arguments, prog_name="sskt", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return error.exit_code
    except click.ClickException as error:
        where = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "sskt"
        )
        said = error.format_message()
        if "extra argument" in said and where == "sskt train":
            said += "; the folder of a run is given with --out"
        return _fail(f"{said} ({where} --help shows the options)", 2)
    except SsktError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        said = str(stop) or str(stop.__cause__ or "")  # click wraps it in an empty Abort
        return _fail(f"interrupted{'; ' + said if said else ''}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, ImportError) and (lacking := missing_extra(error)):
            return _fail(str(lacking), lacking.exit_code)
        if os.environ.get("SSKT_DEBUG"):
            raise
        advice = (
            f"SSKT_DEBUG=1 shows where; please report that, with the command and what sskt doctor "
            f"prints, {maintainers()}"
        )
        return _fail(f"unexpected {described(error)} ({advice})", 1)
    return 0


def _fail(message: str, status: int) -> int:
    click.echo(f"sskt: {printable(' '.join(message.split()))}", err=True)
    return status
