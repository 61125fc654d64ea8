"""What all requests of a gateway share: its settings, its client of the queue, and its keys."""

from typing import Any

from starlette.requests import Request

from ingine.gateway.access import Access
from ingine.gateway.body import read_object
from ingine.gateway.keys import KeyFile
from ingine.gateway.metrics import Metrics
from ingine.gateway.models import Workers
from ingine.gateway.settings import GatewaySettings
from ingine.producer.client import AsyncClient


class Gateway:
    def __init__(self, settings: GatewaySettings):
        """Raises ConfigError if the file of keys cannot be read."""
        self.settings = settings
        self.access = Access(KeyFile(settings.gateway_keys) if settings.gateway_keys else None)
        self.client = AsyncClient(settings.redis_url, queue=settings.queue)
        self.workers = Workers(self.client)
        self.metrics = Metrics()

    async def read_body(self, request: Request) -> dict[str, Any]:
        """Return the body as an object. Raises Refused, and ClientDisconnect."""
        return await read_object(
            request,
            max_bytes=self.settings.gateway_max_body_bytes,
            timeout_s=self.settings.gateway_body_timeout_s,
        )
