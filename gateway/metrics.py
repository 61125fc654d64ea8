"""The gateway's metrics, in a registry of their own."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.requests import Request
from starlette.responses import Response

OTHER = "other"
"""The label of a path that is not served: requests must not make new labels."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self):
        self.registry = registry = CollectorRegistry()
        labels = ["method", "path"]
        self.requests = Counter(
            "ingine_gateway_requests", "Requests that have ended.", [*labels, "status"], registry=registry
        )
        self.in_flight = Gauge("ingine_gateway_requests_in_flight", "Requests now.", registry=registry)
        self.first_byte = Histogram(
            "ingine_gateway_first_byte_seconds",
            "From a request's head to the first bytes of the answer's body.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "ingine_gateway_request_seconds",
            "From a request's head to the end of the answer.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )


async def show_metrics(request: Request) -> Response:
    """Prometheus text. With keys it needs one, since the port may be public."""
    gateway = request.state.gateway
    gateway.access.caller(request)
    return Response(generate_latest(gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
