"""The three things there are: a task, an object, an actor.

    python examples/hello.py
    mpirun -n 2 hpcray run examples/hello.py
"""

from __future__ import annotations

import os
import socket
import time

import hpcray as ray


@ray.remote
def whoami(i: int) -> str:
    time.sleep(0.1)  # some work; without it one worker is done with all before others have begun
    return f"task {i} ran on {socket.gethostname()}, pid {os.getpid()}"


@ray.remote
def total(numbers: list[int]) -> int:
    return sum(numbers)


@ray.remote
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


def main() -> None:
    ray.init()

    # Tasks: a call returns at once with a ref to the result; `get` waits for the values.
    for line in ray.get([whoami.remote(i) for i in range(4)]):
        print(line)

    # Objects: put a value once, pass the ref to as many tasks as you like.
    numbers = ray.put(list(range(1000)))
    print("three tasks read one object:", ray.get([total.remote(numbers) for _ in range(3)]))

    # Actors: a class in a process of its own. Calls of one caller run in order.
    counter = Counter.remote()
    print("a counter:", ray.get([counter.add.remote(1) for _ in range(5)]))

    ray.shutdown()


if __name__ == "__main__":
    main()
