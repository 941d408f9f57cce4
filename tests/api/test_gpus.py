"""GPUs: which ones a task or actor sees, and in which process."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def gpus(bare_ray, init_options, monkeypatch):
    """`gpus(visible, num_gpus=2)`: the backend, where that variable is set."""

    def start(visible, **options):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        bare_ray.init(**{"num_cpus": 4, "num_gpus": 2, **options}, **init_options)
        return bare_ray

    return start


def looker(ray):
    def see():
        import os

        return (ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"),
                ray.get_runtime_context().get_accelerator_ids()["GPU"])

    return see


@pytest.mark.parametrize(("visible", "names"), [
    (None, [0, 1]), ("0,1", ["0", "1"]), ("4,5", ["4", "5"]),
    ("GPU-aaaa,GPU-bbbb", ["GPU-aaaa", "GPU-bbbb"]),
    ("MIG-1111,MIG-2222", ["MIG-1111", "MIG-2222"]),
])
def test_devices_are_named_as_the_variable_names_them(gpus, visible, names):
    ray = gpus(visible)
    see = ray.remote(looker(ray))
    nothing = [], visible, []
    assert ray.get(see.remote()) == nothing, "a task without GPUs sees what its node sees"
    assert ray.get(see.options(num_gpus=0).remote()) == nothing
    first = [names[0]], str(names[0]), [str(names[0])]
    assert ray.get(see.options(num_gpus=1).remote()) == first
    halves = ray.get([see.options(num_gpus=0.5).remote() for _ in range(2)])
    assert halves == [first] * 2, "fractions share a device"
    found, variable, ids = ray.get(see.options(num_gpus=2).remote())
    assert sorted(found) == names
    assert variable.split(",") == ids == list(map(str, found))
    assert ray.get(see.remote()) == nothing, "after all those"
    assert (ray.get_gpu_ids(), ray.get_runtime_context().get_accelerator_ids()["GPU"]) == ([], [])


def test_actors_have_devices_of_their_own(gpus):
    ray = gpus("4,5")
    look = looker(ray)
    actor = ray.remote(num_gpus=1)(type("Actor", (), {"see": lambda self: look()}))
    actors = [actor.remote() for _ in range(2)]
    for _ in range(2):  # whatever they run
        seen = ray.get([one.see.remote() for one in actors])
        assert sorted(seen) == [(["4"], "4", ["4"]), (["5"], "5", ["5"])]
    none = actor.options(num_gpus=0).remote()
    assert ray.get(none.see.remote()) == ([], "4,5", [])


def test_tasks_with_and_without_gpus_do_not_share_a_process(gpus):
    """CUDA is initialised once per process."""
    ray = gpus(None, num_cpus=1)
    pid = ray.remote(lambda: os.getpid())
    for _ in range(2):
        without = ray.get(pid.remote())
        assert ray.get(pid.options(num_gpus=1).remote()) != without
        assert ray.get(pid.options(num_gpus=0.5).remote()) != without


@pytest.mark.ray_differs("Ray runs them in one process, whose libraries have seen the first device")
def test_a_process_keeps_to_its_devices(gpus):
    ray = gpus("4,5")
    look = looker(ray)
    see = ray.remote(num_gpus=1, max_calls=100)(lambda: (look()[1], os.getpid()))
    hold = ray.remote(num_gpus=1)(type("Hold", (), {"see": lambda self: look()[1]}))
    first = ray.get(see.remote())
    assert ray.get(see.remote()) == first
    holder = hold.remote()
    assert ray.get(holder.see.remote()) == "4"
    other = ray.get(see.remote())
    assert other[0] == "5" and other[1] != first[1]


def test_a_program_that_chooses_devices_itself(gpus):
    ray = gpus("4,5")
    see = ray.remote(num_gpus=1)(looker(ray))
    env = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    assert ray.get(see.options(runtime_env=env).remote())[:2] == (["4"], "4,5")


def test_more_gpus_than_the_variable_names(gpus):
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        gpus("4", num_gpus=2)
    ray = gpus("4,5", num_gpus=2)  # another try
    assert ray.get(ray.remote(num_gpus=2)(looker(ray)).remote())[0] == ["4", "5"]


def test_fewer_gpus_than_the_variable_names(gpus):
    ray = gpus("7,5,3", num_gpus=1)
    assert ray.cluster_resources()["GPU"] == 1
    assert ray.get(ray.remote(num_gpus=1)(looker(ray)).remote())[:2] == (["7"], "7")
