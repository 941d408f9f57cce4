"""The runtime context: where am I, who am I, what do I hold."""

from __future__ import annotations

import importlib
import os
import string

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")


def is_hex(text, nbytes):
    return isinstance(text, str) and len(text) == 2 * nbytes and set(text) <= set(string.hexdigits)


@pytest.fixture
def ask(ray):
    """`ask(name)` is a function that asks the context of its process."""

    def ask(name):
        value = getattr(ray.get_runtime_context(), name)
        return value() if callable(value) else value

    return ask


def test_in_the_driver(ray, ask):
    assert is_hex(ask("get_job_id"), 4)
    assert is_hex(ask("get_worker_id"), 28)
    assert is_hex(ask("get_node_id"), 28)
    assert ask("get_task_id") is None
    assert ask("get_actor_id") is None
    assert isinstance(ask("namespace"), str)


def test_in_a_task(ray, ask):
    f = ray.remote(ask)
    assert ray.get(f.remote("get_job_id")) == ask("get_job_id")
    assert ray.get(f.remote("get_node_id")) == ask("get_node_id")
    assert ray.get(f.remote("namespace")) == ask("namespace")
    assert ray.get(f.remote("get_actor_id")) is None
    assert is_hex(ray.get(f.remote("get_task_id")), 24)
    assert ray.get(f.remote("get_worker_id")) != ask("get_worker_id")


def test_in_an_actor(ray, ask):
    @ray.remote
    class A:
        def ask(self, name):
            return ask(name)

    a = A.remote()
    actor_id = ray.get(a.ask.remote("get_actor_id"))
    assert is_hex(actor_id, 16)
    assert actor_id == a._actor_id.hex()
    assert ray.get(a.ask.remote("get_job_id")) == ask("get_job_id")
    assert is_hex(ray.get(a.ask.remote("get_task_id")), 24)
    assert ray.get(a.ask.remote("was_current_actor_reconstructed")) is False
    assert not ray.get(a.ask.remote("get_actor_name"))


def test_task_ids_differ_and_are_in_the_ref(ray, ask):
    f = ray.remote(ask)
    refs = [f.remote("get_task_id") for _ in range(3)]
    ids = ray.get(refs)
    assert len(set(ids)) == 3
    assert [ref.task_id().hex() for ref in refs] == ids


def test_actor_id_in_the_constructor(ray):
    @ray.remote
    class A:
        def __init__(self):
            self.id = ray.get_runtime_context().get_actor_id()

        def get(self):
            return self.id

    a = A.remote()
    assert ray.get(a.get.remote()) == a._actor_id.hex()


def test_assigned_resources_of_a_task(ray, ask):
    f = ray.remote(ask)
    assert ray.get(f.remote("get_assigned_resources")) == {"CPU": 1.0}
    assert ray.get(f.options(num_cpus=0.5).remote("get_assigned_resources")) == {"CPU": 0.5}
    assert ray.get(f.options(num_cpus=0).remote("get_assigned_resources")) == {}


def test_assigned_resources_of_an_actor(ray, ask):
    @ray.remote
    class A:
        def ask(self, name):
            return ask(name)

    assert ray.get(A.remote().ask.remote("get_assigned_resources")) == {}
    one = A.options(num_cpus=1).remote()
    assert ray.get(one.ask.remote("get_assigned_resources")) == {"CPU": 1.0}


def test_task_names(ray, ask):
    f = ray.remote(ask)
    assert ray.get(f.remote("get_task_name")).endswith("ask")
    assert ray.get(f.options(name="mine").remote("get_task_name")) == "mine"
    assert ray.get(f.remote("get_task_function_name")).endswith("ask")


def test_method_names(ray, ask):
    @ray.remote
    class A:
        def method(self, name):
            return ask(name)

    assert ray.get(A.remote().method.remote("get_task_name")).endswith("A.method")


def test_function_names_do_not_change_with_the_tasks_name(ray, ask):
    f = ray.remote(ask)
    assert ray.get(f.options(name="mine").remote("get_task_function_name")).endswith("ask")
    assert ask("get_task_name") is None
    assert ask("get_task_function_name") is None


def test_is_canceled_where_it_makes_no_sense(ray, ask):
    with pytest.raises(RuntimeError):
        ask("is_canceled")

    @ray.remote
    class A:
        async def ask(self):
            return ask("is_canceled")

    with pytest.raises(RuntimeError):
        ray.get(A.remote().ask.remote())
    assert ray.get(ray.remote(ask).remote("is_canceled")) is False


def test_the_session_has_one_name(ray, ask):
    name = ask("get_session_name")
    assert isinstance(name, str) and name
    assert ray.get(ray.remote(ask).remote("get_session_name")) == name


def test_runtime_env_is_what_runs_here(bare_ray, init_options):
    ray = bare_ray
    ray.init(num_cpus=2, **init_options, runtime_env={"env_vars": {"OF_JOB": "1", "BOTH": "job"}})

    def env_vars():
        return dict(ray.get_runtime_context().runtime_env["env_vars"])

    @ray.remote
    def parent():
        return env_vars(), ray.get(ray.remote(env_vars).remote())

    assert env_vars() == {"OF_JOB": "1", "BOTH": "job"}
    mine = {"OF_JOB": "1", "OF_TASK": "2", "BOTH": "task"}
    options = {"env_vars": {"OF_TASK": "2", "BOTH": "task"}}
    assert ray.get(parent.options(runtime_env=options).remote()) == (mine, mine)
    assert "OF_TASK" in ray.get(ray.remote(
        lambda: ray.get_runtime_context().get_runtime_env_string()).options(
            runtime_env=options).remote())


def test_current_actor_outside_an_actor(ray):
    with pytest.raises(RuntimeError):
        ray.get_runtime_context().current_actor  # noqa: B018
    f = ray.remote(lambda: ray.get_runtime_context().current_actor)
    with pytest.raises(RuntimeError):
        ray.get(f.remote())


def test_get_as_a_dict(ray):
    context = ray.get_runtime_context()
    values = context.get()
    assert values["job_id"].hex() == context.get_job_id()
    assert values["node_id"].hex() == context.get_node_id()


def test_gpu_ids_without_gpus(ray):
    assert ray.get(ray.remote(lambda: ray.get_gpu_ids()).remote()) == []


def test_gpu_ids(cluster):
    ray = cluster(num_cpus=2, num_gpus=2)

    @ray.remote(num_gpus=1)
    def f():
        import os

        return ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    ids, visible = ray.get(f.remote())
    assert len(ids) == 1
    assert visible == str(ids[0])
    assert ray.get(f.options(num_gpus=0.5).remote())[0][0] in (0, 1)
    assert ray.cluster_resources()["GPU"] == 2


def test_job_ids_count_up(bare_ray, init_options):
    ids = []
    for _ in range(2):
        bare_ray.init(num_cpus=1, **init_options)
        ids.append(bare_ray.get_runtime_context().get_job_id())
        bare_ray.shutdown()
    assert all(is_hex(i, 4) for i in ids)


def test_older_spellings_are_ids(ray):
    @ray.remote
    class A:
        def ids(self):
            context = importlib.import_module(BACKEND).get_runtime_context()
            return [
                (context.job_id.hex(), context.get_job_id()),
                (context.node_id.hex(), context.get_node_id()),
                (context.task_id.hex(), context.get_task_id()),
                (context.actor_id.hex(), context.get_actor_id()),
            ]

    assert all(old == new for old, new in ray.get(A.remote().ids.remote()))
    assert ray.get_runtime_context().job_id.hex() == ray.get_runtime_context().get_job_id()
