"""Run the gateway's application under uvicorn, until a signal."""

import logging
import signal
import socket

import uvicorn

from ingine.errors import ConfigError
from ingine.gateway.app import make_app
from ingine.gateway.settings import GatewaySettings

logger = logging.getLogger("gateway")

SHUTDOWN_S = 5.0
"""How long answers may go on after a signal. Streams are then cut off; their jobs go on, and a client can
resume them at another gateway."""
BACKLOG = 2048
_CUT_OFF = "ASGI callable returned without completing response."


def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if it cannot listen."""
    logger.setLevel(logging.INFO)
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(lambda record: record.getMessage() != _CUT_OFF)  # see `EventStream`
    listener = listen(settings)
    server = uvicorn.Server(uvicorn_config(settings))
    for signum in (signal.SIGTERM, signal.SIGINT):
        # uvicorn has handlers of its own while it serves, and afterwards raises the signal again.
        signal.signal(signum, lambda *_: None)
    host, port = listener.getsockname()[:2]
    logger.info(
        "gateway ready: http://%s:%d, queue %s", f"[{host}]" if ":" in host else host, port, settings.queue
    )
    server.run(sockets=[listener])


def uvicorn_config(settings: GatewaySettings) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(settings),
        lifespan="on",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def listen(settings: GatewaySettings) -> socket.socket:
    """Listen on host and port. Raises ConfigError."""
    host, port = settings.gateway_host, settings.gateway_port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"INGINE_GATEWAY_HOST (--host): {host}: {error.strerror}") from None
    except OSError as error:
        raise ConfigError(
            f"INGINE_GATEWAY_PORT (--port): cannot listen on {host}:{port}: {error.strerror}"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it. Without it, a client that reads nothing more would keep its buffer for ever.
        timeout_ms = round(settings.gateway_send_timeout_s * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return listener
