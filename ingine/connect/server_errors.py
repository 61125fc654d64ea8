"""Errors that say more about a server than about the command: a refusal to let the client in, a server that
is not the one with the keys, a command that the server lacks."""

import ssl

from redis import exceptions

_MOVING = "the queue moves to another node of its cluster"
_WRONG_SERVER_ERRORS = {
    exceptions.ReadOnlyError: "it is a read-only replica",
    exceptions.MasterDownError: "it is a replica without its primary",
    exceptions.ClusterDownError: "its cluster is down, or no node owns the queue's slot",
    exceptions.MovedError: "another node of its cluster has the queue (INGINE_REDIS_URL begins with "
    "redis+cluster:// there)",
    # Following ASK would not help: a script touches several keys, and neither node serves it until all of
    # them are on one node. The errors end once the slot has moved.
    exceptions.AskError: _MOVING,
    exceptions.TryAgainError: _MOVING,
}
_WRONG_SERVER_CODES = {
    "REDIRECT": "it is a read-only replica",
    "UNBLOCKED": "it broke off a blocking read, as a primary does that becomes a replica",
    "NOREPLICAS": "it has lost its replicas, so another may be the primary by now",
}


class NoSuchDatabase(exceptions.AuthenticationError):
    """The server has no database of this number. A retry cannot help, as with a refused password."""


class WrongServer(exceptions.ConnectionError):
    """The keys are on another server, at least for now. The connection is closed; the next one looks up the
    server again."""


def is_refusal(error: BaseException | None) -> bool:
    """True if a password or a certificate was refused, according to the error or to one of its causes."""
    kinds = (exceptions.AuthenticationError, ssl.SSLCertVerificationError)
    return error is not None and (
        isinstance(error, kinds) or is_refusal(error.__cause__ or error.__context__)
    )


def is_lacking(answer: object) -> bool:
    """True if the server does not know the command, or a proxy does not forward it."""
    text = str(answer).lower()
    signs = ("unknown command", "unknown subcommand", "unknown redis command", "unsupported", "not supported")
    return (
        isinstance(answer, exceptions.ResponseError)
        and any(sign in text for sign in signs)
        # Redis 6 has one message for an unknown subcommand and for a wrong number of arguments.
        and "wrong number of arguments" not in text
    )


def wrong_server_reason(error: exceptions.ResponseError) -> str | None:
    """The reason why this is the wrong server, according to the error.

    None if the error does not say that it is.
    """
    for kind, reason in _WRONG_SERVER_ERRORS.items():
        if isinstance(error, kind):
            return reason
    return _WRONG_SERVER_CODES.get(str(error).partition(" ")[0])
