"""A worker: runs tasks one at a time, or hosts one actor. Entered by a fork of the zygote.

    task channel --Run--> load function and arguments --> run user code --> Done | DoneMany | Failed
    client channel  gets, puts, nested submissions, and the outcomes (one flush per datagram)

While the running task waits in `get`, the worker gives back its CPU and every Run it has read but
not started (`Blocked`); the node takes back those it has not read. So nested tasks cannot deadlock.

What an actor adds is in `worker/hosting.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import GeneratorType
from typing import Any

# Imported here so that the zygote has them: an actor's start would pay 30 ms for them.
from hpcray import actor as _actor  # noqa: F401
from hpcray import exceptions
from hpcray.client import context, logs, process, references, serialization
from hpcray.client.client import Client
from hpcray.client.context import TaskContext
from hpcray.client.waiters import Waiter
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    Blocked,
    Done,
    Failed,
    Run,
    Stop,
    Template,
    Unblocked,
)
from hpcray.transport.datagrams import ChannelClosed
from hpcray.worker import ends, environment, output, surroundings, title
from hpcray.worker.cancels import Cancels
from hpcray.worker.channel import TaskChannel
from hpcray.worker.ends import leave_if_forked
from hpcray.worker.generators import Generators
from hpcray.worker.hosting import HostedActor, Parts, host
from hpcray.worker.loading import FailedDependency, Loaded, Loader
from hpcray.worker.outcomes import Outcomes, us

_WELCOME_S = 60.0
# Outcomes do not wait longer than this for the rest of their datagram.
_FLUSH_S = 0.001
_SIG_IGN = int(signal.SIG_IGN)
# What a blocked worker waits for is told if it is at most so many objects.
_TOLD_IDS = 256


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
    surroundings.set_handler(signal.SIGTERM, ends.end_in_good_order)
    output.open_streams()
    title.show("IDLE")
    ends.take_over_forks()
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


class Worker:
    def __init__(self, client: Client) -> None:
        """To be opened in the process that it is in."""
        self.client = client
        self._channel = TaskChannel(client)
        self._channel.on_idle = self._show_idle
        self._queue = self._channel.queue
        self._main = threading.get_ident()
        self._context = TaskContext()
        self._shown_idle = False
        self._streams = output.streams
        self._around = surroundings.Surroundings()
        loader = Loader(client, self._enter_environment)
        outcomes = self._outcomes = Outcomes(client, self._context, loader.unpin)
        cancels = self._cancels = Cancels(client)
        self._generators = Generators(client, outcomes, cancels)
        self._loader = loader
        # Of each task; not looked up there.
        self._cancelled = client.cancelled
        self._report = client.report
        self._begin_task = client.begin_task
        self._load = loader.load
        self._arguments = loader.arguments
        self._outcome = outcomes.outcome
        client.link.before_wait = self._before_wait
        client.link.after_wait = Unblocked
        self._actor: HostedActor | None = None  # once created

    def open(self, tasks: socket.socket, settings: dict[str, Any]) -> None:
        """This process is the worker."""
        self._settings = settings
        self._channel.open(tasks)
        self._context.namespace = settings.get("namespace", "")
        context.set_process_context(self._context)
        outcomes = self._outcomes
        outcomes.host = settings.get("host", "")
        outcomes.address = settings.get("address", "")
        outcomes.rank = settings.get("rank", 0)
        self._cancels.open()
        surroundings.forget()  # what the zygote has done

    # --- the loop ---------------------------------------------------------------------------------

    def serve(self) -> int:
        queue = self._queue
        client = self.client
        read = self._channel.read
        flushed_s = 0.0
        while True:
            if not queue:
                if output.touched:
                    output.flush()
                client.flush(True)
                read(True)
                flushed_s = time.monotonic()
                continue
            item = queue.popleft()
            if type(item) is not Run:
                client.flush()
                return 0
            self._run_task(item)
            if self._actor is not None:
                return self._actor.serve(queue)
            if self.failed_creation:
                client.flush()
                return 0
            if queue and time.monotonic() - flushed_s > _FLUSH_S:
                client.flush()
                flushed_s = time.monotonic()

    failed_creation = False  # this process was meant for the actor: it ends

    # --- one task ---------------------------------------------------------------------------------

    def _run_task(self, run: Run) -> None:
        began_s = time.monotonic()
        if run.task_id in self._cancelled:
            self._report(self._outcomes.cancellation(run, began_s))
            return
        streams = self._streams
        if (surroundings.changed or sys.stdout is not streams["stdout"]
                or sys.stderr is not streams["stderr"]):
            self._around.restore()
        try:
            loaded = self._load(run)
            template = loaded.template
            args, kwargs = self._arguments(run)
        except FailedDependency as failed:
            self._report(Failed(run.task_id, run.attempt, us(began_s), failed.error))
            self.failed_creation = bool(run.actor_id)
            return
        except BaseException as error:
            self._report_failure(run, self._loader.name_of(run), began_s, error)
            return
        self.enter(run, template)
        if template.kind == ACTOR_CREATION:
            self._create_actor(run, loaded, args, kwargs, began_s)
            return
        try:
            cancels = self._cancels
            cancels.interruptible = run.task_id
            try:
                result = loaded.function(*args, **kwargs)
            finally:
                cancels.interruptible = cancels.struck = b""
            del args, kwargs
            self.deliver(run, template, result, began_s)
        except SystemExit as request:
            self._exit(request)
        except BaseException as error:
            if run.task_id in self._cancelled or isinstance(error, KeyboardInterrupt):
                self._report(self._outcomes.cancellation(run, began_s))
            else:
                self._report_failure(run, template.name, began_s, error, template)
            return
        # Not before: were refs in it dropped first (by the helper thread), the node would free
        # their objects before it hears that the result holds them.
        del result

    def enter(self, run: Run, template: Template) -> None:
        """This is what the process runs from now on."""
        current = self._context
        current.task_id = run.task_id
        current.attempt = run.attempt
        if template is not current.template or self._shown_idle:
            self._surround(template)
        self._begin_task(run.task_id, run.attempt)

    def _show_idle(self) -> None:
        if self._actor is None:
            self._shown_idle = True
            title.show("IDLE")

    def _surround(self, template: Template) -> None:
        """What its task finds around it: group, environment, resources."""
        current = self._context
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
            self._context.devices = environment.see_devices(self._settings["gpus"], run.devices)
        if "setup_hook" in self._settings:
            environment.set_up(self._settings["setup_hook"])
        self._around.settle()

    # --- outcomes ---------------------------------------------------------------------------------

    def deliver(self, run: Run, template: Template, result: Any, began_s: float) -> None:
        """Report a result; a generator runs now. Large values are in shared memory by then."""
        if references.in_fork:
            leave_if_forked()
        if type(result) is GeneratorType or template.stream:
            self._generators.run(run, template, result, began_s)
        else:
            self._report(self._outcome(run, template, result, began_s), run.reply_to)

    def _report_failure(self, run: Run, name: str, began_s: float, error: BaseException,
                        template: Template | None = None) -> None:
        if run.actor_id:
            self._fail_creation(run, name, began_s, error)
        else:
            self._report(self._outcomes.failure(run, name, began_s, error, template))

    def _exit(self, request: SystemExit) -> None:
        """`sys.exit()` in a task ends the worker: to the node it is a crash, retried as such."""
        leave_if_forked(request)
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
        self._context.actor_id = run.actor_id
        self._context.incarnation = run.attempt
        held = template.held_resources
        self._context.resources = template.resources if held is None else held
        if not any(name == "CPU" for name, _ in self._context.resources):
            self.client.link.before_wait = None  # it has no CPU to give back while it waits
        self.client.set_actor(run.actor_id)
        actor = host(Parts(
            self.client, self._channel, self._loader, self._outcomes, self._generators,
            self._context, self.deliver, self._on_terminate), template, run.actor_id)
        try:
            actor.construct(loaded.function, args, kwargs)
        except SystemExit as request:
            self._exit(request)
        except BaseException as error:
            self._fail_creation(run, template.name, began_s, error)
            return
        leave_if_forked()
        self._actor = actor
        self._outcomes.own_repr = actor.own_repr
        own = actor.own_repr()
        if own is not None:
            output.call(own)
        actor.constructed()
        self._report(Done(run.task_id, run.attempt, us(began_s), serialization.NONE))

    def _fail_creation(self, run: Run, name: str, began_s: float, error: BaseException) -> None:
        self._report(self._outcomes.creation_failure(run, name, began_s, error))
        self.failed_creation = True

    def _on_terminate(self, end: Callable[[], None]) -> None:
        """What a SIGTERM does from now on, unless it is the end of the job."""
        self._channel.wake_by_signals()
        ends.on_terminate(end, self._settings.get("ending", b"\0"))

    # --- waiting ----------------------------------------------------------------------------------

    def _before_wait(self, waiter: Waiter) -> Blocked | None:
        """By the client, with its lock held, before the running task really waits."""
        if threading.get_ident() != self._main:
            return None
        ids = waiter.ids
        waits = b"".join(ids) if len(ids) <= _TOLD_IDS else b""
        if self._actor is not None:
            return Blocked((), waits)  # its calls stay its own
        unstarted = tuple(item.task_id for item in self._queue if type(item) is Run)
        stops = [item for item in self._queue if type(item) is Stop]
        self._queue.clear()
        self._queue.extend(stops)
        return Blocked(unstarted, waits)


def shown_name(template: Template) -> str:
    """In front of what it prints: the function without its module, or the name it was given."""
    if template.kind == ACTOR_CREATION:
        return template.name.removesuffix(".__init__").rpartition(".")[2]
    return template.name if template.function_name else template.name.rpartition(".")[2]
