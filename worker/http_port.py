"""Whether the HTTP port can be had: asked before the model is loaded, which may take minutes."""

import errno
import logging
import socket

from ingine.errors import ConfigError
from ingine.worker.logs import log_event
from ingine.worker.settings import WorkerSettings

logger = logging.getLogger("worker")


def with_usable_port(settings: WorkerSettings) -> WorkerSettings:
    """`settings`, with any free port where the default one is taken: by another worker, say.

    Raises ConfigError where a port was asked for and cannot be had.
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
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"INGINE_HTTP_HOST (--http-host): {host} is no address of this machine: {error.strerror}"
    return (
        f"INGINE_HTTP_PORT (--http-port): cannot listen on {host}:{port}: {error.strerror}. "
        "0 takes any free port, -1 none"
    )


def _bind(host: str, port: int) -> OSError | None:
    """As `HTTPServer` does it."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
    except OSError as error:
        return error
    return None
