"""Sizes: batches in parts, and what is refused where it is made."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.protocol import messages as m
from hpcray.protocol import sizes

# Lengths of messages around what makes a part full, on its own or together with others.
LIMIT = 1000
lengths = st.lists(st.one_of(
    st.integers(0, 40), st.integers(LIMIT // 2 - 6, LIMIT // 2 + 2),
    st.integers(LIMIT - 14, LIMIT + 2), st.just(5 * LIMIT)), max_size=120)


@given(lengths)
def test_parts_are_the_batch_and_keep_the_limit(lengths: list[int]) -> None:
    batch = [m.TaskYield(bytes([index]), index, m.PeerReturn(b"v" * length))
             for index, length in enumerate(lengths)]
    parts = list(sizes.parts(batch, m.encode, LIMIT))
    decoded = [m.decode_to_peer(part) for part in parts]
    assert [message for part in decoded for message in part] == batch
    assert all(decoded), "no part is empty"
    for encoded, part in zip(parts, decoded, strict=True):
        assert len(encoded) <= LIMIT or len(part) == 1
    for first, second in zip(decoded, decoded[1:], strict=False):
        # Small messages are joined by the slice: a part ends before the slice that does not fit.
        together = len(m.encode([*first, *second[:15]]))
        assert together > LIMIT - 5, "no part ends before it is full"


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_an_array_header_is_msgpacks(count: int) -> None:
    assert sizes.array_header(count) + b"\xc0" * count == msgspec.msgpack.encode([None] * count)


def test_a_part_is_made_when_it_is_asked_for() -> None:
    encoded = []

    def encode(message: object) -> bytes:
        encoded.append(message)
        return m.encode(message)

    parts = sizes.parts([b"v" * 600] * 1000, encode, LIMIT)
    next(parts)
    assert len(encoded) < 20
    assert len(list(parts)) == 999


def test_a_message_that_should_have_been_refused_is_not_sent() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return sizes.MESSAGE_MAX_BYTES + 1

    with pytest.raises(ValueError, match="a str message of 268,435,457 B exceeds 268,435,456 B"):
        list(sizes.parts(["x"], lambda _: Huge()))


@pytest.mark.parametrize(("count", "refused"), [
    (sizes.REFS_MAX - 1, False), (sizes.REFS_MAX, False), (sizes.REFS_MAX + 1, True)])
def test_refs_of_one_call(count: int, refused: bool) -> None:
    if not refused:
        sizes.check_refs(count * 28, "this list holds")
        return
    with pytest.raises(ValueError, match="this list holds 1,000,001 ObjectRefs, and at most"):
        sizes.check_refs(count * 28, "this list holds")


@pytest.mark.parametrize("nbytes", [sizes.TEMPLATE_MAX_BYTES, sizes.TEMPLATE_MAX_BYTES + 1])
def test_definitions(nbytes: int) -> None:
    if nbytes == sizes.TEMPLATE_MAX_BYTES:
        sizes.check_template(nbytes, "f")
        return
    with pytest.raises(ValueError, match="the definition of fff takes 1,048,577 B, and at most"):
        sizes.check_template(nbytes, "fff")
