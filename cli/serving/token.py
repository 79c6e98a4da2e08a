"""``sskt token``: the tokens of the label server."""

from __future__ import annotations

import time
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


@click.group("token")
def token() -> None:
    """Tokens of the label server: new, list, revoke.

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
@as_json
def new(
    name: str, token_file: Path, scopes: tuple[str, ...], days: float | None, as_json: bool
) -> None:
    """Make a token and print its secret, once: TOKEN=$(sskt token new lab ...)."""
    from sskt.server.http.tokens import list_tokens, new_token

    secret = new_token(token_file, name, scopes, days)
    (made,) = (t for t in list_tokens(token_file) if t.name == name)
    if as_json:
        print_json({"token": secret} | _document(made))
        return
    click.echo(secret)
    end = f"until {_day(made.expires)}" if made.expires else "until revoked"
    said = f"token {name} ({', '.join(sorted(made.scopes))}), valid {end}"
    click.echo(f"{said}; the secret is shown only once; clients take it from SSKT_TOKEN", err=True)


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
