"""The node as one pure machine: messages in, messages and actions out.

It wires the collaborators together and routes messages to them; it decides nothing itself.
No sockets, clocks, threads or MPI: `server.py` carries out what lies in `outbox`.

    client messages --+                                   +--> outbox.clients / peers / tasks
    peer messages   --+--> Machine --> collaborators -----+--> outbox.actions
    results of actions+       directory  tasks  dispatcher  actors  memory  cluster  requests

One turn = any number of `client_messages`, `peer_messages`, results, then one `end_turn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hpcray.node.actors import Actors
from hpcray.node.cluster import Cluster, describe
from hpcray.node.directory import Directory
from hpcray.node.dispatch import Dispatcher
from hpcray.node.executor import Executor, Runner
from hpcray.node.explain import Explain
from hpcray.node.inventory import Inventory
from hpcray.node.ledger import ResourceLedger
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import FailJob, Outbox, Preload, ServePull, StopJob
from hpcray.node.placement import GROUPS_RANK, Bundles, Groups
from hpcray.node.pulls import Pulls
from hpcray.node.records import DRIVER, WAIT_LOCAL, WAIT_READY, WAIT_VALUE, ClientRecord
from hpcray.node.requests import Requests
from hpcray.node.streams import Streams
from hpcray.node.tables import Tables
from hpcray.node.task_states import QUEUED
from hpcray.node.tasks import Tasks
from hpcray.node.templates import Templates
from hpcray.node.waiting import Waiting
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

_FOREIGN_WAIT_S = 0.1
_SQUEEZED_INLINE_BYTES = 4096


class Machine:
    def __init__(
        self, rank: int, size: int, resources: dict[str, int], capacity_bytes: int, job_id: bytes,
        session: dict[str, Any],
    ) -> None:
        self.tables = Tables(rank, size, job_id, session)
        self.rank = rank
        self.size = size
        self.job_id = job_id
        self.session = session
        self.outbox = Outbox()
        self.clients = self.tables.clients
        self.functions: dict[bytes, m.FunctionDef] = {}
        self._function_waits: dict[bytes, list[tuple[int, bytes]]] = {}
        # New functions, for the control store.
        self.new_functions: list[m.FunctionDef] = []
        tables, outbox = self.tables, self.outbox
        self.membership = Membership(tables)
        self.memory = NodeMemory(tables, outbox, capacity_bytes)
        self.directory = Directory(tables, outbox, self.membership, self.memory)
        self.pulls = Pulls(tables, outbox, self.memory)
        self.streams = Streams(tables, outbox, self.memory, self.directory)
        self.tasks = Tasks(tables, outbox, self.memory, self.directory, self.streams)
        self.executor = Executor(tables, outbox, self.memory, self.directory, self.tasks)
        self.dispatcher = Dispatcher(
            tables, outbox, ResourceLedger(resources), self.executor, self.memory.lent)
        self.templates = Templates(tables, outbox)
        self.cluster = Cluster(tables, outbox, self.memory, self.tasks, self.dispatcher)
        self.bundles = Bundles(
            tables, outbox, self.tasks, self.executor, self.dispatcher, self.cluster)
        self.groups = Groups(tables, outbox, self.cluster, self.bundles)
        self.actors = Actors(
            tables, outbox, self.membership, self.directory, self.tasks, self.executor,
            self.dispatcher)
        self.inventory = Inventory(tables, outbox, self.directory, self.tasks)
        self.explain = Explain(
            tables, self.membership, self.memory, self.dispatcher, self.bundles)
        self.requests = Requests(
            tables, outbox, self.membership, self.memory, self.directory, self.tasks,
            self.dispatcher, self.cluster, self.actors.homes, self.inventory, self.explain)
        self.waiting = Waiting(
            tables, outbox, self.memory, self.dispatcher, self.cluster, self.groups, self.explain)
        self._wire()
        self._foreign_since_s: float | None = None
        self._squeezed = False
        self._from_clients = self._client_handlers()
        self._from_peers = self._peer_handlers()

    def _wire(self) -> None:
        """Upward: who hears of what, and who answers what. (Downward, parts know each other.)"""
        memory, directory, tasks = self.memory, self.directory, self.tasks
        executor, dispatcher = self.executor, self.dispatcher
        actors, cluster = self.actors, self.cluster
        memory.set_tight = dispatcher.set_tight
        memory.worker_waits = lambda number: dispatcher.blocked(number, ())
        memory.worker_goes_on = dispatcher.unblocked
        memory.who = self.explain.who
        directory.dependency_ready = tasks.dependency_ready
        directory.dependency_refused = tasks.dependency_refused
        directory.creation_freed = actors.homes.last_handle_gone
        templates = self.templates
        templates.learn = cluster.learn
        templates.asked_for = self.inventory.asked_for
        templates.on_forgotten += [
            dispatcher.template_gone, cluster.template_gone, self.inventory.template_gone]
        tasks.tell_template = templates.tell
        cluster.define = templates.define
        cluster.derived_gone = templates.derived_from
        tasks.enqueue = executor.enqueue = dispatcher.enqueue
        tasks.place = cluster.place
        tasks.over_elsewhere = cluster.finished
        tasks.back_from = cluster.returned
        tasks.unavailable = cluster.unavailable
        tasks.refuse_of_group = self.bundles.refuse
        tasks.arrived = executor.arrived
        tasks.refused_to_arrive = executor.refused_to_arrive
        tasks.cancel_here = executor.cancel_here
        tasks.failed_for_good = self.inventory.failed
        self.pulls.arrived = directory.pulled
        self.pulls.failed = directory.pull_failed
        self.pulls.sent = directory.unpin
        executor.has_room = dispatcher.has_room
        executor.work_came = cluster.work_came
        executor.reason_of_group = self.bundles.reason
        executor.runners[m.TASK] = Runner(
            fetched=dispatcher.fetched, over=dispatcher.finished, raised=dispatcher.finished)
        dispatcher.refuse_of_group = self.bundles.refuse
        dispatcher.held_shapes = self.bundles.held_shapes
        dispatcher.demanded_shapes = cluster.demanded_shapes
        dispatcher.place_actor = cluster.place_actor
        dispatcher.creating = actors.hosts.creating
        dispatcher.actor_gone = actors.hosts.worker_gone
        dispatcher.actor_of_group = actors.hosts.group_removed
        dispatcher.worker_over = self.inventory.worker_gone
        actors.homes.actor_created = self.requests.actor_created
        actors.homes.actor_died = self.requests.actor_died
        actors.homes.actor_forgotten = self.inventory.actor_forgotten
        forward = self.requests.forward
        self.inventory.forward = self.explain.forward = self.waiting.forward = forward
        self.waiting.collect_garbage = self.collect_garbage
        serve = self.requests.serve
        serve("create_placement_group", self.groups.create)
        serve("remove_placement_group", self.groups.remove)
        serve("placement_groups", self.groups.table)
        serve("holdings", lambda arguments: self.waiting.holdings(arguments["names"]))
        serve("statistics", lambda _: self.statistics())
        self.membership.on_lost += [
            directory.node_lost, templates.node_lost, cluster.node_lost, self.requests.node_lost,
            self._end_for]
        cluster.refuse_of_group = self.bundles.refuse
        if self.rank == GROUPS_RANK:
            self.bundles.gone = self.groups.is_gone

    @property
    def now_s(self) -> float:
        return self.tables.now_s

    # --- other nodes come and go ------------------------------------------------------------------

    def joined(self, node: m.Joined) -> None:
        """A node of the job, this one too."""
        self.membership.joined(node)
        self.cluster.joined(node)

    def node_lost(self, rank: int, reason: str) -> None:
        """Everybody hears of it; then the job ends, for it cannot go on without a node yet."""
        self.membership.lose(rank, reason)

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
        handlers = self._from_clients
        for message in batch:
            handlers[type(message)](client, message)

    def may_have_called(self, worker: int) -> list[int]:
        """The clients whose messages are to be heard before the end of this worker is: they may
        have called the actor in it themselves, and then said so (`SubmitCall.worker`)."""
        return [client.number for client in self.clients.values() if worker in client.actors]

    def worker_exited(self, number: int, failure: values.Failure) -> None:
        """The process is gone and its channel has been read dry."""
        client = self.clients.pop(number, None)
        self.outbox.clients.pop(number, None)
        self.dispatcher.worker_gone(number, failure)
        if client is not None:
            self.directory.answer_unsent(client.sent_values)
            self.templates.client_gone(client)
            self.actors.hosts.caller_died(client.called)
            for other in self.clients.values():
                if other.number in client.connected or number in other.actors:
                    self.outbox.clients[other.number].append(m.ClientGone(number))
                for numbers in (other.eligible, other.connected, other.actors):
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

    def _preload(self, client: ClientRecord, message: m.Preload) -> None:
        self.outbox.actions.append(Preload(message.modules))
        for rank in range(self.size):
            if rank != self.rank:
                self.outbox.peers[rank].append(message)

    def _define_template(self, client: ClientRecord, message: m.DefineTemplate) -> None:
        self.templates.from_client(client, message.template)

    def _forget_templates(self, client: ClientRecord, message: m.ForgetTemplates) -> None:
        self.templates.client_lets_go(client, message.template_ids)

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

    def _causal_header(self, client: ClientRecord, message: m.CausalHeader) -> None:
        if message.sent:  # what it has heard of is the loop's affair (node/inbox.py)
            client.sent_values.clear()
            client.called = b""

    def _values_unsent(self, client: ClientRecord, message: m.ValuesUnsent) -> None:
        self.directory.answer_unsent(
            [(message.client, object_id) for object_id in ids.split_ids(message.ids)])

    def _taken(self, client: ClientRecord, message: m.Taken) -> None:
        self.requests.taken(client.number, message.request)

    def _end_for(self, rank: int, reason: str) -> None:
        self.outbox.actions.append(FailJob(
            f"rank {rank} is gone ({reason}), and it cannot yet go on without a rank"))

    def _end_job(self, client: ClientRecord, message: m.EndJob) -> None:
        self.outbox.actions.append(StopJob(message.park, message.status))

    # --- peers ------------------------------------------------------------------------------------

    def peer_messages(self, rank: int, batch: list[Any]) -> None:
        handlers = self._from_peers
        for message in batch:
            handlers[type(message)](rank, message)

    def _holder_add(self, rank: int, message: m.HolderAdd) -> None:
        self.directory.holder_added(rank, message.ids)
        self.outbox.peers[rank].append(m.HolderAdded(message.turn))

    def _pull_request(self, rank: int, message: m.PullRequest) -> None:
        location = self.directory.pull_asked(rank, message)
        if location is not None:
            self.outbox.actions.append(
                ServePull(message.object_id, rank, message.transfer, location, message.mapped))

    def _load(self, rank: int, message: m.Load) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.load(rank, message, self.now_s)

    def _demand(self, rank: int, message: m.Demand) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.demand(rank, message)
            self.groups.demanded(rank, message.shape)

    def _grant_unused(self, rank: int, message: m.GrantUnused) -> None:
        if self.cluster.scheduler is not None:
            self.cluster.scheduler.unused(rank, message)

    def collect_garbage(self) -> None:
        """In the processes of this node."""
        for number in self.clients:
            self.outbox.clients[number].append(m.CollectGarbage())

    def _notice(self, rank: int, message: m.Notice) -> None:
        self.outbox.notices.append(message.text)

    # --- turns ------------------------------------------------------------------------------------

    def end_turn(self, now_s: float) -> None:
        """Decide what follows from this turn's messages."""
        self.tables.now_s = now_s
        if self.bundles.ending:
            self.bundles.end_turn()
        if self.groups.pending:
            self.groups.end_turn()
        self.dispatcher.end_turn(now_s)
        if self.actors.hosts.pump:
            self.actors.hosts.end_turn()
        if self.size > 1:
            self.cluster.end_turn(now_s)
        if self.memory.released:
            self.memory.end_turn()
        self.directory.end_turn()
        if self.inventory.questions:
            self.inventory.end_turn()

    def tick(self, now_s: float) -> None:
        """Every 10 ms or so while `wants_ticks`, else every second."""
        self.tables.now_s = now_s
        self.dispatcher.tick(now_s)
        self.memory.tick(now_s)
        self.templates.tick(now_s)
        if self.explain.open:
            self.explain.tick(now_s)
        if self.size > 1:
            self._give_back_foreign(now_s)
        self._limit_inline()
        self._report_impossible()
        self.waiting.tick(now_s)

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
        # So do actors of ours: their place was chosen by loads that had changed by then.
        # There are few of either: a look at all that is queued would take milliseconds.
        if (any(queue.creation and queue.tasks for queue in self.dispatcher.queues.values())
                or any(task.state is QUEUED for task in self.executor.guests.values())):
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
                for _, node in sorted(self.membership.living.items())[:8])
            self.outbox.notices.append(
                f"Warning: {name} asks for {asked}, which no node of this job can ever offer "
                f"(it has {have}). It stays pending; cancel it, or start a larger job.")

    @property
    def wants_ticks(self) -> bool:
        return bool(
            self.dispatcher.piled or self.dispatcher.pausing or self.memory.waiting
            or self._foreign_since_s is not None
            or self.inventory.questions or self.explain.open
            or self.directory.inline_bytes > self.memory.budget.capacity_bytes // 10
            or (self.size > 1 and (self.dispatcher.queued() or self.cluster.actors_waiting)))

    @property
    def due_s(self) -> float:
        """When the next turn should be, if nothing happens."""
        return self.cluster.due_s if self.size > 1 else math.inf

    def statistics(self) -> dict[str, Any]:
        """For tests and `hpcray status`; units in the names."""
        budget = self.memory.budget.statistics()
        return {
            "rank": self.rank, "objects": len(self.directory.records),
            "tasks": len(self.tasks.records), "tasks_submitted": self.tasks.submitted,
            "tasks_finished": self.tasks.finished, "workers": len(self.dispatcher.workers),
            "actors": len(self.tables.hosted), "queued": self.dispatcher.queued(),
            "store_capacity_bytes": budget.capacity_bytes, "store_used_bytes": budget.used_bytes,
            "object_bytes": self.memory.object_bytes,
        }

    def validate(self) -> None:
        """Check every collaborator's invariants. Slow: for tests."""
        self.directory.validate()
        self.tasks.validate()
        self.executor.validate()
        self.streams.validate()
        self.dispatcher.validate()
        self.actors.validate()
        self.bundles.validate()
        self.memory.budget.validate()
        self.membership.validate()
        self.pulls.validate()

    def _client_handlers(self) -> dict[type, Callable[[ClientRecord, Any], None]]:
        return {
            m.Hello: self._hello,
            m.DefineFunction: self._define_function,
            m.DefineTemplate: self._define_template,
            m.ForgetTemplates: self._forget_templates,
            m.SubmitTask: self.tasks.submit,
            m.SubmitCall: self.actors.routes.call,
            m.CreateActor: self.actors.homes.create,
            m.PutInline: self._put_inline,
            m.PutLocated: self._put_located,
            m.Hold: self._hold,
            m.Drop: self._drop,
            m.Unpin: self._unpin,
            m.PinForJob: self._pin_for_job,
            m.Get: self._get,
            m.Watch: self._watch,
            m.Done: self.executor.done,
            m.DoneMany: self.executor.done_many,
            m.Failed: self.executor.failed,
            m.Blocked: lambda client, message: self.dispatcher.blocked(
                client.number, message.unstarted, message.waits),
            m.Unblocked: lambda client, _: self.dispatcher.unblocked(client.number),
            m.SegmentRequest: lambda client, message: self.memory.request(
                client, message.nbytes, self.now_s),
            m.SegmentReturn: lambda client, message: self.memory.returned(client, message.segment),
            m.SegmentOpen: lambda client, message: self.memory.open(client, message.segment),
            m.FetchTemplate: self._fetch_template,
            m.Request: lambda client, message: self.requests.asked(client.number, message),
            m.CausalHeader: self._causal_header,
            m.ValuesUnsent: self._values_unsent,
            m.CallUnsent: lambda _, message: self.actors.hosts.call_unsent(message.task_id),
            m.EndJob: self._end_job,
            m.ActorExit: lambda _, message: self.actors.hosts.exiting(message.actor_id),
            m.Yield: self.streams.yielded,
            m.StreamTaken: lambda _, message: self.streams.taken(message),
            m.StreamDropped: self.streams.dropped,
            m.Taken: self._taken,
            m.Preload: self._preload,
        }

    def _peer_handlers(self) -> dict[type, Callable[[int, Any], None]]:
        return {
            m.TemplateDef: lambda rank, message: self.templates.from_peer(rank, message.template),
            m.ForgetTemplates: lambda rank, message: self.templates.peer_lets_go(
                rank, message.template_ids),
            m.FetchFunction: self._function_asked,
            m.FunctionDef: self._function_arrived,
            m.Assign: self.executor.assigned,
            m.AssignCall: self.actors.hosts.call_assigned,
            m.TaskDone: self.tasks.peer_done,
            m.TaskDoneMany: self.tasks.peer_done_many,
            m.TaskFailed: self.tasks.peer_failed,
            m.TaskCrashed: self.tasks.peer_crashed,
            m.TaskReturned: self.tasks.peer_returned,
            m.HolderAdd: self._holder_add,
            m.HolderAdded: lambda rank, message: self.directory.holders.acknowledged(
                rank, message.turn),
            m.HolderDrop: lambda rank, message: self.directory.holder_dropped(rank, message.ids),
            m.HandedOver: lambda _, message: self.directory.handed_over(message.handover),
            m.Want: lambda rank, message: self.directory.wanted_by(rank, message.ids),
            m.ObjectReady: lambda _, message: self.directory.object_ready(
                message.object_id, message.value),
            m.PullRequest: self._pull_request,
            m.PullEnded: lambda _, message: self.directory.unpin(message.object_id),
            m.CopyAdded: lambda rank, message: self.directory.copy_added(rank, message.object_id),
            m.FreeCopies: lambda _, message: self.directory.free_copies(message.ids),
            m.Load: self._load,
            m.Demand: self._demand,
            m.GrantUnused: self._grant_unused,
            m.Grant: lambda _, message: self.cluster.granted(message, self.now_s),
            **self.actors.handlers,
            m.PeerRequest: self.requests.peer_asked,
            m.PeerReply: lambda _, message: self.requests.peer_answered(message),
            m.PeerRows: lambda _, message: self.inventory.peer_rows(message),
            m.Notice: self._notice,
            m.CollectGarbage: lambda *_: self.collect_garbage(),
            m.GiveBack: lambda rank, message: self.dispatcher.give_back_to(
                rank, message.shape, message.count),
            m.RecallTask: lambda _, message: self.executor.recalled(message),
            m.TaskYield: self.streams.peer_yielded,
            m.PrepareBundles: lambda rank, message: self.outbox.peers[rank].append(
                m.BundlesPrepared(message.group, self.bundles.prepare(message))),
            m.BundlesPrepared: self.groups.prepared,
            m.CommitBundles: lambda _, message: self.bundles.commit(message),
            m.ReleaseBundles: lambda _, message: self.bundles.release(message.group),
            m.GroupRemoved: lambda _, message: self.bundles.removed(message.group),
            m.TaskRoom: lambda _, message: self.streams.room(message),
            m.Preload: lambda _, message: self.outbox.actions.append(Preload(message.modules)),
        }
