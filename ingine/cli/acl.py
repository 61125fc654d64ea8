"""`ingine acl`: the users of one queue, for the server's access list."""

import hashlib
import secrets
from typing import Annotated

import typer

from ingine.contract.roles import ALL_TAGS, Role, tags_of, user_line
from ingine.terminal import echo

PASSWORD_BYTES = 32


def acl(
    queue: Annotated[
        str, typer.Option("--queue", help="Whose keys and channels; '*' is all queues.", show_default=False)
    ],
    roles: Annotated[
        list[Role] | None, typer.Argument(help="Which users. Default: one for each role.", show_default=False)
    ] = None,
    partitioned: Annotated[
        bool, typer.Option("--partitioned", help="With the keys that it has in several partitions.")
    ] = False,
) -> None:
    """Print users for a queue, as lines of a server's `aclfile`.

    Each has what its role needs on the keys and channels of that queue, and nothing else. Their passwords are
    made here, and go to standard error; a line holds a password's digest only.
    """
    try:
        tags = tags_of(queue, partitioned=partitioned)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--queue") from None
    prefix = "ingine" if queue == ALL_TAGS else queue
    for role in roles or Role:
        user, password = f"{prefix}-{role}", secrets.token_hex(PASSWORD_BYTES)
        digest = hashlib.sha256(password.encode()).hexdigest()
        echo(user_line(role, user, digest, tags))
        echo(f"redis://{user}:{password}@HOST:6379/0", err=True)
