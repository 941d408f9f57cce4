"""Options that Ray has and hpcray does not: refused where they are written, never ignored."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ray_differs("Ray has them")


@pytest.fixture
def task(ray):
    return ray.remote(lambda: 1)


@pytest.fixture
def Actor(ray):
    @ray.remote
    class Actor:
        def m(self):
            return 1

    return Actor


def test_tensor_transport_of_a_method(ray, Actor):
    with pytest.raises(NotImplementedError, match="tensor_transport"):

        class A:
            @ray.method(tensor_transport="nccl")
            def m(self):
                pass

    method = Actor.remote().m
    with pytest.raises(NotImplementedError, match="tensor_transport"):
        method.options(tensor_transport="nixl")
    assert ray.get(method.options(tensor_transport=None).remote(), timeout=20) == 1


def test_tensor_transport_of_tasks_and_actors(ray, task, Actor):
    for thing in (task, Actor):
        with pytest.raises(ValueError, match="tensor_transport"):
            thing.options(tensor_transport="nccl")
        with pytest.raises(ValueError, match="tensor_transport"):
            ray.remote(tensor_transport="nccl")(thing.__wrapped__)


def test_a_limit_for_all_streams_of_an_actor(ray, Actor):
    with pytest.raises(NotImplementedError, match="of the method"):
        Actor.options(_actor_generator_backpressure_num_objects=2)
    actor = Actor.options(_actor_generator_backpressure_num_objects=-1).remote()
    assert ray.get(actor.m.remote(), timeout=20) == 1


def test_tensor_transport_of_put(ray):
    with pytest.raises(NotImplementedError, match="_tensor_transport"):
        ray.put(1, _tensor_transport="nccl")


def test_object_store_memory_of_tasks_and_actors(ray, task, Actor):
    for thing in (task, Actor):
        with pytest.raises(NotImplementedError, match="object_store_memory.*init"):
            thing.options(object_store_memory=100 * 1024 * 1024)
        with pytest.raises(NotImplementedError, match="object_store_memory.*init"):
            ray.remote(object_store_memory=100 * 1024 * 1024)(thing.__wrapped__)
    assert ray.get(task.options(object_store_memory=None).remote(), timeout=20) == 1


def test_object_store_memory_of_a_method(Actor):
    with pytest.raises(ValueError, match="object_store_memory"):
        Actor.remote().m.options(object_store_memory=1)
