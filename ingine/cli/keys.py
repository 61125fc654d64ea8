"""`ingine keys`: the API keys of gateways, in a file."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ingine.cli.options import AsJson, print_json
from ingine.terminal import echo

keys_app = typer.Typer(help="API keys for gateways, in a file.", no_args_is_help=True)

KeyPath = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FILE", help="The file of keys.", show_default="$INGINE_GATEWAY_KEYS"),
]


@keys_app.command()
def create(
    tenant: Annotated[
        str | None, typer.Option(help="Account of the key's jobs. Default: none.", show_default=False)
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Models that it may use, with commas. Default: all.", show_default=False
        ),
    ] = None,
    keys: KeyPath = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It is printed once: the file holds only a digest."""
    from ingine.gateway.keys import create_key, fields_of

    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    entry, key = create_key(_file(keys), tenant=tenant, models=names)
    if as_json:
        print_json(fields_of(entry) | {"key": key})
    else:
        echo(key)
        echo(f"ingine: created {entry.id}; revoke it with: ingine keys revoke {entry.id}", err=True)


@keys_app.command("list")
def list_keys(keys: KeyPath = None, as_json: AsJson = False) -> None:
    """List the keys: id, when it was created, tenant, models."""
    from ingine.gateway.keys import fields_of, read_keys

    for entry in read_keys(_file(keys)):
        fields = fields_of(entry)
        if as_json:
            print_json(fields)
            continue
        created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.created_at))
        models = ", ".join(fields["models"]) if fields["models"] is not None else "all models"
        echo(f"{entry.id}  {created}Z  {entry.tenant or '-'}  {models}")


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id that `list` shows.", show_default=False)],
    keys: KeyPath = None,
) -> None:
    """Revoke a key. Gateways refuse it from their next request on."""
    from ingine.gateway.keys import revoke_key

    revoke_key(_file(keys), key_id)
    echo(f"revoked {key_id}")


def _file(keys: Path | None) -> Path:
    from ingine.gateway.settings import read_settings

    path = keys or read_settings().gateway_keys
    if path is None:
        raise typer.BadParameter("name a file, or set INGINE_GATEWAY_KEYS", param_hint="--keys")
    return path
