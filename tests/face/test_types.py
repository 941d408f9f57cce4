"""Type checkers accept a user's typed program, know its types, and find its mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]

PROGRAM = '''
from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import assert_type

import hpcray as ray
from hpcray.actor import ActorHandle, ActorProxy


@ray.remote
def double(x: int) -> int:
    return 2 * x


@ray.remote(num_cpus=1, max_retries=0)
def join(a: str, b: str = "", *, sep: str = " ") -> str:
    return a + sep + b


@ray.remote
def nothing() -> None:
    pass


@ray.remote(num_returns=2)
def pair(x: int) -> tuple[int, str]:
    return x, str(x)


@ray.remote
def count(n: int) -> Iterator[int]:
    yield from range(n)


@ray.remote
def squares(n: int) -> Generator[float, None, None]:
    yield n * n / 2


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, n: int) -> int:
        self.value += n
        return self.value

    @ray.method(num_returns=2)
    def both(self) -> tuple[int, int]:
        return self.value, -self.value

    async def later(self) -> str:
        return "later"

    async def stream(self) -> AsyncIterator[int]:
        yield 1


# With @ray.method on its methods, an ActorProxy knows them.
class Typed:
    def __init__(self, start: int) -> None:
        self.value = start

    @ray.method
    def add(self, n: int, times: int = 1) -> int:
        self.value += n * times
        return self.value

    @ray.method(max_task_retries=2)
    async def later(self, word: str) -> str:
        assert_type(self.add(1), int)
        return word

    @ray.method
    def up_to(self, n: int) -> Iterator[int]:
        yield from range(n)

    @ray.method
    async def stream(self) -> AsyncIterator[bytes]:
        yield b""

    @ray.method(num_returns=2)
    def both(self) -> tuple[int, int]:
        return self.value, -self.value


# A type checker does not see what a decorator makes of a class; it sees this.
RemoteCounter = ray.remote(Counter)
Small = ray.remote(num_cpus=1)(Counter)
RemoteTyped = ray.remote(Typed)


def main() -> None:
    ray.init(num_cpus=2)
    ref = double.remote(1)
    assert_type(ref, ray.ObjectRef[int])
    assert_type(ray.get(ref), int)
    assert_type(double.remote(ref), ray.ObjectRef[int])
    assert_type(ray.get([ref, double.remote(2)]), list[int])
    assert_type(double.options(num_cpus=2).remote(1), ray.ObjectRef[int])
    assert_type(ray.get(join.remote("a", b="b", sep=ray.put("-"))), str)
    assert_type(ray.put(1.5), ray.ObjectRef[float])
    assert_type(ray.get(nothing.remote()), None)
    ready, rest = ray.wait([ref], num_returns=1, timeout=1.0)
    assert_type(ready, list[ray.ObjectRef[int]])
    assert_type(rest, list[ray.ObjectRef[int]])
    first, second = pair.remote(1)
    ray.get([first, second])
    for item in count.remote(3):
        assert_type(item, ray.ObjectRef[int])
        assert_type(ray.get(item), int)
    assert_type(squares.remote(2), ray.ObjectRefGenerator[float])
    assert_type(next(squares.options(num_cpus=1).remote(2)), ray.ObjectRef[float])

    counter = RemoteCounter.remote(3)
    assert_type(counter, ActorHandle[Counter])
    assert_type(Small.remote(), ActorHandle[Counter])
    total: int = ray.get(counter.add.remote(1))
    named = RemoteCounter.options(name="c", lifetime="detached").remote()
    both = named.both.remote()
    ray.get(both)
    print(ray.get(counter.later.remote()), total)
    found = ray.get_actor("c")
    found.add.options(num_returns=1).remote(1)
    for number in counter.stream.remote():
        print(ray.get(number))
    proxy: ActorProxy[Typed] = RemoteTyped.remote(1)
    assert_type(proxy.add.remote(1), ray.ObjectRef[int])
    assert_type(proxy.add.remote(ref, times=ray.put(2)), ray.ObjectRef[int])
    assert_type(ray.get(proxy.later.remote("x")), str)
    assert_type(ray.get([proxy.add.remote(i) for i in range(3)]), list[int])
    assert_type(proxy.up_to.remote(3), ray.ObjectRefGenerator[int])
    assert_type(proxy.stream.remote(), ray.ObjectRefGenerator[bytes])
    one, two = proxy.both.remote()
    ray.get([one, two])
    one, two = proxy.add.options(num_returns=2).remote(1)
    hand_on(proxy)
    ray.get(RemoteTyped.remote(1).add.remote(1))
    ray.kill(proxy)
    ray.kill(counter)
    ray.cancel(ref, force=True)
    context = ray.get_runtime_context()
    node: str = context.get_node_id()
    print(node)


def hand_on(actor: ActorProxy[Typed]) -> ray.ObjectRef[int]:
    return actor.add.remote(1)


async def waits() -> int:
    value = await double.remote(4)
    assert_type(value, int)
    async for item in count.remote(3):
        value += await item
    return value


if __name__ == "__main__":
    main()
'''

# Each line and what mypy must say of it.
MISTAKES = {
    "double(1); print()": "unreachable",
    "wrong: str = ray.get(double.remote(1))": "Incompatible types in assignment",
    "ray.get(double.remote(1)).upper()": '"int" has no attribute "upper"',
    "ray.get([double.remote(1)])[0].upper()": '"int" has no attribute "upper"',
    "ray.get(1)": "No overload variant",
    "for item in count.remote(2): ray.get(item).upper()": '"int" has no attribute "upper"',
    'ray.init(num_cpus="2")': "incompatible type",
    "ray.cancel(1)": "incompatible type",
    "hand_on(RemoteTyped.remote(1)).upper()": "has no attribute",
    "one: ActorProxy[Typed] = RemoteTyped.remote(1); one.subtract.remote(1)": "no attribute",
    "two: ActorProxy[Typed] = RemoteTyped.remote(1); two.add(1).upper()": "no attribute",
    "three: ActorProxy[Typed] = RemoteTyped.remote(1); ray.get(three.add.remote(1)).upper()":
        "no attribute",
}


def check(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unreachable", "--no-error-summary",
         "--config-file", "", "--cache-dir", str(path.parent / "cache"), str(path)],
        capture_output=True, text=True, timeout=300, cwd=path.parent, env=_environment())
    return done.stdout + done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "MYPYPATH": str(ROOT)}


def test_programs(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    lines = PROGRAM.count("\n")
    with path.open("a") as out:
        for number, mistake in enumerate(MISTAKES):
            out.write(f"def mistake_{number}() -> None:\n    {mistake}\n")
    found: dict[int, str] = {}
    for line in check(path).splitlines():
        match = re.match(r".*program\.py:(\d+): error: (.*)", line)
        assert match or ": note:" in line, line
        if match:
            found[int(match[1])] = found.get(int(match[1]), "") + match[2]
    # mypy counts lines from 1; a mistake is the second line of its two.
    expected = {lines + 2 * i + 2: says for i, says in enumerate(MISTAKES.values())}
    assert not {number: says for number, says in found.items() if number not in expected}
    for number, says in expected.items():
        assert re.search(says, found.get(number, "")), (number - lines, says, found.get(number))
