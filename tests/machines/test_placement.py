"""Where bundles go, and what a reserved bundle is in the ledger."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.node.ledger import ResourceLedger, Shape
from hpcray.node.placement import Room, choose
from hpcray.protocol.messages import UNIT

ONE: Shape = (("CPU", UNIT),)
TWO: Shape = (("CPU", 2 * UNIT),)


def nodes(*cpus: int) -> Room:
    return Room({rank: {"CPU": count * UNIT} for rank, count in enumerate(cpus)})


@pytest.mark.parametrize(("strategy", "bundles", "cpus", "expected"), [
    ("PACK", [ONE, ONE], (1, 2), [1, 1]),  # all on one node if one can
    ("PACK", [ONE, ONE, ONE], (2, 1), [0, 0, 1]),  # else on few
    ("PACK", [ONE, TWO], (1, 2), [0, 1]),  # the large one has no other place
    ("PACK", [TWO], (1, 1), None),
    ("STRICT_PACK", [ONE, ONE], (1, 2), [1, 1]),
    ("STRICT_PACK", [ONE, ONE], (1, 1), None),
    ("SPREAD", [ONE, ONE], (4, 1), [0, 1]),
    ("SPREAD", [ONE, ONE, ONE], (4, 1), [0, 1, 0]),  # two must share
    ("STRICT_SPREAD", [ONE, ONE], (4, 1), [0, 1]),
    ("STRICT_SPREAD", [ONE, ONE, ONE], (4, 1), None),
])
def test_choice(strategy: str, bundles: list[Shape], cpus: tuple[int, ...],
                expected: list[int] | None) -> None:
    assert choose(bundles, strategy, nodes(*cpus)) == expected


@given(strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
       sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
       cpus=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_a_choice_fits(strategy: str, sizes: list[int], cpus: list[int]) -> None:
    bundles: list[Shape] = [(("CPU", size * UNIT),) for size in sizes]
    chosen = choose(bundles, strategy, nodes(*cpus))
    if chosen is None:
        return
    for rank, count in enumerate(cpus):
        assert sum(size for size, where in zip(sizes, chosen, strict=True)
                   if where == rank) <= count
    if strategy == "STRICT_PACK":
        assert len(set(chosen)) == 1
    if strategy == "STRICT_SPREAD":
        assert len(set(chosen)) == len(chosen)


def test_a_bundle_is_offered_under_its_own_names() -> None:
    ledger = ResourceLedger({"CPU": 4 * UNIT})
    assert ledger.acquire(TWO) == ()
    ledger.offer("@g", 0, TWO, ())
    own = (("CPU@g", UNIT), ("CPU@g:0", UNIT))
    assert ledger.fits(TWO)  # what is left of the node
    assert ledger.fits(own)
    ledger.acquire(own)
    ledger.acquire((("CPU@g", UNIT),))
    assert not ledger.fits((("CPU@g", UNIT),))
    assert not ledger.fits((("CPU@g", UNIT), ("CPU@g:0", UNIT)))
    ledger.validate([TWO, own, (("CPU@g", UNIT),)])


def test_gpus_of_a_bundle_are_its_own() -> None:
    ledger = ResourceLedger({"GPU": 4 * UNIT})
    pair: Shape = (("GPU", 2 * UNIT),)
    ledger.acquire((("GPU", UNIT),))
    first, second = ledger.acquire(pair), ledger.acquire((("GPU", UNIT),))
    ledger.offer("@g", 0, pair, first)
    ledger.offer("@g", 1, (("GPU", UNIT),), second)
    in_second = (("GPU@g", UNIT), ("GPU@g:1", UNIT))
    assert ledger.acquire(in_second) == second
    assert ledger.acquire((("GPU@g", UNIT // 2),)) == first[:1]
    assert ledger.acquire((("GPU@g", UNIT // 2),)) == first[:1]  # packed
    assert not ledger.fits(in_second)
    assert not ledger.fits((("GPU@g", 2 * UNIT),))
    assert ledger.acquire((("GPU@g", UNIT), ("GPU@g:0", UNIT))) == first[1:]
    ledger.release(in_second, second)
    assert ledger.fits(in_second)


def test_a_withdrawn_group_goes_when_nobody_holds_any() -> None:
    ledger = ResourceLedger({"CPU": 2 * UNIT, "GPU": UNIT})
    shape: Shape = (("CPU", UNIT), ("GPU", UNIT))
    devices = ledger.acquire(shape)
    ledger.offer("@g", 0, shape, devices)
    held = (("CPU@g", UNIT), ("GPU@g", UNIT))
    taken = ledger.acquire(held)
    ledger.withdraw("@g")
    assert not ledger.forget("@g")
    ledger.validate([shape, held])
    ledger.release(held, taken)
    assert ledger.forget("@g")
    ledger.release(shape, devices)
    assert ledger.free == ledger.total == {"CPU": 2 * UNIT, "GPU": UNIT}
