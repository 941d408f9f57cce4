"""The table of refs: what unpickling adds to it without the client's lock."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hpcray.client import references
from hpcray.client.references import ReferenceTable, _load_ref
from hpcray.protocol import ids

JOB = ids.job_id(1)
REFS = 3000
THREADS = 4


@pytest.fixture
def table() -> Iterator[ReferenceTable]:
    found = ReferenceTable()
    found.job_id = JOB
    found.intern_locked = found.intern
    references.set_table(found)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield found
    sys.setswitchinterval(interval_s)
    references.set_table(None)


def test_each_ref_met_by_several_threads_is_one_and_is_told_once(table: ReferenceTable) -> None:
    met = [bytes(16) + number.to_bytes(4, "big") + JOB + bytes(4) for number in range(REFS)]
    loaded: list[list[Any]] = [[] for _ in range(THREADS)]
    start = threading.Barrier(THREADS + 1)

    def load(into: list[Any]) -> None:
        start.wait()
        into.extend(map(_load_ref, met))

    threads = [threading.Thread(target=load, args=(into,)) for into in loaded]
    for thread in threads:
        thread.start()
    start.wait()
    outbox: list[Any] = []
    while any(thread.is_alive() for thread in threads):
        table.tell_holds(outbox)
    table.tell_holds(outbox)
    told = [id_ for hold in outbox for id_ in ids.split_ids(hold.ids)]
    assert sorted(told) == met
    for refs in loaded:
        assert all(map(operator.is_, refs, loaded[0]))


def test_a_ref_of_another_session_is_in_no_table(table: ReferenceTable) -> None:
    foreign = bytes(20) + ids.job_id(2) + bytes(4)
    ref = _load_ref(foreign)
    assert ref is _load_ref(foreign)
    assert not table.live
    assert not table.new_holds
