"""A Django project in one file: a view that waits for a result, and one that streams.

    pip install django uvicorn
    uvicorn web_django:application --app-dir examples

Needs a worker: `ingine worker`. docs/tutorial/django-celery.md explains each part.
"""

import json
from collections.abc import AsyncIterator

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.urls import path

from ingine import AsyncClient, Client
from ingine.producer import AsyncJobHandle, ClientError

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    SECRET_KEY="only for this example",
)

client = Client()
"""For views that block. Threads share it; forked processes open connections of their own."""
async_client = AsyncClient()
"""For views that stream."""


def complete(request: HttpRequest) -> JsonResponse:
    try:
        job = client.submit(request.GET.get("prompt", ""), max_tokens=32, deadline_s=60)
        return JsonResponse({"text": job.result(timeout=60, cancel=True).text})
    except ClientError as error:
        return JsonResponse({"error": type(error).__name__, "message": str(error)}, status=502)


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    job = await async_client.submit(request.GET.get("prompt", ""), max_tokens=32, deadline_s=60)
    return StreamingHttpResponse(events(job), content_type="text/event-stream")


async def events(job: AsyncJobHandle) -> AsyncIterator[str]:
    try:
        async for chunk in job.stream():
            yield f"id: {chunk.position}\ndata: {json.dumps(chunk.text)}\n\n"
    except ClientError as error:
        yield f"event: error\ndata: {json.dumps(str(error))}\n\n"


urlpatterns = [path("complete", complete), path("stream", stream)]
application = get_asgi_application()
