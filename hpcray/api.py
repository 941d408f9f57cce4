"""The verbs of the public face: init, shutdown, remote, get, put, wait, kill, cancel, nodes, ...

    user --> api (checks, in Ray's words where Ray has some) --> Client --> node

Owns the one session of this process: who connected it, and that it ends with the interpreter.
Decides nothing about tasks or objects; a check belongs here only if its mistake is the caller's.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import numbers
import operator
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, overload

import msgspec

from hpcray import options as options_
from hpcray.actor import ActorClass, ActorHandle, raise_stale
from hpcray.client import context, logs, process
from hpcray.client.interrupts import raised_by_handler
from hpcray.client.references import ObjectRef
from hpcray.client.streams import ObjectRefGenerator
from hpcray.config import make_config, unknown_variables
from hpcray.exceptions import RayError
from hpcray.job_config import JobConfig, LoggingConfig
from hpcray.protocol import ids, words
from hpcray.protocol.messages import UNIT
from hpcray.remote_function import RemoteFunction
from hpcray.version import __version__

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.protocol.messages import Output
    from hpcray.remote_function import RemoteGenerator

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_logger = logging.getLogger("hpcray")


# --- the session ---------------------------------------------------------------------------------

# Threads that use hpcray first at the same moment must not start it twice.
_starting = threading.RLock()
# In a child of fork: whether its parent was connected. Only then is a first use a mistake.
_forked_while_connected = False


class InitContext(Mapping[str, Any]):
    """What `init` returns: facts by name, and a context manager that shuts down at its end.

    Attributes:
      address_info: the facts. Ray's keys, of which those that speak of a server are None, and
        `job_id`, `namespace`, `rank` and `nodes` (how many).
      dashboard_url: None.
      python_version, ray_version, ray_commit: Python's, and hpcray's.
    """

    def __init__(self, client: Client, namespace: str) -> None:
        from hpcray.util.address import get_node_ip_address

        self.address_info: dict[str, Any] = {
            "node_ip_address": get_node_ip_address(),
            "node_id": _node_id(client, client.rank),
            "address": None,
            "gcs_address": None,
            "redis_address": None,
            "object_store_address": None,
            "raylet_socket_name": None,
            "webui_url": None,
            "session_dir": None,
            "metrics_export_port": None,
            "dashboard_agent_listen_port": None,
            "job_id": client.job_id.hex(),
            "rank": client.rank,
            "nodes": client.size,
            "namespace": namespace,
        }
        self.dashboard_url: str | None = None
        self.python_version = platform.python_version()
        self.ray_version = __version__
        self.ray_commit = ""

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Any:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> InitContext:
        return self

    def __exit__(self, *_: object) -> None:
        shutdown()

    def disconnect(self) -> None:
        shutdown()

    def __repr__(self) -> str:
        return f"InitContext({self.address_info})"


# Called at the end of every `init`, automatic ones too: hpcray.as_ray puts hooks of libraries here.
after_init: list[Callable[[], Any]] = []


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    object_store_memory: int | None = None,
    local_mode: bool = False,
    ignore_reinit_error: bool = False,
    include_dashboard: bool | None = None,
    dashboard_host: str | None = None,
    dashboard_port: int | None = None,
    job_config: JobConfig | None = None,
    configure_logging: bool = True,
    logging_level: int | None = None,
    logging_format: str | None = None,
    logging_config: LoggingConfig | None = None,
    log_to_driver: bool | None = None,
    namespace: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    preload: Sequence[str] | Literal["auto"] | None = None,
    redis_url: str | None = None,
    _memory: int | None = None,
    **others: Any,
) -> InitContext:
    """Start the session on the ranks of this launch: one node per MPI rank, or a single one.

    The first use of hpcray calls it with defaults. Amounts are per node and detected if left out;
    HPCRAY_* variables stand in for arguments (see `hpcray.config.ENVIRONMENT`).

    Args:
      preload: modules every node imports once, before it forks workers, instead of each worker for
        itself; default none, or "auto" under `--as-ray`. "auto": what this process has imported of
        installed packages, now and whenever it defines another task or actor. Each module is tried
        in a process of its own first: what starts threads, opens a GPU or crashes is left out (a
        warning names it; of "auto" only what crashes), and workers that need it import it
        themselves.
      redis_url: an existing control store instead of our own.
      job_config: a `JobConfig`: namespace and runtime_env as one object; what is given here wins.
      logging_config: a `LoggingConfig`: how the root logger of every process writes.

    `address` may be None, "auto" or "local": which machines take part is the launcher's to say.
    Ray's arguments of the dashboard, `configure_logging`, `logging_level` and `logging_format` are
    accepted and have no effect.

    Raises:
      RuntimeError: there is a session already (inside tasks there always is), unless
        `ignore_reinit_error`.
      LaunchError: the processes could not be started.
      ValueError: an argument that cannot be; more GPUs than a variable of some node names.
    """
    if others:
        known = inspect.signature(init).parameters
        near = "".join(words.did_you_mean(name, known) for name in sorted(others))
        raise TypeError(f"init() does not know {', '.join(sorted(map(repr, others)))}.{near} See "
                        "help(hpcray.init)")
    if address not in (None, "auto", "local", ""):
        raise ValueError(
            f"address={address!r}: hpcray joins no running cluster; it starts on the ranks it is "
            "launched on: mpirun -n N hpcray run script.py")
    if local_mode:
        raise NotImplementedError(
            "local_mode is not supported; to debug, call f.__wrapped__(...) in this process")
    if job_config is not None:
        if not isinstance(job_config, JobConfig):
            raise TypeError(f"job_config must be a JobConfig, not {job_config!r}; or give "
                            "namespace= and runtime_env=")
        namespace = job_config.ray_namespace if namespace is None else namespace
        runtime_env = job_config.runtime_env if runtime_env is None else runtime_env
    if logging_config is not None and not isinstance(logging_config, LoggingConfig):
        raise TypeError(f"logging_config must be a LoggingConfig, not {logging_config!r}")
    with _starting:
        client = process.client
        if client is not None:
            if not ignore_reinit_error:
                where = "" if client.is_driver else " (this process is a worker)"
                raise RuntimeError(
                    f"hpcray is initialised already{where}; call shutdown() first, or "
                    "init(ignore_reinit_error=True) to go on with what there is")
            _logger.info("init() ignored: hpcray is initialised already")
            return InitContext(client, context.current().namespace)
        for sentence in unknown_variables(os.environ):
            print(f"hpcray: {sentence}", file=sys.stderr, flush=True)
        config = make_config(
            num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, labels=labels,
            object_store_memory_bytes=object_store_memory, memory_bytes=_memory,
            namespace=namespace, log_to_driver=log_to_driver, preload=preload,
            as_ray=_is_as_ray(), runtime_env=runtime_env, redis_url=redis_url,
            logging=None if logging_config is None else logging_config.fields())
        if not config.namespace:  # one of its own: nobody else's actors are in it
            config = msgspec.structs.replace(config, namespace=os.urandom(16).hex())
        from hpcray.launch import start, terminal

        client = start.connect(config, partial(terminal.print_output, config.color_prefix)
                               if config.log_to_driver else _print_nothing)
        client.on_lost(_print_lost)
        driver = ids.driver_task_id(client.rank, client.job_id)
        if not client.task_prefix:
            client.begin_task(driver, 0)
        context.set_process_context(
            context.TaskContext(task_id=driver, namespace=config.namespace))
        process.set_client(client)
        if config.logging:
            logs.configure(**config.logging)
        if set(config.runtime_env) - {"env_vars"}:
            from hpcray.environment import packages_of

            # Its children inherit it: every task and actor of the job.
            context.current().packages = packages_of(client, config.runtime_env)
        _end_with_interpreter()
        answer = InitContext(client, config.namespace)
    for hook in after_init:
        hook()
    return answer


def _is_as_ray() -> bool:
    """Whether `import ray` gives hpcray in this process: then it does in workers."""
    as_ray = sys.modules.get("hpcray.as_ray")
    return as_ray is not None and bool(as_ray.is_installed())


def shutdown(_exiting_interpreter: bool = False) -> None:
    """End the session: tasks that run are stopped, objects freed. Nothing happens if there is none.

    Raises:
      RuntimeError: called by a task or actor; only the driver may.
    """
    end_session(0)


def end_session(status: int, *, for_good: bool = False) -> None:
    """`shutdown` by a driver that knows how it ends: `status` is its exit status, and `for_good`
    says that it begins no other session."""
    with _starting:
        client = process.client
        if client is None:
            return
        if not client.is_driver:
            raise RuntimeError("shutdown() ends the whole job: only the driver may call it")
        # The node hangs up in a moment, as it should.
        client.on_lost(_lost_silently)
        process.set_client(None)
        context.set_process_context(context.TaskContext())
        from hpcray.launch import start

        start.disconnect(client, status, for_good=for_good)


def is_initialized() -> bool:
    """Whether this process has a session; always true inside tasks and actors."""
    return process.client is not None


def _connect_implicitly() -> Client:
    with _starting:
        client = process.client
        if client is not None:
            return client  # another thread was quicker
        if _forked_while_connected:
            raise RuntimeError(
                "this process was forked from one that uses hpcray and has no session of its own: "
                "call hpcray from the parent, or start children by 'spawn'")
        if sys.is_finalizing():  # a thread that is started now never runs: we would wait for it
            raise RuntimeError("the interpreter ends: hpcray is not started again for a finaliser")
        init()
        client = process.client
        assert client is not None
        return client


def _before_fork() -> None:
    global _forked_while_connected
    _forked_while_connected = process.client is not None


def _after_fork_in_parent() -> None:
    global _forked_while_connected
    _forked_while_connected = False


def _after_fork_in_child() -> None:
    # Another thread may have held it at the fork, and will never let go here.
    global _starting
    _starting = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent,
                    after_in_child=_after_fork_in_child)
process.set_connector(_connect_implicitly)


def _end_with_interpreter() -> None:
    # Anew in every session: handlers run last in, first out, and that of the node this session
    # started must come after this one.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _at_exit() -> None:
    client = process.client
    if client is None or not client.is_driver:
        return
    try:
        end_session(_exit_status(), for_good=True)
    except KeyboardInterrupt:
        pass  # one more Ctrl-C, by who waits for this: the node sees that we are gone
    except Exception as error:  # the interpreter would print a traceback nobody can act on
        print(f"hpcray: the session did not end in good order: {error}", file=sys.stderr)


def _exit_status() -> int:
    """How this interpreter is about to end, as far as Python tells.

    An exception nobody caught leaves its traces in `sys`; the argument of sys.exit() does not.
    """
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return 0  # those traces are of some earlier line
    error = getattr(sys, "last_value", None)
    if error is None:
        return 0
    return 130 if isinstance(error, KeyboardInterrupt) else 1


# These are called by whichever thread has read the news: they may not raise.


def _print_nothing(_output: Output) -> None:
    pass


def _print_lost(reason: str) -> None:
    try:
        print(f"hpcray: the connection to the node is gone: {reason}", file=sys.stderr, flush=True)
    except Exception:
        pass


def _lost_silently(_reason: str) -> None:
    pass


# --- remote --------------------------------------------------------------------------------------


class _Remote(Protocol):
    """`remote` with options: what is left to be given is the function or class.

    A class is a callable too, so the overloads overlap; the first that fits is meant.
    """

    @overload
    def __call__(self, target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Callable[P, Iterator[R]], /) -> RemoteGenerator[P, R]: ...
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
@overload
def remote(target: Callable[P, Iterator[R]], /) -> RemoteGenerator[P, R]: ...
@overload
def remote(target: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def remote(**options: Any) -> _Remote: ...


def remote(*targets: Any, **options: Any) -> Any:
    """Make a function a remote function, or a class an actor class.

    `@remote` bare, or with options: `@remote(num_cpus=2)`. The options of tasks and of actors are
    in `hpcray.options.TABLE`.

    Raises:
      ValueError, TypeError, NotImplementedError: an option is unknown, wrong or not there yet.
    """
    if not targets:
        return lambda target: _make_remote(target, options)
    if len(targets) > 1 or options:
        raise TypeError(
            "@remote takes a function or class alone, or options by keyword alone: "
            "remote(f), or remote(num_cpus=2)(f)")
    return _make_remote(targets[0], {})


def _make_remote(target: Any, options: dict[str, Any]) -> Any:
    if isinstance(target, (RemoteFunction, ActorClass)):
        raise TypeError(f"{target!r} is remote already; change its options with .options(...)")
    if isinstance(target, type):
        return ActorClass(target, options_.check_options(options, "a"))
    if inspect.isfunction(target) or inspect.isbuiltin(target):
        return RemoteFunction(target, options_.check_options(options, "t"))
    raise TypeError(f"@remote goes onto a function or a class, not onto {target!r}")


# --- objects -------------------------------------------------------------------------------------


@overload
def get(object_refs: ObjectRef[R], *, timeout: float | None = None) -> R: ...
@overload
def get(object_refs: Sequence[ObjectRef[R]], *, timeout: float | None = None) -> list[R]: ...


def get(object_refs: Any, *, timeout: float | None = None) -> Any:
    """The value of a ref, or the values of a list of refs in its order; waits until they are there.

    Arrays come as read-only views of shared memory.

    Args:
      timeout: seconds; 0 looks and does not wait.

    Raises:
      GetTimeoutError: not all of them were there in time.
      TaskError: the task raised; an instance of the exception's own type too.
    """
    client = process.client
    if type(object_refs) is ObjectRef:
        if client is None:
            raise_stale("ref")
        if timeout is not None:
            _check_timeout(timeout)
        return client.get((object_refs,), timeout)[0]
    if type(object_refs) is ObjectRefGenerator:
        return object_refs  # as Ray: it is already what a program iterates over
    if not isinstance(object_refs, list):
        raise ValueError(
            f"get() takes an ObjectRef or a list of them, not {type(object_refs).__name__}")
    if not object_refs:
        return []
    if list(map(type, object_refs)).count(ObjectRef) != len(object_refs):
        wrong = next(item for item in object_refs if type(item) is not ObjectRef)
        raise TypeError(
            f"get() takes a list of ObjectRefs; this one holds {wrong!r} "
            f"(type {type(wrong).__name__})")
    if client is None:
        raise_stale("ref")
    if timeout is not None:
        _check_timeout(timeout)
    return client.get(object_refs, timeout)


def _check_timeout(timeout: Any) -> None:
    if not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout must be None or a number of seconds, not {timeout!r}")
    if timeout < 0 or timeout != timeout:
        raise ValueError(f"timeout must be None or >= 0 seconds, not {timeout!r}")


def put(value: R, *, _owner: Any = None, _tensor_transport: Any = None) -> ObjectRef[R]:
    """Store a value; the ref to it can be passed to any number of tasks without copying.

    Raises:
      TypeError: the value is a ref already, or cannot be pickled.
      ObjectStoreFullError: there is no room for it.
    """
    if isinstance(value, ObjectRef):
        raise TypeError("put() of an ObjectRef is not allowed: use the ref itself, "
                        "or put([ref]) to store a value that holds it")
    if _owner is not None or _tensor_transport not in (None, "object_store"):
        raise NotImplementedError("put() supports neither _owner nor _tensor_transport")
    client = process.client
    if client is None:
        client = process.current_client()
    try:
        return client.put(value)
    except (RayError, MemoryError, RuntimeError):
        raise
    except Exception as error:
        if raised_by_handler(error):
            raise
        raise TypeError(
            f"put(): the {type(value).__name__} cannot be pickled "
            f"({type(error).__name__}: {error})") from error


@overload
def wait(
    ray_waitables: list[ObjectRef[R]], *, num_returns: int = 1, timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[ObjectRef[R]], list[ObjectRef[R]]]: ...
@overload
def wait(
    ray_waitables: list[Any], *, num_returns: int = 1, timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[Any], list[Any]]: ...


def wait(
    ray_waitables: Any,
    *,
    num_returns: int = 1,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[Any], list[Any]]:
    """Wait until `num_returns` of the refs are ready: (those ready, at most so many; the others).

    Both lists keep the given order. A task that failed is ready too. An `ObjectRefGenerator` is
    ready when its next item is, or its end.

    Args:
      timeout: seconds; fewer may be ready when it ends. 0 looks and does not wait.
      fetch_local: ready means here, on this node, and not only somewhere.

    Raises:
      ValueError: a ref is given twice, or `num_returns` is not within 1 and their number.
    """
    if not isinstance(ray_waitables, list):
        hint = "; put it into a list" if isinstance(ray_waitables, ObjectRef) else ""
        given = type(ray_waitables).__name__
        raise TypeError(f"wait() takes a list of ObjectRefs, not {given}{hint}")
    if timeout is not None:
        _check_timeout(timeout)
    count = len(ray_waitables)
    if not count:
        return [], []
    client = process.client
    # What an earlier wait left need not be checked again: a loop of waits would be quadratic.
    known = 0 if client is None else client.known_part(ray_waitables, fetch=bool(fetch_local))
    if known < count:
        _check_waitables(client, ray_waitables[known:], known)
    try:
        num_returns = operator.index(num_returns)  # an integer of numpy's too
    except TypeError:
        raise TypeError(f"num_returns must be an integer, not {num_returns!r}") from None
    if not 0 < num_returns <= count:
        among = "1, as there is one ref" if count == 1 else f"from 1 to {count}, the number of refs"
        raise ValueError(f"num_returns must be {among}, not {num_returns}")
    if client is None:
        raise_stale("ref")
    return client.wait(ray_waitables, num_returns, timeout, bool(fetch_local))


def _check_waitables(client: Any, refs: list[Any], known: int) -> None:
    """Of those behind the known ones. Passes in C: some 35 us for 1,000 refs."""
    if list(map(type, refs)).count(ObjectRef) != len(refs):
        for ref in refs:
            if type(ref) is not ObjectRef and type(ref) is not ObjectRefGenerator:
                raise TypeError(f"wait() takes a list of ObjectRefs; this one holds {ref!r} "
                                f"(type {type(ref).__name__})")
    if len(set(refs)) != len(refs) or (known and any(map(client.is_known, refs))):
        raise ValueError("wait() was given the same ref more than once")


# --- control -------------------------------------------------------------------------------------


def kill(actor: ActorHandle[Any] | Any, *, no_restart: bool = True) -> None:
    """End an actor at once, without running what is queued: those calls fail.

    (The type says `Any` because an `ActorProxy` is, to type checkers, what it stands for.)

    With `no_restart=False` an actor with `max_restarts` left is restarted.
    """
    if not isinstance(actor, ActorHandle):
        raise ValueError(
            f"kill() takes an actor handle, not {type(actor).__name__}; "
            "for tasks there is cancel()")
    client = process.client
    if client is None or client is not actor._hpcray_client:
        raise_stale("actor handle")
    client.request("kill_actor", {"actor_id": actor._hpcray_id, "no_restart": bool(no_restart)})


def cancel(
    ray_waitable: ObjectRef[Any] | ObjectRefGenerator[Any], *, force: bool = False,
    recursive: bool = True,
) -> None:
    """Cancel the task that makes this object: dequeue it, or raise KeyboardInterrupt in it.

    Nothing happens if it is done. `get` of a cancelled task's refs raises `TaskCancelledError`.

    Args:
      force: end the worker that runs it. Not for actor calls: use kill().
      recursive: the tasks it has submitted too.
    """
    if type(ray_waitable) is ObjectRefGenerator:
        ray_waitable = ray_waitable.completed()
    if not isinstance(ray_waitable, ObjectRef):
        raise TypeError(
            f"cancel() takes an ObjectRef, not {type(ray_waitable).__name__}; "
            "for actors there is kill()")
    client = process.client
    if client is None:
        raise_stale("ref")
    client.request("cancel", {"object_id": ray_waitable.binary(), "force": bool(force),
                              "recursive": bool(recursive)})


# --- the cluster ---------------------------------------------------------------------------------


def _node_id(client: Client, rank: int) -> str:
    key = client.session.get("job_key")
    return ids.node_id_hex(rank, key) if key else ""


def _in_units(amounts: Mapping[str, int]) -> dict[str, float]:
    return {name: amount / UNIT for name, amount in amounts.items()}


def nodes() -> list[dict[str, Any]]:
    """Every node of the job, dead ones too: one dictionary each, with Ray's keys and "Rank"."""
    client = process.current_client()
    return [
        {
            "NodeID": node.get("node_id") or _node_id(client, node["rank"]),
            "Alive": node["alive"],
            "alive": node["alive"],
            "Rank": node["rank"],
            "NodeManagerHostname": node["host"],
            "NodeManagerAddress": node["address"],
            "NodeName": node["host"],
            "Resources": _in_units(node["resources"]) if node["alive"] else {},
            "Labels": dict(node.get("labels") or {}),
        }
        for node in client.request("nodes")
    ]


def cluster_resources() -> dict[str, float]:
    """What all living nodes have together."""
    return _in_units(process.current_client().request("cluster_resources"))


def available_resources() -> dict[str, float]:
    """What of it is free. Another node's share is as it last reported."""
    return _in_units(process.current_client().request("available_resources"))
