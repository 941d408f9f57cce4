"""Names of actors: one creator at a time, no handle before the home knows the actor."""

from __future__ import annotations

from typing import Any

from hpcray.node.machine import Machine
from hpcray.node.records import DRIVER
from hpcray.protocol import ids
from hpcray.protocol import messages as m

JOB = b"\0\0\0\1"


def machine() -> Machine:
    made = Machine(0, 1, {"CPU": m.UNIT}, 1 << 20, JOB, {"job_key": "00"})
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


def create(node: Machine, client: int, *, detached: bool = True) -> None:
    node.client_messages(client, [
        m.DefineTemplate(m.Template(b"t" * 16, b"f" * 16, m.ACTOR_CREATION, "A.__init__")),
        m.CreateActor(actor(client), b"t" * 16, b"", b"", 0, "a", "", detached, b"h")])


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
    assert not node.requests._look_ups


def test_one_that_dies_while_it_waits() -> None:
    node = machine()
    reserve(node, 1)
    reserve(node, 2)
    node.worker_exited(2, m.Failure("WorkerCrashedError", "it died"))
    node.worker_exited(1, m.Failure("WorkerCrashedError", "it died"))
    assert not node.requests.names.entries
    assert not node.requests._look_ups


def test_nothing_is_kept_of_names_that_exist() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1)
    for number in range(2, 5):
        reserve(node, 2, number)
        node.client_messages(2, [m.Taken(number)])
    assert not node.requests._look_ups


def test_a_name_whose_asker_has_given_up_is_free() -> None:
    node = machine()
    reserve(node, 1)
    reserve(node, 2)
    node.client_messages(1, [m.Taken(1)])
    assert replies(node, 2) == [(1, None, "")]
    node.client_messages(2, [m.Taken(1)])
    assert not node.requests.names.entries
    assert not node.requests._look_ups


HANDLE = ids.creation_object_id(actor(1))


def found(node: Machine, client: int, number: int) -> None:
    """It has been given the handle, counted."""
    reply = node.outbox.clients.pop(client)[-1]
    assert (reply.request, reply.error, reply.held) == (number, None, HANDLE)


def test_a_handle_by_name_is_counted_until_its_client_does_so() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1, detached=False)
    ask(node, 2, 1, "get_actor")
    found(node, 2, 1)
    node.client_messages(1, [m.Drop(HANDLE)])
    assert HANDLE in node.directory.records
    node.client_messages(2, [m.Hold(HANDLE), m.Taken(1)])
    assert HANDLE in node.directory.records
    node.client_messages(2, [m.Drop(HANDLE)])
    assert HANDLE not in node.directory.records
    assert not node.requests._look_ups


def test_an_earlier_handle_of_the_asker_may_go_meanwhile() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1, detached=False)
    ask(node, 1, 2, "get_actor")
    node.client_messages(1, [m.Drop(HANDLE)])
    found(node, 1, 2)
    node.client_messages(1, [m.Hold(HANDLE), m.Taken(2)])
    assert node.directory.records[HANDLE].count == 1


def test_nothing_is_counted_for_who_dies_before_it_takes_the_handle() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1, detached=False)
    ask(node, 2, 1, "get_actor")
    node.client_messages(1, [m.Drop(HANDLE)])
    node.worker_exited(2, m.Failure("WorkerCrashedError", "it died"))
    assert HANDLE not in node.directory.records
    assert not node.requests._look_ups


def test_an_actor_that_waits_for_room_is_found_without_any_handle() -> None:
    node = machine()
    reserve(node, 1)
    create(node, 1, detached=False)
    node.client_messages(1, [m.Drop(HANDLE)])
    ask(node, 2, 1, "get_actor")
    found(node, 2, 1)
    reserve(node, DRIVER, if_exists=False)
    assert replies(node, DRIVER) == [(1, None, "ActorAlreadyExistsError")]
    assert node.directory.records[HANDLE].count == 1
