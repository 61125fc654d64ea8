"""/metrics, /healthz and /readyz on one port, from a thread that the loop and the engine cannot hold up."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from ingine.errors import ConfigError
from worker.http_port import cannot_listen

Check = Callable[[], str | None]
"""What is wrong, in a sentence, or None."""


class HttpServer:
    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, healthy: Check, ready: Check):
        """ConfigError if the port cannot be had."""

        class RequestHandler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif check := {"/healthz": healthy, "/readyz": ready}.get(self.path):
                    fault = check()
                    self._answer(503 if fault else 200, f"{fault or 'ok'}\n".encode(), "text/plain")
                else:
                    self._answer(404, b"/metrics /healthz /readyz\n", "text/plain")

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass  # A probe every second is no event.

        try:
            self._server = ThreadingHTTPServer((host, port), RequestHandler)
        except OSError as error:
            raise ConfigError(cannot_listen(host, port, error)) from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
