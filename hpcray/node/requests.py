"""The slow path: what clients ask rarely, by name. Pure.

A request is answered here, at node 0 (names, cluster facts) or at an actor's home; forwarded
requests keep the asking client's number until the answer comes back. Names:

    nodes  cluster_resources  available_resources  statistics            facts
    reserve_name  name_created  release_name  get_actor  list_named_actors   names, at node 0
    create_placement_group  remove_placement_group  placement_groups     groups, at node 0
    kill_actor  actor_handle  hold_actor                                 at the actor's home
    cancel                                                               at the task's home
    kv_put kv_get kv_exists kv_delete kv_list       the job's small facts, at node 0: keyvalue.py
    explain {ids}          why objects are not there yet, a sentence each: see node/explain.py
    holdings {names}       of resources: what is free when tasks have ended, who keeps the rest
    locations  local_locations                      at the objects' home; at the asker's node
    state                              what there is, at every node: see node/inventory.py

An actor that node 0 knows by name may have lost its last handle, or be about to. So the asker's
node lets the home count the handle before it gives it out, and asks node 0 again if that refuses:

    reserve_name    ASKED --no such actor--> GRANTED --CreateActor--> gone (the creator died: free)
    get_actor         | ^
                      | +--- the actor is ending ---+
                      +--an actor--> hold_actor ----+--counted--> HELD --Taken--> gone
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hpcray.node.actor_homes import ActorHomes
from hpcray.node.cluster import Cluster
from hpcray.node.directory import Directory
from hpcray.node.dispatch import Dispatcher
from hpcray.node.explain import Explain
from hpcray.node.inventory import Inventory
from hpcray.node.keyvalue import KeyValue
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.names import Asker, Names, NotYet, RequestError, already_taken
from hpcray.node.outbox import Outbox
from hpcray.node.tables import Tables
from hpcray.node.tasks import Tasks
from hpcray.protocol import ids, labels
from hpcray.protocol.messages import (
    STORE,
    PeerReply,
    PeerRequest,
    Reply,
    Request,
    Rows,
    encode,
)
from hpcray.protocol.sizes import ROWS_BYTES
from hpcray.protocol.values import Failure

NAMES_RANK = 0


def parts(rows: list[Any]) -> Iterator[list[Any]]:
    """A long list in lists that fit into a datagram each."""
    part: list[Any] = []
    nbytes = 0
    for row in rows:
        size = len(encode(row))
        if part and nbytes + size > ROWS_BYTES:
            yield part
            part, nbytes = [], 0
        part.append(row)
        nbytes += size
    if part:
        yield part


class LookUp:
    """What a client here has asked of a name, until that has had its consequences."""

    __slots__ = ("arguments", "granted", "held", "request")

    def __init__(self, request: str, arguments: Any) -> None:
        self.request = request
        self.arguments = arguments
        self.granted = False  # the name: its actor is not created yet
        self.held = b""  # the object of the handle that the client has not counted yet


class Requests:
    def __init__(
        self, tables: Tables, outbox: Outbox, membership: Membership, memory: NodeMemory,
        directory: Directory, tasks: Tasks, dispatcher: Dispatcher, cluster: Cluster,
        homes: ActorHomes, inventory: Inventory, explain: Explain,
    ) -> None:
        self._tables = tables
        self._clients = tables.clients
        self._rank = tables.rank
        self._outbox = outbox
        self._membership = membership
        self._memory = memory
        self._directory = directory
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._homes = homes
        self._inventory = inventory
        self._explain = explain
        # Forwarded: our number -> to whom, and who asked or what to call, or None if nobody waits.
        self._forwarded: dict[int, tuple[int, Asker | Callable[[PeerReply], None] | None]] = {}
        self._count = 0
        self.names = Names()  # used on node 0
        facts = KeyValue()  # used on node 0
        self._look_ups: dict[tuple[int, int], LookUp] = {}  # by client and its number
        self._handlers: dict[str, Callable[[Any], Any]] = {
            "nodes": self._nodes,
            "cluster_resources": self._cluster_resources,
            "available_resources": self._available_resources,
            "reserve_name": self.names.reserve,
            "name_created": self._name_created,
            "release_name": self._release_name,
            "get_actor": self.names.find,
            "list_named_actors": self.names.list,
            "kv_put": facts.put,
            "kv_get": facts.get,
            "kv_exists": facts.exists,
            "kv_delete": facts.delete,
            "kv_list": facts.list,
            "actor_handle": self._actor_handle,
            "hold_actor": lambda arguments: homes.hold_for(
                arguments["actor_id"], arguments["rank"]),
            "kill_actor": self._kill_actor,
            "cancel": self._cancel,
            "locations": inventory.locations,
            "local_locations": inventory.locations,
        }

    def serve(self, name: str, handler: Callable[[Any], Any]) -> None:
        """What another part answers: its result, or a RequestError."""
        self._handlers[name] = handler

    # --- routing ----------------------------------------------------------------------------------

    def asked(self, client: int, message: Request) -> None:
        name, arguments = message.name, message.arguments
        if name == "state":
            self._inventory.asked(client, message)
            return
        if name == "explain":
            asker = (self._rank, client, message.request)
            self._explain.asked(
                arguments, lambda found: self._deliver(asker, found, None), peer=False)
            return
        if name in ("reserve_name", "get_actor"):
            self._look_ups[client, message.request] = LookUp(name, arguments)
        self._ask(name, arguments, (self._rank, client, message.request))

    def _ask(self, name: str, arguments: Any, asker: Asker) -> None:
        rank = self._rank_for(name, arguments)
        if rank == self._rank:
            self._answer(name, arguments, asker)
        else:
            self.forward(rank, name, arguments, asker)

    def forward(
        self, rank: int, name: str, arguments: Any,
        asker: Asker | Callable[[PeerReply], None] | None,
    ) -> int:
        """Ask another node; the number its answer will carry."""
        self._count += 1
        self._forwarded[self._count] = (rank, asker)
        self._outbox.peers[rank].append(PeerRequest(self._count, name, arguments))
        return self._count

    def _rank_for(self, name: str, arguments: Any) -> int:
        if name in ("kill_actor", "actor_handle", "hold_actor"):
            return self._membership.home_of_actor(arguments["actor_id"])
        if name == "cancel":
            return self._membership.home_of(arguments["object_id"])
        if name == "locations":
            return self._membership.home_of(arguments["ids"][:28])
        if name in ("statistics", "local_locations"):
            return self._rank
        return NAMES_RANK

    def peer_asked(self, rank: int, message: PeerRequest) -> None:
        if message.name == "state":
            self._inventory.peer_asked(rank, message.request, message.arguments)
        elif message.name == "explain":
            self._explain.asked(
                message.arguments,
                lambda found: self._deliver((rank, -1, message.request), found, None), peer=True)
        else:
            self._answer(message.name, message.arguments, (rank, -1, message.request))

    def peer_answered(self, message: PeerReply) -> None:
        _, asker = self._forwarded.pop(message.request, (-1, None))
        if callable(asker):
            asker(message)
        elif asker is not None:
            self._deliver(asker, message.result, message.error)

    def node_lost(self, rank: int, reason: str) -> None:
        """It answers no more: who asked it is told so."""
        for number in [n for n, (asked, _) in self._forwarded.items() if asked == rank]:
            self.peer_answered(PeerReply(number, None, Failure(
                "RaySystemError", f"rank {rank} is gone ({reason}) and answers no more")))

    def _answer(self, name: str, arguments: Any, asker: Asker) -> None:
        handler = self._handlers.get(name)
        result, error = None, None
        if handler is None:
            error = Failure("ValueError", f"the node knows no request {name!r}")
        else:
            try:
                result = handler(arguments)
            except RequestError as refused:
                error = refused.failure
            except NotYet as wait:
                wait.entry.waiting.append((name, arguments, asker))
                return
        self._deliver(asker, result, error)

    def _deliver(self, asker: Asker, result: Any, error: Failure | None) -> None:
        rank, client, number = asker
        if client < 0:
            self._outbox.peers[rank].append(PeerReply(number, result, error))
            return
        look_up = self._look_ups.get((client, number))
        if look_up is not None:
            if result is not None:
                self._hold_actor(asker, look_up, result)
                return
            look_up.granted = error is None
            if error is not None or client not in self._clients:
                self._give_up((client, number))
        if client in self._clients:
            to_client = self._outbox.clients[client]
            if type(result) is list and len(encode(result)) > ROWS_BYTES:
                to_client += [Rows(number, part) for part in parts(result)]
                result = []
            to_client.append(Reply(number, result, error))

    # --- facts ------------------------------------------------------------------------------------

    def _nodes(self, _: Any) -> list[dict[str, Any]]:
        session = self._tables.session
        return [
            {
                "rank": node.rank, "host": node.host, "address": node.address, "alive": True,
                "pid": node.pid, "resources": dict(node.resources), "labels": dict(node.labels),
                "node_id": ids.node_id_hex(node.rank, session["job_key"]),
            }
            for _, node in sorted(self._tables.nodes.items())
        ]

    def _cluster_resources(self, _: Any) -> dict[str, int]:
        total: dict[str, int] = {}
        for node in self._tables.nodes.values():
            for name, amount in node.resources:
                total[name] = total.get(name, 0) + amount
        return total

    def _available_resources(self, _: Any) -> dict[str, int]:
        free = {n: a for n, a in self._dispatcher.ledger.free.items() if a > 0}
        free[STORE] = self._memory.free_units
        scheduler = self._cluster.scheduler
        if scheduler is not None:
            for rank, view in scheduler.views.items():
                if rank != self._rank:
                    for name, amount in (*view.reported, (STORE, view.store)):
                        free[name] = free.get(name, 0) + max(amount, 0)
        return {name: amount for name, amount in free.items()
                if amount > 0 and "@" not in name and not labels.is_condition(name)}

    # --- names ------------------------------------------------------------------------------------

    def _name_created(self, arguments: Any) -> None:
        self._answer_again(self.names.created(arguments))

    def _release_name(self, arguments: Any) -> None:
        self._answer_again(self.names.release(arguments))

    def _answer_again(self, waiting: list[tuple[str, Any, Asker]]) -> None:
        for name, arguments, asker in waiting:
            self._answer(name, arguments, asker)

    def actor_created(self, actor_id: bytes, namespace: str, name: str) -> None:
        """At its home: CreateActor is here."""
        for key, look_up in list(self._look_ups.items()):
            if look_up.granted and look_up.arguments["actor_id"] == actor_id:
                del self._look_ups[key]
        self._tell_names("name_created", actor_id, namespace, name)

    def actor_died(self, actor_id: bytes, namespace: str, name: str) -> None:
        self._tell_names("release_name", actor_id, namespace, name)

    def _tell_names(self, request: str, actor_id: bytes, namespace: str, name: str) -> None:
        if not name:
            return
        arguments = {"actor_id": actor_id, "namespace": namespace, "name": name}
        if self._rank == NAMES_RANK:
            self._handlers[request](arguments)
        else:
            self.forward(NAMES_RANK, request, arguments, None)

    def client_gone(self, number: int) -> None:
        """Names it has reserved for actors that will not be, and handles it has not taken."""
        for key, look_up in list(self._look_ups.items()):
            if key[0] == number and (look_up.granted or look_up.held):
                self._give_up(key)

    def taken(self, client: int, number: int) -> None:
        """The client counts the handle itself now, or has given the name up."""
        look_up = self._look_ups.get((client, number))
        if look_up is not None and (look_up.held or look_up.granted):
            self._give_up((client, number))

    def _give_up(self, key: tuple[int, int]) -> None:
        look_up = self._look_ups.pop(key)
        if look_up.granted:
            self._tell_names("release_name", look_up.arguments["actor_id"],
                             look_up.arguments["namespace"], look_up.arguments["name"])
        if look_up.held:
            self._directory.release(look_up.held)

    def _hold_actor(self, asker: Asker, look_up: LookUp, facts: dict[str, Any]) -> None:
        """Node 0 knows this actor by the name; its home is asked whether it can be given out."""
        arguments = {"actor_id": facts["actor_id"], "rank": self._rank}
        worker = self._tables.workers.get(asker[1])
        if worker is not None and worker.actor_id == facts["actor_id"]:
            # Of itself: its own handles do not count, and its end must not wait for its end.
            self._give_out(asker, look_up, facts)
            return
        rank = self._rank_for("hold_actor", arguments)
        if rank == self._rank:
            self._home_answered(asker, look_up, facts, self._handlers["hold_actor"](arguments))
        else:
            self.forward(rank, "hold_actor", arguments,
                         lambda reply: self._home_answered(asker, look_up, facts, reply.result))

    def _home_answered(
        self, asker: Asker, look_up: LookUp, facts: dict[str, Any], counted: bool
    ) -> None:
        if not counted and asker[1] in self._clients:
            look_up.arguments = {**look_up.arguments, "ending": facts["actor_id"]}
            self._ask(look_up.request, look_up.arguments, asker)
            return
        if counted:
            look_up.held = ids.creation_object_id(facts["actor_id"])
            self._directory.held_for_us(look_up.held)
        self._give_out(asker, look_up, facts)

    def _give_out(self, asker: Asker, look_up: LookUp, facts: dict[str, Any]) -> None:
        _, client, number = asker
        alive = client in self._clients
        if look_up.request == "get_actor" or look_up.arguments.get("get_if_exists"):
            held = ids.creation_object_id(facts["actor_id"])
            reply = Reply(number, facts, None, held)
            keep = alive and look_up.held == held
        else:
            reply = Reply(number, None, already_taken(look_up.arguments).failure)
            keep = False
        if not keep:
            self._give_up((client, number))
        if alive:
            self._outbox.clients[client].append(reply)

    # --- acts -------------------------------------------------------------------------------------

    def _actor_handle(self, arguments: Any) -> dict[str, Any]:
        home = self._tables.homes.get(arguments["actor_id"])
        if home is None:
            raise RequestError("ValueError", "there is no such actor (any more)")
        return {"actor_id": home.actor_id, "handle": home.handle, "name": home.name}

    def _kill_actor(self, arguments: Any) -> None:
        self._homes.kill(
            arguments["actor_id"], no_restart=arguments.get("no_restart", True))

    def _cancel(self, arguments: Any) -> str:
        task_id = ids.task_of_object(arguments["object_id"])
        task = self._tables.tasks.get(task_id)
        if arguments.get("force") and task is not None and task.actor_id:
            raise RequestError("ValueError", "force=True is not for calls of actors: it would end "
                               "the actor. To do that there is kill()")
        return self._tasks.cancel(
            task_id, force=bool(arguments.get("force")),
            recursive=bool(arguments.get("recursive")))
