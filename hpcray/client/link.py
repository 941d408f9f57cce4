"""The client's door to its node: one lock, one socket, one reader, and how threads wait.

    user threads                       helper thread (drivers always, workers once they submit)
      with link:       (the door)        flushes what lingers (1 ms), reads while nobody waits,
        core.submit()  --> outbox        completes futures
        link.wait(waiter)
          one of them reads for all, the others sleep until what they wait for has come

The rules, and what each is for:

- **Only who holds the lock touches the core.** One waiting thread at a time sleeps in the socket,
  without the lock, and takes and handles what has come with the lock. While it waits nobody else
  reads. A worker leaves notes for whoever takes the lock next: what it has read on its task
  channel, and what came of its tasks.
- **Under the lock nothing runs that is not ours.** The garbage collector is off there, so no
  finaliser of a user does (it may call `put` or `get`). What runs other code (printing output,
  callbacks) is an effect, done when the lock is free.
- **Nothing is raised inside by an interrupt.** Ctrl-C and cancellation set a flag while the main
  thread is inside; they strike as it leaves. What a signal handler of the user's raises can still
  come behind any call: so what sends or takes a datagram is a step of an iterator, which is none.
- **Who holds the lock may wait for room in the socket**: the node reads it whatever else it does.

A call that finds itself inside already can only come from a signal handler of the user's: it is
refused, because it would wait for itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgspec

from hpcray import exceptions
from hpcray.client.core import Core
from hpcray.client.interrupts import raised_by_handler
from hpcray.client.waiters import Waiter
from hpcray.protocol import messages
from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES, parts
from hpcray.transport import datagrams
from hpcray.transport.datagrams import FULL, PEEK, SENT, SHORT, ChannelClosed, Malformed

_NOTHING: tuple[list[Any], list[int]] = ([], [])
# A datagram of this many messages is long enough to amortise its system call.
_BATCH_MESSAGES = 48
# Submissions further apart than this leave at once; closer ones are gathered.
_LINGER_S = 0.0005
# After a datagram this large another one is likely there already; else poll says if there is.
_LIKELY_MORE_BYTES = 1024
# A call this long is not gathered with others.
_LARGE_BYTES = 16_384
# How long a wait for room in the socket, or for a descriptor, goes unexplained.
_SAY_AFTER_S = 10.0
# For want of descriptors or memory a send is tried again for so long.
_SHORT_S = 5.0
_NO_WAIT_S = 3600.0
_LOOK_US = 500_000
_LOOK = struct.pack("ll", 0, _LOOK_US)

_CLIENT = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(_CLIENT)) + os.sep
_get_ident = threading.get_ident
_monotonic = time.monotonic
_gc_enable = gc.enable
_gc_disable = gc.disable
_gc_is_enabled = gc.isenabled


class Link:
    # Python finds attributes sooner so, if there are more than 30.
    __slots__ = (
        "_buffer", "_collecting", "_effects", "_first_byte", "_handlers", "_last_flush_s",
        "_main", "_noted", "_notes", "_pid", "_read_lately", "_reader", "_received",
        "_sending", "_sends", "_settling", "_sleepers", "_slot", "_taken", "_unhandled",
        "after_wait", "arm", "armed", "autopsy", "before_wait", "check_interrupt", "core",
        "ended", "inside", "interrupted", "lock", "lost", "on_interrupt", "on_lost",
        "sent", "socket", "wake",
    )

    def __init__(self, core: Core) -> None:
        """To be opened before it is used."""
        self.core = core
        self.lock = threading.RLock()
        # Of the main thread: something has struck while it was inside (see `deliver_interrupt`).
        self.interrupted = False
        # What to do about it, outside: may raise.
        self.on_interrupt: Callable[[], None] = _raise_interrupt
        self.on_lost: Callable[[str], None] = lambda reason: None
        # Of a driver, whose child the node is: how that has ended. Waits for the end, a moment.
        self.autopsy: Callable[[], str] = lambda: ""
        # By threads that wait, between two reads: may raise (a worker's cancelled task).
        self.check_interrupt: Callable[[], None] | None = None
        # A worker gives its CPU back around a wait: what to say then, None if it need not.
        self.before_wait: Callable[[Waiter], Any] | None = None
        self.after_wait: Callable[[], Any] | None = None
        # The helper thread's (helper.py): something lingers and somebody has to send it soon; and
        # something has changed. `armed`: it knows, and looks every few milliseconds.
        self.arm: Callable[[], None] = _nothing
        self.wake: Callable[[], None] = _nothing
        self.armed = False
        self.lost: str | None = None
        # Why is `lost`, and the node has told it to whoever reads the job's output.
        self.ended = False
        self._read_lately = False  # since the helper has asked
        self._last_flush_s = 0.0
        self.inside = False  # some thread is
        self._collecting = False  # the collector is off because of that
        self._notes = core.notes
        self._effects = core.effects
        self._handlers = core.handlers
        self._reader = 0  # the thread that waits and reads for all
        # Threads that wait while another one reads: (what wakes it, what it waits for).
        self._sleepers: list[tuple[Any, Waiter]] = []
        self._buffer = datagrams.receive_buffer()
        self._first_byte = bytearray(1)
        self._taken: Any = None  # of the datagram that is in the buffer
        self._slot = [b""]
        self._sending: list[bytes] = []  # datagrams, encoded, for which there was no room
        self._noted: list[Any] = []  # but the first of them, if something is here
        # Messages of a datagram that a handler of the user's has interrupted, and its descriptors.
        self._unhandled: tuple[list[Any], list[int]] = _NOTHING
        self.sent = 0  # datagrams
        self._settling = threading.Lock()  # by the thread that carries out effects
        self._main = threading.main_thread().ident  # a fork's is the same
        core.on_ended = self._set_ended

    def open(self, sock: socket.socket) -> None:
        """In the process that is to use it, which may be a fork of the one that has made it."""
        self._pid = os.getpid()
        self.socket = sock
        self._received = datagrams.received(sock, self._buffer)
        self._sends = datagrams.sent(sock, self._slot)
        datagrams.enlarge_buffers(sock)
        sock.setblocking(True)
        # A thread that waits looks now and then whether the client was closed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK)

    # --- the door ---------------------------------------------------------------------------------

    def __enter__(self) -> Link:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """Take the lock. Hot paths write `enter`, `try`, `finally: leave` themselves."""
        self.lock.acquire()
        if self.inside:
            self._refuse_or_repair()
        self.inside = True
        if _gc_is_enabled():
            _gc_disable()
            self._collecting = True
        if self._notes:
            try:
                self.core.take_notes()
            except BaseException:
                self.leave()
                raise

    def _refuse_or_repair(self) -> None:
        """This thread holds the lock already. Either a signal handler of the user's has interrupted
        us and calls us, or one has raised something just where we were about to let go.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_ours(frame):  # this call
            frame = frame.f_back
        while frame is not None and not frame.f_code.co_filename.startswith(_CLIENT):
            frame = frame.f_back
        self.lock.release()
        if frame is None:
            return
        raise RuntimeError(
            "a signal handler called hpcray while it had interrupted hpcray itself; let the "
            "handler set a flag, or raise an exception, and call hpcray from the program")

    def leave(self) -> None:
        self.inside = False
        try:
            if self._collecting:
                self._collecting = False
                _gc_enable()
        finally:
            try:
                self.lock.release()
            except RuntimeError:
                pass  # two handlers that raised, one upon the other, have kept `_await` from it
        if self.interrupted or self._effects:
            self._outside()

    def _outside(self) -> None:
        """What was left for when this thread does not hold the lock any more. May raise."""
        if self.interrupted:
            self.deliver_interrupt()
        if self._effects:
            self._settle()

    def _settle(self) -> None:
        """Carry out what was left for when the lock is free; in order, by one thread."""
        effects = self._effects
        while effects and self._settling.acquire(blocking=False):
            try:
                while effects:
                    effects.popleft()()
            finally:
                self._settling.release()

    @property
    def mine(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]  # what Condition asks

    def catch_interrupts(self) -> None:
        """Let Ctrl-C strike outside only. Of a driver, in the main thread; unless the program has a
        handler of its own."""
        if (threading.get_ident() == self._main
                and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            signal.signal(signal.SIGINT, self._on_sigint)

    def _on_sigint(self, _number: int, _frame: FrameType | None) -> None:
        if self.mine:
            self.interrupted = True
        else:
            self.on_interrupt()

    def deliver_interrupt(self) -> None:
        """As the main thread leaves: what struck while it was inside."""
        if self.interrupted and threading.get_ident() == self._main and not self.mine:
            self.interrupted = False
            self.on_interrupt()

    # --- sending (inside) -------------------------------------------------------------------------

    def check(self) -> None:
        """Raises RaySystemError: the node is gone. RuntimeError: this process is a fork."""
        if self.lost is None:
            return
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from an hpcray process and has no connection of its own; "
                "call hpcray functions from the parent only")
        raise exceptions.RaySystemError(
            f"the job has ended: {self.lost}" if self.ended
            else f"the connection to the node is gone: {self.lost}{self.autopsy()}")

    def linger(self, nbytes: int) -> None:
        """Send now if the channel was quiet or enough has gathered; else soon (helper)."""
        now_s = _monotonic()
        if (now_s - self._last_flush_s > _LINGER_S or nbytes > _LARGE_BYTES
                or len(self.core.outbox) >= _BATCH_MESSAGES):
            self.flush(False, now_s)
        elif not self.armed:
            self.arm()

    def flush(self, drain: bool = False, now_s: float = 0.0) -> None:
        """Send what is queued; with `drain` (before a process idles) dropped refs too.

        Raises:
          RaySystemError: the node is gone.
          OSError: no descriptor or memory to send a large message with; it will be tried again.
        """
        core = self.core
        now_s = now_s or _monotonic()
        outbox = core.collect(now_s, drain)
        if not outbox and not self._sending:
            return
        self._last_flush_s = now_s
        self._send_batch(outbox)
        if core.direct.waiting:
            core.direct.send(outbox, self.sent)
            if outbox:  # what could not be sent, mostly nothing
                self._send_batch(outbox)

    def _send_batch(self, outbox: list[Any]) -> None:
        """Each message exactly once, whatever a signal handler of the user's raises meanwhile:
        handlers run behind calls, and a step of `_sends` is none."""
        if self._sending:
            self._send_rest()
        if not outbox:
            return
        encoded = messages.encode(outbox)
        if len(encoded) <= DATAGRAM_MAX_BYTES:
            self._slot[0] = encoded
            try:
                for _ in self._sends:
                    break
            except OSError:
                self._sending = [encoded]
            else:
                self.sent += 1
                outbox.clear()
                return
        else:
            self._sending = list(parts(outbox, messages.encode))
        outbox.clear()
        self._send_rest()  # it meets the error, too

    def _send_rest(self) -> None:
        """What is encoded. `_noted` says that the first of it has been sent."""
        sending = self._sending
        noted = self._noted
        since_s = 0.0
        while sending:
            outcome = SENT if noted else datagrams.send(
                self.socket, sending[0], (), noted, messages.ANNOUNCEMENT)
            if outcome == SENT:
                self.sent += 1
                noted.clear()
                del sending[0]
            elif outcome in (FULL, SHORT):
                since_s = self._await_room(outcome, since_s)
            else:
                # It may have said why before it hung up.
                self.read(all=True)
                self.set_lost("the node closed the connection")
                self.check()

    def _await_room(self, outcome: int, since_s: float) -> float:
        """A moment; the node reads whatever it does, so there will be room."""
        now_s = time.monotonic()
        since_s = since_s or now_s
        waited_s = now_s - since_s
        if outcome == FULL:
            poller = select.poll()
            poller.register(self.socket, select.POLLOUT)
            poller.poll(100)
            if waited_s > _SAY_AFTER_S:
                self.core.effects.append(_say_node_is_silent)
                since_s = now_s + _NO_WAIT_S  # once
        elif waited_s > _SHORT_S:
            raise OSError(
                "hpcray cannot send a large message: this process has no file descriptor or "
                "memory left (ulimit -n, ulimit -v)")
        else:
            time.sleep(0.01)
        if self.interrupted and threading.get_ident() == self._main:
            self.interrupted = False
            self.on_interrupt()  # nothing is lost by it: what is not sent stays in `_sending`
        return since_s

    # --- reading (inside) -------------------------------------------------------------------------

    def read(self, *, all: bool = False) -> bool:
        """Handle what has come, or at least the first of it; False if there was nothing."""
        if self._reader and self._reader != _get_ident():
            return False  # another thread is about to
        return self._read(all)

    def _read(self, all: bool) -> bool:
        found = self._unhandled is not _NOTHING
        if found:
            self._handle_rest()
        try:
            while True:
                if self._taken is None and not self._look():
                    break
                found = True
                data, descriptors, spent = datagrams.content(self._taken, self._buffer)
                try:
                    batch = messages.decode_to_client(data)
                except msgspec.DecodeError as error:
                    datagrams.close_all(descriptors if spent < 0 else (*descriptors, spent))
                    raise Malformed(f"it sent what cannot be read: {error}") from None
                self._unhandled = (batch, descriptors)
                self._taken = None
                if spent >= 0:
                    os.close(spent)
                if len(batch) == 1:  # as an answer that somebody waits for mostly is
                    try:
                        self._handlers[type(batch[0])](batch[0], descriptors)
                        self._unhandled = _NOTHING
                    except BaseException as error:
                        if not raised_by_handler(error):
                            self._unhandled = _NOTHING
                        raise
                else:
                    self._handle(batch, descriptors)
                if not all and len(data) < _LIKELY_MORE_BYTES:
                    break
        except ChannelClosed as closed:
            self._taken = None
            self.set_lost(str(closed))
        if found:
            self._read_lately = True
            if self._sleepers:
                self._wake_sleepers()
            if self.core.outbox and not self.armed:
                self.arm()  # an answer to what was read, or memory given back
        return found

    def _look(self) -> bool:
        """Take what lies in the socket; False if that is nothing."""
        received = self._received
        try:
            for self._taken in received:
                return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno is None:
                raise  # a signal handler's, such as a TimeoutError
            raise ChannelClosed(str(error)) from None
        return False

    def _handle(self, batch: list[Any], descriptors: list[int]) -> None:
        done = 0
        handlers = self._handlers
        try:
            for message in batch:
                handlers[type(message)](message, descriptors)
                done += 1
            self._unhandled = _NOTHING
        except BaseException as error:
            if raised_by_handler(error):
                self._unhandled = (batch[done:], descriptors)
            else:
                self._unhandled = _NOTHING
            raise

    def _handle_rest(self) -> None:
        """Of a datagram that was interrupted: its first message may have been handled in part."""
        batch, descriptors = self._unhandled
        self._unhandled = (batch[1:], descriptors)
        with contextlib.suppress(ValueError, KeyError, IndexError):
            self.core.receive(batch[:1], descriptors)
        self._handle(*self._unhandled)

    def has_told(self, error: BaseException) -> bool:
        """Whether it only says what the node has told people already."""
        return (self.ended and isinstance(error, exceptions.RaySystemError)
                and str(self.lost) in str(error))

    def _set_ended(self, reason: str) -> None:
        if self.lost is None:
            self.ended = True
            self.on_lost = lambda reason: None
            self.set_lost(reason)

    def set_lost(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            for lock, _ in self._sleepers:
                lock.release()
            self._sleepers.clear()
            self.core.effects.append(lambda: self.on_lost(f"{reason}{self.autopsy()}"))
            self.wake()

    # --- waiting (inside) -------------------------------------------------------------------------

    def wait(
        self, waiter: Waiter, deadline_s: float | None, giving_back: bool = True
    ) -> bool:
        """Wait until nothing remains; False at the deadline. The lock is held, but not asleep.

        Raises:
          RaySystemError: the node is gone.
        """
        gave_back = reading = False
        thread = _get_ident()
        outer = 0
        try:
            while waiter.remaining > 0:
                if self.lost is not None:
                    self.check()
                remaining_s = None
                if deadline_s is not None:
                    remaining_s = deadline_s - _monotonic()
                    if remaining_s <= 0:
                        # What lies there already counts: timeout=0 means "look", not "give up".
                        self.read(all=True)
                        return waiter.remaining <= 0
                if giving_back and not gave_back and self.before_wait is not None:
                    said = self.before_wait(waiter)
                    if said is not None:
                        gave_back = True
                        self.core.outbox.append(said)
                        self.flush()
                        continue
                if not reading and (not self._reader or self._reader == thread):
                    outer = self._reader
                    self._reader = thread
                    reading = True
                if reading:
                    self._await(waiter, remaining_s, None)
                    self._read(False)
                else:
                    self._sleep(waiter, remaining_s)
                if self.check_interrupt is not None:
                    self.check_interrupt()
            return True
        finally:
            if reading:
                self._reader = outer
            if self._sleepers and not self._reader:
                self._sleepers.pop()[0].release()  # somebody has to read
            if gave_back and self.after_wait is not None and self.lost is None:
                self.core.outbox.append(self.after_wait())
                self.flush()

    def _sleep(self, waiter: Waiter, timeout_s: float | None) -> None:
        """Until the thread that reads wakes us: what we wait for has come, or it reads no more."""
        bed = threading.Lock()
        bed.acquire()
        entry = (bed, waiter)
        self._sleepers.append(entry)
        try:
            self._await(waiter, timeout_s, bed)
        finally:
            if entry in self._sleepers:
                self._sleepers.remove(entry)

    def _await(self, waiter: Waiter, timeout_s: float | None, bed: Any) -> None:
        """Without the lock: until something can be read. This is for one thread at a time; others
        have a bed, and sleep until it is released.

        Outside a finaliser may run, and wait in here itself: it reads in our place, and what we
        wait for may have come by then. So nothing that could start one is between the look at the
        waiter and the system call.
        """
        try:
            self.leave()
            while self.lock._is_owned():  # type: ignore[attr-defined]
                self.lock.release()  # one that raised has kept an earlier call from it
            if bed is not None:
                bed.acquire(timeout=-1 if timeout_s is None else min(timeout_s, _NO_WAIT_S))
            elif timeout_s is None:
                if waiter.remaining > 0 and self.lost is None and self._taken is None:
                    # Not taken: when the system call is over a finaliser may run still.
                    self.socket.recv_into(self._first_byte, 1, PEEK)
            else:
                poller = select.poll()
                poller.register(self.socket, select.POLLIN)
                if waiter.remaining > 0 and self.lost is None and self._taken is None:
                    poller.poll(min(timeout_s * 1000 + 0.999, _LOOK_US / 1000))
        except OSError as error:
            if error.errno is None:
                raise  # a signal handler's, such as a TimeoutError
            # It was only a look, or the end: `_read` meets it, too.
        finally:
            # Nothing can keep us from it: what a signal handler raises meanwhile comes afterwards.
            # Not a function: a handler may raise before its first step.
            raised: BaseException | None = None
            while True:
                try:  # `enter`, written out
                    self.lock.acquire()
                    self.inside = True
                    if _gc_is_enabled():
                        _gc_disable()
                        self._collecting = True
                    break
                except BaseException as error:
                    raised = error
                    if self.mine:
                        self.inside = True
                        break
            if raised is not None:
                raise raised

    def _wake_sleepers(self) -> None:
        still = []
        for entry in self._sleepers:
            if entry[1].remaining <= 0:
                entry[0].release()
            else:
                still.append(entry)
        self._sleepers = still

    # --- by the helper, by signal handlers and by event loops (outside) ---------------------------

    def read_now(self) -> None:
        """Read all that is there."""
        with self:
            if self.lost is None:
                self.read(all=True)

    def read_idle(self) -> bool:
        """Read, unless a waiting thread does; whether the channel is worth watching."""
        with self:
            if self._reader or self.lost is not None:
                return False
            self._read(False)
            return self.lost is None

    def flush_lingering(self) -> bool:
        """Send what has waited; whether there was anything."""
        with self:
            if self.lost is not None or not (
                self._sending or self.core.has_more(time.monotonic())
            ):
                return False
            self.flush()
            return True

    def is_read(self, *, lately: bool) -> bool:
        """Whether waiting threads read, or (`lately`) have since this was asked last: then the
        helper keeps away."""
        since, self._read_lately = self._read_lately, False
        return bool(self._reader) or (lately and since)

    # --- the end ----------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """Hang up. Waits in other threads end with an error."""
        if signal.getsignal(signal.SIGINT) == self._on_sigint:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, signal.default_int_handler)
        with self:
            self.on_lost = lambda reason: None
            self.autopsy = lambda: ""
            self.set_lost(reason)
            self.socket.close()
            self.core.close()

    def forked(self) -> None:
        """In a child of this process: the channel is its parent's."""
        self.lost = "this process is a fork"
        if self.inside:  # some other thread of the parent
            if self._collecting:
                _gc_enable()
            self.lock = threading.RLock()
            self.inside = self._collecting = False
        self.socket.close()
        self.core.forked()


def _nothing() -> None:
    """There is no helper: whoever enters next, sends."""


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _raise_interrupt() -> None:
    """As Ctrl-C does without us."""
    signal.default_int_handler(signal.SIGINT, None)


def _say_node_is_silent() -> None:
    print("hpcray: the node has not read what this process sends for 10 s; is it stopped?",
          file=sys.stderr, flush=True)
