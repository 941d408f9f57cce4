"""What a task raises reaches whoever gets its result: type, text, traceback and cause."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from random import Random

import pytest


@pytest.fixture
def fail(ray):
    @ray.remote
    def fail(error):
        raise error

    return fail


def catch(ray, ref):
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(ref, timeout=15)
    return caught.value


def test_is_both_the_original_type_and_a_task_error(ray, fail):
    error = catch(ray, fail.remote(KeyError("key")))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, KeyError)
    assert isinstance(error, LookupError)
    assert type(error).__name__ == "RayTaskError(KeyError)"


def test_cause_is_the_original(ray, fail):
    error = catch(ray, fail.remote(ValueError("v", 1)))
    assert type(error.cause) is ValueError
    assert error.cause.args == ("v", 1)


def test_text_has_the_remote_traceback(ray):
    @ray.remote
    def a_function_with_a_name():
        def deeper():
            raise ValueError("the message")

        deeper()

    text = str(catch(ray, a_function_with_a_name.remote()))
    assert "a_function_with_a_name" in text
    assert "in deeper" in text
    assert "ValueError: the message" in text
    assert "test_errors.py" in text
    assert "pid=" in text


def test_text_has_no_frames_of_the_runtime(ray, fail):
    text = str(catch(ray, fail.remote(ValueError("clean"))))
    assert text.count('File "') == 1


def test_text_of_an_actor_names_class_and_method(ray):
    @ray.remote
    class Machine:
        def fail(self):
            raise ValueError("broken")

    text = str(catch(ray, Machine.remote().fail.remote()))
    assert "Machine.fail" in text
    assert "actor_id=" in text


def test_attributes_of_the_original_are_there(ray):
    class Coded(Exception):
        def __init__(self, message):
            super().__init__(message)
            self.code = len(message)

    @ray.remote
    def f():
        raise Coded("four")

    error = catch(ray, f.remote())
    assert isinstance(error, Coded)
    assert error.code == 4
    assert error.cause.code == 4


def test_its_own_attributes_win_whatever_they_are_called(ray):
    class Lost(Exception):
        ip = "of the class"

        def __init__(self, rank):
            super().__init__(rank)
            self.rank, self.pid, self.function_name, self.traceback_str = rank, -1, "mine", "text"

    @ray.remote
    def f():
        raise Lost(7)

    error = catch(ray, f.remote())
    assert (error.rank, error.pid, error.function_name, error.traceback_str, error.ip) == (
        7, -1, "mine", "text", "of the class")
    assert "Lost: 7" in str(error)
    again = ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
    assert isinstance(again, Lost)
    assert again.rank == 7
    assert str(again) == str(error)


def test_exception_groups(ray):
    @ray.remote
    def f():
        raise ExceptionGroup("several", [ValueError("v"), KeyError("k")])

    error = catch(ray, f.remote())
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert [type(one) for one in error.exceptions] == [ValueError, KeyError]
    matching, rest = error.split(KeyError)
    assert [type(one) for one in matching.exceptions] == [KeyError]
    assert [type(one) for one in rest.exceptions] == [ValueError]
    found = []
    try:
        ray.get(f.remote())
    except* ValueError as group:
        found.extend(group.exceptions)
    except* KeyError:
        pass
    assert [str(one) for one in found] == ["v"]


def test_oserror_keeps_its_errno(ray):
    f = ray.remote(lambda: open("/no/such/file"))
    error = catch(ray, f.remote())
    assert isinstance(error, FileNotFoundError)
    assert error.cause.errno == 2


def test_chained_errors_are_in_the_text(ray):
    @ray.remote
    def f():
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as e:
            raise RuntimeError("outer") from e

    error = catch(ray, f.remote())
    assert isinstance(error, RuntimeError)
    assert "ZeroDivisionError" in str(error)
    assert "direct cause" in str(error)


def test_get_again_raises_again(ray, fail):
    ref = fail.remote(KeyError("x"))
    for _ in range(3):
        assert isinstance(catch(ray, ref), KeyError)


def test_every_return_raises(ray, fail):
    for ref in fail.options(num_returns=3).remote(KeyError("x")):
        assert isinstance(catch(ray, ref), KeyError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StopIteration(1),
        lambda: AssertionError(),
        lambda: UnicodeDecodeError("utf8", b"a", 0, 1, "why"),
        lambda: TimeoutError("t"),
        lambda: GeneratorExit(),
    ],
    ids=["StopIteration", "AssertionError", "UnicodeDecodeError", "TimeoutError", "GeneratorExit"],
)
def test_builtin_errors(ray, fail, make):
    error = catch(ray, fail.remote(make()))
    assert isinstance(error.cause, type(make()))


def test_plain_exception(ray, fail):
    error = catch(ray, fail.remote(Exception("plain")))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert "plain" in str(error)


def test_base_exception_does_not_end_the_worker(ray, fail):
    class Mine(BaseException):
        pass

    @ray.remote
    def f():
        raise Mine("mine")

    assert "mine" in str(catch(ray, f.remote()))
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


def test_several_arguments_in_the_constructor(ray):
    class Pair(Exception):
        def __init__(self, a, b):
            super().__init__(a, b)
            self.a, self.b = a, b

    @ray.remote
    def f():
        raise Pair(1, 2)

    error = catch(ray, f.remote())
    assert isinstance(error, Pair)
    assert (error.a, error.b) == (1, 2)


def test_constructor_that_pickle_cannot_call(ray):
    # Exception.__reduce__ calls Odd(message), which lacks an argument: the text must survive.
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    @ray.remote
    def f():
        raise Odd("left", "right")

    text = str(catch(ray, f.remote()))
    assert "left and right" in text
    assert "Odd" in text
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


@pytest.mark.ray_differs("in Ray only its text arrives, and as no RayTaskError")
def test_constructor_that_pickle_cannot_call_keeps_its_type(ray):
    class Odd(Exception):
        def __init__(self, a, *, b):
            super().__init__(f"{a} and {b}")
            self.a, self.b = a, b

    class Made(Exception):
        def __new__(cls, a, b):
            made = super().__new__(cls, a, b)
            made.sum = a + b
            return made

    @ray.remote
    def f(odd):
        if odd:
            raise Odd("left", b="right")
        raise Made(1, 2)

    error = catch(ray, f.remote(True))
    assert isinstance(error, Odd)
    assert (error.a, error.b, error.args) == ("left", "right", ("left and right",))
    again = ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
    assert isinstance(again, Odd)
    value = ray.get(ray.put([Odd("l", b="r")]))[0]
    assert (type(value), value.b, str(value)) == (Odd, "r", "l and r")
    made = catch(ray, f.remote(False))
    assert isinstance(made, Made)
    assert made.sum == 3


@pytest.mark.ray_differs("Ray raises a RayError that was a value")
def test_what_was_put_or_returned_is_a_value(ray, fail):
    raised = catch(ray, fail.remote(KeyError("k")))
    for error in (ValueError("v"), ray.exceptions.RayActorError(), raised):
        for ref in (ray.put(error), ray.remote(lambda x: x).remote(error)):
            assert type(ray.get(ref)) is type(error)


def test_payload_that_cannot_be_pickled(ray):
    class Holds(Exception):
        def __init__(self):
            super().__init__("holds a lock")
            self.lock = threading.Lock()

    @ray.remote
    def f():
        raise Holds()

    error = catch(ray, f.remote())
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert "holds a lock" in str(error)
    assert isinstance(error.cause, ray.exceptions.RayError)
    assert "holds a lock" in str(error.cause)


def test_class_that_cannot_be_subclassed(ray):
    class Final(Exception):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("final")

    @ray.remote
    def f():
        raise Final("final message")

    error = catch(ray, f.remote())
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error.cause, Final)
    assert "final message" in str(error)


def test_dependent_task_does_not_run_and_raises_the_original(ray, fail, counter):
    add = counter.add

    @ray.remote
    def use(x):
        add()
        return x

    error = catch(ray, use.remote(use.remote(fail.remote(KeyError("first")))))
    assert isinstance(error, KeyError)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert counter.value == 0
    assert "fail" in str(error)


def test_dependent_actor_call(ray, fail):
    @ray.remote
    class A:
        def use(self, x):
            return x

        def ok(self):
            return 1

    a = A.remote()
    assert isinstance(catch(ray, a.use.remote(fail.remote(KeyError("first")))), KeyError)
    assert ray.get(a.ok.remote()) == 1


def test_nested_get_raises_the_original(ray, fail):
    outer = ray.remote(lambda: ray.get(fail.remote(KeyError("inner"))))
    error = catch(ray, outer.remote())
    assert isinstance(error, KeyError)
    assert "fail" in str(error)


def test_a_task_can_catch_the_original(ray, fail):
    @ray.remote
    def careful():
        try:
            ray.get(fail.remote(KeyError("x")))
        except KeyError as e:
            return isinstance(e, ray.exceptions.RayTaskError)

    assert ray.get(careful.remote()) is True


def test_error_as_a_value(ray):
    same = ray.remote(lambda x: x)
    assert isinstance(ray.get(same.remote(KeyError("v"))), KeyError)
    assert not isinstance(ray.get(same.remote(KeyError("v"))), ray.exceptions.RayError)
    assert ray.get(ray.remote(lambda: KeyError("r")).remote()).args == ("r",)


@pytest.mark.ray_differs("Ray's class of two types has no importable name")
def test_error_survives_pickle(ray, fail):
    error = catch(ray, fail.remote(KeyError("x")))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ray.exceptions.RayTaskError)
    assert "KeyError" in str(again)


def test_caught_error_can_be_sent_to_a_task(ray, fail):
    error = catch(ray, fail.remote(KeyError("x")))
    name = ray.remote(lambda e: type(e[0]).__name__)
    assert ray.get(name.remote([error])).startswith("RayTaskError")


def test_return_value_that_cannot_be_pickled(ray):
    error = catch(ray, ray.remote(lambda: threading.Lock()).remote())
    assert isinstance(error, TypeError)
    assert "pickle" in str(error)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


def test_argument_that_cannot_be_pickled_fails_at_the_call(ray):
    def takes_it(x):
        return x

    f = ray.remote(takes_it)
    for call in (lambda: f.remote(threading.Lock()), lambda: f.remote(x=threading.Lock())):
        with pytest.raises(TypeError) as caught:
            call()
        assert "lock" in str(caught.value)
        assert "takes_it" in str(caught.value)


@pytest.mark.hpcray_only("the error says what could not be pickled")
def test_a_result_that_cannot_be_pickled_is_named(ray):
    @ray.remote
    def makes_it():
        return threading.Lock()

    with pytest.raises(TypeError, match="(?s)lock.*return value of .*makes_it"):
        ray.get(makes_it.remote())


def test_actor_argument_that_cannot_be_pickled_fails_at_the_call(ray):
    @ray.remote
    class A:
        def __init__(self, x=None):
            pass

        def takes_it(self, x):
            return x

    with pytest.raises(TypeError, match="lock"):
        A.remote(threading.Lock())
    with pytest.raises(TypeError, match="(?s)lock.*takes_it|takes_it.*lock"):
        A.remote().takes_it.remote(threading.Lock())


def test_closure_that_cannot_be_pickled_fails_at_the_call(ray):
    lock = threading.Lock()
    f = ray.remote(lambda: lock)
    with pytest.raises(TypeError, match="lock"):
        f.remote()


def test_argument_that_cannot_be_unpickled(ray):
    class Refuses:
        def __reduce__(self):
            return (int, ("not a number",))

    f = ray.remote(lambda x: x)
    error = catch(ray, f.remote(Refuses()))
    assert "not a number" in str(error)
    assert ray.get(f.remote(1)) == 1


def test_module_missing_on_the_worker_is_named(ray):
    @ray.remote
    def f():
        import no_such_module  # noqa: F401

    error = catch(ray, f.remote())
    assert isinstance(error, ModuleNotFoundError)
    assert "no_such_module" in str(error)


def test_recursion_error(ray):
    @ray.remote
    def f():
        def down():
            return down()

        return down()

    assert isinstance(catch(ray, f.remote()), RecursionError)


@pytest.mark.ray_differs("Ray takes any SystemExit of a task for the death of its worker")
@pytest.mark.parametrize("code", [None, 0, 3])
@pytest.mark.parametrize("retries", [0, 1])
def test_system_exit_in_a_task(ray, counter, code, retries):
    """It ends the worker, and the task is retried as after any crash."""
    add = counter.add

    def leave():
        add()
        sys.exit(code)

    error = catch(ray, ray.remote(max_retries=retries)(leave).remote())
    assert isinstance(error, ray.exceptions.WorkerCrashedError)
    assert counter.value == 1 + retries
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


def test_system_exit_in_an_actor_ends_it(ray):
    @ray.remote
    class A:
        def leave(self):
            sys.exit(0)

        def m(self):
            return 1

    a = A.remote()
    assert isinstance(catch(ray, a.leave.remote()), ray.exceptions.RayActorError)
    assert isinstance(catch(ray, a.m.remote()), ray.exceptions.RayActorError)


def test_errors_are_not_retried_by_default(ray, counter):
    add = counter.add

    @ray.remote(max_retries=3)
    def f():
        add()
        raise KeyError("x")

    catch(ray, f.remote())
    assert counter.value == 1


def test_retry_exceptions(ray, counter):
    add = counter.add

    @ray.remote(max_retries=3, retry_exceptions=True)
    def f():
        if add() < 3:
            raise KeyError("x")
        return "third time"

    assert ray.get(f.remote()) == "third time"
    assert counter.value == 3


def test_retry_exceptions_gives_up(ray, counter):
    add = counter.add

    @ray.remote(max_retries=2, retry_exceptions=True)
    def f():
        add()
        raise KeyError("x")

    assert isinstance(catch(ray, f.remote()), KeyError)
    assert counter.value == 3


def test_retry_exceptions_of_some_types(ray, counter):
    add = counter.add

    @ray.remote(max_retries=2, retry_exceptions=[KeyError])
    def f(kind):
        add()
        raise kind("x")

    assert isinstance(catch(ray, f.remote(ValueError)), ValueError)
    assert counter.value == 1
    assert isinstance(catch(ray, f.remote(KeyError)), KeyError)
    assert counter.value == 4


def test_actor_goes_on_after_an_error(ray):
    @ray.remote
    class A:
        def __init__(self):
            self.n = 0

        def fail(self):
            self.n += 1
            raise KeyError(self.n)

        def get(self):
            return self.n

    a = A.remote()
    for _ in range(2):
        assert isinstance(catch(ray, a.fail.remote()), KeyError)
    assert ray.get(a.get.remote()) == 2


def test_constructor_error_is_an_actor_error_with_the_traceback(ray):
    @ray.remote
    class Broken:
        def __init__(self):
            raise ValueError("no start")

        def m(self):
            return 1

    broken = Broken.remote()
    for _ in range(2):
        error = catch(ray, broken.m.remote())
        assert isinstance(error, ray.exceptions.RayActorError)
        assert isinstance(error, ray.exceptions.ActorDiedError)
        assert "ValueError: no start" in str(error)
        assert "__init__" in str(error)
        assert error.actor_init_failed


def test_a_death_later_is_no_failed_init(ray):
    class constructor:
        def m(self):
            os._exit(1)

    actor = ray.remote(constructor).remote()
    assert not catch(ray, actor.m.remote()).actor_init_failed


def test_constructor_with_a_failed_argument(ray, fail):
    @ray.remote
    class A:
        def __init__(self, x):
            pass

        def m(self):
            return 1

    error = catch(ray, A.remote(fail.remote(KeyError("argument"))).m.remote())
    assert isinstance(error, (ray.exceptions.RayActorError, KeyError))


def test_error_tree(ray):
    errors = ray.exceptions
    assert issubclass(errors.ActorDiedError, errors.RayActorError)
    assert issubclass(errors.ActorUnavailableError, errors.RayActorError)
    assert issubclass(errors.GetTimeoutError, TimeoutError)
    assert issubclass(errors.ActorAlreadyExistsError, ValueError)
    assert issubclass(errors.ActorHandleNotFoundError, ValueError)
    assert issubclass(errors.ReferenceCountingAssertionError, AssertionError)
    assert issubclass(errors.ObjectFetchTimedOutError, errors.ObjectLostError)
    assert issubclass(errors.OwnerDiedError, errors.ObjectLostError)
    for name in (
        "RayTaskError", "RayActorError", "WorkerCrashedError", "TaskCancelledError",
        "GetTimeoutError", "ObjectLostError", "ObjectStoreFullError", "OutOfMemoryError",
        "NodeDiedError", "RaySystemError", "RuntimeEnvSetupError", "PendingCallsLimitExceeded",
        "TaskUnschedulableError", "ActorUnschedulableError", "OutOfDiskError",
        "ObjectReconstructionFailedError", "UnserializableException", "ActorAlreadyExistsError",
        "ActorHandleNotFoundError", "ActorPlacementGroupRemoved", "AsyncioActorExit",
        "AuthenticationError", "CrossLanguageError", "LocalRayletDiedError", "ObjectFreedError",
        "ObjectRefStreamEndOfStreamError", "OufOfBandObjectRefSerializationException",
        "PlasmaObjectNotAvailable", "RayCgraphCapacityExceeded", "RayChannelError",
        "RayChannelTimeoutError", "RayDirectTransportError", "ReferenceCountingAssertionError",
        "RpcError", "StreamingGeneratorReplayInconsistentError", "TaskPlacementGroupRemoved",
        "UserCodeException",
    ):
        assert issubclass(getattr(errors, name), errors.RayError), name


def test_texts_are_attributes(ray):
    errors = ray.exceptions
    for name, attribute in (
        ("ActorAlreadyExistsError", "error_message"), ("ActorUnschedulableError", "error_message"),
        ("ActorHandleNotFoundError", "error_message"), ("TaskUnschedulableError", "error_message"),
        ("RuntimeEnvSetupError", "error_message"), ("NodeDiedError", "message"),
        ("OutOfMemoryError", "message"),
    ):
        error = pickle.loads(pickle.dumps(getattr(errors, name)("why")))
        assert "why" in getattr(error, attribute), name


@pytest.mark.ray_differs("what Ray raises of both types has no actor_repr")
def test_an_actor_with_a_repr_says_so_in_its_errors(ray):
    @ray.remote
    class A:
        def __repr__(self):
            return "the seventh of nine"

        def m(self):
            raise ValueError("in m")

    error = catch(ray, A.remote().m.remote())
    assert error.actor_repr == "the seventh of nine"
    assert error.proctitle.endswith("A.m()")
    assert error.make_dual_exception_instance() is error
    assert "the seventh of nine" in str(error)


def test_retry_looks_behind_a_user_code_exception(ray, counter):
    add = counter.add

    @ray.remote(max_retries=3, retry_exceptions=[KeyError])
    def f():
        if add() < 3:
            raise ray.exceptions.UserCodeException("of a library") from KeyError("of its user")
        return "done"

    assert ray.get(f.remote()) == "done"
    assert counter.value == 3


# --- cancel ---------------------------------------------------------------------------------------


def test_cancel_of_a_waiting_task(ray, make_gate, counter):
    holding, add = make_gate(), counter.add
    enter = holding.enter
    held = [ray.remote(enter).remote() for _ in range(2)]  # both CPUs
    holding.wait_for_arrivals(2)
    waiting = ray.remote(add).remote()
    ray.cancel(waiting)
    assert isinstance(catch(ray, waiting), ray.exceptions.TaskCancelledError)
    holding.open()
    ray.get(held)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    assert counter.value == 0


def test_cancel_of_a_task_whose_argument_is_late(ray, gate):
    enter = gate.enter
    waiting = ray.remote(lambda x: x).remote(ray.remote(enter).remote())
    gate.wait_for_arrivals()
    ray.cancel(waiting)
    assert isinstance(catch(ray, waiting), ray.exceptions.TaskCancelledError)
    gate.open()


def test_cancel_of_a_running_task_raises_keyboard_interrupt_in_it(ray, gate, counter):
    enter, add = gate.enter, counter.add

    @ray.remote
    def f():
        import time

        try:
            enter()
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            add()
            raise

    ref = f.remote()
    gate.wait_for_arrivals()
    gate.open()
    ray.cancel(ref)
    assert isinstance(catch(ray, ref), ray.exceptions.TaskCancelledError)
    assert counter.value == 1


def test_cancel_by_force_ends_the_worker(ray, gate, eventually, tmp_path):
    enter = gate.enter
    pid_file = str(tmp_path / "pid")

    @ray.remote
    def f():
        import os

        with open(pid_file, "w") as out:
            out.write(str(os.getpid()))
        enter()

    ref = f.remote()
    gate.wait_for_arrivals()
    ray.cancel(ref, force=True)
    assert isinstance(
        catch(ray, ref), (ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)
    )
    pid = (tmp_path / "pid").read_text()
    eventually(lambda: not (tmp_path.__class__("/proc") / pid).exists())


def test_cancel_of_a_finished_task_changes_nothing(ray):
    ref = ray.remote(lambda: 1).remote()
    assert ray.get(ref) == 1
    ray.cancel(ref)
    assert ray.get(ref) == 1


def test_cancel_of_a_put_changes_nothing(ray):
    ref = ray.put(1)
    ray.cancel(ref)
    assert ray.get(ref) == 1


def test_cancel_twice(ray, gate):
    enter = gate.enter
    waiting = ray.remote(lambda x: x).remote(ray.remote(enter).remote())
    gate.wait_for_arrivals()
    ray.cancel(waiting)
    ray.cancel(waiting)
    assert isinstance(catch(ray, waiting), ray.exceptions.TaskCancelledError)
    gate.open()


@pytest.mark.parametrize("nbytes", [10, 3_000, 50_000, 300_000])
def test_a_cancel_at_any_moment_cuts_nothing(ray, nbytes):
    """Before, while and after they run, between two messages and within one."""

    @ray.remote(max_retries=0)
    def make(i):
        return [i, bytes(nbytes), ray.put(i)]

    random = Random(nbytes)
    outcomes = {"cancelled": 0, "done": 0}
    for begin in range(0, 240, 24):
        refs = [make.remote(i) for i in range(begin, begin + 24)]
        cancelled = random.sample(refs, 12)
        for ref in cancelled:
            time.sleep(random.random() * 0.001)
            ray.cancel(ref)
        for i, ref in enumerate(refs, begin):
            try:
                value = ray.get(ref, timeout=20)
            except ray.exceptions.TaskCancelledError:
                outcomes["cancelled"] += 1
                assert ref in cancelled
            else:
                outcomes["done"] += 1
                assert value[:2] == [i, bytes(nbytes)]
                assert ray.get(value[2], timeout=20) == i
    assert outcomes["done"] >= 120 and outcomes["cancelled"] > 0
    assert ray.get(ray.remote(lambda: "as before").remote(), timeout=20) == "as before"


def test_cancel_reaches_children(ray, gate, counter):
    enter, add = gate.enter, counter.add
    child = ray.remote(lambda _, add=add: add())

    @ray.remote
    def parent(box):
        return ray.get(child.remote(box[0]))

    late = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    ref = parent.remote([late])
    assert ray.wait([ref], timeout=0.2) == ([], [ref])
    ray.cancel(ref, recursive=True)
    assert isinstance(catch(ray, ref), ray.exceptions.TaskCancelledError)
    gate.open()
    ray.get(late)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    assert counter.value == 0


@pytest.mark.ray_differs("Ray's actor may wait 30 s for the cancelled call's number")
def test_cancel_of_a_waiting_actor_call(ray, gate, counter):
    enter, add = gate.enter, counter.add

    @ray.remote
    class A:
        def hold(self):
            enter()

        def m(self):
            add()

        def ok(self):
            return 1

    a = A.remote()
    held = a.hold.remote()
    gate.wait_for_arrivals()
    waiting = a.m.remote()
    ray.cancel(waiting)
    gate.open()
    assert isinstance(catch(ray, waiting), ray.exceptions.TaskCancelledError)
    ray.get(held)
    assert ray.get(a.ok.remote()) == 1
    assert counter.value == 0


@pytest.mark.parametrize("options", [{"max_concurrency": 1}, {"max_concurrency": 2}],
                         ids=["sequential", "threaded"])
def test_a_method_is_told_that_it_is_cancelled(ray, options):
    @ray.remote(**options)
    class A:
        def until_cancelled(self):
            deadline_s = time.monotonic() + 20
            here = ray.get_runtime_context()
            while not here.is_canceled():
                assert time.monotonic() < deadline_s
                time.sleep(0.005)
            raise ValueError("ended early")

        def is_canceled(self):
            return ray.get_runtime_context().is_canceled()

    a = A.remote()
    running = a.until_cancelled.remote()
    assert ray.wait([running], timeout=0.2)[0] == []
    ray.cancel(running)
    assert isinstance(catch(ray, running), (ValueError, ray.exceptions.TaskCancelledError))
    assert ray.get(a.is_canceled.remote()) is False


def test_a_method_that_ends_early_was_cancelled(ray, counter):
    add = counter.add

    @ray.remote
    class A:
        def until_cancelled(self):
            add()
            while not ray.get_runtime_context().is_canceled():
                time.sleep(0.005)
            return "early"

    running = A.remote().until_cancelled.remote()
    while not counter.value:
        time.sleep(0.005)
    ray.cancel(running)
    assert isinstance(catch(ray, running), ray.exceptions.TaskCancelledError)


def test_cancel_of_an_actor_call_by_force(ray, signal):
    waiting = signal.wait.remote()
    with pytest.raises(ValueError, match="force=True"):
        ray.cancel(waiting, force=True)
    ray.get(signal.send.remote())
    assert ray.get(waiting) is None


def test_cancel_of_an_async_actor_call(ray, signal):
    waiting = signal.wait.remote()
    assert ray.wait([waiting], timeout=0.2)[0] == []
    ray.cancel(waiting)
    assert isinstance(catch(ray, waiting), ray.exceptions.TaskCancelledError)
    ray.get(signal.send.remote())


def test_task_that_uses_a_cancelled_one(ray, gate):
    enter = gate.enter
    waiting = ray.remote(lambda x: x).remote(ray.remote(enter).remote())
    gate.wait_for_arrivals()
    user = ray.remote(lambda x: x).remote(waiting)
    ray.cancel(waiting)
    assert isinstance(catch(ray, user), ray.exceptions.TaskCancelledError)
    gate.open()
