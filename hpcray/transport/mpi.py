"""The network over MPI. The only module of this room that imports mpi4py.

    control communicator   Improbe(any source) -> Imrecv      Isend
    data communicator      Irecv / Isend, tag = transfer, chunks of one transfer in order

Why MPI is used as it is:

- Two duplicates of the given communicator: a wildcard probe must never see data, and nobody
  else's messages may match ours. Wildcards on the control one only, so that data needs no
  acknowledgement of failures.
- `Improbe`, not `Iprobe`: a matched message cannot be taken by another receive. `Imrecv`, not
  `Mrecv`: a frame beyond the eager limit would block until its sender makes progress. It
  costs 0.1 us more on a small frame.
- A frame's send request is tested once right after it starts, which completes small ones; the
  rest are at most a window per peer.
- Data is sent in chunks because one progress call copies a whole message on shared memory:
  a GiB would hold the loop for 0.1 s, and it has sockets to serve.
- ERRORS_RETURN: a dead peer is an event. With ULFM (Open MPI under `mpirun --with-ft ulfm`) a
  wildcard probe raises until the failure is acknowledged; we do so at once and report the
  rank. Other errors are TransportError.

Threads: exactly one, the caller's (MPI_THREAD_FUNNELED).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable

import mpi4py

# Before the first import of MPI: who starts and ends the library is decided here, not by the
# import, and an exit through an exception must not enter MPI_Finalize, which waits for peers.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
mpi4py.rc.thread_level = "funneled"

from mpi4py import MPI  # noqa: E402

from hpcray.transport.base import (  # noqa: E402
    CloseTimeout,
    DataCancelled,
    DataReceived,
    DataSent,
    TransportError,
    TransportEvent,
)
from hpcray.transport.patience import Patience  # noqa: E402
from hpcray.transport.peers import Outgoing, Peers  # noqa: E402
from hpcray.transport.transfers import (  # noqa: E402
    ChunkCursor,
    TransferKey,
    byte_view,
    check_transfer,
)

# How a transfer is cut, and how many chunks of it are posted at once. The two ends differ on
# purpose. A posted send costs its process nothing until the receiver takes it, so there are
# enough to never wait for the sender's turn of loop. A posted receive may be filled by *any*
# progress call, which on shared memory means copied then and there: few, so that their sum
# stays under a millisecond (measured on shared memory at 5 GB/s: at most 0.6 ms a poll with
# MPICH, 1.0 ms with Open MPI, and 0.94 of the speed of a plain Send/Recv of 64 MiB; larger
# chunks gain two hundredths and double the stall). Several, because a network card works while
# the loop is elsewhere.
CHUNK_BYTES = 1 << 20
SENDS_IN_FLIGHT = 8
RECEIVES_IN_FLIGHT = 4
# Over all transfers in one direction; each keeps at least one chunk, so that a peer that
# hangs never holds up the others.
TOTAL_SENDS_IN_FLIGHT = 64
TOTAL_RECEIVES_IN_FLIGHT = 8

# Between a watchdog's message and its end: enough to print it.
_PRINT_S = 0.1
_ABORT_S = 5.0

# Bounds of one poll. Frames: more than a loop turn meets on a healthy job. Bytes: about 0.5 ms
# of copying. Data: after this long the poll ends, with what the last call to MPI still copies.
FRAMES_PER_POLL = 64
FRAME_BYTES_PER_POLL = 4 << 20
DATA_NS_PER_POLL = 200_000

# Open MPI 5.0 sometimes (1 in 10 on a loaded machine) stays in MPI_Finalize for ever after a rank
# has died. By then the survivors have drained among themselves, so nothing is lost by leaving.
FINALIZE_AFTER_LOSS_S = 5.0
# Otherwise it only waits for ranks that are on their way. On a loaded machine that takes seconds,
# and nothing tells from outside how far they are: long enough for that, and yet an end.
FINALIZE_S = 120.0
# Between two polls of a rank that has nothing to do but to wait for the others' end.
_DRAIN_WAIT_S = 0.0002

# Frames up to here land in one reused buffer: an allocation less on nearly every frame.
REUSED_BUFFER_BYTES = 64 << 10

_CONTROL_TAG = 0
_ANY_SOURCE = MPI.ANY_SOURCE
_ANY_TAG = MPI.ANY_TAG
_FAILED = "MPI reports that its process has failed"


class MpiAlreadyStarted(Exception):
    """The user's program has initialised MPI before hpcray could."""

    def __str__(self) -> str:
        return (
            "MPI is already initialised in this process, with settings hpcray does not control. "
            "Remove the earlier `from mpi4py import MPI`, or start the program with "
            "`mpirun ... hpcray run script.py`, where the script is not an MPI process"
        )


def start_mpi(
    start_timeout_s: float, *, force_funneled: bool = True, by_srun: bool = False
) -> MPI.Intracomm:
    """Initialise MPI and return the world communicator; the process exits on timeout.

    MPI_Init waits for every rank of the job. A rank that never comes must not hang the
    others for ever, so a C-level watchdog prints what is wrong and ends this one
    (mpi4py holds the GIL during MPI_Init, so no Python thread could).

    `force_funneled` refuses a library that offers less than MPI_THREAD_FUNNELED, which the
    control-store writer thread beside the loop needs.

    `by_srun`: Slurm and not the MPI's own launcher started this process.
    """
    if MPI.Is_initialized() or MPI.Is_finalized():
        raise MpiAlreadyStarted
    if by_srun and "PMI_FD" in os.environ:
        _spare_short_lines()
    message = (
        f"hpcray: MPI_Init has not returned after {start_timeout_s:g} s, so some ranks of this "
        "job never arrived. Check that the launcher could start all of them, that all use the "
        "same MPI, or raise HPCRAY_START_TIMEOUT_S"
    )
    provided: list[int] = []
    _under_watchdog(
        start_timeout_s, message, lambda: provided.append(MPI.Init_thread(MPI.THREAD_FUNNELED))
    )
    if force_funneled and provided[0] < MPI.THREAD_FUNNELED:
        raise TransportError(
            "this MPI library was built without thread support (it provides "
            "MPI_THREAD_SINGLE, hpcray needs MPI_THREAD_FUNNELED); load another build"
        )
    return MPI.COMM_WORLD


def _spare_short_lines() -> None:
    """Slurm's pmi2 takes lines of 1,024 bytes, and tells MPICH that a *value* may have as many.

    With UCX, MPICH fills values with a fixed 4 KiB for an address and whatever lies behind it in
    memory; it depends on that whether a line is too long ("value not properly terminated") and
    MPI_Init fails. An address of OFI is short. Only a build with both lets us choose, and the
    user's own choice stands.
    """
    match = re.search(r"MPICH Device:\s*ch4:(.*)", MPI.Get_library_version())
    if match is not None and {"ucx", "ofi"} <= set(re.split(r"[\s,]+", match[1])):
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")


def library() -> str:
    """Name and version of the MPI library, such as "Open MPI v5.0.8"."""
    text = MPI.Get_library_version().replace("\0", "").split(",")[0].split("\n")[0]
    return re.sub(r"\s*Version:\s*", " ", text).strip()


def connect(world: MPI.Intracomm, start_timeout_s: float) -> MpiTransport:
    """This rank's end of the network, once all ranks have made theirs; the process exits on
    timeout, as in `start_mpi`: a rank may be lost between the two."""
    message = (
        f"hpcray: the ranks of this job have not met after {start_timeout_s:g} s, so one of them "
        "ended or hangs right behind MPI_Init. Look for its own error above, or raise "
        "HPCRAY_START_TIMEOUT_S"
    )
    made: list[MpiTransport] = []
    _under_watchdog(start_timeout_s, message, lambda: made.append(MpiTransport(world)))
    return made[0]


def end_world() -> None:
    """End MPI in a process that has no part in a job."""
    _under_watchdog(_ABORT_S, "", MPI.Finalize)


def _under_watchdog(timeout_s: float, message: str, action: Callable[[], object]) -> None:
    """Run `action`; if it takes longer, print `message` and a traceback, and end this process.
    Without a message: end it silently.

    faulthandler runs without the GIL but prints only a traceback, so the message travels as the
    file name of a frame in it. The end is by SIGALRM, which needs no GIL either: of a rank that
    exits within MPI_Init, MPICH's mpirun takes no notice once in a while, and leaves the others.
    """
    if message:
        faulthandler.dump_traceback_later(timeout_s, file=2)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    due_s, every_s = signal.setitimer(signal.ITIMER_REAL, timeout_s + _PRINT_S)
    try:
        exec(compile("action()", message or "?", "exec"), {"action": action})
    finally:
        signal.setitimer(signal.ITIMER_REAL, due_s, every_s)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def abort(status: int) -> None:
    """End this process and have the launcher end the job with this status.

    Not by _exit: of that, MPICH's mpirun takes no notice once in a while (see `_under_watchdog`).
    """
    if MPI.Is_initialized() and not MPI.Is_finalized():
        _under_watchdog(_ABORT_S, "hpcray: MPI_Abort does not return",
                        lambda: MPI.COMM_WORLD.Abort(status))


def _peer_failure_classes() -> frozenset[int]:
    """The error classes that mean "a process died", as far as this library has them."""
    unspecific = {MPI.SUCCESS, MPI.ERR_OTHER, MPI.ERR_UNKNOWN, MPI.UNDEFINED}
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING")
    return frozenset(getattr(MPI, name, MPI.UNDEFINED) for name in names) - unspecific


class _Chunks:
    """One live transfer, as the requests of the chunks that are posted.

        POSTED --all chunks done--> over (DataReceived / DataSent)
           |                          ^
           | cancel()                 | something had arrived: repost the rest
           v                          |
        CANCELLING --all cancelled--> over (DataCancelled)

    `ending`: the peer is lost; what completes, and how, no longer matters.
    """

    __slots__ = (
        "begun", "buffer", "cancelling", "cursor", "ending", "is_receive", "rank", "ranges",
        "requests", "tag", "transfer", "unmatched",
    )

    def __init__(
        self, rank: int, transfer: int, tag: int, buffer: memoryview, chunk_bytes: int,
        *, is_receive: bool,
    ) -> None:
        self.rank = rank
        self.transfer = transfer
        self.tag = tag
        self.buffer = buffer
        self.is_receive = is_receive
        self.cursor = ChunkCursor(len(buffer), chunk_bytes)
        self.requests: deque[MPI.Request] = deque()
        self.ranges: deque[tuple[int, int]] = deque()  # of `requests`, in step
        self.begun = False  # a chunk has come
        self.cancelling = False
        self.unmatched: deque[tuple[int, int]] = deque()  # cancelled so far, in order
        self.ending = False

    def post(self, comm: MPI.Intracomm, window: int) -> None:
        while len(self.requests) < window and not self.cursor.exhausted:
            self._post_range(comm, self.cursor.take())

    def advance(
        self, comm: MPI.Intracomm, window: int, status: MPI.Status, stop_ns: int
    ) -> bool:
        """Collect finished chunks and post the next ones; True when the transfer is over.

        Posting a receive whose message waits already copies the chunk on the spot, and the
        one after it is then found complete: without a look at the clock a whole transfer
        would run in one call.
        """
        if self.cancelling:
            return self._resolve_cancel(comm, status)
        requests = self.requests
        while requests and requests[0].Test(status):
            requests.popleft()
            self._check(self.ranges.popleft(), status)
            if not self.cursor.exhausted and len(requests) < window:
                self._post_range(comm, self.cursor.take())
            if time.perf_counter_ns() > stop_ns:
                break
        else:
            # The window may have grown, because other transfers are over.
            self.post(comm, window)
        return not requests

    def cancel(self) -> None:
        """Last chunk first: what has matched by then is a prefix, and can be carried on."""
        if self.begun or self.cancelling or self.ending:
            return
        self.cancelling = True
        for request in reversed(self.requests):
            request.Cancel()

    def abandon(self) -> None:
        """The peer is lost: let go of what can be let go. Sends cannot be cancelled in MPI."""
        self.ending = True
        if self.is_receive:
            for request in self.requests:
                with contextlib.suppress(MPI.Exception):
                    request.Cancel()

    def let_go(self) -> bool:
        """After `abandon`: True once the library has released every request."""
        while self.requests:
            try:
                if not self.requests[0].Test():
                    return False
            except MPI.Exception:
                pass  # ended by the failure itself
            self.requests.popleft()
        return True

    def _resolve_cancel(self, comm: MPI.Intracomm, status: MPI.Status) -> bool:
        """True if nothing had matched; else repost what was cancelled and go on receiving."""
        while self.requests:
            if not self.requests[-1].Test(status):
                return False
            self.requests.pop()
            chunk = self.ranges.pop()
            if status.Is_cancelled():
                self.unmatched.appendleft(chunk)
            else:
                self._check(chunk, status)
        if not self.begun:
            return True
        self.cancelling = False
        while self.unmatched:
            self._post_range(comm, self.unmatched.popleft())
        return not self.requests and self.cursor.exhausted

    def _check(self, chunk: tuple[int, int], status: MPI.Status) -> None:
        self.begun = True
        expected = chunk[1] - chunk[0]
        if self.is_receive and status.count != expected:
            raise TransportError(
                f"transfer {self.transfer}: rank {self.rank} sent {status.count} B where "
                f"{expected} B were expected; both ends must post the same length"
            )

    def _post_range(self, comm: MPI.Intracomm, chunk: tuple[int, int]) -> None:
        view = self.buffer[chunk[0] : chunk[1]]
        start = comm.Irecv if self.is_receive else comm.Isend
        self.requests.append(start(view, self.rank, self.tag))
        self.ranges.append(chunk)


class MpiTransport:
    """This rank's end of the network. Making one is collective over `comm`."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        sends_in_flight: int = SENDS_IN_FLIGHT,
        receives_in_flight: int = RECEIVES_IN_FLIGHT,
    ) -> None:
        """`chunk_bytes` must be the same on every rank."""
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._control = comm.Dup()
        self._data = comm.Dup()
        for communicator in (self._control, self._data):
            communicator.Set_errhandler(MPI.ERRORS_RETURN)
        self._improbe = self._control.Improbe
        self._peers = Peers(self.rank, self.size)
        self._chunk_bytes = chunk_bytes
        self._sends_in_flight = sends_in_flight
        self._receives_in_flight = receives_in_flight
        tag_upper_bound = self._data.Get_attr(MPI.TAG_UB)
        assert isinstance(tag_upper_bound, int), "every MPI library has TAG_UB"
        self._tags = tag_upper_bound + 1
        self._failure_classes = _peer_failure_classes()
        self._status = MPI.Status()
        self._frame_buffer = bytearray(REUSED_BUFFER_BYTES)
        self._frame_view = memoryview(self._frame_buffer)
        # Frames that did not complete at once: rank, request (, buffer, length).
        self._frames_out: list[tuple[int, MPI.Request]] = []
        self._frames_in: list[tuple[int, MPI.Request, bytearray, int]] = []
        # Requests with lost peers that may never complete; kept so that their buffers live.
        self._abandoned: list[object] = []
        self._receives: dict[TransferKey, _Chunks] = {}
        self._sends: dict[TransferKey, _Chunks] = {}
        self._live: deque[_Chunks] = deque()  # all of both, in turn
        self._tags_in_use: set[tuple[bool, int, int]] = set()  # is_receive, rank, tag
        # Events that calls other than poll caused, for the next poll.
        self._pending: list[TransportEvent] = []
        self._closed = False

    # ---- control -----------------------------------------------------------------------

    def send(self, rank: int, payload: bytes) -> None:
        self._peers.send(rank, payload)

    def flush(self) -> None:
        frames = self._peers.flush()
        if frames:
            self._start(frames, self._pending)

    def queued_bytes(self, rank: int) -> int:
        return self._peers.queued_bytes(rank)

    def poll(self) -> list[TransportEvent]:
        events, self._pending = self._pending, []
        self._receive_frames(events)
        if self._frames_in or self._frames_out:
            self._progress_frames(events)
        if self._live:
            self._progress_data(events)
        frames = self._peers.end_poll(events)
        if frames:
            self._start(frames, events)
        return events

    def _receive_frames(self, events: list[TransportEvent]) -> None:
        status = self._status
        room_bytes = FRAME_BYTES_PER_POLL
        room_frames = FRAMES_PER_POLL
        try:
            # Nearly every poll of an idle node ends at this first probe.
            while (message := self._improbe(_ANY_SOURCE, _ANY_TAG, status)) is not None:
                room_bytes -= self._take_frame(message, status.source, status.count, events)
                room_frames -= 1
                if room_bytes <= 0 or room_frames == 0:
                    return
        except MPI.Exception as error:  # of the probe; `_take_frame` handles its own
            self._failed(error, None, events)

    def _take_frame(
        self, message: MPI.Message, rank: int, nbytes: int, events: list[TransportEvent]
    ) -> int:
        small = nbytes <= REUSED_BUFFER_BYTES
        buffer = self._frame_buffer if small else bytearray(nbytes)
        try:
            request = message.Irecv(buffer)
            done = request.Test()
        except MPI.Exception as error:
            self._failed(error, rank, events)
            return nbytes
        if done:
            data = self._frame_view[:nbytes] if small else buffer
            self._peers.arrived(rank, data, events)
            return nbytes
        self._frames_in.append((rank, request, buffer, nbytes))
        if small:  # MPI still writes into it, so it is this frame's from here on
            self._frame_buffer = bytearray(REUSED_BUFFER_BYTES)
            self._frame_view = memoryview(self._frame_buffer)
        return nbytes

    def _progress_frames(self, events: list[TransportEvent]) -> None:
        waiting_in, self._frames_in = self._frames_in, []
        for rank, request, buffer, nbytes in waiting_in:
            if self._done(rank, request, events):
                self._peers.arrived(rank, memoryview(buffer)[:nbytes], events)
            elif rank not in self._peers.lost:
                self._frames_in.append((rank, request, buffer, nbytes))
            else:
                self._abandoned.append(request)
        waiting_out, self._frames_out = self._frames_out, []
        for rank, request in waiting_out:
            if not self._done(rank, request, events):
                if rank not in self._peers.lost:
                    self._frames_out.append((rank, request))
                else:
                    self._abandoned.append(request)

    def _start(self, frames: list[Outgoing], events: list[TransportEvent]) -> None:
        for rank, frame in frames:
            if rank in self._peers.lost:  # found while sending an earlier one
                continue
            try:
                request = self._control.Isend(frame, rank, _CONTROL_TAG)
                if not request.Test():
                    self._frames_out.append((rank, request))
            except MPI.Exception as error:
                self._failed(error, rank, events)

    def _done(self, rank: int, request: MPI.Request, events: list[TransportEvent]) -> bool:
        try:
            return request.Test()
        except MPI.Exception as error:
            self._failed(error, rank, events)
            return False

    # ---- data --------------------------------------------------------------------------

    def post_receive(self, rank: int, transfer: int, buffer: memoryview) -> None:
        check_transfer(self.size, rank, transfer, self._receives, "receive")
        self._post(rank, transfer, byte_view(buffer, writable=True), is_receive=True)

    def post_send(self, rank: int, transfer: int, buffer: memoryview) -> None:
        check_transfer(self.size, rank, transfer, self._sends, "send")
        self._post(rank, transfer, byte_view(buffer, writable=False), is_receive=False)

    def cancel_receive(self, rank: int, transfer: int) -> None:
        chunks = self._receives.get((rank, transfer))
        if chunks is not None:
            chunks.cancel()

    def heard(self, rank: int) -> int:
        return self._peers.heard(rank)

    def busy(self) -> bool:
        return bool(self._live or self._frames_in or self._frames_out)

    def _post(self, rank: int, transfer: int, view: memoryview, *, is_receive: bool) -> None:
        if rank in self._peers.lost:
            over = DataCancelled if is_receive else DataSent
            self._pending.append(over(rank, transfer))
            return
        tag = transfer % self._tags
        if (is_receive, rank, tag) in self._tags_in_use:
            raise ValueError(
                f"transfer {transfer} has the tag of another live one with rank {rank}; "
                f"numbers of live transfers must differ modulo {self._tags}"
            )
        chunks = _Chunks(rank, transfer, tag, view, self._chunk_bytes, is_receive=is_receive)
        self._tags_in_use.add((is_receive, rank, tag))
        (self._receives if is_receive else self._sends)[rank, transfer] = chunks
        self._live.append(chunks)
        try:
            chunks.post(self._data, self._window(chunks))
        except MPI.Exception as error:
            self._failed(error, rank, self._pending)

    def _window(self, chunks: _Chunks) -> int:
        if chunks.is_receive:
            share = TOTAL_RECEIVES_IN_FLIGHT // len(self._receives)
            return max(1, min(self._receives_in_flight, share))
        share = TOTAL_SENDS_IN_FLIGHT // len(self._sends)
        return max(1, min(self._sends_in_flight, share))

    def _progress_data(self, events: list[TransportEvent]) -> None:
        """Give every live transfer a turn, the longest-waiting first, within the time bound."""
        stop_ns = time.perf_counter_ns() + DATA_NS_PER_POLL
        for _ in range(len(self._live)):
            chunks = self._live.popleft()
            try:
                over = (
                    chunks.let_go()
                    if chunks.ending
                    else chunks.advance(self._data, self._window(chunks), self._status, stop_ns)
                )
            except MPI.Exception as error:
                self._failed(error, chunks.rank, events)
                # `_lose` reaches only what is on the list, and this one is in our hands.
                chunks.abandon()
                over = False
            if over:
                self._finish(chunks, events)
            else:
                self._live.append(chunks)
            if time.perf_counter_ns() > stop_ns:
                return

    def _finish(self, chunks: _Chunks, events: list[TransportEvent]) -> None:
        rank, transfer = chunks.rank, chunks.transfer
        self._tags_in_use.discard((chunks.is_receive, rank, chunks.tag))
        del (self._receives if chunks.is_receive else self._sends)[rank, transfer]
        if not chunks.is_receive:
            events.append(DataSent(rank, transfer))
        elif chunks.ending or chunks.cancelling:
            events.append(DataCancelled(rank, transfer))
        else:
            events.append(DataReceived(rank, transfer))

    # ---- death and end -----------------------------------------------------------------

    def declare_lost(self, rank: int, reason: str) -> None:
        self._lose(rank, reason, self._pending)

    def _failed(
        self, error: MPI.Exception, rank: int | None, events: list[TransportEvent]
    ) -> None:
        """Turn the death of peers into events; anything else is a TransportError."""
        if error.Get_error_class() not in self._failure_classes:
            about = "" if rank is None else f" with rank {rank}"
            raise TransportError(
                f"MPI reports {error.Get_error_string()!r}{about}; this node cannot go on"
            ) from error
        if rank is not None:
            self._lose(rank, _FAILED, events)
        for failed in self._acknowledge_failures(error):
            self._lose(failed, _FAILED, events)

    def _acknowledge_failures(self, error: MPI.Exception) -> list[int]:
        """Every rank known to have failed; wildcard probes work again afterwards."""
        try:
            self._control.Ack_failed()
            failed = self._control.Get_failed()
        except (MPI.Exception, NotImplementedError) as unsupported:
            raise TransportError(
                f"a rank died ({error.Get_error_string()!r}) and this MPI cannot go on without "
                "it; Open MPI can, under `mpirun --with-ft ulfm`"
            ) from unsupported
        everyone = self._control.Get_group()
        ranks = failed.Translate_ranks(list(range(failed.Get_size())), everyone)
        failed.Free()
        everyone.Free()
        return list(ranks)

    def _lose(self, rank: int, reason: str, events: list[TransportEvent]) -> None:
        lost = self._peers.lose(rank, reason)
        if lost is None:
            return
        events.append(lost)
        for chunks in self._live:
            if chunks.rank == rank:
                chunks.abandon()

    def close(self, limit_s: float, *, finalize: bool = True, failed: bool = False) -> None:
        """Drain with every living rank, then end MPI (`finalize`) or only this transport.

        `failed`: the launcher may be killing the others, so nobody is waited for long.

        Raises:
          CloseTimeout: nothing moved for `limit_s`, and somebody still has not closed.

        After the draining every rank is known to be there and to come along, so MPI_Finalize gets
        FINALIZE_S; if it does not return then, this process is ended (SIGALRM). A second call does
        nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._drain(limit_s)
        if not finalize:
            self._free()
            return
        finalize_s = FINALIZE_AFTER_LOSS_S if self._peers.lost else FINALIZE_S
        message = (
            f"hpcray: rank {self.rank} has delivered everything, but MPI_Finalize does not "
            f"return after {finalize_s:g} s. Ending this process without it"
        )
        if failed:
            finalize_s, message = limit_s, ""  # why the job failed has been said
        _under_watchdog(finalize_s, message, self._free_and_finalize)

    def _free_and_finalize(self) -> None:
        self._free()
        MPI.Finalize()

    def _drain(self, limit_s: float) -> None:
        """Poll, discarding payloads, until nothing is under way between any two ranks."""
        for rank, transfer in list(self._receives):
            self.cancel_receive(rank, transfer)
        self._start(self._peers.close(), self._pending)
        patience = Patience(limit_s)
        while (waiting_for := self._undrained()) or self._frames_out or self._frames_in:
            self.poll()
            moved = (self._peers.heard_from_all(), len(self._frames_out), len(self._frames_in),
                     sum(chunks.cursor.offset - len(chunks.requests) for chunks in self._live))
            if patience.look(time.monotonic(), moved):
                raise CloseTimeout(limit_s, tuple(waiting_for))
            # The peers may share our core; they have to run for this to end.
            time.sleep(_DRAIN_WAIT_S)

    def _undrained(self) -> list[int]:
        lost = self._peers.lost
        live = {chunks.rank for chunks in self._live if chunks.rank not in lost}
        return sorted(live.union(self._peers.undrained()))

    def _free(self) -> None:
        # Collective, so only while everyone is there; MPI_Finalize covers the other case.
        if not self._peers.lost:
            self._control.Free()
            self._data.Free()

    def validate(self) -> None:
        self._peers.validate()
        assert len(self._live) == len(self._receives) + len(self._sends)
