"""A gateway in the test's own event loop, under a real uvicorn, and a client of plain HTTP for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx2
import uvicorn

from ingine.gateway.serve import listen, uvicorn_config
from ingine.gateway.settings import GatewaySettings
from tests.waiting import HANGS_S, wait_until_async


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to pytest."""
        yield


@asynccontextmanager
async def serving(settings: GatewaySettings) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve on a free port. Yields an HTTP client for it."""
    settings = settings.model_copy(update={"gateway_port": 0})
    listener = listen(settings)
    server = Server(uvicorn_config(settings))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await wait_until_async(lambda: server.started or running.done())
        host, port = listener.getsockname()[:2]
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", timeout=HANGS_S) as http:
            yield http
    finally:
        server.should_exit = True
        await running
