"""Help that a person reads: options in groups, examples, and suggestions for mistyped names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from sskt.teacher_cache.errors import did_you_mean


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups, and examples at the end.

    Args:
        groups: Titles, each with the names of its parameters. Options that no group names, such
            as ``--json`` and ``--help``, come last under "Output".
        examples: Command lines, shown as they are typed.
        **settings: Settings of ``click.Command``.
    """

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, Sequence[str]] | None = None,
        examples: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.groups = groups or {}
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, a section for each group."""
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in self.groups}
        title_of = {name: title for title, names in self.groups.items() for name in names}
        last = "Output" if self.groups else "Options"
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = title_of.get(parameter.name or "", last)
                records.setdefault(title, []).append(record)
        for title, found in records.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class SuggestingGroup(click.Group):
    """A group of commands that suggests the nearest name for a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command, or fails with a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = did_you_mean(args[0], self.list_commands(ctx))
            if not near or args[0] in self.list_commands(ctx):
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}; {near}", ctx) from error
