"""The node as one pure machine: messages in, messages and actions out.

It wires the collaborators together and routes messages to them; it decides nothing itself.
No sockets, clocks, threads or MPI: `server.py` carries out what lies in `outbox`.

    client messages --+                                   +--> outbox.clients / peers / tasks
    peer messages   --+--> Machine --> collaborators -----+--> outbox.actions
    results of actions+       directory  tasks  dispatcher  actors  memory  cluster  requests

One turn = any number of `client_messages`, `peer_messages`, results, then one `end_turn`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.node.actors import Actors
from hpcray.node.cluster import Cluster, describe
from hpcray.node.directory import Directory
from hpcray.node.dispatch import Dispatcher
from hpcray.node.inventory import Inventory
from hpcray.node.ledger import ResourceLedger
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox, ServePull, StopJob
from hpcray.node.placement import Bundles, Groups
from hpcray.node.records import DRIVER, WAIT_LOCAL, WAIT_READY, WAIT_VALUE, ClientRecord
from hpcray.node.requests import Requests
from hpcray.node.streams import Streams
from hpcray.node.tasks import Tasks
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

_FOREIGN_WAIT_S = 0.1
_SQUEEZED_INLINE_BYTES = 4096


class Machine:
    def __init__(
        self, rank: int, size: int, resources: dict[str, int], capacity_bytes: int, job_id: bytes,
        session: dict[str, Any],
    ) -> None:
        self.rank = rank
        self.size = size
        self.job_id = job_id
        self.session = session
        self.now_s = 0.0
        self.outbox = Outbox()
        self.clients: dict[int, ClientRecord] = {}
        self.functions: dict[bytes, m.FunctionDef] = {}
        self._function_waits: dict[bytes, list[tuple[int, bytes]]] = {}
        # New functions, for the control store.
        self.new_functions: list[m.FunctionDef] = []
        self.memory = NodeMemory(self, self.outbox, capacity_bytes)
        self.directory = Directory(self, self.outbox)
        self.tasks = Tasks(self, self.outbox)
        self.streams = Streams(self, self.outbox)
        self.dispatcher = Dispatcher(self, self.outbox, ResourceLedger(resources))
        self.actors = Actors(self, self.outbox)
        self.cluster = Cluster(self, self.outbox)
        self.bundles = Bundles(self, self.outbox, self.dispatcher.ledger)
        self.groups = Groups(self, self.outbox)
        self.requests = Requests(self, self.outbox)
        self.inventory = Inventory(self, self.outbox)
        self.directory.on_freed_creation = self.actors.last_handle_gone
        self._foreign_since_s: float | None = None
        self._squeezed = False

    # --- clients ----------------------------------------------------------------------------------

    def connect(self, number: int) -> None:
        """A process (the driver, or a worker being forked) may talk to us as client `number`."""
        self.clients[number] = ClientRecord(number)

    def welcome(self, number: int) -> None:
        client = self.clients[number]
        client.welcomed = True
        self.outbox.clients[number].append(
            m.Welcome(self.job_id, self.rank, self.size, number, self.session))
        if self._squeezed:
            self.outbox.clients[number].append(m.InlineLimit(_SQUEEZED_INLINE_BYTES))

    def client_messages(self, number: int, batch: list[Any]) -> None:
        client = self.clients.get(number)
        if client is None:
            return
        handlers = _CLIENT_HANDLERS
        for message in batch:
            handlers[type(message)](self, client, message)

    def worker_exited(self, number: int, failure: values.Failure) -> None:
        """The process is gone and its channel has been read dry."""
        client = self.clients.pop(number, None)
        self.outbox.clients.pop(number, None)
        self.dispatcher.worker_gone(number, failure)
        if client is not None:
            self.directory.answer_after_all(client.told)
            self.actors.caller_died(client.called)
            for other in self.clients.values():
                if other.number in client.introduced or number in other.actors:
                    self.outbox.clients[other.number].append(m.ClientGone(number))
                for numbers in (other.met, other.introduced, other.actors):
                    numbers.discard(number)
            self.directory.forget_client(client)
            self.streams.client_gone(number)
            self.requests.client_gone(number)
            self.memory.client_gone(number)

    def _hello(self, client: ClientRecord, message: m.Hello) -> None:
        client.pid = message.pid
        if client.number != DRIVER:
            self.welcome(client.number)
            self.dispatcher.worker_ready(client.number, message.pid, self.now_s)

    def _define_function(self, client: ClientRecord, message: m.DefineFunction) -> None:
        if message.function_id not in self.functions:
            definition = m.FunctionDef(
                message.function_id, message.name, message.blob, message.object_id)
            self.functions[message.function_id] = definition
            self.new_functions.append(definition)

    def _define_template(self, client: ClientRecord, message: m.DefineTemplate) -> None:
        self.tasks.define(message.template)

    def _fetch_template(self, client: ClientRecord, message: m.FetchTemplate) -> None:
        template = self.tasks.templates[message.template_id]
        if template.kind == m.METHOD:
            self.outbox.clients[client.number].append(m.TemplateIs(template, b""))
            return
        function = self.functions.get(template.function_id)
        if function is not None:
            self.outbox.clients[client.number].append(
                m.TemplateIs(template, function.blob, function.object_id))
        elif message.home == self.rank:
            # Every home defines a function before the first task that names it.
            self.outbox.clients[client.number].append(m.TemplateIs(template, b""))
        else:
            waits = self._function_waits.setdefault(template.function_id, [])
            waits.append((client.number, template.template_id))
            if len(waits) == 1:
                self.outbox.peers[message.home].append(m.FetchFunction(template.function_id))

    def _function_arrived(self, rank: int, message: m.FunctionDef) -> None:
        if message.blob or message.object_id:
            self.functions[message.function_id] = message
        for number, template_id in self._function_waits.pop(message.function_id, ()):
            if number in self.clients:
                self.outbox.clients[number].append(m.TemplateIs(
                    self.tasks.templates[template_id], message.blob, message.object_id))

    def _function_asked(self, rank: int, message: m.FetchFunction) -> None:
        self.outbox.peers[rank].append(self.functions.get(
            message.function_id, m.FunctionDef(message.function_id, "", b"")))

    def _put_inline(self, client: ClientRecord, message: m.PutInline) -> None:
        client.held.add(message.object_id)
        self.directory.put_inline(message.object_id, message.value, message.contained)

    def _put_located(self, client: ClientRecord, message: m.PutLocated) -> None:
        self.directory.created(message.object_id)
        client.held.add(message.object_id)
        self.directory.resolve_located(message.object_id, message.location, message.contained)

    def _hold(self, client: ClientRecord, message: m.Hold) -> None:
        directory = self.directory
        held = client.held
        for object_id in ids.split_ids(message.ids):
            if object_id in held:
                continue
            held.add(object_id)
            record = directory.hold(object_id)
            barrier = directory.announce(record)
            if barrier:
                client.add_barrier = barrier

    def _drop(self, client: ClientRecord, message: m.Drop) -> None:
        release = self.directory.release
        held = client.held
        for object_id in ids.split_ids(message.ids):
            if object_id in held:
                held.remove(object_id)
                release(object_id)

    def _unpin(self, client: ClientRecord, message: m.Unpin) -> None:
        self.directory.client_unpinned(client, message.object_id, message.count)

    def _pin_for_job(self, client: ClientRecord, message: m.PinForJob) -> None:
        for object_id in ids.split_ids(message.ids):
            self.directory.announce(self.directory.hold(object_id))

    def _get(self, client: ClientRecord, message: m.Get) -> None:
        self.directory.get(client.number, message.ids, WAIT_VALUE)

    def _watch(self, client: ClientRecord, message: m.Watch) -> None:
        self.directory.get(
            client.number, message.ids, WAIT_LOCAL if message.fetch else WAIT_READY)

    def _meanwhile(self, client: ClientRecord, message: m.Meanwhile) -> None:
        if message.sent:  # what it has heard of is the loop's affair (node/inbox.py)
            client.told.clear()
            client.called = b""

    def _untold(self, client: ClientRecord, message: m.Untold) -> None:
        self.directory.answer_after_all(
            [(message.client, object_id) for object_id in ids.split_ids(message.ids)])

    def _end_job(self, client: ClientRecord, message: m.EndJob) -> None:
        self.outbox.actions.append(StopJob(message.park, message.status))

    # --- peers ------------------------------------------------------------------------------------

    def peer_messages(self, rank: int, batch: list[Any]) -> None:
        handlers = _PEER_HANDLERS
        for message in batch:
            handlers[type(message)](self, rank, message)

    def _holder_add(self, rank: int, message: m.HolderAdd) -> None:
        self.directory.holder_added(rank, message.ids)
        self.outbox.peers[rank].append(m.HolderAdded())

    def _pull_request(self, rank: int, message: m.PullRequest) -> None:
        location = self.directory.pull_asked(rank, message)
        if location is not None:
            self.outbox.actions.append(
                ServePull(message.object_id, rank, message.transfer, location, message.mapped))

    def _load(self, rank: int, message: m.Load) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.load(rank, message)
            self.groups.resources_changed()

    def _demand(self, rank: int, message: m.Demand) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.demand(rank, message)

    def _grant_unused(self, rank: int, message: m.GrantUnused) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.unused(rank, message)

    def _notice(self, rank: int, message: m.Notice) -> None:
        self.outbox.notices.append(message.text)

    # --- turns ------------------------------------------------------------------------------------

    def end_turn(self, now_s: float) -> None:
        """Decide what follows from this turn's messages."""
        self.now_s = now_s
        self.bundles.end_turn()
        self.groups.end_turn()
        self.dispatcher.end_turn(now_s)
        self.actors.end_turn()
        self.cluster.end_turn(now_s)
        self.memory.end_turn()
        self.directory.end_turn()
        if self.inventory.questions:
            self.inventory.end_turn()

    def tick(self, now_s: float) -> None:
        """Every 10 ms or so while `wants_ticks`, else every second."""
        self.now_s = now_s
        self.dispatcher.tick(now_s)
        self.memory.tick(now_s)
        if self.size > 1:
            self._give_back_foreign(now_s)
        self._limit_inline()
        self._report_impossible()

    def _limit_inline(self) -> None:
        """Inline values may fill a tenth of the store's budget; beyond, larger ones go to it."""
        tenth = self.memory.budget.capacity_bytes // 10
        inline_bytes = self.directory.inline_bytes
        if inline_bytes > tenth if not self._squeezed else inline_bytes < tenth // 2:
            self._squeezed = not self._squeezed
            limit = _SQUEEZED_INLINE_BYTES if self._squeezed else values.INLINE_MAX_BYTES
            for number in self.clients:
                self.outbox.clients[number].append(m.InlineLimit(limit))

    def _give_back_foreign(self, now_s: float) -> None:
        # Others' tasks that wait here for long go back even unasked: somebody may have room.
        if any(t.home != self.rank for q in self.dispatcher.queues.values() for t in q.tasks):
            if self._foreign_since_s is None:
                self._foreign_since_s = now_s
            elif now_s - self._foreign_since_s > _FOREIGN_WAIT_S:
                self.dispatcher.give_back_foreign()
                self._foreign_since_s = None
        else:
            self._foreign_since_s = None

    def _report_impossible(self) -> None:
        found: list[tuple[str, Any]] = []
        if self.size == 1:
            found += [(task.template.name, queue.shape)
                      for queue, task in self.dispatcher.infeasible()]
        elif self.cluster.scheduler is not None:
            found += [("a task", demand.shape)
                      for _, demand in self.cluster.scheduler.impossible]
            self.cluster.scheduler.impossible.clear()
        for name, shape in found:
            asked = describe(shape)
            have = ", ".join(
                f"rank {node.rank}: {describe(node.resources)}"
                for _, node in sorted(self.cluster.nodes.items())[:8])
            self.outbox.notices.append(
                f"Warning: {name} asks for {asked}, which no node of this job can ever offer "
                f"(it has {have}). It stays pending; cancel it, or start a larger job.")

    @property
    def wants_ticks(self) -> bool:
        return bool(
            self.dispatcher.piled or self.memory.waiting or self._foreign_since_s is not None
            or self.cluster.load_is_stale or self.inventory.questions
            or self.directory.inline_bytes > self.memory.budget.capacity_bytes // 10
            or (self.size > 1 and (self.dispatcher.queued() or self.cluster.actors_waiting)))

    def statistics(self) -> dict[str, Any]:
        """For tests and `hpcray status`; units in the names."""
        budget = self.memory.budget.statistics()
        return {
            "rank": self.rank, "objects": len(self.directory.records),
            "tasks": len(self.tasks.records), "tasks_submitted": self.tasks.submitted,
            "tasks_finished": self.tasks.finished, "workers": len(self.dispatcher.workers),
            "actors": len(self.actors.hosted), "queued": self.dispatcher.queued(),
            "store_capacity_bytes": budget.capacity_bytes, "store_used_bytes": budget.used_bytes,
            "object_bytes": self.memory.object_bytes,
        }

    def validate(self) -> None:
        """Check every collaborator's invariants. Slow: for tests."""
        self.directory.validate()
        self.tasks.validate()
        self.streams.validate()
        self.dispatcher.validate()
        self.actors.validate()
        self.bundles.validate()
        self.memory.budget.validate()


_CLIENT_HANDLERS: dict[type, Callable[[Machine, ClientRecord, Any], None]] = {
    m.Hello: Machine._hello,
    m.DefineFunction: Machine._define_function,
    m.DefineTemplate: Machine._define_template,
    m.SubmitTask: lambda self, client, message: self.tasks.submit(client, message),
    m.SubmitCall: lambda self, client, message: self.actors.call(client, message),
    m.CreateActor: lambda self, client, message: self.actors.create(client, message),
    m.PutInline: Machine._put_inline,
    m.PutLocated: Machine._put_located,
    m.Hold: Machine._hold,
    m.Drop: Machine._drop,
    m.Unpin: Machine._unpin,
    m.PinForJob: Machine._pin_for_job,
    m.Get: Machine._get,
    m.Watch: Machine._watch,
    m.Done: lambda self, client, message: self.tasks.done(client, message),
    m.DoneMany: lambda self, client, message: self.tasks.done_many(client, message),
    m.Failed: lambda self, client, message: self.tasks.failed(client, message),
    m.Blocked: lambda self, client, message: self.dispatcher.blocked(
        client.number, message.unstarted),
    m.Unblocked: lambda self, client, _: self.dispatcher.unblocked(client.number),
    m.SegmentRequest: lambda self, client, message: self.memory.request(
        client, message.nbytes, self.now_s),
    m.SegmentReturn: lambda self, client, message: self.memory.returned(client, message.segment),
    m.SegmentOpen: lambda self, client, message: self.memory.open(client, message.segment),
    m.FetchTemplate: Machine._fetch_template,
    m.Request: lambda self, client, message: self.requests.asked(client.number, message),
    m.Meanwhile: Machine._meanwhile,
    m.Untold: Machine._untold,
    m.Unsent: lambda self, _, message: self.actors.call_unsent(message.task_id),
    m.EndJob: Machine._end_job,
    m.ActorExit: lambda self, _, message: self.actors.exiting(message.actor_id),
    m.Yield: lambda self, client, message: self.streams.yielded(client, message),
    m.StreamTaken: lambda self, _, message: self.streams.taken(message),
    m.StreamDropped: lambda self, client, message: self.streams.dropped(client, message),
}

_PEER_HANDLERS: dict[type, Callable[[Machine, int, Any], None]] = {
    m.TemplateDef: lambda self, _, message: self.tasks.define(message.template),
    m.FetchFunction: Machine._function_asked,
    m.FunctionDef: Machine._function_arrived,
    m.Assign: lambda self, rank, message: self.tasks.assigned(rank, message),
    m.AssignCall: lambda self, rank, message: self.actors.call_assigned(rank, message),
    m.TaskDone: lambda self, rank, message: self.tasks.peer_done(rank, message),
    m.TaskDoneMany: lambda self, rank, message: self.tasks.peer_done_many(rank, message),
    m.TaskFailed: lambda self, rank, message: self.tasks.peer_failed(rank, message),
    m.TaskCrashed: lambda self, rank, message: self.tasks.peer_crashed(rank, message),
    m.TaskReturned: lambda self, rank, message: self.tasks.peer_returned(rank, message),
    m.HolderAdd: Machine._holder_add,
    m.HolderAdded: lambda self, rank, _: self.directory.holders.acknowledged(rank),
    m.HolderDrop: lambda self, rank, message: self.directory.holder_dropped(rank, message.ids),
    m.HandedOver: lambda self, _, message: self.directory.handed_over(message.handover),
    m.Want: lambda self, rank, message: self.directory.wanted_by(rank, message.ids),
    m.ObjectReady: lambda self, _, message: self.directory.object_ready(
        message.object_id, message.value),
    m.PullRequest: Machine._pull_request,
    m.PullEnded: lambda self, _, message: self.directory.unpin(message.object_id),
    m.CopyAdded: lambda self, rank, message: self.directory.copy_added(rank, message.object_id),
    m.FreeCopies: lambda self, _, message: self.directory.free_copies(message.ids),
    m.Load: Machine._load,
    m.Demand: Machine._demand,
    m.GrantUnused: Machine._grant_unused,
    m.Grant: lambda self, _, message: self.cluster.granted(message, self.now_s),
    m.ActorWhere: lambda self, rank, message: self.actors.where(rank, message.actor_id),
    m.ActorIs: lambda self, _, message: self.actors.actor_is(message),
    m.ActorStop: lambda self, _, message: self.actors.stop_hosted(message),
    m.ActorDown: lambda self, _, message: self.actors.actor_down(message),
    m.PeerRequest: lambda self, rank, message: self.requests.peer_asked(rank, message),
    m.PeerReply: lambda self, _, message: self.requests.peer_answered(message),
    m.PeerRows: lambda self, _, message: self.inventory.peer_rows(message),
    m.ActorAt: lambda self, _, message: self.actors.actor_at(message),
    m.Notice: Machine._notice,
    m.GiveBack: lambda self, rank, message: self.dispatcher.give_back_to(
        rank, message.shape, message.count),
    m.RecallTask: lambda self, _, message: self.tasks.recalled(message),
    m.TaskYield: lambda self, rank, message: self.streams.peer_yielded(rank, message),
    m.PrepareBundles: lambda self, rank, message: self.outbox.peers[rank].append(
        m.BundlesPrepared(message.group, self.bundles.prepare(message))),
    m.BundlesPrepared: lambda self, rank, message: self.groups.prepared(rank, message),
    m.CommitBundles: lambda self, _, message: self.bundles.commit(message),
    m.ReleaseBundles: lambda self, _, message: self.bundles.release(message.group),
    m.GroupRemoved: lambda self, _, message: self.bundles.removed(message.group),
    m.TaskRoom: lambda self, _, message: self.streams.room(message),
}
