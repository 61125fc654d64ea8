"""Logging: one line per event, as `name key=value ...` for people or as a JSON object for machines.

Values are escaped, so that none can begin a line or send a control character to a terminal.
"""

import json
import logging
import sys
import textwrap
from datetime import UTC, datetime

from ingine.terminal import visible


def log_event(logger: logging.Logger, level: int, name: str, **fields) -> None:
    """Log the event `name` ("job finished") with fields. Callers pass prompts and outputs only if the
    settings ask for them."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields})


class _Formatter(logging.Formatter):
    def _parts(self, record: logging.LogRecord) -> tuple[datetime, str, dict]:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return datetime.fromtimestamp(record.created, UTC), record.getMessage(), fields


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when, message, fields = self._parts(record)
        error = fields.pop("error", None)
        pairs = "".join(f" {name}={_short(value)}" for name, value in fields.items() if value is not None)
        end = f" error={visible(str(error))}" if error else ""
        if error and record.exc_info:  # indent a traceback, whose lines must not look like log lines
            end = "\n" + textwrap.indent(visible(error, keep_lines=True), "  ")
        time = f"{when:%H:%M:%S}.{when.microsecond // 1000:03d}"
        return f"{time} {record.levelname:<7} {visible(message)}{pairs}{end}"


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when, message, fields = self._parts(record)
        line = {"time": when.isoformat(), "level": record.levelname.lower(), "event": message}
        return json.dumps(line | fields, default=str)


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    text = str(value)
    is_word = text.isprintable() and text and " " not in text
    return text if is_word else visible(json.dumps(text, ensure_ascii=False))


def setup_logging(level: str, *, as_json: bool) -> None:
    """Log to standard error, which a supervisor collects. Standard output is left to programs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    for name in ("ingine", "worker"):
        logging.getLogger(name).setLevel(level.upper())
