"""Names of actors: one creator at a time, no handle before the home knows the actor."""

from __future__ import annotations

from typing import Any

from hpcray.node.machine import Machine
from hpcray.node.records import DRIVER
from hpcray.protocol import messages as m

JOB = b"\0\0\0\1"


def machine() -> Machine:
    made = Machine(0, 1, {"CPU": m.UNIT}, 1 << 20, JOB, {"node_ids": ["n"]})
    for number in (DRIVER, 1, 2):
        made.connect(number)
    return made


def actor(number: int) -> bytes:
    return bytes([number]) * 8 + b"\0\0\0\0" + JOB


def ask(node: Machine, client: int, number: int, name: str, **arguments: Any) -> None:
    arguments = {"namespace": "", "name": "a", "handle": b"h", **arguments}
    node.client_messages(client, [m.Request(number, name, arguments)])


def reserve(node: Machine, client: int, number: int = 1, *, if_exists: bool = True) -> None:
    ask(node, client, number, "reserve_name", actor_id=actor(client), get_if_exists=if_exists)


def create(node: Machine, client: int) -> None:
    node.client_messages(client, [
        m.DefineTemplate(m.Template(b"t" * 16, b"f" * 16, m.ACTOR_CREATION, "A.__init__")),
        m.CreateActor(actor(client), b"t" * 16, b"", b"", 0, "a", "", True, b"h")])


def replies(node: Machine, client: int) -> list[tuple[int, Any, str]]:
    found = [message for message in node.outbox.clients.pop(client, [])
             if type(message) is m.Reply]
    return [(r.request, r.result, r.error.kind if r.error else "") for r in found]


def test_others_wait_until_the_actor_is_created() -> None:
    node = machine()
    reserve(node, 1)
    assert replies(node, 1) == [(1, None, "")]
    reserve(node, 2)
    ask(node, DRIVER, 5, "get_actor")
    assert replies(node, 2) == replies(node, DRIVER) == []
    create(node, 1)
    facts = {"actor_id": actor(1), "handle": b"h"}
    assert replies(node, 2) == [(1, facts, "")]
    assert replies(node, DRIVER) == [(5, facts, "")]


def test_a_taken_name_is_refused_at_once() -> None:
    node = machine()
    reserve(node, 1)
    reserve(node, 2, if_exists=False)
    assert replies(node, 2) == [(1, None, "ActorAlreadyExistsError")]


def test_a_creator_that_dies_leaves_the_name_to_the_next() -> None:
    node = machine()
    reserve(node, 1)
    reserve(node, 2)
    ask(node, DRIVER, 5, "get_actor")
    node.worker_exited(1, m.Failure("WorkerCrashedError", "it died"))
    assert replies(node, 2) == [(1, None, "")]
    assert replies(node, DRIVER) == []  # now it waits for the second
    node.worker_exited(2, m.Failure("WorkerCrashedError", "it died"))
    assert replies(node, DRIVER) == [(5, None, "ValueError")]
    assert not node.requests.names.entries
    assert not node.requests._reserving


def test_one_that_dies_while_it_waits() -> None:
    node = machine()
    reserve(node, 1)
    reserve(node, 2)
    node.worker_exited(2, m.Failure("WorkerCrashedError", "it died"))
    node.worker_exited(1, m.Failure("WorkerCrashedError", "it died"))
    assert not node.requests.names.entries
    assert not node.requests._reserving


def test_nothing_is_kept_of_names_that_exist() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1)
    for number in range(2, 5):
        reserve(node, 2, number)
    assert not node.requests._reserving
