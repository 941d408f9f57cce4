"""What the node writes behind to the control store, and the sidecar that node 0 keeps. Thin.

Every few milliseconds `record` takes what the machine has gathered (lineage, functions, actors,
names) and queues it; the writer's own thread talks to Redis. Nothing here waits for Redis, and
losing it costs the record, not the job: it is reported once.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from hpcray.control.address import ControlAddress
from hpcray.control.schema import ActorRecord, JobRecord, NodeRecord
from hpcray.control.sidecar import Sidecar, new_password, spawn_sidecar
from hpcray.exceptions import LaunchError
from hpcray.protocol.messages import UNIT, Joined
from hpcray.transport.patience import Patience

if TYPE_CHECKING:
    from hpcray.control.writer import ControlWriter
    from hpcray.node.machine import Machine

# At the end, Redis may be silent for so long before the rest is dropped.
_END_S = 1.0
# A connection breaks moments before the death behind it can be seen; arbitrary, but nobody waits.
_DEATH_IS_TOLD_S = 1.0
_encode = msgspec.msgpack.Encoder().encode


class Journal:
    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._sidecar: Sidecar | None = None
        self._dead = False
        self._held: list[tuple[float, str]] = []  # when it came, what the connection says
        self._address: ControlAddress | None = None
        self._writer: ControlWriter | None = None
        self._patience = Patience(_END_S)
        self._rank = 0

    def start_store(self, url: str, bind_address: str | None) -> None:
        """Node 0: use the store at `url`, else start a sidecar; go on without if none can be."""
        if url:
            self._address = ControlAddress.from_url(url)
            return
        try:
            self._sidecar = spawn_sidecar(None, new_password(), bind_address=bind_address)
            self._address = self._sidecar.address
        except LaunchError as error:
            self._notice(f"Warning: running without a control store: {error}")

    def descriptors(self) -> list[tuple[int, Callable[[int], None]]]:
        return [] if self._sidecar is None else [(self._sidecar.fileno(), self._on_sidecar)]

    def _on_sidecar(self, _fd: int) -> None:
        self.watch_sidecar()

    def watch_sidecar(self) -> str | None:
        """What happened to the sidecar, once."""
        died = None if self._sidecar is None else self._sidecar.poll()
        if died is not None:
            self._dead = True
            self._notice(f"Warning: {died}. Running tasks go on; state is no longer recorded.")
        return died

    def address_bytes(self) -> bytes:
        return b"" if self._address is None else self._address.to_bytes()

    # --- one job ----------------------------------------------------------------------------------

    def begin(
        self, job_id: bytes, secret: bytes, address: bytes, machine: Machine,
        config: dict[str, Any], me: Joined,
    ) -> None:
        self._rank = machine.rank
        if not address:
            return
        from hpcray.control.writer import ControlWriter

        job = bytes.fromhex(machine.session["job_key"])[:8] + job_id
        self._writer = ControlWriter(ControlAddress.from_bytes(address), job, secret)
        if machine.rank == 0:
            self._writer.write_job_started(JobRecord(
                time.time(), me.host, config.get("driver_pid", 0), config.get("script", ""),
                _user()))
        resources = {name: amount / UNIT for name, amount in me.resources}
        self._writer.write_node(machine.rank, NodeRecord(me.host, me.pid, resources))

    def record(self, machine: Machine) -> None:
        """Queue what has gathered; cheap when nothing has."""
        writer = self._writer
        if machine.tasks.lineage:
            lineage, machine.tasks.lineage = machine.tasks.lineage, []
            machine.inventory.remember(lineage)
            if writer is not None:
                writer.write_lineage(self._rank, _encode(lineage))
        if machine.new_functions:
            functions, machine.new_functions = machine.new_functions, []
            for function in functions:
                if writer is not None:
                    writer.write_function(function.function_id, function.name, function.blob)
        if machine.actors.homes.changes:
            changes, machine.actors.homes.changes = machine.actors.homes.changes, []
            for actor_id, facts in changes:
                if writer is not None:
                    writer.write_actor(actor_id, ActorRecord(
                        facts["state"], facts["class"], facts["name"], facts["rank"], 0,
                        facts["incarnation"]))
        if machine.requests.names.changes:
            names, machine.requests.names.changes = machine.requests.names.changes, []
            for namespace, name, actor in names:
                if writer is not None and actor is not None:
                    writer.write_named_actor(namespace, name, actor)
                elif writer is not None:
                    writer.remove_named_actor(namespace, name)
        if writer is not None:
            self._tell(writer.reports())

    def _tell(self, reports: list[str]) -> None:
        """Of a sidecar that has died its connection tells first, and has no more to say then: what
        it says waits for a moment whether the death is what there is to tell."""
        if reports or self._held:
            now_s = time.monotonic()
            self._held += [(now_s, line) for line in reports]
            if self._dead:
                self._held.clear()
            while self._held and (
                    self._sidecar is None or now_s - self._held[0][0] >= _DEATH_IS_TOLD_S):
                self._notice(f"Warning: {self._held.pop(0)[1]}")

    def start_end(self, machine: Machine) -> None:
        """The job is over: write what is queued and the end. Then call `ended`."""
        self._patience = Patience(_END_S)
        if self._writer is not None:
            if machine.rank == 0:
                self._writer.write_job_finished("finished", time.time(), range(machine.size))
            self._writer.start_close()

    def ended(self, now_s: float) -> bool:
        """Whether nothing more is to be waited for: all is written, or Redis does not answer."""
        writer = self._writer
        if writer is None:
            return True
        if not writer.ended:
            known = writer.statistics()
            if not self._patience.look(now_s, (known.round_trips, known.queued_bytes)):
                return False
            writer.give_up()
        writer.close_report()
        self._writer = None
        return True

    def close(self) -> None:
        if self._sidecar is not None:
            self._sidecar.stop()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
