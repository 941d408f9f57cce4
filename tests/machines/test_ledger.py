"""ResourceLedger: RL-1 and RL-2 under any legal sequence."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.ledger import ResourceLedger, Shape, cpu_part
from hpcray.protocol.messages import UNIT

TOTAL = {"CPU": 4 * UNIT, "GPU": 2 * UNIT, "memory": 1000}

shapes = st.builds(
    lambda cpu, gpu, memory: tuple(
        (name, amount) for name, amount in (("CPU", cpu), ("GPU", gpu), ("memory", memory))
        if amount),
    st.sampled_from((0, 1, UNIT // 2, UNIT, 3 * UNIT)),
    st.sampled_from((0, UNIT // 4, UNIT // 2, UNIT, 2 * UNIT)),
    st.sampled_from((0, 1, 600)),
)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = ResourceLedger(TOTAL)
        self.held: list[tuple[Shape, tuple[int, ...]]] = []
        self.blocked: list[tuple[Shape, tuple[int, ...]]] = []

    @rule(shape=shapes)
    def acquire(self, shape: Shape) -> None:
        if not self.ledger.fits(shape):
            assert self.ledger.slots(shape) == 0 or dict(shape).get("GPU")
            return
        assert self.ledger.could_ever_fit(shape)
        devices = self.ledger.acquire(shape)
        gpu = dict(shape).get("GPU", 0)
        assert len(devices) == (1 if 0 < gpu < UNIT else gpu // UNIT)
        self.held.append((shape, devices))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        shape, devices = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.ledger.release(shape, devices)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def block(self, data: st.DataObject) -> None:
        lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.ledger.release(cpu_part(lease[0]))
        self.blocked.append(lease)

    @precondition(lambda self: self.blocked)
    @rule()
    def unblock(self) -> None:
        lease = self.blocked.pop()
        self.ledger.take_back(cpu_part(lease[0]))
        self.held.append(lease)

    @invariant()
    def books_balance(self) -> None:
        held = [shape for shape, _ in self.held]
        held += [tuple(p for p in shape if p[0] != "CPU") for shape, _ in self.blocked]
        self.ledger.validate(held)

    @invariant()
    def no_gpu_is_given_twice(self) -> None:
        given = [0, 0]
        for shape, devices in self.held + self.blocked:
            for index in devices:
                given[index] += min(dict(shape)["GPU"], UNIT)
        assert all(amount <= UNIT for amount in given)

    def teardown(self) -> None:
        while self.blocked:
            self.unblock()
        for shape, devices in self.held:
            self.ledger.release(shape, devices)
        assert self.ledger.free == TOTAL


TestLedger = LedgerMachine.TestCase
