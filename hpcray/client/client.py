"""The client of a node, as the face and the worker use it: submit, get, wait, put. Thread-safe.

    Calls  Puts  Gets  Waits  Futures  Streaming  Questions  Memory     threads wait in these
      |      |     |     |       |         |          |        |
      +------+-----+-----+--with link:-----+----------+--------+--> Core     known and said (pure)
                              link.wait ------------------------> Link     lock, socket, reader

Each of their methods enters the door once (a wait leaves it while it sleeps), and unpickles, maps
memory and raises what tasks have raised outside of it.

Here they are made and given what they need of each other. What must not go in: how anything of this
is done.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from hpcray import exceptions
from hpcray.client.arguments import Arguments
from hpcray.client.calls import Calls
from hpcray.client.core import Core
from hpcray.client.futures import Futures
from hpcray.client.gets import Gets
from hpcray.client.helper import Helper
from hpcray.client.imports import Imports
from hpcray.client.link import Link
from hpcray.client.memory import Memory
from hpcray.client.puts import Puts
from hpcray.client.questions import Questions
from hpcray.client.references import ObjectRef, ReferenceTable
from hpcray.client.store import Store
from hpcray.client.streaming import Streaming
from hpcray.client.waits import Waits
from hpcray.protocol import ids
from hpcray.protocol.messages import Done, EndJob, Hello, Output, PinForJob, Yield


class Client:
    """See the module. One per process: made by `init`, or by the zygote for all its workers."""

    # Python finds attributes sooner so, if there are more than 30.
    __slots__ = (
        "_futures", "_helper", "_waits", "await_room", "begin_task", "cancelled", "check_pending",
        "children_of", "close_room", "complete_futures", "core", "create_actor", "define",
        "discard", "fetch_template", "future", "get", "get_packed", "has_room", "is_defined",
        "is_driver", "is_known", "known_part", "knows_function", "link", "look_up",
        "new_actor_id", "note_pending", "notify", "on_runs", "open_room", "pack_arguments",
        "packages", "pinned", "put", "put_packed", "put_serialized", "refs", "request", "submit",
        "unpin", "use_of", "wait", "write", "write_packed",
    )

    def __init__(self, *, is_driver: bool, imports: Imports | None = None) -> None:
        """`imports`: of a driver whose workers are to import what it has imported."""
        refs: ReferenceTable = ReferenceTable()
        self.refs: ReferenceTable = refs
        core = self.core = Core(refs=refs, store=Store, wire=_wire)
        link = self.link = Link(core)
        objects = core.objects
        helper = self._helper = Helper(link, is_driver=is_driver)
        memory = Memory(link, core.store, objects)
        questions = Questions(link, core.outbox, refs, core.requests)
        gets = Gets(link, refs, objects, memory, core.want_result, questions.explain)
        waits = self._waits = Waits(link, refs, objects)
        puts = Puts(link, core, memory)
        calls = Calls(link, core, imports)
        futures = self._futures = Futures(link, refs, objects, helper, gets.get)
        streaming = Streaming(
            link, core.outbox, core.streams, core.rooms, objects.ready_waiters)

        # What parts below ask of parts above.
        helper.complete = self._tick
        helper.has_futures = futures.is_waiting
        refs.intern_locked = self.intern
        refs.pin_for_job = self.pin_for_job
        refs.future = futures.future
        core.streams.next_item = streaming.next_item
        core.streams.item_future = futures.item_future
        core.on_collect = self._collect_garbage

        self.is_driver = is_driver
        # runtime_env's directories: digest of the packed content -> object.
        self.packages: dict[bytes, bytes] = {}

        # The parts' methods under one roof. Not methods that pass on: a call less for each.
        self.define = calls.define
        self.is_defined = core.is_defined
        self.use_of = core.use_of
        self.pack_arguments = Arguments(refs.check_session, puts.put_serialized).pack
        self.submit = calls.submit
        self.new_actor_id = calls.new_actor_id
        self.create_actor = calls.create_actor
        self.check_pending = calls.check_pending
        self.note_pending = calls.note_pending
        self.put = puts.put
        self.put_packed = puts.put_packed
        self.put_serialized = puts.put_serialized
        self.get = gets.get
        self.get_packed = gets.get_packed
        self.wait = waits.wait
        self.known_part = waits.known_part
        self.is_known = waits.is_known
        self.future = futures.future
        self.complete_futures = futures.complete  # by an event loop that reads the channel itself
        self.request = questions.request
        self.look_up = questions.look_up
        self.notify = questions.notify
        # Of workers.
        self.begin_task = core.begin_task
        # Child ids from now on descend from the (task, attempt) that is told, asked in the thread
        # or coroutine that makes them.
        self.children_of = core.children_of
        self.on_runs = core.notes.append
        self.cancelled = core.cancelled  # tasks of this worker
        self.fetch_template = questions.fetch_template
        self.knows_function = core.knows_function
        self.pinned = memory.pinned
        self.unpin = objects.unpins.append  # what is pinned for us, and nobody will open
        self.write = memory.write
        self.write_packed = memory.write_packed
        self.discard = memory.discard
        self.open_room = streaming.open_room
        self.close_room = streaming.close_room
        self.await_room = streaming.await_room
        self.has_room = streaming.has_room

    # --- connection -------------------------------------------------------------------------------

    def open(self, sock: socket.socket) -> None:
        """First of all: this is the channel. All that does not depend on it is made before."""
        self.link.open(sock)

    def start(self, timeout_s: float, config: dict[str, Any] | None = None) -> None:
        """Introduce this process and wait for the node's welcome.

        Raises:
          LaunchError: no welcome in time, or the node went away.
        """
        with self.link as link:
            self.core.outbox.append(Hello(os.getpid(), config))
            try:
                link.flush()
                done = link.wait(
                    self.core.welcomed, time.monotonic() + timeout_s, giving_back=False)
            except exceptions.RaySystemError as error:
                raise exceptions.LaunchError(f"the node could not start: {error}") from None
        if not done:
            raise exceptions.LaunchError(
                f"the node did not become ready within {timeout_s:g} s "
                "(HPCRAY_START_TIMEOUT_S); did every rank of the launch arrive?")

    def watch_always(self) -> None:
        """Show what workers print, and notice that the node is gone, while nobody calls us."""
        self._helper.start()

    def close(self) -> None:
        """Hang up. Pending waits in other threads end with an error."""
        self._helper.stop()
        self.link.close("hpcray was shut down")
        self._waits.close()
        self._futures.lost()
        self._futures.complete()  # with the error of the wait that can no longer be answered

    def end_job(
        self, status: int, *, park: bool, look_s: float, is_stuck: Callable[[], bool]
    ) -> bool:
        """Tell the node that the driver is done and wait until the job is gone.

        `is_stuck` is asked every `look_s`; once it says so the node is given up: False.
        """
        with self.link as link:
            if link.lost is not None:
                return link.ended
            self.core.outbox.append(EndJob(status, park))
            try:
                link.flush()
                while not link.wait(self.core.ended, time.monotonic() + look_s):
                    if is_stuck():
                        return False
                return True
            except exceptions.RaySystemError:
                return False

    def forked(self) -> None:
        """This process is a child of the one that made the client."""
        self.link.forked()

    @property
    def lost(self) -> str | None:
        return self.link.lost

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """What to do when the node is gone."""
        def lost(reason: str) -> None:
            self._futures.lost()
            self._helper.wake()
            tell(reason)

        self.link.on_lost = lost

    def on_output(self, show: Callable[[Output], None]) -> None:
        """What to do with lines that workers have printed."""
        self.core.on_output = show

    def on_cancel(self, tell: Callable[[bytes], None]) -> None:
        """What to do when a task of this worker is cancelled."""
        self.core.on_cancel = tell

    # --- what this process is ---------------------------------------------------------------------

    @property
    def job_id(self) -> bytes:
        return self.refs.job_id

    @property
    def rank(self) -> int:
        return self.core.rank

    @property
    def size(self) -> int:
        return self.refs.size

    @property
    def number(self) -> int:
        """Among the clients of its node."""
        return self.core.number

    @property
    def session(self) -> dict[str, Any]:
        return self.core.session

    @property
    def task_prefix(self) -> bytes:
        return self.core.task_prefix

    def set_actor(self, actor_id: bytes) -> None:
        """This process is that actor from now on."""
        self.refs.own = ids.creation_object_id(actor_id)

    # --- refs, and what is said of them -----------------------------------------------------------

    def intern(self, object_id: bytes) -> ObjectRef[Any]:
        """The ref of an object met in a value being unpickled."""
        with self.link:
            return self.refs.intern(object_id)

    def pin_for_job(self, object_id: bytes) -> None:
        with self.link as link:
            self.core.outbox.append(PinForJob(object_id))
            link.linger(0)

    def report(self, message: Any, reply_to: int = -1) -> None:
        """Queue a task's outcome; `flush` sends it, and the value of a Done to `reply_to`."""
        if type(message) is Done or (type(message) is Yield and not message.returned.contained):
            self.core.notes.append((message, reply_to))
        else:  # it may name refs, which die only when the lock is free again
            with self.link:
                self.core.report(message, reply_to)

    def flush(self, drain: bool = False) -> None:
        """Send what is queued; with `drain` (before a process idles) dropped refs too."""
        if drain and self._waits.group is not None:
            self._waits.let_go()
        link = self.link
        link.enter()
        try:
            link.flush(drain)
        finally:
            link.leave()

    def _tick(self) -> None:
        """By the helper, now and then."""
        self._futures.complete()
        self._waits.let_go()

    def _collect_garbage(self) -> None:
        gc.collect()
        if self.link.lost is None:
            self.flush(drain=True)


def _wire(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


__all__ = ["Client"]
