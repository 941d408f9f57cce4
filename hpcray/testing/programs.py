"""Random programs that know their own answers: the bodies that fuzzing the cluster runs.

Every value is `[label, pairs]`, `pairs` a list of `[ref, label of its value]`: whoever gets a ref
out of a value knows what it must find behind it. A task's label is its seed, so a second attempt
makes the same value, and a program's random choices come from its seed alone.

    driver/worker `mixed`: put, submit (refs nested and direct), get, wait, drop, actors, sleep;
                           returns some of the pairs it collected
    actor `Shelf`:         keeps pairs in its state, gives some back, drops some
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

from hpcray.protocol.messages import UNIT
from hpcray.testing.processes import Large, Process, Ref, Script, SystemFailed, TaskFailed

Pair = list[Any]  # [Ref, label]

# What may befall an object when workers are killed.
_DEATHS = ("WorkerCrashedError", "ActorDiedError", "ActorUnavailableError")


class Mix:
    """How wild a program is. All of them numbers, so that a test's parameters say everything."""

    def __init__(
        self, *, steps: int = 8, depth: int = 2, actors: bool = True, deaths: bool = False,
        slow: bool = True, large: float = 0.3,
    ) -> None:
        self.steps = steps
        self.depth = depth
        self.actors = actors
        self.deaths = deaths
        self.slow = slow
        self.large = large

    def bodies(self) -> dict[str, Any]:
        return {"mixed": self.mixed, "leaf": self.leaf, "Shelf": self.shelf, "keep": self.keep,
                "give": self.give, "two": self.two}

    # --- task bodies ------------------------------------------------------------------------------------

    def leaf(self, p: Process, seed: int, *deps: Any) -> Script:
        rng = random.Random(seed)
        if self.slow and rng.random() < 0.2:
            yield from p.sleep(rng.random() * 0.03)
        for dep in deps:
            yield from self.check_deep(p, rng, dep)
        return self.value(rng, seed, [])

    def two(self, p: Process, seed: int, pairs: list[Pair]) -> Script:
        rng = random.Random(seed)
        yield None
        return [self.value(rng, seed, pairs), self.value(rng, seed + 1, [])]

    def mixed(
        self, p: Process, seed: int, depth: int, pairs: list[Pair], handles: list[Ref], *deps: Any
    ) -> Script:
        rng = random.Random(seed)
        for dep in deps:
            pairs = pairs + dep[1]
        del deps
        yield from self.steps_of(p, rng, depth, pairs, handles)
        return self.value(rng, seed, self.some(rng, pairs))

    # --- actor bodies -----------------------------------------------------------------------------------

    def shelf(self, p: Process, seed: int) -> None:
        assert p.actor is not None
        p.actor["pairs"] = []

    def keep(self, p: Process, seed: int, pairs: list[Pair]) -> Script:
        assert p.actor is not None
        rng = random.Random(seed)
        p.actor["pairs"] += pairs
        if self.slow and rng.random() < 0.2:
            yield from p.sleep(rng.random() * 0.01)
        if rng.random() < 0.3 and p.actor["pairs"]:
            yield from self.check(p, rng.choice(p.actor["pairs"]))
        return [seed, []]

    def give(self, p: Process, seed: int) -> list[Any]:
        assert p.actor is not None
        rng = random.Random(seed)
        pairs = self.some(rng, p.actor["pairs"])
        if rng.random() < 0.5:
            p.actor["pairs"] = self.some(rng, p.actor["pairs"])
        return [seed, pairs]

    # --- the program --------------------------------------------------------------------------------------

    def driver(self, p: Process, seed: int) -> Script:
        rng = random.Random(seed)
        pairs: list[Pair] = []
        yield from self.steps_of(p, rng, self.depth, pairs, [], steps=2 * self.steps)
        for pair in pairs:
            yield from self.check(p, pair)

    def steps_of(
        self, p: Process, rng: random.Random, depth: int, pairs: list[Pair], handles: list[Ref],
        steps: int | None = None,
    ) -> Script:
        handles = list(handles)
        for _ in range(rng.randint(1, self.steps) if steps is None else steps):
            yield from self.one_step(p, rng, depth, pairs, handles)

    def one_step(
        self, p: Process, rng: random.Random, depth: int, pairs: list[Pair], handles: list[Ref]
    ) -> Script:
        choice = rng.random()
        if choice < 0.2:
            label = rng.getrandbits(30)
            ref = yield from p.put(self.value(rng, label, self.some(rng, pairs)))
            pairs.append([ref, label])
        elif choice < 0.5:
            self.submit(p, rng, depth, pairs, handles)
        elif choice < 0.7 and pairs:
            yield from self.check_deep(p, rng, None, pair=rng.choice(pairs), into=pairs)
        elif choice < 0.78 and pairs:
            del pairs[rng.randrange(len(pairs))]
        elif choice < 0.82 and pairs:
            yield from p.wait([pair[0] for pair in self.some(rng, pairs)], rng.random() < 0.5)
        elif choice < 0.86 and self.slow:
            yield from p.sleep(rng.random() * 0.02)
        elif self.actors:
            if not handles or rng.random() < 0.3:
                handles.append(p.create_actor("Shelf", [rng.getrandbits(30)]))
            else:
                label = rng.getrandbits(30)
                handle = rng.choice(handles)
                if rng.random() < 0.5:
                    ref = p.call(handle, "keep", [label, self.some(rng, pairs)])[0]
                else:
                    ref = p.call(handle, "give", [label])[0]
                pairs.append([ref, label])
                if rng.random() < 0.1:
                    handles.remove(handle)

    def submit(
        self, p: Process, rng: random.Random, depth: int, pairs: list[Pair], handles: list[Ref]
    ) -> None:
        label = rng.getrandbits(30)
        retries = rng.choice((0, 1, 3))
        kind = rng.random()
        options: dict[str, Any] = {"max_retries": retries}
        if rng.random() < 0.2:
            options["rank"] = rng.randrange(p.cluster.size)
        if rng.random() < 0.1:
            options["resources"] = (("CPU", UNIT // 2),)
        deps = [pair[0] for pair in self.some(rng, pairs)[:2]]
        if depth > 0 and kind < 0.5:
            nested = self.some(rng, pairs)
            ref = p.submit("mixed", [label, depth - 1, nested, self.some(rng, handles), *deps],
                           **options)[0]
        elif kind < 0.8:
            ref = p.submit("leaf", [label, *deps], **options)[0]
        else:
            first, second = p.submit(
                "two", [label, self.some(rng, pairs)], return_count=2, **options)
            pairs.append([second, label + 1])
            ref = first
        pairs.append([ref, label])

    # --- values -------------------------------------------------------------------------------------------

    @staticmethod
    def some(rng: random.Random, things: list[Any]) -> list[Any]:
        return rng.sample(things, rng.randint(0, min(len(things), 3)))

    def value(self, rng: random.Random, label: int, pairs: list[Pair]) -> Any:
        value = [label, pairs]
        return Large(value, rng.randint(600, 3000)) if rng.random() < self.large else value

    def check(self, p: Process, pair: Pair) -> Generator[Any, Any, Any]:
        """Get it; its label must be right. With deaths it may be a failure: then None."""
        try:
            value = yield from p.get(pair[0])
        except (SystemFailed, TaskFailed) as error:
            if not self.deaths or not any(kind in str(error) for kind in _DEATHS):
                p.cluster.fault(f"{p!r} got {error!r} from {pair[0]!r}", error)
            return None
        if value[0] != pair[1]:
            p.cluster.fault(f"{p!r} found {value[0]} behind {pair[0]!r}, not {pair[1]}")
        return value

    def check_deep(
        self, p: Process, rng: random.Random, value: Any, *, pair: Pair | None = None,
        into: list[Pair] | None = None,
    ) -> Script:
        """Follow refs found in values, as far as a coin says."""
        if pair is not None:
            value = yield from self.check(p, pair)
        while value is not None and value[1]:
            found = rng.choice(value[1])
            if into is not None and rng.random() < 0.5:
                into.append(found)
            del value
            if rng.random() < 0.4:
                return
            value = yield from self.check(p, found)
            del found
