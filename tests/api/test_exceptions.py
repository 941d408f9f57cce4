"""What a task raises arrives as what it is: every built-in type, and classes of any kind."""

from __future__ import annotations

import builtins
import importlib
import inspect
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from .conftest import BACKEND

BUILTINS = sorted({value.__name__ for value in vars(builtins).values()
                   if isinstance(value, type) and issubclass(value, BaseException)})
# These end a task in ways of their own.
ENDS = {"SystemExit", "KeyboardInterrupt"}
# A plain RayTaskError is one of these already.
BASES = {"Exception", "BaseException"}
MEMBERS = ("errno", "strerror", "filename", "filename2", "name", "path", "lineno", "offset",
           "text", "msg", "encoding", "object", "start", "end", "reason", "value")


def make(name: str) -> Any:
    import builtins

    kind = getattr(builtins, name)
    if name == "UnicodeDecodeError":
        return kind("utf-8", b"\xff", 0, 1, "why")
    if name == "UnicodeEncodeError":
        return kind("ascii", "\xe4", 0, 1, "why")
    if name == "UnicodeTranslateError":
        return kind("\xe4", 0, 1, "why")
    if issubclass(kind, BaseExceptionGroup):
        return kind("group", [ValueError(1), TypeError("two")])
    if issubclass(kind, ImportError):
        return kind("text", name="module", path="/path")
    if issubclass(kind, NameError):
        return kind("text", name="it")
    if issubclass(kind, SyntaxError):
        return kind("text", ("file.py", 3, 4, "line", 3, 6))
    if issubclass(kind, OSError):
        return kind(2, "no such", "file", None, "other")
    return kind("text", 2)


@pytest.fixture
def raised(ray):
    """`raised(function)`: what `get` raises of a task that runs it."""

    def run(function: Any, *args: Any) -> Any:
        remote = ray.remote(function)
        with pytest.raises(BaseException) as caught:
            ray.get(remote.options(max_retries=0).remote(*args), timeout=30)
        return caught.value

    return run


def _raise_built_in() -> Any:
    import inspect

    source = inspect.getsource(make)

    def fail(name: str) -> None:
        scope: dict[str, Any] = {"Any": object}
        exec(source, scope)
        error = scope["make"](name)
        error.add_note("a note")
        error.more = [1]
        raise error

    return fail


@pytest.mark.parametrize("name", [name for name in BUILTINS if name not in ENDS])
def test_every_built_in_exception_arrives_as_its_own_type(ray, raised, name):
    error = raised(_raise_built_in(), name)
    made = make(name)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, getattr(builtins, name)) or name == "BaseException"
    assert type(error.cause) is type(made)
    assert repr(error.cause.args) == repr(made.args)
    assert error.cause.more == [1] and error.cause.__notes__ == ["a note"]
    assert "a note" in str(error) and type(made).__name__ in str(error)
    if name not in BASES:
        assert error.more == [1] and error.__notes__ == ["a note"]
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, getattr(builtins, name)) or name == "BaseException"


@pytest.mark.ray_differs("Ray's has None for them")
@pytest.mark.parametrize("name", [name for name in BUILTINS if name not in ENDS])
def test_what_a_built_in_exception_knows_is_known_of_it_here(raised, name):
    error, made = raised(_raise_built_in(), name), make(name)
    for member in MEMBERS:
        if hasattr(made, member):
            assert getattr(error, member) == getattr(made, member), member
            assert getattr(error.cause, member) == getattr(made, member), member


def test_keyboard_interrupt_is_a_cancellation(ray, raised):
    def fail() -> None:
        raise KeyboardInterrupt

    assert isinstance(raised(fail), ray.exceptions.TaskCancelledError)


def test_system_exit_ends_the_worker(ray, raised):
    def fail() -> None:
        raise SystemExit(3)

    assert isinstance(raised(fail), ray.exceptions.WorkerCrashedError)


def test_a_memory_error_of_numpy(raised):
    def fail() -> None:
        import numpy as np

        np.ones((10**7, 10**7))

    error = raised(fail)
    assert isinstance(error, MemoryError)
    assert isinstance(error, type(error.cause)) and "Unable to allocate" in str(error)
    assert error.cause.shape == (10**7, 10**7) and error.cause.dtype == np.dtype("f8")


def test_args_that_can_only_be_read(raised):
    class ReadOnly(Exception):
        def __init__(self, message: str) -> None:
            self.message = message

        @property
        def args(self) -> tuple[str, ...]:
            return (self.message,)

    def fail() -> None:
        raise ReadOnly("boom")

    error = raised(fail)
    assert isinstance(error, ReadOnly)
    assert error.message == "boom" and error.cause.args == ("boom",)


@pytest.mark.ray_differs("in Ray only their text arrives, or it loses what is in slots")
def test_classes_that_are_hard_to_build_again(raised):
    class Arguments(Exception):
        def __init__(self, code: int, where: str) -> None:
            super().__init__(f"{code} in {where}")
            self.code, self.where = code, where

    class Keywords(Exception):
        def __init__(self, *, code: int) -> None:
            super().__init__()
            self.code = code

    class Slots(Exception):
        __slots__ = ("code",)

        def __init__(self, code: int) -> None:
            super().__init__("slots")
            self.code = code

    class Checks(Exception):
        def __init__(self, code: Any) -> None:
            super().__init__("checks")
            self.code = {7: 7}[code]

    class New(Exception):
        code: int

        def __new__(cls, *args: Any, code: int = 0) -> Any:
            made = super().__new__(cls, *args)
            made.code = code
            return made

        def __init__(self, *args: Any, code: int = 0) -> None:
            super().__init__(*args)

    makers = [lambda: Arguments(7, "here"), lambda: Keywords(code=7), lambda: Slots(7),
              lambda: Checks(7), lambda: New("new", code=7)]
    for maker, kind in zip(makers, (Arguments, Keywords, Slots, Checks, New), strict=True):
        def fail(maker: Any = maker) -> None:
            raise maker()

        error = raised(fail)
        assert isinstance(error, kind), kind
        assert error.code == error.cause.code == 7, kind
        assert str(error.cause) == str(maker())


def test_a_group_can_be_split(raised):
    def fail() -> None:
        raise ExceptionGroup("both", [ValueError("one"), KeyError("two")])

    error = raised(fail)
    assert isinstance(error, ExceptionGroup)
    values, others = error.split(ValueError)
    assert [str(one) for one in values.exceptions] == ["one"]
    assert [type(one) for one in others.exceptions] == [KeyError]
    try:
        raise error
    except* KeyError as caught:
        assert len(caught.exceptions) == 1
    except* ValueError:
        pass


def test_a_cause_that_cannot_be_pickled_says_so(ray, raised):
    class Locked(Exception):
        def __init__(self) -> None:
            super().__init__("locked")
            self.lock = threading.Lock()

    def fail() -> None:
        raise Locked

    error = raised(fail)
    assert type(error) is ray.exceptions.RayTaskError
    assert isinstance(error.cause, ray.exceptions.RayError)
    text = f"{error}{error.cause}"
    assert "Locked" in text and "pickle" in text and "lock" in text


@pytest.mark.ray_differs("Ray's text is another")
def test_a_cause_that_cannot_be_read_here_says_so(ray, raised):
    def fail() -> None:
        import sys
        import types

        module = sys.modules["only_there"] = types.ModuleType("only_there")
        exec("class Strange(Exception): pass", vars(module))
        raise module.Strange("text")

    error = raised(fail)
    assert type(error) is ray.exceptions.RayTaskError
    assert "Strange: text" in str(error) and "could not be read here" in str(error)
    assert "only_there" in str(error)


# --- the tree -------------------------------------------------------------------------------------

# Ray's classes and what they are, below RayError.
TREE = {
    "ActorAlreadyExistsError": "ValueError RayError", "ActorDiedError": "RayActorError",
    "ActorHandleNotFoundError": "ValueError RayError", "ActorPlacementGroupRemoved": "RayError",
    "ActorUnavailableError": "RayActorError", "ActorUnschedulableError": "RayError",
    "AsyncioActorExit": "RayError", "AuthenticationError": "RayError",
    "CrossLanguageError": "RayError", "GetTimeoutError": "RayError TimeoutError",
    "LocalRayletDiedError": "RayError", "NodeDiedError": "RayError",
    "ObjectFetchTimedOutError": "ObjectLostError", "ObjectFreedError": "ObjectLostError",
    "ObjectLostError": "RayError", "ObjectReconstructionFailedError": "ObjectLostError",
    "ObjectRefStreamEndOfStreamError": "RayError", "ObjectStoreFullError": "RayError",
    "OufOfBandObjectRefSerializationException": "RayError", "OutOfDiskError": "RayError",
    "OutOfMemoryError": "RayError", "OwnerDiedError": "ObjectLostError",
    "PendingCallsLimitExceeded": "RayError", "PlasmaObjectNotAvailable": "RayError",
    "RayActorError": "RayError", "RayCgraphCapacityExceeded": "RaySystemError",
    "RayChannelError": "RaySystemError", "RayChannelTimeoutError": "RayChannelError TimeoutError",
    "RayDirectTransportError": "RaySystemError", "RayError": "Exception",
    "RaySystemError": "RayError", "RayTaskError": "RayError",
    "ReferenceCountingAssertionError": "ObjectLostError AssertionError", "RpcError": "RayError",
    "RuntimeEnvSetupError": "RayError", "StreamingGeneratorReplayInconsistentError":
    "RaySystemError", "TaskCancelledError": "RayError", "TaskPlacementGroupRemoved": "RayError",
    "TaskUnschedulableError": "RayError", "UnserializableException": "RayError",
    "UserCodeException": "RayError", "WorkerCrashedError": "RayError",
}


def test_the_tree_of_errors():
    exceptions = importlib.import_module(f"{BACKEND}.exceptions")
    for name, bases in TREE.items():
        kind = getattr(exceptions, name)
        for base in bases.split():
            wanted = getattr(exceptions, base, None) or getattr(builtins, base)
            assert issubclass(kind, wanted), (name, base)
    if BACKEND == "ray":
        there = {value.__name__ for value in vars(exceptions).values() if inspect.isclass(value)
                 and issubclass(value, exceptions.RayError)}
        assert there == set(TREE)


def test_lost_objects_have_the_attributes_of_ray():
    exceptions = importlib.import_module(f"{BACKEND}.exceptions")
    for name in ("ObjectLostError", "OwnerDiedError", "ObjectFreedError",
                 "ObjectFetchTimedOutError", "ReferenceCountingAssertionError"):
        error = getattr(exceptions, name)("ab" * 28, None, "")
        assert (error.object_ref_hex, error.owner_address, error.call_site) == ("ab" * 28, None, "")
        assert "ab" * 28 in str(error)
        assert type(pickle.loads(pickle.dumps(error))) is type(error)
