"""Which modules a node can import once for all its workers, and why not: `hpcray doctor MODULE...`.

The real thing: a zygote of our own tries them, as that of a job would.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence

from hpcray.launch.doctor import Finding
from hpcray.node.pool import WorkerPool, ZygoteLost
from hpcray.worker.zygote_messages import Preloaded

_END_S = 5.0


def examine_preloads(modules: Sequence[str], environ: Mapping[str, str]) -> Iterator[Finding]:
    """A finding for each module, when all have been tried. None is a problem: workers import for
    themselves what is not preloaded."""
    pool = WorkerPool(environ)
    try:
        pool.preload(modules, {"sys_path": [os.path.abspath(entry) for entry in sys.path]})
        answer: Preloaded | None = None
        while answer is None:
            poller = select.poll()
            poller.register(pool, select.POLLIN | (select.POLLOUT if pool.wants_write else 0))
            poller.poll()  # the zygote's end is an event, too, and each of its waits has a limit
            for event in pool.read_zygote():
                if isinstance(event, Preloaded):
                    answer = event
                elif isinstance(event, ZygoteLost):
                    yield Finding("preload", "problem", "the process that starts workers dies "
                                  f"(exit code {event.exit_code})", "look at its output above")
                    return
    finally:
        pool.close(_END_S)
    texts = {problem.module: problem.text for problem in answer.problems}
    for module in modules:
        if module in texts:
            yield Finding("preload", "note", f"{module}: it {texts[module]}",
                          "it is left out; workers that need it import it themselves")
        else:
            yield Finding("preload", "ok", f"{module}: imported once for all workers of a node")
