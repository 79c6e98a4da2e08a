"""``sskt``: commands are imported when they are called, so that --help answers at once."""

from __future__ import annotations

import importlib
import os
import sys

import click

from sskt.teacher_cache.errors import SsktError, first_line

COMMANDS = {
    "cache-teachers": ("sskt.cli.cache_teachers", "Label a target once with frozen sources."),
    "plan": ("sskt.cli.plan", "What labelling will cost: bytes, hours, when it pays."),
    "train": (
        "sskt.cli.train",
        "Train a target network from stored soft labels, or from scratch.",
    ),
    "compare": ("sskt.cli.compare", "Runs side by side: table, curves, what exceeds chance."),
    "sweep": ("sskt.cli.sweep", "Train over temperature and alpha, drawn as in figure 2."),
    "serve": ("sskt.cli.serve", "One label store for a whole cluster, over HTTP."),
    "token": ("sskt.cli.token", "Tokens of the label server: new, list, revoke."),
    "ls": ("sskt.cli.ls", "List the label sets of a cache."),
    "inspect": (
        "sskt.cli.inspect",
        "Look at one sample under one seed: view, labels, recomputation.",
    ),
    "verify": ("sskt.cli.verify", "Check label sets: checksums, rows, coverage, recomputation."),
    "copy": ("sskt.cli.copy", "Copy label sets between caches: folders and object stores."),
    "rm": ("sskt.cli.rm", "Remove label sets, or some of their seeds."),
    "export": ("sskt.cli.export", "Store a label set in a smaller encoding, without its source."),
    "datasets": ("sskt.cli.datasets", "List the known targets."),
    "sources": ("sskt.cli.sources", "List the known sources."),
    "reproduce": (
        "sskt.cli.reproduce",
        "A table or figure of the paper, reported and measured.",
    ),
    "demo": ("sskt.cli.demo", "Cache, train and compare on the embedded target, in minutes."),
}
INTERRUPTED = 130


class Lazy(click.Group):
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
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sskt")
def cli() -> None:
    """Label once with frozen teachers, train many times from the stored soft labels (SSKT)."""


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
        return _fail(f"{error.format_message()} ({where} --help shows the options)", 2)
    except SsktError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        said = str(stop) or str(stop.__cause__ or "")  # click wraps it in an empty Abort
        return _fail(f"interrupted{'; ' + said if said else ''}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("SSKT_DEBUG"):
            raise
        advice = "SSKT_DEBUG=1 shows where; please report it"
        return _fail(f"unexpected {type(error).__name__}: {first_line(error)} ({advice})", 1)
    return 0


def _fail(message: str, status: int) -> int:
    click.echo(f"sskt: {' '.join(message.split())}", err=True)
    return status
