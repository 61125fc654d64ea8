"""The gateway's application: which path is served by which function, and what every error looks like."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ingine.errors import IngineError
from ingine.gateway import completions, models
from ingine.gateway.encoding import Json
from ingine.gateway.errors import fault_of, fault_of_status, internal_error
from ingine.gateway.gateway import Gateway
from ingine.gateway.metrics import show_metrics
from ingine.gateway.openapi import show_description
from ingine.gateway.requests import Requests, error_response
from ingine.gateway.responses import endpoints as responses
from ingine.gateway.settings import GatewaySettings


async def health(request: Request) -> Response:
    """Say that the gateway runs. Its server and its workers have health checks of their own."""
    return Json({"status": "ok"})


ROUTES = [
    Route("/health", health),
    Route("/metrics", show_metrics),
    Route("/openapi.json", show_description),
    Route("/v1/chat/completions", completions.create_chat_completion, methods=["POST"]),
    Route("/v1/completions", completions.create_completion, methods=["POST"]),
    Route("/v1/responses", responses.create_response, methods=["POST"]),
    Route("/v1/responses/{response_id}", responses.get_response),
    Route("/v1/responses/{response_id}", responses.delete_response, methods=["DELETE"]),
    Route("/v1/responses/{response_id}/cancel", responses.cancel_response, methods=["POST"]),
    Route("/v1/models", models.list_models),
    Route("/v1/models/{model:path}", models.get_model),
]


def make_app(settings: GatewaySettings) -> Starlette:
    """Make the application. Raises ConfigError if the file of keys cannot be read. Connects at the first
    request."""
    gateway = Gateway(settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with gateway.client:
            yield {"gateway": gateway}
            await gateway.workers.aclose()

    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[
            Middleware(
                Requests,
                metrics=gateway.metrics,
                paths={route.endpoint: route.path for route in ROUTES},
                max_requests=settings.gateway_max_requests,
                local_only=settings.gateway_keys is None and not settings.gateway_without_keys,
            )
        ],
        exception_handlers={
            IngineError: _on_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_crash,
        },
    )


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(fault_of(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(fault_of_status(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which no client reads


async def _on_crash(request: Request, error: Exception) -> Response:
    return error_response(internal_error())  # Starlette raises the error again, and uvicorn logs it
