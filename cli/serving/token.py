"""``sskt token``: the tokens of the label server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sskt.cli.output import as_json, print_json, print_table

if TYPE_CHECKING:
    from sskt.server.http.tokens import Token

token_file = click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    envvar="SSKT_TOKEN_FILE",
    show_envvar=True,
    help="Token file that sskt serve reads.",
)


out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the secret, instead of printing it. It must not exist; only you can read it.",
)


@click.group("token")
def token() -> None:
    """Tokens of the label server: new, rotate, list, revoke.

    A running server follows the file within a fraction of a second. The file holds hashes, so
    that its readers cannot use the tokens. The status page of the server shows when each token
    was last used.
    """


@token.command("new")
@click.argument("name")
@token_file
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read", "compute"]),
    default=["read"],
    show_default=True,
    help="Permission; compute (labels on demand) includes read.",
)
@click.option(
    "--days",
    type=float,
    help="Days until the token expires; without it, it is valid until revoked.",
)
@out_option
@as_json
def new(
    name: str,
    token_file: Path,
    scopes: tuple[str, ...],
    days: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make a token and print its secret, once; with --out, write it to a private file."""
    from sskt.server.http.tokens import new_token

    _give(lambda: new_token(token_file, name, scopes, days), name, token_file, out, as_json)


@token.command("rotate")
@click.argument("name")
@token_file
@click.option(
    "--grace",
    type=float,
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Hours for which the old secret stays valid, as NAME.old. 0: it stops working at once.",
)
@out_option
@as_json
def rotated(name: str, token_file: Path, grace: float, out: Path | None, as_json: bool) -> None:
    """Give a token a new secret, which is valid at once; the old one stays valid for --grace."""
    from sskt.server.http.tokens import OLD, rotate

    _give(lambda: rotate(token_file, name, grace), name, token_file, out, as_json)
    if grace:
        click.echo(
            f"the old secret is valid for {grace:g} hours more; sskt token revoke {name}{OLD} ends "
            "it at once",
            err=True,
        )


def _give(
    make: Callable[[], str], name: str, token_file: Path, out: Path | None, as_json: bool
) -> None:
    """Makes a secret and prints it, or writes it to a file."""
    from sskt.server.http.tokens import list_tokens, secret_file

    with secret_file(out) if out else contextlib.nullcontext() as file:
        secret = make()
        if file:
            file.write(f"{secret}\n")
    (made,) = (t for t in list_tokens(token_file) if t.name == name)
    if as_json:
        print_json(({"out": str(out)} if out else {"token": secret}) | _document(made))
        return
    if not out:
        click.echo(secret)
    end = f"until {_day(made.expires)}" if made.expires else "until revoked"
    said = f"token {name} ({', '.join(sorted(made.scopes))}), valid {end}"
    use = "the secret is shown only once; clients take it from SSKT_TOKEN"
    if out:
        use = f"the secret is in {out}; clients take it so: export SSKT_TOKEN=$(cat {out})"
    click.echo(f"{said}; {use}", err=True)


@token.command("list")
@token_file
@as_json
def listed(token_file: Path, as_json: bool) -> None:
    """List the tokens of a file, without their secrets."""
    from sskt.server.http.tokens import list_tokens

    tokens = list_tokens(token_file)
    if as_json:
        print_json([_document(t) for t in tokens])
        return
    rows = [
        (t.name, " ".join(sorted(t.scopes)), _day(t.created), _day(t.expires), _state(t))
        for t in tokens
    ]
    print_table(("name", "scopes", "created", "expires", ""), rows)


@token.command("revoke")
@click.argument("name")
@token_file
def revoked(name: str, token_file: Path) -> None:
    """Remove a token: it stops working at once."""
    from sskt.server.http.tokens import revoke

    revoke(token_file, name)
    click.echo(f"token {name} is revoked", err=True)


def _state(token: Token) -> str:
    return "expired" if token.expired() else ""


def _day(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _document(token: Token) -> dict[str, object]:
    return {
        "name": token.name,
        "scopes": sorted(token.scopes),
        "created": token.created,
        "expires": token.expires,
        "expired": token.expired(),
    }
