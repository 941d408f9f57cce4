"""A worker: runs tasks one at a time, or hosts one actor. Entered by a fork of the zygote.

    task channel --Run--> load function and arguments --> run user code --> Done | DoneMany | Failed
    client channel  gets, puts, nested submissions, and the outcomes (one flush per datagram)

While the running task waits in `get`, the worker gives back its CPU and every Run it has read but
not started (`Blocked`); the node takes back those it has not read. So nested tasks cannot deadlock.

What an actor adds is in `worker/hosting.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from types import GeneratorType
from typing import Any

import msgspec

# Imported here so that the zygote has them: an actor's start would pay 30 ms for them.
from hpcray import actor as _actor  # noqa: F401
from hpcray import exceptions
from hpcray.client import context, logs, process, references, serialization
from hpcray.client.arguments import Placeholder
from hpcray.client.client import Client
from hpcray.client.context import TaskContext
from hpcray.client.waiters import Waiter
from hpcray.protocol import ids, messages, sizes, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    ARGS_IN_DEP,
    METHOD,
    NO_ARGS,
    Blocked,
    Done,
    DoneMany,
    Failed,
    Located,
    Return,
    Run,
    Stop,
    Template,
    Unblocked,
)
from hpcray.transport import datagrams
from hpcray.transport.datagrams import ChannelClosed
from hpcray.worker import environment, generators, output, surroundings, title
from hpcray.worker.hosting import FailedDependency, end_user_code, host
from hpcray.worker.zygote import INTERRUPT_SIGNAL

_WELCOME_S = 60.0
# Outcomes do not wait longer than this for the rest of their datagram.
_FLUSH_S = 0.001
# An interrupt that a finaliser has swallowed comes again after this.
_AGAIN_S = 0.002
_SIG_IGN = int(signal.SIG_IGN)
# A worker without work is shown as idle after this.
_SHOWN_IDLE_MS = 1000
# What a blocked worker waits for is told if it is at most so many objects.
_TOLD_IDS = 256


class Loaded:
    """A template and what it stands for in this process."""

    __slots__ = ("function", "template")

    def __init__(self, template: Template, function: Any) -> None:
        self.template = template
        self.function = function


def prepare() -> Callable[[int, int, int, dict[str, Any]], int]:
    """By the zygote, once: what its workers have in common. What a fork makes or changes costs it
    a page fault per page, and those are most of a worker's start."""
    surroundings.take_notes()
    output.make_streams()
    return partial(run_worker, Worker(Client(is_driver=False)))


def run_worker(
    worker: Worker, number: int, task_fd: int, client_fd: int, settings: dict[str, Any]
) -> int:
    """The worker's life, from the fork on; its exit status."""
    # Ctrl-C at the terminal is for the driver; cancellation comes as a message.
    surroundings.set_handler(signal.SIGINT, _SIG_IGN)
    surroundings.set_handler(signal.SIGTERM, _end_in_good_order)
    output.open_streams()
    title.show("IDLE")
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
    client = worker.client
    client.open(socket.socket(fileno=client_fd))
    process.set_client(client)
    worker.open(socket.socket(fileno=task_fd), settings)
    try:
        client.start(_WELCOME_S)
        logging_config = client.session["config"].get("logging")
        if logging_config:
            logs.configure(**logging_config)
        return worker.serve()
    except (ChannelClosed, exceptions.RaySystemError, exceptions.LaunchError):
        return 1  # the node is gone; so are we


# What the worker does at a SIGTERM that is not its job's end; unset once it does it.
_terminate: Callable[[], None] | None = None


def _end_in_good_order(number: int, _frame: object) -> None:
    """SIGTERM, by which a job ends its workers; then the signal does its work. Whoever takes longer
    than the zygote's grace is killed."""
    global _terminate
    if _terminate is not None:
        terminate, _terminate = _terminate, None  # a second signal waits for nothing
        terminate()
        return
    signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(BaseException):
        end_user_code()
    os.kill(os.getpid(), number)


# A process that user code forks ends by SIGTERM as any other, from its first moment. Python forgets
# a signal that comes before it has set itself up in the child: so none comes until then.
_signals = threading.local()


def _before_fork() -> None:
    _signals.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _signals.blocked)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _end_in_good_order:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


class Worker:
    def __init__(self, client: Client) -> None:
        """To be opened in the process that it is in."""
        self.client = client
        self._loaded: dict[bytes, Loaded] = {}
        self._queue: deque[Run | Stop] = deque()
        self._buffer = datagrams.receive_buffer()
        self._poller = select.poll()
        self._main = threading.get_ident()
        self.context = TaskContext()
        self._retry_only: dict[bytes, tuple[type, ...]] = {}
        self._entered = False  # the environment of its first task, for good
        self._shown_idle = False
        self._streams = output.streams
        self._around = surroundings.Surroundings()
        client.link.before_wait = self._before_wait
        client.link.after_wait = Unblocked
        self.cancelled = client.cancelled
        # The task whose user code runs in the main thread: what a cancel may interrupt.
        self.interruptible = b""
        client.link.check_interrupt = self._check_interrupt
        client.link.on_interrupt = self._read_cancels
        client.on_cancel(self._on_cancel)
        self._struck = b""  # the task that a cancel has interrupted, until it is over
        self.signalled = -1  # readable after a signal; see `on_terminate`
        self.actor: Any = None  # worker.hosting.HostedActor, once created

    def open(self, tasks: socket.socket, settings: dict[str, Any]) -> None:
        """This process is the worker."""
        self._tasks = tasks
        self._settings = settings
        self._tasks_fd = tasks.fileno()
        self._poller.register(tasks, select.POLLIN)
        self._poller.register(self.client.link.socket, select.POLLIN)
        self.context.namespace = settings.get("namespace", "")
        context.set_process_context(self.context)
        self.host = settings.get("host", "")
        self.address = settings.get("address", "")
        self.rank = settings.get("rank", 0)
        surroundings.set_handler(INTERRUPT_SIGNAL, self._on_interrupt)
        surroundings.forget()  # what the zygote has done
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable

    def on_terminate(self, end: Callable[[], None]) -> None:
        """What a SIGTERM does from now on, unless it is the end of the job."""
        global _terminate
        # A signal that comes just before the main thread polls does not end the poll; this does.
        self.signalled, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._poller.register(self.signalled, select.POLLIN)
        ending = self._settings.get("ending", b"\0")

        def terminate() -> None:
            if ending[0]:
                _end_in_good_order(signal.SIGTERM, None)
            else:
                end()

        _terminate = terminate

    def take_signals(self) -> None:
        """Their handlers run by themselves, now that the main thread is awake."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.signalled, 4096)

    # --- the loop ---------------------------------------------------------------------------------

    def serve(self) -> int:
        queue = self._queue
        client = self.client
        flushed_s = 0.0
        while True:
            if not queue:
                if output.touched:
                    output.flush()
                client.flush(True)
                self.read_tasks(True)
                flushed_s = time.monotonic()
                continue
            item = queue.popleft()
            if type(item) is not Run:
                client.flush()
                return 0
            self._run_task(item)
            if self.actor is not None:
                return int(self.actor.serve(queue))
            if self.failed_creation:
                client.flush()
                return 0
            if queue and time.monotonic() - flushed_s > _FLUSH_S:
                client.flush()
                flushed_s = time.monotonic()

    failed_creation = False  # this process was meant for the actor: it ends

    def read_tasks(self, wait: bool) -> int:
        """One datagram of the task channel into the queue; its size, 0 if there is none.

        While it waits it reads what the client channel brings (freed ranges, requests to give
        memory back): nobody else does in an idle worker.
        """
        if wait:
            client = self.client
            while True:
                ready = self._poller.poll(_SHOWN_IDLE_MS) or self._wait_idle()
                if ready[0][0] == self._tasks_fd or len(ready) > 1:
                    break
                if ready[0][0] == self.signalled:
                    self.take_signals()
                    continue
                if not client.link.read_idle() and client.lost is not None:
                    raise ChannelClosed(client.lost)
                client.flush()
        # The node may have taken it back in between: not a reason to block here.
        try:
            received = datagrams.receive(self._tasks, self._buffer)
            if received is None:
                return 0
            data, _ = received
            batch = messages.decode_to_worker(data)
        except (datagrams.Malformed, msgspec.DecodeError) as error:
            print(f"hpcray: a worker ends: what its node sent cannot be read: {error}",
                  file=sys.stderr, flush=True)
            raise ChannelClosed(str(error)) from None
        self.client.on_runs(batch)
        self._queue.extend(batch)
        return len(data)

    def _wait_idle(self) -> list[tuple[int, int]]:
        if self.actor is None:
            self._shown_idle = True
            title.show("IDLE")
        return self._poller.poll()

    # --- one task ---------------------------------------------------------------------------------

    def _run_task(self, run: Run) -> None:
        began_s = time.monotonic()
        if run.task_id in self.cancelled:
            self.client.report(self.cancellation(run, began_s))
            return
        streams = self._streams
        if (surroundings.changed or sys.stdout is not streams["stdout"]
                or sys.stderr is not streams["stderr"]):
            self._around.restore()
        try:
            loaded = self.load(run)
            template = loaded.template
            args, kwargs = self.arguments(run)
        except FailedDependency as failed:
            self.client.report(Failed(run.task_id, run.attempt, _us(began_s), failed.error))
            self.failed_creation = bool(run.actor_id)
            return
        except BaseException as error:
            self._report_failure(run, self._name(run), began_s, error)
            return
        self.enter(run, template)
        if template.kind == ACTOR_CREATION:
            self._create_actor(run, loaded, args, kwargs, began_s)
            return
        try:
            self.interruptible = run.task_id
            try:
                result = loaded.function(*args, **kwargs)
            finally:
                self.interruptible = self._struck = b""
            del args, kwargs
            self.deliver(run, template, result, began_s)
        except SystemExit as request:
            self._exit(request)
        except BaseException as error:
            if run.task_id in self.cancelled or isinstance(error, KeyboardInterrupt):
                self.client.report(self.cancellation(run, began_s))
            else:
                self._report_failure(run, template.name, began_s, error, template)
            return
        # Not before: were refs in it dropped first (by the helper thread), the node would free
        # their objects before it hears that the result holds them.
        del result

    # --- cancellation -----------------------------------------------------------------------------

    def _on_interrupt(self, *_: Any) -> None:
        """The node rang: a CancelTask lies in the client channel. In the main thread, anywhere."""
        if references.in_fork:
            return
        if self.client.link.mine:
            self.client.link.interrupted = True  # looked at as this frame leaves the client
        else:
            self._read_cancels()

    def _on_cancel(self, task_id: bytes) -> None:
        """Another thread has read it, after the bell perhaps: it rings once more."""
        if task_id == self.interruptible and threading.get_ident() != self._main:
            os.kill(os.getpid(), INTERRUPT_SIGNAL)

    def _read_cancels(self) -> None:
        self.client.link.read_now()
        self._check_interrupt()

    def _check_interrupt(self) -> None:
        """Stop the running task if it is cancelled; one that is over is left alone."""
        task = self.interruptible
        if task and task in self.cancelled and threading.get_ident() == self._main:
            self.interruptible = b""  # once
            self._struck = task
            raise KeyboardInterrupt

    def _on_unraisable(self, unraisable: Any) -> None:
        """If a finaliser has swallowed the interrupt of a cancel, it comes again."""
        if (self._struck and unraisable.exc_type is KeyboardInterrupt
                and threading.get_ident() == self._main):
            self.interruptible = self._struck
            # Not from here: what it raised would be swallowed, too.
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), INTERRUPT_SIGNAL))
            again.daemon = True
            again.start()
        else:
            self._unraisable(unraisable)

    def cancellation(self, run: Run, began_s: float) -> Failed:
        self.leave_if_forked()
        self._unpin(run, run.deps)
        failure = values.Failure("TaskCancelledError", "", run.task_id.hex())
        return Failed(run.task_id, run.attempt, _us(began_s), values.pack_failure(failure))

    def enter(self, run: Run, template: Template) -> None:
        """This is what the process runs from now on."""
        current = self.context
        current.task_id = run.task_id
        current.attempt = run.attempt
        if template is not current.template or self._shown_idle:
            self._surround(template)
        self.client.begin_task(run.task_id, run.attempt)

    def _surround(self, template: Template) -> None:
        """What its task finds around it: group, environment, resources."""
        current = self.context
        current.template = template
        shown = shown_name(template)
        output.call(shown)
        title.show(shown)
        self._shown_idle = False
        current.resources = template.resources
        current.group_id = template.group_id
        current.captures = template.captures
        current.env_vars = template.env_vars
        current.packages = template.packages
        hands_on = template.group_id or template.env_vars or template.packages
        context.inherited = template.template_id if hands_on else b""

    def _enter_environment(self, run: Run, template: Template) -> None:
        """Of the first task, and so of all of this process (node/dispatch.py)."""
        if template.environment:
            environment.enter(self.client, self._settings["packages"], template)
        if run.devices:
            self.context.devices = environment.see_devices(self._settings["gpus"], run.devices)
        if "setup_hook" in self._settings:
            environment.set_up(self._settings["setup_hook"])
        self._entered = True
        self._around.settle()

    def load(self, run: Run) -> Loaded:
        """The function (class) behind the template; fetched the first time."""
        loaded = self._loaded.get(run.template_id)
        if loaded is not None:
            return loaded
        answer = self.client.fetch_template(run.template_id, ids.home_of_task(run.task_id))
        template = answer.template
        assert template is not None
        if not self._entered:
            # Before its function is unpickled: that may import what the packages bring.
            self._enter_environment(run, template)
        function: Any = None
        if template.kind != METHOD:
            packed: Any = answer.function
            if answer.object_id:
                ref = self.client.intern(answer.object_id)
                packed = self.client.get_packed([ref], None)[0]
            if len(packed) == 0:
                raise exceptions.RaySystemError(
                    f"the definition of {template.name} is not known to its home (rank "
                    f"{ids.home_of_task(run.task_id)})")
            function = serialization.deserialize(packed)
            self.client.knows_function(template.function_id)
        loaded = self._loaded[run.template_id] = Loaded(template, function)
        return loaded

    def arguments(self, run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if run.args == NO_ARGS:
            return (), {}
        if not run.deps:
            args, kwargs = serialization.deserialize(run.args)
            return args, kwargs
        deps, run.deps = run.deps, ()  # from here on they are opened, or unpinned below
        data: list[Any] = []
        try:
            fetched = self._fetch_dependencies(run, deps)
            for index, dep in enumerate(deps):
                if type(dep) is Located:
                    data.append(self.client.pinned(run.ids[index * 28 : index * 28 + 28], dep))
                else:
                    data.append(dep or fetched.pop())
        except BaseException:
            self._unpin(run, deps, len(data))
            raise
        for item in data:
            if item[0] >= values.ERROR:
                raise FailedDependency(bytes(item))
        if run.args == ARGS_IN_DEP:
            packed, data = data[0], data[1:]
        else:
            packed = run.args
        args, kwargs = serialization.deserialize(packed)
        found = [serialization.deserialize(item) for item in data]
        args = tuple(found[a.index] if type(a) is Placeholder else a for a in args)
        for key, value in kwargs.items():
            if type(value) is Placeholder:
                kwargs[key] = found[value.index]
        return args, kwargs

    def _unpin(self, run: Run, deps: tuple[bytes | Located, ...], start: int = 0) -> None:
        """Let go of dependencies that will not be opened."""
        for index in range(start, len(deps)):
            if type(deps[index]) is Located:
                self.client.unpin(run.ids[index * 28 : index * 28 + 28])

    def _fetch_dependencies(self, run: Run, deps: tuple[bytes | Located, ...]) -> list[Any]:
        """Those that were too many for the message, the last one first."""
        absent = [self.client.intern(run.ids[index * 28 : index * 28 + 28])
                  for index, dep in enumerate(deps) if dep == b""]
        return self.client.get_packed(absent, None)[::-1] if absent else []

    # --- outcomes ---------------------------------------------------------------------------------

    def deliver(self, run: Run, template: Template, result: Any, began_s: float) -> None:
        """Report a result; a generator runs now. Large values are in shared memory by then."""
        if references.in_fork:
            self.leave_if_forked()
        if type(result) is GeneratorType or template.stream:
            generators.run(self, run, template, result, began_s)
        else:
            self.client.report(self._outcome(run, template, result, began_s), run.reply_to)

    def leave_if_forked(self, error: BaseException | None = None) -> None:
        """A child that user code has forked leaves its task function: it ends here. The outcome is
        its parent's to report."""
        if not references.in_fork:
            return
        code = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(error)
            code = 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _outcome(self, run: Run, template: Template, result: Any, began_s: float) -> Any:
        count = template.return_count
        if count == 1:
            limit = self.client.core.inline_max_bytes
            packed = serialization.pack_atom(result, limit)
            if packed:
                return Done(run.task_id, run.attempt, _us(began_s), packed)
            serialized = _serialized(template, result)
            if not serialized.contained and serialized.nbytes <= limit:
                packed = values.pack(serialized.pickled, serialized.buffers)
                return Done(run.task_id, run.attempt, _us(began_s), packed)
            parts: tuple[Return, ...] = (self.returned(serialized, 0),)
        elif count == 0:
            parts = ()
        else:
            if not isinstance(result, Collection):
                raise TypeError(f"Task {template.name} returned an object of type "
                                 f"{type(result).__name__}, but num_returns={count}.")
            if len(result) != count:
                raise ValueError(f"Task {template.name} returned {len(result)} objects, "
                                 f"but num_returns={count}.")
            parts = self.gathered(_serialized(template, item) for item in result)
        return DoneMany(run.task_id, run.attempt, _us(began_s), parts)

    def gathered(self, results: Iterable[serialization.Serialized]) -> tuple[Return, ...]:
        """Several values for one message: as many of them inline as it should carry."""
        parts = []
        nbytes = 0
        for serialized in results:
            part = self.returned(serialized, nbytes)
            nbytes += inline_bytes(part)
            parts.append(part)
        return tuple(parts)

    def returned(self, serialized: serialization.Serialized, before_bytes: int) -> Return:
        """One value, behind `before_bytes` of others in the same message."""
        contained = b"".join(serialized.contained)
        sizes.check_refs(len(contained), "the result holds")
        nbytes = serialized.nbytes
        if nbytes <= self.client.core.inline_max_bytes and (
            nbytes <= sizes.SMALL_BYTES or before_bytes + nbytes <= sizes.GATHERED_BYTES
        ):
            return Return(values.pack(serialized.pickled, serialized.buffers), contained)
        return Return(self.client.write(serialized), contained)

    def failure(self, run: Run, name: str, began_s: float, error: BaseException,
                template: Template | None = None) -> Failed:
        self.leave_if_forked(error)
        self._unpin(run, run.deps)
        task_error = exceptions.TaskError(
            name, self.describe(name, error), error, os.getpid(), self.address, self.rank,
            run.actor_id.hex() or None, None if self.actor is None else self.actor.own_repr())
        if isinstance(error, exceptions.UserCodeException) and error.__cause__ is not None:
            error = error.__cause__
        retry = (template is not None and template.retry_exceptions
                 and not isinstance(error, exceptions.TaskCancelledError)
                 and (not template.retry_only or isinstance(error, self._retried(template))))
        packed = self._error_value(task_error, template, retry)
        return Failed(run.task_id, run.attempt, _us(began_s), packed, retry)

    def _error_value(
        self, error: exceptions.TaskError, template: Template | None, retry: bool
    ) -> bytes | Located:
        """A large one travels as a large result does; unless the home may run the task again: who
        waits on this node would take what lies here for the outcome."""
        packed = serialization.dump_error(error)
        if len(packed) <= self.client.core.inline_max_bytes:
            return packed
        try:
            if (template is not None and template.return_count == 1 and not template.stream
                    and not retry):
                return self.client.write_packed(packed)
            if len(packed) <= sizes.MESSAGE_MAX_BYTES // 2:
                return packed  # one message, and one value for all returns
        except exceptions.ObjectStoreFullError:
            pass
        return serialization.dump_error(error, with_cause=False)

    def _retried(self, template: Template) -> tuple[type, ...]:
        found = self._retry_only.get(template.retry_only)
        if found is None:
            found = self._retry_only[template.retry_only] = serialization.load_classes(
                template.retry_only)
        return found

    def describe(self, name: str, error: BaseException) -> str:
        """The remote traceback, headed by where it comes from; our own frames left out."""
        if type(error).__name__ == "BdbQuit":  # breakpoint(), which found the end of its input
            error.add_note("A worker has no terminal for a debugger: call f.__wrapped__(...) in "
                           "the driver, or wait in the task for a remote debugger (debugpy).")
        frames = error.__traceback__
        folder = os.path.dirname(os.path.abspath(__file__))
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(folder):
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
        actor = self.context.actor_id
        whose = f", actor_id={actor.hex()}" if actor else ""
        own = self.actor.own_repr() if self.actor is not None else None
        if own is not None:
            whose += f", repr={own}"
        return (f"hpcray::{name}() (host={self.host}, rank={self.rank}, "
                f"pid={os.getpid()}, ip={self.address}{whose})\n{text}")

    def _report_failure(self, run: Run, name: str, began_s: float, error: BaseException,
                        template: Template | None = None) -> None:
        if run.actor_id:
            self._report_creation_failure(run, name, began_s, error)
        else:
            self.client.report(self.failure(run, name, began_s, error, template))

    def _name(self, run: Run) -> str:
        loaded = self._loaded.get(run.template_id)
        return "task" if loaded is None else loaded.template.name

    def _exit(self, request: SystemExit) -> None:
        """`sys.exit()` in a task ends the worker: to the node it is a crash, retried as such."""
        self.leave_if_forked(request)
        self.client.flush()
        code = request.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else (0 if code is None else 1))

    # --- actors -----------------------------------------------------------------------------------

    def _create_actor(
        self, run: Run, loaded: Loaded, args: tuple[Any, ...], kwargs: dict[str, Any],
        began_s: float,
    ) -> None:
        template = loaded.template
        self.context.actor_id = run.actor_id
        self.context.incarnation = run.attempt
        held = template.held_resources
        self.context.resources = template.resources if held is None else held
        if not any(name == "CPU" for name, _ in self.context.resources):
            self.client.link.before_wait = None  # it has no CPU to give back while it waits
        self.client.set_actor(run.actor_id)
        actor = host(self, template, run.actor_id)
        try:
            actor.construct(loaded.function, args, kwargs)
        except SystemExit as request:
            self._exit(request)
        except BaseException as error:
            self._report_creation_failure(run, template.name, began_s, error)
            return
        self.leave_if_forked()
        self.actor = actor
        own = actor.own_repr()
        if own is not None:
            output.call(own)
        actor.constructed()
        self.client.report(Done(run.task_id, run.attempt, _us(began_s), serialization.NONE))

    def _report_creation_failure(
        self, run: Run, name: str, began_s: float, error: BaseException
    ) -> None:
        self.leave_if_forked(error)
        text = self.describe(name, error)
        packed = values.pack_failure(values.Failure(
            "ActorDiedError",
            "The actor died because of an error raised in its creation task (its constructor), "
            + text[:32_768], run.actor_id.hex(), in_constructor=True))
        self.client.report(Failed(run.task_id, run.attempt, _us(began_s), packed))
        self.failed_creation = True

    # --- waiting ----------------------------------------------------------------------------------

    def _before_wait(self, waiter: Waiter) -> Blocked | None:
        """By the client, with its lock held, before the running task really waits."""
        if threading.get_ident() != self._main:
            return None
        ids = waiter.ids
        waits = b"".join(ids) if len(ids) <= _TOLD_IDS else b""
        if self.actor is not None:
            return Blocked((), waits)  # its calls stay its own
        unstarted = tuple(item.task_id for item in self._queue if type(item) is Run)
        stops = [item for item in self._queue if type(item) is Stop]
        self._queue.clear()
        self._queue.extend(stops)
        return Blocked(unstarted, waits)


def inline_bytes(part: Return) -> int:
    """What it adds to its message."""
    return len(part.value) if type(part.value) is bytes else 0


def _serialized(template: Template, result: Any) -> serialization.Serialized:
    try:
        return serialization.serialize(result)
    except TypeError as error:
        error.add_note(f"(while the return value of {template.name} was pickled)")
        raise


def shown_name(template: Template) -> str:
    """In front of what it prints: the function without its module, or the name it was given."""
    if template.kind == ACTOR_CREATION:
        return template.name.removesuffix(".__init__").rpartition(".")[2]
    return template.name if template.function_name else template.name.rpartition(".")[2]


def _us(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1_000_000)
