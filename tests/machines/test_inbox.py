"""Cause before effect, however the batches of different clients arrive: `node/inbox.py`."""

from __future__ import annotations

import random
from typing import Any

from hpcray.node.inbox import Inboxes
from hpcray.protocol.messages import CausalHeader


class Sockets:
    """Clients whose batches are (their number, a count)."""

    def __init__(self, clients: int) -> None:
        self.unread: dict[int, list[list[Any]]] = {number: [] for number in range(clients)}
        self.handled: list[tuple[int, int]] = []
        self.inboxes = Inboxes(self.read, self.handle)
        for number in self.unread:
            self.inboxes.add(number)

    def read(self, number: int) -> bool:
        """All that is there, as a node does: it may be more than was asked for."""
        found, self.unread[number] = self.unread[number], []
        self.inboxes.of[number].batches.extend(found)
        return bool(found)

    def handle(self, number: int, batch: list[Any]) -> None:
        self.handled.append(batch[-1])

    def says(self, number: int, count: int, heard: tuple[tuple[int, int], ...] = ()) -> None:
        batch: list[Any] = [(number, count)]
        if heard:
            batch.insert(0, CausalHeader(False, heard))
        self.unread[number].append(batch)

    def arrive(self, number: int) -> None:
        self.read(number)
        self.inboxes.handle_all(number)


def test_what_a_client_has_heard_of_comes_first_and_no_more() -> None:
    sockets = Sockets(2)
    for count in (1, 2, 3):
        sockets.says(1, count)
    sockets.says(0, 1, ((1, 2),))
    sockets.arrive(0)
    assert sockets.handled == [(1, 1), (1, 2), (0, 1), (1, 3)]
    assert not any(inbox.batches for inbox in sockets.inboxes.of.values()), "nobody comes back"


def test_two_that_talk_to_each_other() -> None:
    sockets = Sockets(2)
    sockets.says(0, 1)
    sockets.says(1, 1, ((0, 1),))
    sockets.says(0, 2, ((1, 1),))
    sockets.says(1, 2, ((0, 2),))
    sockets.says(0, 3, ((1, 2),))
    for first in (0, 1):
        copy = Sockets(2)
        copy.unread = {number: list(batches) for number, batches in sockets.unread.items()}
        copy.arrive(first)
        copy.arrive(1 - first)
        assert copy.handled == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]


def test_one_that_has_ended_holds_nobody_up() -> None:
    sockets = Sockets(2)
    sockets.says(0, 1, ((1, 5), (9, 3)))
    del sockets.inboxes.of[1]
    sockets.arrive(0)
    assert sockets.handled == [(0, 1)]


def test_histories_at_random() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        sockets = Sockets(4)
        said = dict.fromkeys(sockets.unread, 0)
        causes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for _ in range(40):
            speaker, *others = rng.sample(range(4), rng.randint(1, 4))
            heard = tuple((other, said[other]) for other in others if said[other])
            said[speaker] += 1
            sockets.says(speaker, said[speaker], heard)
            causes[(speaker, said[speaker])] = list(heard)
            if rng.random() < 0.3:
                sockets.arrive(rng.randrange(4))
        for number in range(4):
            sockets.arrive(number)
        place = {event: index for index, event in enumerate(sockets.handled)}
        assert len(place) == len(sockets.handled) == len(causes)
        for (speaker, count), heard in causes.items():
            if count > 1:
                heard.append((speaker, count - 1))
            assert all(place[cause] < place[(speaker, count)] for cause in heard), seed
