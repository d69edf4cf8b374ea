"""Lines of the log: text or JSON, and what happens to requests, told with their ids.

Prompts and answers are never logged. Knows neither the server nor the engine.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
_PACKAGE = "trident_llm"
_FIELDS = "request_fields"
_PLAIN = re.compile(r"[\w.:/+-]+")


class TextFormatter(logging.Formatter):
    """``TIME PROCESS LEVEL LOGGER: MESSAGE key=value ...``; a value that is no plain word is quoted as in JSON."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, _FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{key}={_word(value)}" for key, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, and the fields of a request's event."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(process: str, log_format: str = "text", log_level: str = "info") -> None:
    """Write the log of this process to standard error, which is the server's log.

    ``log_level`` is that of this project; libraries tell what they tell from ``info`` on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger(_PACKAGE).setLevel(log_level.upper())


class RequestLog:
    """Events of requests, at level debug. Nothing is kept or formatted where that is off."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._client_ids: dict[str, str] = {}
        """What the clients of unfinished requests call them, by our ids."""

    def begin(self, event: str, request_id: str, client_id: str, **fields: object) -> None:
        """An event with which a request begins here."""
        if self._logger.isEnabledFor(logging.DEBUG):
            if client_id:
                self._client_ids[request_id] = client_id
            self._write(event, request_id, fields)

    def end(self, event: str, request_id: str, **fields: object) -> None:
        """The last event of a request here."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._write(event, request_id, fields)
            self._client_ids.pop(request_id, None)

    def _write(self, event: str, request_id: str, fields: dict[str, object]) -> None:
        ids = {"request_id": request_id, "client_id": self._client_ids.get(request_id, "")}
        given = {key: value for key, value in {**ids, **fields}.items() if value not in ("", None)}
        self._logger.debug("request %s", event, extra={_FIELDS: given})


def _word(value: object) -> str:
    """What a client chose must not look like another field, or another line."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
