# /// script
# dependencies = ["taps @ git+https://github.com/proxystore/taps"]
# ///
"""TaPS's `RayExecutor`: an executor of the standard library's kind, whose futures are arguments."""

from taps.executor.ray import RayExecutor


def add(a, b):
    return a + b


if __name__ == "__main__":
    with RayExecutor(num_cpus=2) as executor:
        first = [executor.submit(add, i, 1) for i in range(20)]
        second = [executor.submit(add, future, b=10) for future in first]
        assert [future.result(timeout=60) for future in second] == [i + 11 for i in range(20)]
        assert list(executor.map(add, range(5), range(5))) == [0, 2, 4, 6, 8]
