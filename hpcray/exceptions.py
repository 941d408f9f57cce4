"""Every error a user can meet, with Ray's names and tree.

Named for whose fault it is: the task raised (`TaskError`), a peer died (`WorkerCrashedError`,
`ActorDiedError`, `ObjectLostError`, `NodeDiedError`), a limit was met (`ObjectStoreFullError`,
`GetTimeoutError`), or hpcray was used wrongly (`ValueError`, `TypeError`, `LaunchError`).
All are picklable data: their attributes cross process boundaries.
"""

from __future__ import annotations

import contextlib
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

from hpcray.protocol import words


class RayError(Exception):
    """Base of everything hpcray raises for a reason of its own (Ray's name, kept for its users)."""


HpcrayError = RayError


class LaunchError(RayError):
    """The processes of this job could not be started; the text says what to do."""


class RaySystemError(RayError):
    """The runtime itself failed: a node went away, or a bug of hpcray."""


class TaskError(RayError):
    """A task or actor method raised.

    Raised by `get` as an object that is an instance of both `TaskError` and of the type that was
    raised, when that type can be subclassed and built; `cause` is the original exception where it
    could be pickled.

    Attributes:
      function_name: the task's name.
      traceback_str: the remote traceback, headed by host, rank and pid.
      cause: the original exception; one that could not be pickled is a `RayError` with its text.
      pid, ip, rank, actor_id: where it happened.
      actor_repr: what the actor's own `__repr__` says of it, or None.
    """

    def __init__(self, function_name: str = "", traceback_str: str = "",
                 cause: BaseException | None = None, pid: int = 0, ip: str = "", rank: int = 0,
                 actor_id: str | None = None, actor_repr: str | None = None) -> None:
        super().__init__(
            function_name, traceback_str, cause, pid, ip, rank, actor_id, actor_repr)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.pid = pid
        self.ip = ip
        self.rank = rank
        self.actor_id = actor_id
        self.actor_repr = actor_repr

    @property
    def proctitle(self) -> str:
        return f"hpcray::{self.function_name}()"

    def __str__(self) -> str:
        return self.traceback_str

    def __reduce__(self) -> tuple[Any, ...]:
        cause = None if self.cause is None else _Travelling(self.cause)
        return (TaskError, (self.function_name, self.traceback_str, cause, self.pid, self.ip,
                            self.rank, self.actor_id, self.actor_repr))

    def make_dual_exception_instance(self) -> TaskError:
        return self.as_instanceof_cause()

    def as_instanceof_cause(self) -> TaskError:
        """This error as an instance of its cause's class too, so that `except ValueError` works.

        A class that refuses to be subclassed or built leaves a plain `TaskError` with the cause.
        """
        cause = self.cause
        if cause is None or _is_dual(self):
            return self
        while isinstance(cause, TaskError) and cause.cause is not None:
            cause = cause.cause  # a task that failed because of a task: the first cause counts
        cause_class = type(cause)
        if issubclass(TaskError, cause_class):
            return self  # TaskError itself, RayError or Exception: nothing to add
        try:
            error: Any = _new_exception(cause_class, _dual_class(cause_class), cause.args)
            # What the cause has is the cause's: `except Mine as e: e.rank` means Mine's rank.
            error.__dict__.update((name, value) for name, value in self.__dict__.items()
                                  if not hasattr(cause, name))
            error.__dict__.update(getattr(cause, "__dict__", {}), cause=cause, _plain=self)
            _set_members(error, _members(cause))
        except Exception:
            return self
        dual_error: TaskError = error
        return dual_error


RayTaskError = TaskError


class _Dual:
    """Marks the classes that are both TaskError and the cause's class."""

    cause: BaseException
    _plain: TaskError

    def __getattr__(self, name: str) -> Any:
        # Slots and properties of the cause which its __dict__ does not show.
        if name.startswith("__") or name in ("cause", "_plain"):
            raise AttributeError(name)
        return getattr(self.cause, name)

    def __str__(self) -> str:
        return self._plain.traceback_str

    def __reduce__(self) -> tuple[Any, ...]:
        # The class has no importable name: pickle what it is made of.
        return (TaskError.as_instanceof_cause, (self._plain,))

    def __reduce_ex__(self, _protocol: Any, /) -> tuple[Any, ...]:
        return self.__reduce__()  # and not what the cause's class has of it


def _is_dual(error: BaseException) -> bool:
    return isinstance(error, _Dual)


def _plain(error: TaskError) -> TaskError:
    """The error without the type of its cause: its attributes are those of a `TaskError`, whatever
    the cause calls its own."""
    found: TaskError = error.__dict__.get("_plain", error)
    return found


_dual_classes: dict[type, type[TaskError]] = {}


def _dual_class(cause_class: type[BaseException]) -> type[TaskError]:
    dual = _dual_classes.get(cause_class)
    if dual is None:
        dual = type(f"RayTaskError({cause_class.__name__})", (_Dual, TaskError, cause_class),
                    {"__module__": "hpcray.exceptions"})
        _dual_classes[cause_class] = dual
    return dual


def _new_exception(
    kind: type[BaseException], as_: type[BaseException], args: tuple[Any, ...]
) -> BaseException:
    """One of class `as_`, which is `kind` or below it, without its constructor."""
    try:
        # The own __new__ of `kind`, which OSError and its like insist on, with its arguments:
        # groups take what they hold from there.
        error = kind.__new__(as_, *args)
    except TypeError:
        error = BaseException.__new__(as_, *args)  # MemoryError's makes no subclasses of two
    with contextlib.suppress(AttributeError):  # its class makes its own of what it has
        error.args = args
    return error


def _member_names(kind: type[BaseException]) -> tuple[tuple[str, bool], ...]:
    """Attributes that an exception's `__dict__` does not show, and whether a `__slots__` has them:
    the others are those of built-in exceptions, such as `errno`."""
    return tuple(
        (name, "__slots__" in vars(base))
        for base in kind.__mro__ if base not in (BaseException, object)
        for name, value in vars(base).items()
        if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)) and name[:2] != "__")


def _members(error: BaseException) -> dict[str, Any]:
    names = _member_names(type(error))
    return {name: getattr(error, name) for name, _ in names if hasattr(error, name)}


def _set_members(error: BaseException, members: dict[str, Any]) -> None:
    for name, value in members.items():
        with contextlib.suppress(AttributeError, TypeError):  # one that is for reading only
            setattr(error, name, value)


_SIMPLE = (str, int, float, bytes)


def _reduce(error: BaseException) -> Any:
    """How pickle takes an exception apart. It rebuilds one by calling its class with its `args`,
    which a constructor with parameters of its own refuses; in Ray only the text of such a one
    arrives. What stands in slots it forgets."""
    reduced = error.__reduce_ex__(5)
    if isinstance(reduced, tuple) and reduced[0] is type(error):
        # Of built-in ones not all: an AttributeError's `obj` may be anything.
        members = {name: getattr(error, name) for name, is_slot in _member_names(type(error))
                   if hasattr(error, name)
                   and (is_slot or isinstance(getattr(error, name), _SIMPLE))}
        return (_build_exception, (*reduced[:2], members), *reduced[2:])
    return reduced


def _build_exception(
    kind: type[BaseException], args: tuple[Any, ...], members: dict[str, Any]
) -> BaseException:
    try:
        error = kind(*args)
    except Exception:
        error = _new_exception(kind, kind, args)
    _set_members(error, members)
    return error


class _Travelling:
    """Pickled in place of an exception, it is unpickled as that."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _reduce(self._error)


class TaskCancelledError(RayError):
    """The task was cancelled with `cancel` before it finished.

    Attributes:
      task_id: hexadecimal, or "" if unknown.
    """

    def __init__(self, task_id: str = "", error_message: str = "") -> None:
        super().__init__(task_id, error_message)
        self.task_id = task_id
        self.error_message = error_message

    def __str__(self) -> str:
        text = f"Task {self.task_id} was cancelled" if self.task_id else "This task was cancelled"
        return f"{text}. {self.error_message}".rstrip()


class GetTimeoutError(RayError, TimeoutError):
    """`get(timeout=)` ran out before every object was there."""


class WorkerCrashedError(RayError):
    """The worker running the task died (crash, signal, os._exit) as often as `max_retries` allows.

    The text names host, rank, pid and how it ended.
    """


class LocalRayletDiedError(RayError):
    """Present for compatibility: the node of this process died; see NodeDiedError."""


class NodeDiedError(RayError):
    """The node (MPI rank) that ran the task or hosted the actor died."""

    message = property(str)


class RuntimeEnvSetupError(RayError):
    """The runtime_env could not be set up; the text says which part."""

    error_message = property(str)


class OutOfMemoryError(RayError):
    """The worker was ended because the job's memory limit was reached."""

    message = property(str)


class UserCodeException(RayError):
    """For libraries: wraps what a user's function raised. `retry_exceptions` looks at its
    `__cause__`."""


class PendingCallsLimitExceeded(RayError):
    """The actor has `max_pending_calls` calls queued from this caller already."""


class TaskUnschedulableError(RayError):
    """No node can ever run the task."""

    error_message = property(str)


class ActorUnschedulableError(RayError):
    """No node can ever host the actor."""

    error_message = property(str)


class TaskPlacementGroupRemoved(RayError):
    """The placement group the task was in was removed."""


class ActorPlacementGroupRemoved(RayError):
    """The placement group the actor was in was removed."""


class RayActorError(RayError):
    """An actor cannot answer.

    Attributes:
      actor_id: hexadecimal, or None.
      error_msg: why, with host, rank and pid where known.
    """

    def __init__(self, actor_id: str | None = None, error_msg: str = "The actor died unexpectedly"
                 " before finishing this task.", actor_init_failed: bool = False,
                 preempted: bool = False) -> None:
        super().__init__(actor_id, error_msg, actor_init_failed, preempted)
        self.actor_id = actor_id
        self.error_msg = error_msg
        self.actor_init_failed = actor_init_failed
        self.preempted = preempted

    def __str__(self) -> str:
        return self.error_msg


ActorError = RayActorError


class ActorAlreadyExistsError(ValueError, RayError):
    """There is an actor of that name in the namespace."""

    error_message = property(str)


class ActorHandleNotFoundError(ValueError, RayError):
    """The handle is of an earlier session: its actor ended with it."""

    error_message = property(str)


class ActorDiedError(RayActorError):
    """The actor is dead for good: it was killed, its constructor raised, or its worker died."""


class ActorUnavailableError(RayActorError):
    """The actor is restarting and this call may or may not have run."""


class AsyncioActorExit(RayError):
    """Raised inside an async actor by `exit_actor`; never reaches callers."""


class ObjectStoreFullError(RayError):
    """The object does not fit in the node's object store.

    Attributes (bytes; 0 if it was another node's): need_bytes, used_bytes, capacity_bytes.
    """

    def __init__(self, need_bytes: int = 0, used_bytes: int = 0, capacity_bytes: int = 0,
                 detail: str = "") -> None:
        super().__init__(need_bytes, used_bytes, capacity_bytes, detail)
        self.need_bytes = need_bytes
        self.used_bytes = used_bytes
        self.capacity_bytes = capacity_bytes
        self.detail = detail

    def __str__(self) -> str:
        if not self.capacity_bytes:
            return self.detail
        need, capacity = words.size(self.need_bytes), words.size(self.capacity_bytes)
        if self.need_bytes > self.capacity_bytes:
            return (f"the object needs {need}, more than this node's whole object store of "
                    f"{capacity}: split it, or start with a larger store: "
                    "init(object_store_memory=BYTES).")
        kept = f" ({self.detail})" if self.detail else ""
        return (
            f"the object needs {need}, but {words.size(self.used_bytes)} of this node's object "
            f"store of {capacity} are in use{kept}. Drop refs that are no longer needed (del ref), "
            "and arrays read from them, which keep their memory; or start with a larger store: "
            "init(object_store_memory=BYTES)."
        )


class OutOfDiskError(RayError):
    """Spilling found no room on the node's disk."""


class ObjectLostError(RayError):
    """No copy of the object is left and it cannot be made again.

    Attributes:
      object_ref_hex: the object's id.
      detail: how it was lost.
      owner_address, call_site: None and "": objects have homes, and no addresses.
    """

    def __init__(self, object_ref_hex: str = "", owner_address: Any = None, call_site: str = "",
                 detail: str = "") -> None:
        super().__init__(object_ref_hex, owner_address, call_site, detail)
        self.object_ref_hex = object_ref_hex
        self.owner_address = owner_address
        self.call_site = call_site
        self.detail = detail

    def __str__(self) -> str:
        return f"Object {self.object_ref_hex} is lost: {self.detail or 'no copy is left'}."


class ObjectFetchTimedOutError(ObjectLostError):
    """The object could not be fetched from another node in time."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was freed while a ref existed: a bug of hpcray, or a ref made from bytes."""


class ObjectFreedError(ObjectLostError):
    """The object was freed explicitly."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object's lineage is gone or its task may not be retried."""


class OwnerDiedError(ObjectLostError):
    """The object's home died and its record could not be rebuilt."""


class UnserializableException(RayError):
    """The task's exception could not be unpickled here; its text is kept."""


# --- never raised: what they speak of is not here; programs that catch them run -------------------


class AuthenticationError(RayError):
    """Of Ray's tokens."""


class CrossLanguageError(RayError):
    """Of tasks in other languages."""


class ObjectRefStreamEndOfStreamError(RayError):
    """Of streams; here the end of one is StopIteration or StopAsyncIteration."""


class OufOfBandObjectRefSerializationException(RayError):
    """Of refs that are pickled without Ray's knowledge."""


class PlasmaObjectNotAvailable(RayError):
    """Of Ray's object store; here it is GetTimeoutError."""


class RpcError(RayError):
    """Of Ray's network."""


class StreamingGeneratorReplayInconsistentError(RaySystemError):
    """Of generators that yield another number of items when they run again."""


class RayChannelError(RaySystemError):
    """Of compiled graphs."""


class RayChannelTimeoutError(RayChannelError, TimeoutError):
    """Of compiled graphs."""


class RayCgraphCapacityExceeded(RaySystemError):
    """Of compiled graphs."""


class RayDirectTransportError(RaySystemError):
    """Of tensors that travel beside the object store."""


RAY_EXCEPTION_TYPES = [
    value for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, RayError)
]
