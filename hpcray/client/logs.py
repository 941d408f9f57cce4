"""How the root logger of this process writes, when `init(logging_config=...)` says so.

    TEXT  time, level, file:line -- message, and then key=value of where it was said
    JSON  one object per line of the same

What must not go in: what becomes of the lines of a worker (observe/logs.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from hpcray.client import context, process
from hpcray.protocol import ids

_TEXT = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"
_USUAL = ("asctime", "levelname", "filename", "lineno", "process")
_OF_A_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def configure(encoding: str, log_level: str, additional: Sequence[str]) -> None:
    """The root logger writes to stderr as told, and to nothing else."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(encoding == "JSON", tuple(additional)))
    root = logging.getLogger()
    for other in list(root.handlers):
        if type(other) is logging.StreamHandler:  # one of basicConfig, or of an earlier session
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(log_level)


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool, additional: tuple[str, ...]) -> None:
        super().__init__(_TEXT)
        self._as_json = as_json
        self._additional = additional

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)  # sets message, asctime and exc_text
        where = {name: getattr(record, name) for name in self._additional}
        where |= {name: value for name, value in vars(record).items()
                  if name not in _OF_A_RECORD}  # `extra=` of the call
        where |= _where()
        where["timestamp_ns"] = time.time_ns()
        if not self._as_json:
            head, newline, traceback = line.partition("\n")
            return " ".join([head, *(f"{name}={value}" for name, value in where.items())]) \
                + newline + traceback
        fields: dict[str, Any] = {name: getattr(record, name) for name in _USUAL}
        fields["message"] = record.message
        if record.exc_text:
            fields["exc_text"] = record.exc_text
        return json.dumps({**fields, **where}, default=str)


def _where() -> dict[str, str]:
    client = process.client
    if client is None:
        return {}
    found = {"job_id": client.job_id.hex(),
             "worker_id": ids.worker_id_hex(client.job_id, client.rank, client.number),
             "node_id": ids.node_id_hex(client.rank, client.session["job_key"])}
    here = context.current()
    if here.actor_id:
        found["actor_id"] = here.actor_id.hex()
    template = here.template
    if template is not None:
        found |= {"task_id": here.task_id.hex(), "task_name": template.name,
                  "task_func_name": template.function_name or template.name}
    return found
