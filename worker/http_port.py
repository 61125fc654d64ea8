"""Check that the HTTP port is free, before the model is loaded, which may take minutes."""

import errno
import logging
import socket

from ingine.errors import ConfigError
from ingine.worker.logs import log_event
from ingine.worker.settings import WorkerSettings

logger = logging.getLogger("worker")


def with_usable_port(settings: WorkerSettings) -> WorkerSettings:
    """`settings`, changed to any free port if the default one is taken, for example by another worker.

    Raises ConfigError if a port was set explicitly and cannot be bound.
    """
    if settings.http_port <= 0:
        return settings
    error = _bind(settings.http_host, settings.http_port)
    if error is None:
        return settings
    if error.errno == errno.EADDRINUSE and "http_port" not in settings.model_fields_set:
        log_event(logger, logging.WARNING, "http port taken", port=settings.http_port)
        return settings.model_copy(update={"http_port": 0})
    raise ConfigError(cannot_listen(settings.http_host, settings.http_port, error))


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """The message of a ConfigError, which names the setting to change."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"INGINE_HTTP_HOST (--http-host): {host} is no address of this machine: {error.strerror}"
    return (
        f"INGINE_HTTP_PORT (--http-port): cannot listen on {host}:{port}: {error.strerror}. "
        "0 takes any free port, -1 none"
    )


def _bind(host: str, port: int) -> OSError | None:
    """Bind the port as `HttpServer` does, and release it. Returns the error, if any."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
    except OSError as error:
        return error
    return None
