"""The gateway's application: which path is served by which function, and what every error looks like."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ingine.errors import IngineError
from ingine.gateway.errors import fault_of, fault_of_status, internal_error
from ingine.gateway.requests import Requests, error_response
from ingine.gateway.settings import GatewaySettings
from ingine.producer.client import AsyncClient


def make_app(settings: GatewaySettings) -> Starlette:
    """Make the application. Its client connects at the first request."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(settings.redis_url, queue=settings.queue) as client:
            app.state.client, app.state.settings = client, settings
            yield

    return Starlette(
        routes=[Route("/health", health)],
        lifespan=lifespan,
        middleware=[
            Middleware(
                Requests,
                max_requests=settings.gateway_max_requests,
                local_only=settings.gateway_keys is None and not settings.gateway_without_keys,
            )
        ],
        exception_handlers={
            IngineError: _on_error,
            HTTPException: _on_http_exception,
            Exception: _on_crash,
        },
    )


async def health(request: Request) -> Response:
    """Say that the gateway runs. Its server and its workers have health checks of their own."""
    return JSONResponse({"status": "ok"})


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(fault_of(error))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    response = error_response(fault_of_status(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _on_crash(request: Request, error: Exception) -> Response:
    return error_response(internal_error())  # Starlette raises the error again, and uvicorn logs it
