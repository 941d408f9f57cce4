"""The resource ledger: what this node has, and who holds how much of it. Pure.

Amounts are integers in ten-thousandths of a unit, so the books balance exactly:

RL-1  held + free == total, for every resource.
RL-2  a GPU index is held by at most UNIT in all.

`free` may go negative: a worker that wakes from `get` takes its CPU back at once, and nothing
new starts until the balance has recovered (ARCHITECTURE.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from hpcray.protocol.messages import UNIT

Shape = tuple[tuple[str, int], ...]


class ResourceLedger:
    def __init__(self, total: dict[str, int]) -> None:
        self.total = dict(total)
        self.free = dict(total)
        # Free ten-thousandths of each GPU.
        self._gpus = [UNIT] * (total.get("GPU", 0) // UNIT)

    def fits(self, shape: Shape) -> bool:
        """Whether `shape` could be acquired now."""
        free = self.free
        return all(free.get(name, 0) >= amount for name, amount in shape) and (
            not self._gpus or self._pick_gpus(shape) is not None
        )

    def could_ever_fit(self, shape: Shape) -> bool:
        return all(self.total.get(name, 0) >= amount for name, amount in shape)

    def slots(self, shape: Shape) -> int:
        """How many of `shape` fit at once now; a shape of nothing counts as many."""
        return min((max(self.free.get(name, 0), 0) // amount for name, amount in shape),
                   default=1000)

    def acquire(self, shape: Shape) -> tuple[int, ...]:
        """Take `shape` (the caller asked `fits`); the GPU indices it got."""
        devices: tuple[int, ...] = ()
        for name, amount in shape:
            self.free[name] = self.free.get(name, 0) - amount
            if name == "GPU":
                devices = self._pick_gpus(shape) or ()
                for index in devices:
                    self._gpus[index] -= min(amount, UNIT)
        return devices

    def release(self, shape: Iterable[tuple[str, int]], devices: tuple[int, ...] = ()) -> None:
        for name, amount in shape:
            self.free[name] += amount
            if name == "GPU":
                for index in devices:
                    self._gpus[index] += min(amount, UNIT)

    def take_back(self, shape: Iterable[tuple[str, int]]) -> None:
        """Acquire without asking: a worker resumes. `free` may become negative."""
        for name, amount in shape:
            self.free[name] = self.free.get(name, 0) - amount

    def _pick_gpus(self, shape: Shape) -> tuple[int, ...] | None:
        """Indices for the GPU part of `shape`, () if it has none, None if they do not fit.

        Fractions are packed onto the fullest GPU that has room, to keep others whole.
        """
        for name, amount in shape:
            if name == "GPU":
                if amount < UNIT:
                    fitting = [(have, i) for i, have in enumerate(self._gpus) if have >= amount]
                    return (min(fitting)[1],) if fitting else None
                whole = [i for i, have in enumerate(self._gpus) if have == UNIT]
                count = amount // UNIT
                return tuple(whole[:count]) if len(whole) >= count else None
        return ()

    def validate(self, held: Iterable[Shape]) -> None:
        """Check RL-1 against the shapes the caller believes to be held."""
        sums = dict.fromkeys(self.total, 0)
        for shape in held:
            for name, amount in shape:
                sums[name] = sums.get(name, 0) + amount
        for name, total in self.total.items():
            assert sums[name] + self.free[name] == total, (name, sums[name], self.free[name], total)
        assert all(0 <= have <= UNIT for have in self._gpus), self._gpus


def cpu_part(shape: Shape) -> Shape:
    """What a blocked worker gives back: CPU only, never GPU, memory or custom resources."""
    return tuple(pair for pair in shape if pair[0] == "CPU")
