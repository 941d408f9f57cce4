"""Actor classes and handles: misuse, and what creation and calls send."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest

import hpcray as ray
from hpcray.actor import ActorExitRequest, ActorMethod, exit_actor
from hpcray.client import context, serialization
from hpcray.client.client import Client
from hpcray.protocol import ids
from hpcray.protocol.messages import (
    CreateActor,
    DefineFunction,
    DefineTemplate,
    Drop,
    Request,
    SubmitCall,
)
from hpcray.protocol.values import Failure


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Base:
    def inherited(self) -> int:
        return 1


@ray.remote(max_task_retries=2)
class Counter(Base):
    """Counts."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count

    @ray.method(num_returns=2, max_task_retries=0)
    def pair(self) -> tuple[int, int]:
        return 1, 2

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> int:
        return x

    @counted
    def wrapped(self, x: int) -> int:
        return x

    def values(self) -> Any:
        yield 1

    def __len__(self) -> int:
        return self.count


@ray.remote
class Async:
    async def wait(self) -> None: ...


@ray.remote
class Plain:
    pass


def test_misuse_of_the_class() -> None:
    with pytest.raises(TypeError, match=r"Counter\.remote\(\.\.\.\)"):
        Counter(1)
    with pytest.raises(TypeError, match="inherit"):
        class Sub(Counter): ...  # type: ignore[misc, valid-type]
    with pytest.raises(ValueError, match="max_restarts"):
        ray.remote(max_retries=1)(Base)
    with pytest.raises(ValueError, match="get_if_exists needs a name"):
        Counter.options(get_if_exists=True)
    with pytest.raises(ValueError, match="in order"):
        ray.remote(allow_out_of_order_execution=False)(Async.__wrapped__)
    with pytest.raises(TypeError, match="or with options"):
        ray.method(Counter.__wrapped__.add, num_returns=2)
    with pytest.raises(TypeError, match="onto a method"):
        ray.method(3)
    with pytest.raises(ValueError, match="num_cpus"):
        ray.method(num_cpus=1)
    with pytest.raises(TypeError, match="built directly"):
        ray.ActorHandle()
    assert Counter.__doc__ == "Counts."
    assert Counter.__name__ == "Counter"


def test_creation(node: Any) -> None:
    handle = Counter.remote(5)
    [create] = node.expect(CreateActor)
    template = node.expect(DefineTemplate)[0].template
    assert template.template_id == create.template_id
    assert (template.name, template.resources, template.held_resources) == (
        "Counter.__init__", (("CPU", 10_000),), ())
    assert serialization.deserialize(create.args) == ((5,), {})
    assert handle._actor_id.binary() == create.actor_id
    assert repr(handle) == f"Actor(Counter, {create.actor_id.hex()})"
    for args in [(1, 2), ("a", "b", "c")]:
        with pytest.raises(TypeError, match=r"Counter\(start=\.\.\.\): too many"):
            Counter.remote(*args)
    with pytest.raises(TypeError, match="too many"):
        Plain.remote(1)


def test_calls(node: Any) -> None:
    handle = Counter.remote()
    ref = handle.add.remote(1)
    handle.add.remote(amount=2)
    calls = node.expect(SubmitCall, 2)
    assert ref.binary() == calls[0].task_id + b"\1\0\0\0"
    assert {call.actor_id for call in calls} == {handle._actor_id.binary()}
    assert calls[0].template_id == calls[1].template_id
    template = node.expect(DefineTemplate, 2)[1].template
    assert (template.name, template.method, template.max_retries) == ("Counter.add", "add", 2)
    first, second = handle.pair.remote()
    assert first is not second
    template = node.expect(DefineTemplate, 3)[2].template
    assert (template.return_count, template.max_retries) == (2, 0)
    assert handle.pair.options(num_returns=0).remote() is None
    assert len(node.expect(DefineFunction)) == 1


def test_methods_there_are_and_are_not(node: Any) -> None:
    handle = Counter.remote()
    handle.inherited.remote()
    handle.static.remote(1)
    handle.of_class.remote(1)
    handle.wrapped.remote(1)
    handle.__len__.remote()
    handle.__ray_ready__.remote()
    handle.__ray_terminate__.remote()
    handle.__ray_call__.remote(lambda self, x: x, 1)
    node.expect(SubmitCall, 8)
    with pytest.raises(AttributeError, match="'Counter' has no method 'sub'"):
        handle.sub  # noqa: B018
    assert not hasattr(handle, "count")
    for name, args in [("add", ()), ("static", ()), ("of_class", (1, 2)), ("wrapped", ())]:
        with pytest.raises(TypeError, match=rf"Counter\.{name}\("):
            getattr(handle, name).remote(*args)
    with pytest.raises(TypeError, match=r"handle\.add\.remote"):
        handle.add(1)
    with pytest.raises(ValueError, match="num_cpus"):
        handle.add.options(num_cpus=1)
    assert dir(handle) == sorted(
        ["__len__", "add", "inherited", "of_class", "pair", "static", "values", "wrapped"])


def test_async_classes_are_found(node: Any) -> None:
    Async.remote()
    template = node.expect(DefineTemplate)[0].template
    assert (template.is_async, template.max_concurrency) == (True, 1000)


def test_handles_are_equal_by_actor_and_travel_as_refs(node: Any, client: Client) -> None:
    handle = Counter.remote()
    actor = handle._actor_id.binary()
    serialized = serialization.serialize([handle, handle.add])
    assert serialized.contained == [ids.creation_object_id(actor)]
    other, method = serialization.deserialize(b"\0" + serialized.pickled)
    assert other == handle and hash(other) == hash(handle) and other is not handle
    assert isinstance(method, ActorMethod)
    assert copy.copy(handle) is handle and copy.deepcopy(handle) is handle
    other.add.remote(1)
    method.remote(1)
    assert len({call.template_id for call in node.expect(SubmitCall, 2)}) == 1


def test_the_last_handle_ends_the_actor(node: Any, client: Client) -> None:
    handle = Counter.remote()
    creation = ids.creation_object_id(handle._actor_id.binary())
    other = serialization.deserialize(b"\0" + serialization.serialize(handle).pickled)
    handle.add.remote(1)
    gone = weakref.ref(handle)
    gc.disable()  # no cycle: the count alone must be enough
    try:
        del handle
        assert gone() is None
        client.flush(drain=True)
        assert not any(creation in m.ids for m in node.received if isinstance(m, Drop))
        del other
        client.flush(drain=True)
        assert any(creation in ids.split_ids(m.ids) for m in node.expect(Drop, 2))
    finally:
        gc.enable()


def test_names(node: Any) -> None:
    asked: list[Any] = []
    taken: dict[str, Any] = {}

    def reserve(arguments: dict[str, Any]) -> Any:
        asked.append(arguments)
        key = arguments["name"]
        if key in taken:
            return taken[key] if arguments["get_if_exists"] else Failure("ValueError", "taken")
        taken[key] = {"actor_id": arguments["actor_id"], "handle": arguments["handle"]}
        return None

    node.answers["reserve_name"] = reserve
    node.answers["get_actor"] = lambda a: taken.get(a["name"]) or Failure("ValueError", "none")
    first = Counter.options(name="c", lifetime="detached").remote()
    assert asked[0]["namespace"] == "here"
    with pytest.raises(ValueError, match="taken"):
        Counter.options(name="c").remote()
    same = Counter.options(name="c", get_if_exists=True, namespace="there").remote()
    assert same == first == ray.get_actor("c")
    assert asked[2]["namespace"] == "there"
    same.add.remote(1)
    create = node.expect(CreateActor)
    assert [(c.name, c.namespace, c.detached) for c in create] == [("c", "here", True)]
    with pytest.raises(ValueError, match="none"):
        ray.get_actor("d")
    with pytest.raises(ValueError, match="non-empty"):
        ray.get_actor("")
    with pytest.raises(TypeError):
        ray.get_actor(1)  # type: ignore[arg-type]
    # Nothing that fails here may leave the name behind.
    with pytest.raises(TypeError):
        Counter.options(name="e").remote(1, 2, 3)
    assert "e" not in taken


def test_kill_and_cancel(node: Any) -> None:
    handle = Counter.remote()
    ref = handle.add.remote(1)
    node.answers["kill_actor"] = lambda _: None
    node.answers["cancel"] = lambda _: None
    ray.kill(handle, no_restart=False)
    ray.cancel(ref, recursive=False)
    kill, cancel = node.expect(Request, 2)
    assert kill.arguments == {"actor_id": handle._actor_id.binary(), "no_restart": False}
    assert cancel.arguments == {"object_id": ref.binary(), "force": False, "recursive": False}
    with pytest.raises(ValueError, match="cancel"):
        ray.kill(ref)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kill"):
        ray.cancel(handle)  # type: ignore[arg-type]


def test_exit_actor_inside_and_outside() -> None:
    with pytest.raises(TypeError, match="not an actor"):
        exit_actor()
    context.set_context(context.TaskContext(actor_id=b"a" * 16))
    try:
        with pytest.raises(ActorExitRequest):
            ray.actor.exit_actor()
    finally:
        context.set_context(None)
    assert not issubclass(ActorExitRequest, Exception)
