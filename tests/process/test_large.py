"""What is far larger than a datagram, in every direction; and what is refused with its limit."""

from __future__ import annotations

from .jobs import Start


def test_many_refs_returns_and_long_errors_and_names(start: Start) -> None:
    job = start("""
import hpcray as ray

@ray.remote
def count(*args):
    return len(args)

@ray.remote
def length(refs):
    return len(ray.get(refs[::1000])), len(refs)

@ray.remote
def give(refs):
    return refs

@ray.remote(num_returns=10_000)
def many():
    return range(10_000)

class Own(Exception):
    pass

@ray.remote
def fail():
    error = Own("e" * 10_000_000)
    error.code = 7
    raise error

ray.init(num_cpus=2)
refs = [ray.put(i) for i in range(100_000)]
assert ray.get(ray.get(ray.put(refs))[99_999]) == 99_999
assert ray.get(count.remote(*refs)) == 100_000
assert ray.get(length.remote(refs)) == (100, 100_000)
assert len(ray.get(give.remote(refs))) == 100_000
assert ray.get(ray.get(give.remote(refs))[77_777]) == 77_777
print("refs", flush=True)
assert ray.get(many.remote()) == list(range(10_000))
print("returns", flush=True)
try:
    ray.get(fail.remote())
except Own as error:
    assert error.code == 7 and len(error.cause.args[0]) == 10_000_000
    print("error", flush=True)
for options in ({"name": "n" * 10_000_000}, {"runtime_env": {"env_vars": {"V": "v" * 10_000_000}}}):
    try:
        count.options(**options).remote()
    except ValueError as error:
        assert "1,048,576 B can travel" in str(error), str(error)[:300]
assert ray.get(count.remote(1, 2)) == 2
print("done", flush=True)
""")
    output = job.finish(timeout_s=90)
    assert [line for line in output.splitlines() if line] == ["refs", "returns", "error", "done"]
