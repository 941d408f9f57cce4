"""The resource ledger: what this node has, and who holds how much of it. Pure.

Amounts are integers in ten-thousandths of a unit, so the books balance exactly:

RL-1  held + free == total, for every resource.
RL-2  a GPU index is held by at most UNIT in all.

`free` may go negative: a worker that wakes from `get` takes its CPU back at once, and nothing
new starts until the balance has recovered (ARCHITECTURE.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from hpcray.protocol.labels import OFFERED
from hpcray.protocol.messages import UNIT

Shape = tuple[tuple[str, int], ...]


class ResourceLedger:
    def __init__(self, total: dict[str, int]) -> None:
        self.total = dict(total)
        self.free = dict(total)
        # Free ten-thousandths of each device: the node's under "GPU", a placement group's under
        # its own name for them, and which of those are one bundle's.
        self._devices: dict[str, dict[int, int]] = {
            "GPU": dict.fromkeys(range(total.get("GPU", 0) // UNIT), UNIT)}
        self._bundle_devices: dict[str, tuple[int, ...]] = {}

    def fits(self, shape: Shape) -> bool:
        """Whether `shape` could be acquired now."""
        free = self.free
        return all(free.get(name, 0) >= amount for name, amount in shape) and (
            not self._devices["GPU"] or self.pick(shape) is not None
        )

    def could_ever_fit(self, shape: Shape) -> bool:
        return all(self.total.get(name, 0) >= amount for name, amount in shape)

    def slots(self, shape: Shape) -> int:
        """How many of `shape` fit at once now; a shape of nothing counts as many."""
        return min((max(self.free.get(name, 0), 0) // amount for name, amount in shape),
                   default=1000)

    def slots_in_all(self, shape: Shape) -> int:
        """How many of `shape` would fit if nobody held anything."""
        return min((self.total.get(name, 0) // amount for name, amount in shape), default=1 << 30)

    def acquire(self, shape: Shape) -> tuple[int, ...]:
        """Take `shape` (the caller asked `fits`); the GPU indices it got."""
        devices = self.pick(shape) or ()
        self.take_back(shape, devices)
        return devices

    def release(self, shape: Iterable[tuple[str, int]], devices: tuple[int, ...] = ()) -> None:
        for name, amount in shape:
            self.free[name] += amount
            if devices and name in self._devices:
                for index in devices:
                    self._devices[name][index] += min(amount, UNIT)

    def take_back(
        self, shape: Iterable[tuple[str, int]], devices: tuple[int, ...] = ()
    ) -> None:
        """Acquire without asking: a worker resumes. `free` may become negative."""
        for name, amount in shape:
            self.free[name] = self.free.get(name, 0) - amount
            if devices and name in self._devices:
                for index in devices:
                    self._devices[name][index] -= min(amount, UNIT)

    def pick(self, shape: Shape) -> tuple[int, ...] | None:
        """Indices for the GPU part of `shape`, () if it has none, None if they do not fit.

        Fractions are packed onto the fullest GPU that has room, to keep others whole.
        """
        pool: dict[int, int] = {}
        wanted = 0
        for name, amount in shape:  # sorted: a group's name comes before its bundle's
            if name in self._devices:
                wanted, pool = amount, self._devices[name]
            elif name in self._bundle_devices:
                pool = {index: pool[index] for index in self._bundle_devices[name]}
        if not wanted:
            return ()
        if wanted < UNIT:
            fitting = [(have, index) for index, have in pool.items() if have >= wanted]
            return (min(fitting)[1],) if fitting else None
        whole = [index for index, have in pool.items() if have == UNIT]
        count = wanted // UNIT
        return tuple(whole[:count]) if len(whole) >= count else None

    def offer_without_limit(self, condition: str) -> None:
        """This node meets a condition on labels: what asks for it may run here."""
        if condition not in self.total:
            self.total[condition] = self.free[condition] = OFFERED

    # --- placement groups: parts of what is held, offered again under names of their own ----------

    def offer(self, group: str, index: int, shape: Shape, devices: tuple[int, ...]) -> None:
        """One bundle: as the group's share of this node (`CPU@g`), and by itself (`CPU@g:0`)."""
        for name, amount in shape:
            for offered in (f"{name}{group}", f"{name}{group}:{index}"):
                self.total[offered] = self.total.get(offered, 0) + amount
                self.free[offered] = self.free.get(offered, 0) + amount
            if name == "GPU":
                pool = self._devices.setdefault(f"GPU{group}", {})
                for device in devices:
                    pool[device] = pool.get(device, 0) + min(amount, UNIT)
                self._bundle_devices[f"GPU{group}:{index}"] = devices

    def withdraw(self, group: str) -> None:
        """Nothing more of the group can be acquired."""
        for name in self._names(group):
            self.free[name] -= self.total[name]
            self.total[name] = 0

    def forget(self, group: str) -> bool:
        """Drop a withdrawn group's names, if nobody holds any of it."""
        names = self._names(group)
        if any(self.free[name] for name in names):
            return False
        for name in names:
            del self.free[name], self.total[name]
            self._devices.pop(name, None)
            self._bundle_devices.pop(name, None)
        return True

    def _names(self, group: str) -> list[str]:
        return [name for name in self.total if group in name]

    def validate(self, held: Iterable[Shape]) -> None:
        """Check RL-1 against the shapes the caller believes to be held."""
        sums = dict.fromkeys(self.total, 0)
        for shape in held:
            for name, amount in shape:
                sums[name] = sums.get(name, 0) + amount
        for name, total in self.total.items():
            assert sums[name] + self.free[name] == total, (name, sums[name], self.free[name], total)
        for pool in self._devices.values():
            assert all(0 <= have <= UNIT for have in pool.values()), self._devices


def cpu_part(shape: Shape) -> Shape:
    """What a blocked worker gives back: CPU only, never GPU, memory or custom resources."""
    return tuple(pair for pair in shape if _is_cpu(pair[0]))


def without_cpu(shape: Shape) -> Shape:
    return tuple(pair for pair in shape if not _is_cpu(pair[0]))


def _is_cpu(name: str) -> bool:
    return name == "CPU" or name.startswith("CPU@")


def is_group_shape(shape: Shape) -> bool:
    """Whether it asks for a part of a placement group."""
    return any("@" in name for name, _ in shape)
