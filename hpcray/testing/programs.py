"""Random programs that know their own answers: the bodies that fuzzing the cluster runs.

Every value is `[label, pairs]`; a pair is `[ref, label, path]`: whoever gets a ref out of a value
knows what it must find behind it. A task's label is its seed, so a second attempt makes the same
value, and a body draws all its choices from its seed.

    driver/worker `mixed`: put, submit (refs nested and direct), get, wait, drop, actors, sleep;
                           returns some of the pairs it collected
    actor `Shelf`:         keeps pairs in its state, gives some back, drops some

A program must not deadlock by itself, and refs travel everywhere through values and actors: a
task may find its own ref on a shelf. So everybody waits only for what comes before it in the
post-order of the tree of submissions (`may_wait`), and actors wait for nothing. The same rule for
what a value contains keeps objects from containing each other: no reference count frees a cycle.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

from hpcray.node.placement import group_name
from hpcray.protocol import ids
from hpcray.protocol.labels import TAKEN
from hpcray.protocol.messages import SPILL, UNIT
from hpcray.testing.clients import Ref, Script
from hpcray.testing.processes import Process
from hpcray.testing.values import Large, SystemFailed, TaskFailed

Pair = list[Any]  # [Ref, label, path in the tree of submissions]

# What may befall an object when workers are killed.
_DEATHS = ("WorkerCrashedError", "ActorDiedError", "ActorUnavailableError")
# When placement groups are removed.
_GROUPS = ("PlacementGroupRemoved", "placement group was removed")
# And what a wild program does to itself.
_WILD = (*_DEATHS, "TaskCancelledError", "boom")


def may_wait(waiter: list[int], path: list[int]) -> bool:
    """Whether the task at `path` precedes `waiter` in post-order: then no cycle can form."""
    for mine, other in zip(waiter, path, strict=False):
        if mine != other:
            return other < mine
    return len(path) > len(waiter)


class Body:
    """One execution of a body: who runs it, and what it has at hand."""

    def __init__(
        self, mix: Mix, p: Process, seed: int, path: list[int], depth: int, pairs: list[Pair],
        handles: list[Ref],
    ) -> None:
        self.mix = mix
        self.p = p
        self.rng = random.Random(seed)
        self.path = path
        self.depth = depth
        self.pairs = list(pairs)
        self.handles = list(handles)
        # [stream, label of its next item, path], newest last.
        self.streams: list[list[Any]] = []
        # The placement group (driver only, one at a time): id, strategy, number of bundles.
        self.group: tuple[bytes, int] | None = None
        self.children = 0

    def some(self, things: list[Any]) -> list[Any]:
        return some(self.rng, things)

    def waitable(self) -> list[Pair]:
        return before(self.path, self.pairs)

    def child(self) -> list[int]:
        self.children += 1
        return [*self.path, self.children]

    def steps(self, count: int) -> Script:
        for _ in range(count):
            yield from self.step()

    def step(self) -> Script:
        p, rng = self.p, self.rng
        choice = rng.random()
        waitable = self.waitable()
        if choice < 0.2:
            label = rng.getrandbits(30)
            path = self.child()
            ref = yield from p.put(self.mix.value(rng, label, self.some(before(path, self.pairs))))
            self.pairs.append([ref, label, path])
        elif choice < 0.5:
            self.submit()
        elif choice < 0.7 and waitable:
            yield from self.follow(rng.choice(waitable))
        elif choice < 0.78 and self.pairs:
            del self.pairs[rng.randrange(len(self.pairs))]
        elif choice < 0.82 and waitable:
            yield from p.wait([pair[0] for pair in self.some(waitable)], rng.random() < 0.5)
        elif choice < 0.88 and self.mix.streams:
            yield from self.consume()
        elif choice < 0.9 and self.mix.groups and not self.path:
            yield from self.regroup()
        elif choice < 0.91 and self.mix.slow:
            yield from p.sleep(rng.random() * 0.02)
        elif choice < 0.94 and self.mix.wild:
            yield from self.harm()
        elif self.mix.actors:
            yield from self.act()

    def consume(self) -> Script:
        """Open a stream, take from one, or drop one with whatever is in it."""
        p, rng = self.p, self.rng
        choice = rng.random()
        if not self.streams or choice < 0.3:
            label = rng.getrandbits(30)
            path = self.child()
            window = rng.choice((0, 0, 1, 2))
            stream = p.open_stream(
                "flow", [label, path, self.some(self.pairs)], window=window,
                max_retries=rng.choice((0, 1, 3)), retry_exceptions=False)
            self.streams.append([stream, label, path])
        elif choice < 0.4:
            del self.streams[rng.randrange(len(self.streams))]
        else:
            entry = rng.choice(self.streams)
            for _ in range(rng.randint(1, 4)):
                ref = yield from p.next_item(entry[0])
                if ref is None:
                    self.streams.remove(entry)
                    return
                self.pairs.append([ref, entry[1], entry[2]])
                entry[1] += 1

    def regroup(self) -> Script:
        """A placement group of half CPUs, tasks and actors in it, and its removal with them."""
        p, rng = self.p, self.rng
        if self.group is None:
            group, count = rng.randbytes(18), rng.randint(1, 2)
            strategies = ["PACK", "SPREAD", "STRICT_PACK"]
            if count <= p.world.size:
                strategies.append("STRICT_SPREAD")
            yield from p.request("create_placement_group", {
                "group": group, "bundles": [{"CPU": UNIT // 2}] * count,
                "strategy": rng.choice(strategies)})
            self.group = group, count
        elif rng.random() < 0.3:
            yield from self.ungroup()
        else:
            self.in_group()

    def ungroup(self) -> Script:
        if self.group is not None:
            yield from self.p.request("remove_placement_group", {"group": self.group[0]})
            self.group = None

    def in_group(self) -> None:
        p, rng = self.p, self.rng
        assert self.group is not None
        group, count = self.group
        index = rng.randint(-1, count - 1)
        names = [group_name("", group)] + ([group_name("", group, index)] if index >= 0 else [])
        shape = tuple(sorted((resource + name, amount) for name in names
                             for resource, amount in (("CPU", UNIT // 2), ("bundle", 10))))
        label, path = rng.getrandbits(30), self.child()
        if rng.random() < 0.3:
            self.handles.append(p.create_actor(
                "Shelf", [label], resources=shape, held_resources=shape, group_id=group))
            return
        ref = p.submit("leaf", [label, path], resources=shape, group_id=group,
                       max_retries=rng.choice((0, 3)))[0]
        self.pairs.append([ref, label, path])

    def harm(self) -> Script:
        """Cancel, kill, give up waiting."""
        p, rng = self.p, self.rng
        choice = rng.random()
        if choice < 0.3 and self.handles:
            handle = rng.choice(self.handles)
            yield from p.request("kill_actor", {
                "actor_id": ids.actor_of_object(handle._id), "no_restart": rng.random() < 0.5})
        elif choice < 0.6 and self.pairs:
            pair = rng.choice(self.pairs)
            yield from p.request("cancel", {
                "object_id": pair[0]._id, "force": rng.random() < 0.3})
        elif self.pairs:
            pair = self.pairs.pop(rng.randrange(len(self.pairs)))
            p.ask(pair[0])
            if rng.random() < 0.5:
                yield from p.sleep(0.01)

    def submit(self) -> None:
        p, rng = self.p, self.rng
        label = rng.getrandbits(30)
        kind = rng.random()
        path = self.child()
        options: dict[str, Any] = {"max_retries": rng.choice((0, 1, 3))}
        if rng.random() < 0.2:
            options["rank"] = rng.randrange(p.world.size)
        if rng.random() < 0.1:
            options["resources"] = (("CPU", UNIT // 2),)
        if rng.random() < 0.1:
            options["environment"] = rng.choice((b"e1", b"e2"))
        if self.mix.placing:
            self.place(options)
        if self.mix.wild:
            options["retry_exceptions"] = rng.random() < 0.3
            options["max_calls"] = rng.choice((0, 0, 0, 1, 3))
        deps = [pair[0] for pair in self.some(self.pairs)[:2] if may_wait(path, pair[2])]
        if self.depth > 0 and kind < 0.5:
            ref = p.submit("mixed", [label, path, self.depth - 1, self.some(self.pairs),
                                     self.some(self.handles), *deps], **options)[0]
        elif kind < 0.6 and self.mix.wild:
            ref = p.submit("boom", [label, path, self.some(self.pairs), *deps], **options)[0]
        elif kind < 0.8:
            ref = p.submit("leaf", [label, path, *deps], **options)[0]
        else:
            ref, second = p.submit(
                "two", [label, self.some(before(path, self.pairs))], return_count=2, **options)
            self.pairs.append([second, label + 1, path])
        self.pairs.append([ref, label, path])

    def place(self, options: dict[str, Any]) -> None:
        """Priorities, labels (rank 0 is "zone=a", the last "zone=b"), affinities that may move."""
        rng = self.rng
        options["priority"] = rng.choice((0, 0, 0, 1, 5, -1))
        if "rank" in options:
            options.update(rng.choice((
                {}, {"soft": True, "unavailable": SPILL}, {"soft": True, "rank": 99})))
        elif "resources" not in options and rng.random() < 0.5:
            names = rng.choice((["?zone=a"], ["?zone=b"], ["?!zone=b"], ["~zone=b"], [],
                                ["?zone", "~zone=b"]))
            options["resources"] = (("CPU", UNIT), *((name, TAKEN) for name in names))
            options["spread"] = not names or any(name[0] == "~" for name in names)

    def act(self) -> Script:
        p, rng = self.p, self.rng
        if not self.handles or rng.random() < 0.3:
            restarts = rng.choice((0, 0, 2)) if self.mix.restarts else 0
            if self.mix.wild and rng.random() < 0.2:
                self.handles.append(p.create_actor("boom", [0, [], self.some(self.pairs)]))
                return
            self.handles.append(p.create_actor(
                "Shelf", [rng.getrandbits(30)], max_restarts=restarts))
            return
        label = rng.getrandbits(30)
        path = self.child()
        handle = rng.choice(self.handles)
        retries = rng.choice((0, 1, -1)) if self.mix.restarts else 0
        if rng.random() < 0.5:
            ref = p.call(handle, "keep", [label, path, self.some(self.pairs)],
                         max_retries=retries)[0]
        elif self.mix.wild and rng.random() < 0.2:
            ref = p.call(handle, "boom", [label, path, self.some(self.pairs)],
                         max_retries=rng.choice((0, 1)), retry_exceptions=True,
                         unordered=rng.random() < 0.5)[0]
        else:
            ref = p.call(handle, "give", [label, path], max_retries=retries)[0]
        self.pairs.append([ref, label, path])
        if rng.random() < 0.1:
            self.handles.remove(handle)
        elif rng.random() < 0.5:
            yield from self.converse(handle)

    def converse(self, handle: Ref) -> Script:
        """One call after the other, each waited for: they go past the node before long."""
        for _ in range(self.rng.randint(3, 8)):
            label = self.rng.getrandbits(30)
            ref = self.p.call(handle, "nod", [label])[0]
            if (yield from self.get([ref, label, self.child()])) is None:
                return

    def get(self, pair: Pair) -> Generator[Any, Any, Any]:
        """Its value; the label must be right. With deaths it may be a failure: then None."""
        p = self.p
        try:
            value = yield from p.get(pair[0])
        except (SystemFailed, TaskFailed) as error:
            allowed = _WILD if self.mix.wild else _DEATHS if self.mix.deaths else ()
            if self.mix.groups:
                allowed = (*allowed, *_GROUPS)
            if not any(kind in str(error) for kind in allowed):
                p.world.fault(f"{p!r} got {error!r} from {pair[0]!r}", error)
            return None
        if value[0] != pair[1]:
            p.world.fault(f"{p!r} found {value[0]} behind {pair[0]!r}, not {pair[1]}")
        return value

    def follow(self, pair: Pair) -> Script:
        """Get it, then what is found in it, as far as a coin says; keep some of what is found."""
        while True:
            value = yield from self.get(pair)
            if value is None or not value[1]:
                return
            pair = self.rng.choice(value[1])
            del value
            if self.rng.random() < 0.5:
                self.pairs.append(pair)
            if self.rng.random() < 0.4 or not may_wait(self.path, pair[2]):
                return


class Mix:
    """How wild the programs are. All plain numbers, so that a test's parameters say everything."""

    def __init__(
        self, *, steps: int = 8, depth: int = 2, actors: bool = True, restarts: bool = False,
        deaths: bool = False, slow: bool = True, large: float = 0.3, wild: bool = False,
        streams: bool = True, groups: bool = False, placing: bool = False,
    ) -> None:
        self.step_count = steps
        self.depth = depth
        self.actors = actors
        self.restarts = restarts
        self.deaths = deaths
        self.slow = slow
        self.large = large
        # Programs that cancel, kill, raise and give up.
        self.wild = wild
        self.streams = streams
        self.groups = groups
        self.placing = placing

    def bodies(self) -> dict[str, Any]:
        return {"mixed": self.mixed, "leaf": self.leaf, "two": self.two, "boom": self.boom,
                "flow": self.flow, "Shelf": self.shelf, "keep": self.keep, "give": self.give,
                "nod": self.nod}

    def driver(self, p: Process, seed: int) -> Script:
        body = Body(self, p, seed, [], self.depth, [], [])
        yield from body.steps(2 * self.step_count)
        for pair in body.pairs:
            yield from body.get(pair)
        yield from body.ungroup()

    def value(self, rng: random.Random, label: int, pairs: list[Pair]) -> Any:
        value = [label, pairs]
        return Large(value, rng.randint(600, 3000)) if rng.random() < self.large else value

    # --- tasks ----------------------------------------

    def mixed(
        self, p: Process, seed: int, path: list[int], depth: int, pairs: list[Pair],
        handles: list[Ref], *deps: Any,
    ) -> Script:
        body = Body(self, p, seed, path, depth, pairs, handles)
        for dep in deps:
            body.pairs += dep[1]
        del deps, pairs, handles
        yield from body.steps(body.rng.randint(1, self.step_count))
        return self.value(body.rng, seed, body.some(body.waitable()))

    def leaf(self, p: Process, seed: int, path: list[int], *deps: Any) -> Script:
        body = Body(self, p, seed, path, 0, [], [])
        if self.slow and body.rng.random() < 0.2:
            yield from p.sleep(body.rng.random() * 0.03)
        for dep in deps:
            for pair in dep[1]:
                if may_wait(path, pair[2]):
                    yield from body.follow(pair)
        return self.value(body.rng, seed, [])

    def boom(self, p: Process, seed: int, path: list[int], pairs: list[Pair], *deps: Any) -> Any:
        rng = random.Random(seed)
        length = rng.randint(600, 3000) if rng.random() < self.large else 0
        raise TaskFailed("boom" + "!" * length)

    def two(self, p: Process, seed: int, pairs: list[Pair]) -> list[Any]:
        rng = random.Random(seed)
        return [self.value(rng, seed, pairs), self.value(rng, seed + 1, [])]

    def flow(self, p: Process, seed: int, path: list[int], pairs: list[Pair]) -> Script:
        """A generator: the same items at every attempt, as far as it gets."""
        body = Body(self, p, seed, path, 0, before(path, pairs), [])
        del pairs
        for index in range(body.rng.randint(0, 5)):
            if self.slow and body.rng.random() < 0.2:
                yield from p.sleep(body.rng.random() * 0.02)
            yield from p.emit(self.value(body.rng, seed + index, body.some(body.pairs)))

    # --- the actor ----------------------------------------

    def shelf(self, p: Process, seed: int) -> None:
        assert p.actor is not None
        p.actor["pairs"] = []

    def keep(self, p: Process, seed: int, path: list[int], pairs: list[Pair]) -> Script:
        assert p.actor is not None
        rng = random.Random(seed)
        p.actor["pairs"] += pairs
        if self.slow and rng.random() < 0.2:
            yield from p.sleep(rng.random() * 0.01)
        if rng.random() < 0.3:
            own = [*path, 1]
            ref = yield from p.put(self.value(rng, seed + 1, some(rng, before(own, pairs))))
            p.actor["pairs"].append([ref, seed + 1, own])
        return [seed, []]

    def nod(self, p: Process, seed: int) -> list[Any]:
        return [seed, []]

    def give(self, p: Process, seed: int, path: list[int]) -> list[Any]:
        assert p.actor is not None
        rng = random.Random(seed)
        pairs = some(rng, before(path, p.actor["pairs"]))
        if rng.random() < 0.5:
            p.actor["pairs"] = some(rng, p.actor["pairs"])
        return [seed, pairs]


def before(path: list[int], pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if may_wait(path, pair[2])]


def some(rng: random.Random, things: list[Any]) -> list[Any]:
    return rng.sample(things, rng.randint(0, min(len(things), 3)))
