"""Remote functions: misuse, and what one call sends."""

from __future__ import annotations

import math
import pickle
import threading
from typing import Any

import cloudpickle
import pytest

import hpcray as ray
from hpcray.client import serialization
from hpcray.client.client import Client
from hpcray.definition import MAX_PICKLED_BYTES, CallSignature, parameters_of
from hpcray.protocol import values
from hpcray.protocol.ids import node_id_hex
from hpcray.protocol.messages import (
    DefineFunction,
    DefineTemplate,
    Hold,
    PinForJob,
    PutLocated,
    SubmitTask,
)
from hpcray.remote_function import RemoteFunction
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote
def add(a: int, b: int = 1, *, c: int = 0) -> int:
    """Adds."""
    return a + b + c


@ray.remote
def nothing() -> None:
    pass


@ray.remote
def factorial(n: int, sofar: int = 1) -> Any:
    return sofar if n < 2 else factorial.remote(n - 1, sofar * n)


def unpack_function(node: Any) -> Any:
    return serialization.deserialize(node.expect(DefineFunction)[-1].blob)


# --- misuse without a session ---------------------------------------------------------------------


def test_calling_directly_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"add\.remote\(\.\.\.\)"):
        add(1)


def test_what_cannot_be_remote() -> None:
    async def coroutine() -> None: ...

    def plain() -> Any:
        return 1

    with pytest.raises(ValueError, match="async"):
        ray.remote(coroutine)
    with pytest.raises(ValueError, match="does not yield"):
        ray.remote(num_returns="streaming")(plain)
    with pytest.raises(TypeError, match="function or a class"):
        ray.remote(1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="remote already"):
        ray.remote(add)
    with pytest.raises(TypeError, match="by keyword alone"):
        ray.remote(len, num_cpus=1)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="num_cpus"):
        @ray.remote(nmu_cpus=1)
        def f() -> None: ...
    with pytest.raises(NotImplementedError, match="bind"):
        add.bind(1)


def test_it_looks_like_the_function() -> None:
    assert add.__doc__ == "Adds."
    assert add.__name__ == "add"
    assert add.__wrapped__(1) == 2  # type: ignore[attr-defined]
    assert add.options(num_cpus=2).__name__ == "add"
    assert isinstance(ray.remote(len), RemoteFunction)
    assert isinstance(ray.remote()(nothing.__wrapped__), RemoteFunction)  # type: ignore[attr-defined]


# --- what is sent ---------------------------------------------------------------------------------


def test_a_call_defines_once_and_submits(node: Any, client: Client) -> None:
    ref = nothing.remote()
    nothing.remote()
    calls = node.expect(SubmitTask, 2)
    assert ref.binary() == calls[0].task_id + b"\1\0\0\0"
    assert calls[0].args == b""
    [function] = node.expect(DefineFunction)
    [defined] = node.expect(DefineTemplate)
    assert function.name == f"{__name__}.nothing"
    assert defined.template.function_id == function.function_id
    assert defined.template.template_id == calls[0].template_id == calls[1].template_id
    assert defined.template.name == "nothing"
    kinds = [type(m) for m in node.received]
    assert kinds.index(DefineFunction) < kinds.index(DefineTemplate) < kinds.index(SubmitTask)
    assert unpack_function(node)() is None


def test_options_make_another_template_of_the_same_function(node: Any) -> None:
    add.remote(1)
    add.options(num_cpus=2).remote(1)
    add.options(num_cpus=2).options(max_retries=0).remote(1)
    add.options(num_cpus=1).remote(1)  # what it is anyway
    calls = node.expect(SubmitTask, 4)
    assert len(node.expect(DefineFunction)) == 1
    templates = [m.template for m in node.expect(DefineTemplate)]
    assert [dict(t.resources)["CPU"] for t in templates] == [10_000, 20_000, 20_000]
    assert [t.max_retries for t in templates] == [3, 3, 0]
    assert calls[0].template_id == calls[3].template_id


def test_the_number_of_returns(node: Any) -> None:
    refs: Any = nothing.options(num_returns=3).remote()
    [call] = node.expect(SubmitTask)
    assert [ref.binary() for ref in refs] == [
        call.task_id + index.to_bytes(4, "little") for index in (1, 2, 3)]
    assert nothing.options(num_returns=0).remote() is None


def test_refs_are_dependencies_or_nested(node: Any) -> None:
    a, b = ray.put(1), ray.put(2)
    add.remote(a, b=[b])
    [call] = node.expect(SubmitTask)
    assert (call.dep_count, call.refs) == (1, a.binary() + b.binary())


def test_wrong_arguments_are_refused_at_the_call(node: Any) -> None:
    for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"d": 1}), ((1,), {"a": 1})]:
        with pytest.raises(TypeError, match=r"^add\(a, b=\.\.\., c=\.\.\.\): "):
            add.remote(*args, **kwargs)
    add.remote(1)
    add.remote(1, 2, c=3)
    add.remote(b=1, a=2)
    node.expect(SubmitTask, 3)


def test_what_cannot_be_pickled_is_named(node: Any) -> None:
    lock = threading.Lock()

    @ray.remote
    def closes_over_it() -> None:
        lock.acquire()

    with pytest.raises(TypeError, match=r"closes_over_it cannot be sent.*variable 'lock'.*lock"):
        closes_over_it.remote()
    with pytest.raises(TypeError, match=r"add: argument 0 of type list cannot be pickled.*lock"):
        add.remote([lock])
    with pytest.raises(TypeError, match=r"argument 'b'"):
        add.remote(1, b=lock)
    with pytest.raises(TypeError, match=r"put\(\): the lock cannot be pickled"):
        ray.put(lock)


def test_too_large_a_function_is_refused(node: Any) -> None:
    data = bytes(MAX_PICKLED_BYTES + 1)

    @ray.remote
    def carries() -> int:
        return len(data)

    with pytest.raises(ValueError, match="put"):
        carries.remote()


def test_a_ref_inside_a_function_lives_as_long_as_the_job(node: Any) -> None:
    inside = ray.put(1)

    @ray.remote
    def reads() -> Any:
        return ray.get(inside)

    reads.remote()
    assert [m.ids for m in node.expect(PinForJob)] == [inside.binary()]
    assert unpack_function(node).__name__ == "reads"


def test_a_recursive_function_keeps_its_id_and_signature(node: Any) -> None:
    factorial.remote(3)
    [function] = node.expect(DefineFunction)
    node.expect(SubmitTask)
    # As a worker does it; here the copy meets the same client, which knows its template already.
    copy = unpack_function(node)
    twin = copy.__globals__["factorial"]
    assert isinstance(twin, RemoteFunction) and twin is not factorial
    copy(2)
    calls = node.expect(SubmitTask, 2)
    assert calls[0].template_id == calls[1].template_id
    assert node.expect(DefineFunction) == [function]
    with pytest.raises(TypeError, match="sofar"):
        twin.remote()


def test_it_pickles_by_itself_with_its_options(node: Any) -> None:
    for original in (factorial, factorial.options(num_cpus=2, name="f")):
        copy = cloudpickle.loads(cloudpickle.dumps(original))
        original.remote(1)
        copy.remote(1)
    calls = node.expect(SubmitTask, 4)
    assert calls[0].template_id == calls[1].template_id != calls[2].template_id
    assert calls[2].template_id == calls[3].template_id


def test_two_that_share_a_definition_and_know_each_other(node: Any) -> None:
    namespace: dict[str, Any] = {"ray": ray}
    exec("@ray.remote\ndef a(n=1):\n    return b\nb = a.options(num_cpus=2)\n", namespace)
    copy = cloudpickle.loads(cloudpickle.dumps(namespace["a"]))
    copy.remote()
    copy._definition.target().remote(5)
    node.expect(SubmitTask, 2)


def test_affinity_to_a_node_that_is_not_there(node: Any) -> None:
    def to(rank: int, soft: bool) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(node_id_hex(rank, node.job_key), soft)

    nothing.options(scheduling_strategy=to(1, False)).remote()
    nothing.options(scheduling_strategy=to(7, True)).remote()
    nothing.options(scheduling_strategy=to(7, False)).remote()  # the node fails it
    node.expect(SubmitTask, 3)


def test_a_lost_node_is_an_error_at_the_next_call(node: Any, client: Client) -> None:
    nothing.remote()
    with client.link:
        client.link.set_lost("gone")
    with pytest.raises(ray.exceptions.RaySystemError, match="gone"):
        nothing.remote()


# --- signatures -----------------------------------------------------------------------------------


def positional_only(a: int, b: int = 0, /, *rest: int, key: int, **more: int) -> None: ...
def plain(a: int, b: int, c: int = 0) -> None: ...


@pytest.mark.parametrize(("function", "args", "kwargs", "fits"), [
    (plain, (1, 2), {}, True), (plain, (1,), {}, False), (plain, (1, 2, 3, 4), {}, False),
    (plain, (1,), {"b": 2}, True), (plain, (), {"a": 1, "b": 2}, True),
    (plain, (1, 2), {"a": 1}, False), (plain, (1, 2), {"z": 1}, False),
    (plain, (1,), {"c": 1}, False),
    (positional_only, (1,), {}, False), (positional_only, (1,), {"key": 1}, True),
    (positional_only, (), {"key": 1}, False), (positional_only, (1, 2, 3), {"key": 1}, True),
    (positional_only, (1,), {"key": 1, "a": 5}, True), (math.hypot, (1, 2, 3), {}, True),
])
def test_fits_agrees_with_python(
    function: Any, args: Any, kwargs: dict[str, Any], fits: bool
) -> None:
    signature = CallSignature(parameters_of(function))
    assert signature.fits(args, kwargs) is fits
    if not kwargs:
        assert (signature.least <= len(args) <= signature.most) is fits
    if not fits:
        with pytest.raises(TypeError):
            signature.check("f", args, kwargs)
    try:
        function(*args, **kwargs)
    except TypeError:
        assert not fits
    else:
        assert fits


def test_pickled_by_other_means_a_ref_is_pinned(node: Any) -> None:
    ref = ray.put(1)
    assert pickle.loads(pickle.dumps(ref)) is ref
    assert node.expect(PinForJob)
    assert not [m for m in node.received if isinstance(m, (Hold, PutLocated))]
    assert values.INLINE_MAX_BYTES
