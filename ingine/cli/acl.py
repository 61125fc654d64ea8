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
        str, typer.Option("--queue", help="The queue; '*' means all queues.", show_default=False)
    ],
    roles: Annotated[
        list[Role] | None, typer.Argument(help="Roles to print users for. Default: all.", show_default=False)
    ] = None,
    partitioned: Annotated[
        bool, typer.Option("--partitioned", help="The queue has several partitions.")
    ] = False,
) -> None:
    """Print users for a queue, as lines of a server's `aclfile`.

    Each user may do what its role needs on the keys and channels of that queue, and nothing else. This
    command generates their passwords and prints them to standard error; a line holds only a digest.
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
