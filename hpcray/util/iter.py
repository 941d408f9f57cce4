"""Iterators in shards: each shard is an actor that produces items, and transforms them where it is.

    from_items([1, 2, 3, 4], num_shards=2).for_each(work).gather_async()
         |                                    |               |
    actors with the items        applied in the actors    a local iterator of the results

Under Ray's names; Ray calls it deprecated. A `ParallelIterator` is lazy, and starts anew whenever
it is gathered. What must not go in: anything behind the public API.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import hpcray as ray

Transform = Callable[[Iterator[Any]], Iterable[Any]]


# --- transforms: of an iterator, anywhere ---------------------------------------------------------


def _for_each(fn: Callable[[Any], Any], max_concurrency: int, resources: Any) -> Transform:
    def apply(items: Iterator[Any]) -> Iterator[Any]:
        if max_concurrency == 1:
            yield from map(fn, items)
            return
        remote = ray.remote(fn).options(**(resources or {}))
        running: deque[Any] = deque()
        for item in items:
            running.append(remote.remote(item))
            if 0 < max_concurrency <= len(running):
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())

    return apply


def _filter(fn: Callable[[Any], bool]) -> Transform:
    return lambda items: filter(fn, items)


def _batch(n: int) -> Transform:
    def apply(items: Iterator[Any]) -> Iterator[list[Any]]:
        batch = []
        for item in items:
            batch.append(item)
            if len(batch) >= n:
                yield batch
                batch = []
        if batch:
            yield batch

    return apply


def _flatten(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        yield from item


def _combine(fn: Callable[[Any], list[Any]]) -> Transform:
    return lambda items: _flatten(map(fn, items))


def _shuffle(buffer_size: int, seed: int | None) -> Transform:
    def apply(items: Iterator[Any]) -> Iterator[Any]:
        generator = random.Random(seed)
        buffer: list[Any] = []
        for item in items:
            buffer.append(item)
            if len(buffer) >= buffer_size:
                yield buffer.pop(generator.randrange(len(buffer)))
        while buffer:
            yield buffer.pop(generator.randrange(len(buffer)))

    return apply


# --- shards ---------------------------------------------------------------------------------------


class ParallelIteratorWorker:
    """What an actor is that a `ParallelIterator` can be made of: see `from_actors`."""

    def __init__(self, item_generator: Any, repeat: bool) -> None:
        """`item_generator`: an iterable, or a function that returns one. `repeat`: without end."""
        self._make = item_generator if callable(item_generator) else lambda: item_generator
        self._repeat = repeat
        self._items: Iterator[Any] = iter(())
        self._slices: dict[int, deque[Any]] = {}

    def _all(self) -> Iterator[Any]:
        yield from self._make()
        while self._repeat:
            yield from self._make()

    def par_iter_init(self, transforms: Sequence[Transform]) -> None:
        """Begin anew."""
        items: Any = self._all()
        for transform in transforms:
            items = transform(iter(items))
        self._items = iter(items)
        self._slices = {}

    def par_iter_next(self) -> Any:
        """Raises StopIteration at the end."""
        return next(self._items)

    def par_iter_next_batch(self, batch_ms: int) -> list[Any]:
        """What comes within `batch_ms`, at least one item."""
        return _within(batch_ms, self.par_iter_next)

    def par_iter_slice(self, step: int, start: int) -> Any:
        """The next of every `step`th item from `start` on."""
        mine = self._slices.setdefault(start, deque())
        while not mine:
            for position in range(step):
                try:
                    item = next(self._items)
                except StopIteration:
                    if not mine:
                        raise
                    break
                self._slices.setdefault(position, deque()).append(item)
        return mine.popleft()

    def par_iter_slice_batch(self, step: int, start: int, batch_ms: int) -> list[Any]:
        return _within(batch_ms, lambda: self.par_iter_slice(step, start))


def _within(batch_ms: int, take: Callable[[], Any]) -> list[Any]:
    batch = [take()]
    end_s = time.monotonic() + batch_ms / 1000
    while time.monotonic() < end_s:
        try:
            batch.append(take())
        except StopIteration:
            break
    return batch


def from_items(items: Sequence[Any], num_shards: int = 2, repeat: bool = False
               ) -> ParallelIterator:
    """Item i is of shard i modulo `num_shards`."""
    shards = [list(items[i::num_shards]) for i in range(num_shards)]
    kind = type(items[0]).__name__ if items else "None"
    return from_iterators(shards, repeat, f"from_items[{kind}, {len(items)}, shards={num_shards}]"
                          + ("[repeat=True]" if repeat else ""))


def from_range(n: int, num_shards: int = 2, repeat: bool = False) -> ParallelIterator:
    """0 to n - 1, in consecutive parts; the last shard has what is left over."""
    part = n // num_shards
    ends = [*(part * i for i in range(num_shards)), n]
    return from_iterators([range(ends[i], ends[i + 1]) for i in range(num_shards)], repeat,
                          f"from_range[{n}, shards={num_shards}]"
                          + ("[repeat=True]" if repeat else ""))


def from_iterators(generators: Sequence[Any], repeat: bool = False, name: str | None = None
                   ) -> ParallelIterator:
    """A shard of each: an iterable, or a function that returns one (what cannot be pickled)."""
    worker = ray.remote(ParallelIteratorWorker)
    return from_actors([worker.remote(one, repeat) for one in generators],
                       name or f"from_iterators[shards={len(generators)}]"
                       + ("[repeat=True]" if repeat else ""))


def from_actors(actors: Sequence[Any], name: str | None = None) -> ParallelIterator:
    """A shard of each actor: they are `ParallelIteratorWorker`s."""
    return ParallelIterator([(actor, ()) for actor in actors],
                            name or f"from_actors[shards={len(actors)}]")


class ParallelIterator:
    """Items in shards. Its methods return others, and nothing runs until one is gathered."""

    def __init__(self, shards: Sequence[tuple[Any, tuple[Transform, ...]]], name: str,
                 parents: Sequence[ParallelIterator] = ()) -> None:
        self._shards = list(shards)
        self.name = name
        self.parent_iterators = list(parents)  # whose actors must live

    def __repr__(self) -> str:
        return f"ParallelIterator[{self.name}]"

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a ParallelIterator is gathered first: it.gather_sync() in the order of "
                        "the shards, or it.gather_async() as items come")

    def _with(self, transform: Transform, name: str) -> ParallelIterator:
        return ParallelIterator([(actor, (*before, transform)) for actor, before in self._shards],
                                self.name + name, self.parent_iterators)

    def transform(self, fn: Transform) -> ParallelIterator:
        """`fn` of the iterator of each shard."""
        return self._with(fn, ".transform()")

    def for_each(self, fn: Callable[[Any], Any], max_concurrency: int = 1, resources: Any = None
                 ) -> ParallelIterator:
        """`fn` of each item, in the shard. Above 1, `max_concurrency` items of a shard are tasks
        at once (0: all), which have `resources`."""
        if max_concurrency < 0:
            raise ValueError(f"max_concurrency must be >= 0, not {max_concurrency}")
        return self._with(_for_each(fn, max_concurrency, resources), ".for_each()")

    def filter(self, fn: Callable[[Any], bool]) -> ParallelIterator:
        return self._with(_filter(fn), ".filter()")

    def batch(self, n: int) -> ParallelIterator:
        return self._with(_batch(n), f".batch({n})")

    def flatten(self) -> ParallelIterator:
        return self._with(_flatten, ".flatten()")

    def combine(self, fn: Callable[[Any], list[Any]]) -> ParallelIterator:
        """`fn` makes several items of one."""
        return self._with(_combine(fn), ".combine()")

    def local_shuffle(self, shuffle_buffer_size: int, seed: int | None = None) -> ParallelIterator:
        """Each shard's items by chance, out of so many at a time."""
        return self._with(_shuffle(shuffle_buffer_size, seed),
                          f".local_shuffle(shuffle_buffer_size={shuffle_buffer_size}, seed={seed})")

    def union(self, other: ParallelIterator) -> ParallelIterator:
        """The shards of both."""
        if not isinstance(other, ParallelIterator):
            raise TypeError(f"union() takes a ParallelIterator, not {other!r}")
        return ParallelIterator([*self._shards, *other._shards],
                                f"ParallelUnion[{self}, {other}]", [self, other])

    def select_shards(self, shards_to_keep: Sequence[int]) -> ParallelIterator:
        """Those of these numbers, each once."""
        if len(set(shards_to_keep)) != len(shards_to_keep):
            raise ValueError(f"a shard is selected twice in {list(shards_to_keep)}")
        return ParallelIterator([self._shards[i] for i in shards_to_keep],
                                f"{self.name}.select_shards({len(shards_to_keep)} total)", [self])

    def repartition(self, num_partitions: int, batch_ms: int = 0) -> ParallelIterator:
        """As many shards of the same items; `batch_ms`: how long items are gathered in a batch."""
        actors = self._begin()

        def make(start: int) -> Callable[[], Iterator[Any]]:
            def items() -> Iterator[Any]:
                running = {a.par_iter_slice_batch.remote(num_partitions, start, batch_ms): a
                           for a in actors}
                while running:
                    [done], _ = ray.wait(list(running))
                    actor = running.pop(done)
                    try:
                        batch = ray.get(done)
                    except StopIteration:
                        continue
                    running[actor.par_iter_slice_batch.remote(
                        num_partitions, start, batch_ms)] = actor
                    yield from batch

            return items

        made = from_iterators([make(i) for i in range(num_partitions)], False,
                              f"{self.name}.repartition[num_partitions={num_partitions}]")
        made.parent_iterators = [self]
        return made

    def _begin(self) -> list[Any]:
        ray.get([actor.par_iter_init.remote(transforms) for actor, transforms in self._shards])
        return [actor for actor, _ in self._shards]

    def gather_sync(self) -> LocalIterator:
        """One item of each shard in turn."""
        found = self.batch_across_shards().flatten()
        found.name = f"{self}.gather_sync()"
        return found

    def batch_across_shards(self) -> LocalIterator:
        """Lists of one item of each shard."""

        def items(_source: _Source) -> Iterator[list[Any]]:
            actors = self._begin()
            while actors:
                refs = [actor.par_iter_next.remote() for actor in actors]
                batch, active = [], []
                for actor, ref in zip(actors, refs, strict=True):
                    try:
                        batch.append(ray.get(ref))
                        active.append(actor)
                    except StopIteration:
                        pass
                if batch:
                    yield batch
                actors = active

        return LocalIterator(items, name=f"{self}.batch_across_shards()")

    def gather_async(self, batch_ms: int = 0, num_async: int = 1) -> LocalIterator:
        """Items as they come. Of each shard `num_async` calls are under way; `batch_ms`: how long
        a shard gathers items for one answer."""
        if num_async < 1:
            raise ValueError(f"num_async must be >= 1, not {num_async}")

        def items(source: _Source) -> Iterator[Any]:
            actors = self._begin()
            running = {actor.par_iter_next_batch.remote(batch_ms): actor
                       for _ in range(num_async) for actor in actors}
            while running:
                [done], _ = ray.wait(list(running))
                actor = running.pop(done)
                try:
                    batch = ray.get(done)
                except StopIteration:
                    continue
                running[actor.par_iter_next_batch.remote(batch_ms)] = actor
                for item in batch:
                    source.actor = actor
                    yield item

        return LocalIterator(items, name=f"{self}.gather_async()")

    def num_shards(self) -> int:
        return len(self._shards)

    def shards(self) -> list[LocalIterator]:
        """A local iterator of each."""
        return [self.get_shard(i) for i in range(len(self._shards))]

    def get_shard(self, shard_index: int, batch_ms: int = 0, num_async: int = 1) -> LocalIterator:
        """A local iterator of this one."""
        found = self.select_shards([shard_index]).gather_async(batch_ms, num_async)
        found.name = f"{self.name}.shard[{shard_index}]"
        return found

    def take(self, n: int) -> list[Any]:
        """At most the first n items."""
        return self.gather_sync().take(n)

    def show(self, n: int = 20) -> None:
        self.gather_sync().show(n)


class _Source:
    """Whose item it is that is under way."""

    actor: Any = None


class LocalIterator:
    """Items of shards, here. Its methods return others; it starts anew when iterated over."""

    def __init__(self, base_iterator: Callable[[_Source], Iterable[Any]],
                 transforms: Sequence[Callable[[Iterator[Any], _Source], Iterable[Any]]] = (),
                 name: str | None = None) -> None:
        self._base = base_iterator
        self._transforms = tuple(transforms)
        self.name = name or "unknown"
        self._begun: Iterator[Any] | None = None

    def __repr__(self) -> str:
        return f"LocalIterator[{self.name}]"

    def _begin(self, source: _Source) -> Iterator[Any]:
        items = iter(self._base(source))
        for transform in self._transforms:
            items = iter(transform(items, source))
        return items

    def __iter__(self) -> Iterator[Any]:
        return self._begin(_Source())

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = iter(self)
        return next(self._begun)

    def _with(self, transform: Transform, name: str) -> LocalIterator:
        return LocalIterator(self._base, (*self._transforms, lambda items, _: transform(items)),
                             self.name + name)

    def transform(self, fn: Transform) -> LocalIterator:
        return self._with(fn, ".transform()")

    def for_each(self, fn: Callable[[Any], Any], max_concurrency: int = 1, resources: Any = None
                 ) -> LocalIterator:
        """`fn` of each item, here; above 1 `max_concurrency` of them are tasks at once."""
        return self._with(_for_each(fn, max_concurrency, resources), ".for_each()")

    def filter(self, fn: Callable[[Any], bool]) -> LocalIterator:
        return self._with(_filter(fn), ".filter()")

    def batch(self, n: int) -> LocalIterator:
        return self._with(_batch(n), f".batch({n})")

    def flatten(self) -> LocalIterator:
        return self._with(_flatten, ".flatten()")

    def combine(self, fn: Callable[[Any], list[Any]]) -> LocalIterator:
        """`fn` makes several items of one."""
        return self._with(_combine(fn), ".combine()")

    def shuffle(self, shuffle_buffer_size: int, seed: int | None = None) -> LocalIterator:
        """By chance, out of so many at a time."""
        return self._with(_shuffle(shuffle_buffer_size, seed), ".shuffle()")

    def zip_with_source_actor(self) -> LocalIterator:
        """Pairs of the actor an item comes from, and the item; after `gather_async`."""
        return LocalIterator(
            self._base, (*self._transforms,
                         lambda items, source: ((source.actor, item) for item in items)),
            self.name + ".zip_with_source_actor()")

    def take(self, n: int) -> list[Any]:
        """At most the first n items."""
        found: list[Any] = []
        if n > 0:
            for item in self:
                found.append(item)
                if len(found) >= n:
                    break
        return found

    def show(self, n: int = 20) -> None:
        for item in self.take(n):
            print(item)

    def duplicate(self, n: int) -> list[LocalIterator]:
        """n iterators that each have all items; what the slowest has not taken is kept."""
        if n < 2:
            raise ValueError(f"duplicate() makes at least 2, not {n}")
        queues: list[deque[Any]] = [deque() for _ in range(n)]
        items = iter(self)

        def make(mine: deque[Any]) -> Callable[[_Source], Iterator[Any]]:
            def take(_source: _Source) -> Iterator[Any]:
                while True:
                    if not mine:
                        try:
                            item = next(items)
                        except StopIteration:
                            return
                        for queue in queues:
                            queue.append(item)
                    yield mine.popleft()

            return take

        return [LocalIterator(make(queue), name=f"{self.name}.duplicate[{i}]")
                for i, queue in enumerate(queues)]

    def union(self, *others: LocalIterator, deterministic: bool = False,
              round_robin_weights: Sequence[float | str] | None = None) -> LocalIterator:
        """All of them in turn: one item of each, or as many as its weight says ("*": all that it
        has). `deterministic` has no effect: the order is always that."""
        members = [self, *others]
        if not all(isinstance(member, LocalIterator) for member in members):
            raise TypeError("union() takes LocalIterators")
        weights: Sequence[Any] = round_robin_weights or [1] * len(members)
        if len(weights) != len(members):
            raise ValueError(f"{len(weights)} weights for {len(members)} iterators")

        def items(source: _Source) -> Iterator[Any]:
            active = [(member._begin(source), weight)
                      for member, weight in zip(members, weights, strict=True)]
            while active:
                remaining = []
                for iterator, weight in active:
                    taken = 0
                    for item in iterator:
                        yield item
                        taken += 1
                        if weight != "*" and taken >= weight:
                            remaining.append((iterator, weight))
                            break
                active = remaining

        return LocalIterator(items, name=f"LocalUnion[{', '.join(map(str, members))}]")


__all__ = ["LocalIterator", "ParallelIterator", "ParallelIteratorWorker", "from_actors",
           "from_items", "from_iterators", "from_range"]
