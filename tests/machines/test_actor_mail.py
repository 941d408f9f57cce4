"""What the parts of actors say to each other on one node: at once, and one after the other."""

from __future__ import annotations

import pytest

from hpcray.node.actors import Mail
from hpcray.node.holders import Holders
from hpcray.node.outbox import Outbox
from hpcray.protocol import ids


def mail_of_rank_0() -> tuple[Mail, Outbox, Holders]:
    outbox = Outbox()
    holders = Holders(outbox, ids.home_of_object)
    return Mail(0, outbox, holders), outbox, holders


def test_what_a_message_leads_to_is_heard_when_it_has_been_dealt_with() -> None:
    mail, outbox, _ = mail_of_rank_0()
    heard: list[str] = []

    def number(rank: int, message: int) -> None:
        heard.append(f"{message} begins")
        if message < 2:
            mail.say(rank, message + 1)
            mail.say(rank, message + 1)
        heard.append(f"{message} ends")

    mail.handlers = {int: number}
    mail.say(0, 1)
    assert heard == ["1 begins", "1 ends", "2 begins", "2 ends", "2 begins", "2 ends"]
    assert not outbox.peers


def test_an_error_leaves_it_able_to_speak() -> None:
    mail, _, _ = mail_of_rank_0()
    heard: list[str] = []

    def refuse(_: int, message: int) -> None:
        raise ValueError(message)

    mail.handlers = {int: refuse, str: lambda _, text: heard.append(text)}
    with pytest.raises(ValueError, match="1"):
        mail.say(0, 1)
    mail.say(0, "after it")
    assert heard == ["after it"]


def test_what_is_said_last_of_a_dead_process_waits_for_what_it_held() -> None:
    mail, outbox, holders = mail_of_rank_0()
    holders.add(ids.task_id(b"p" * 12, 1, ids.id_tail(1, ids.job_id(1))) + ids.FIRST_RETURN)
    mail.say_last(2, "the end")
    mail.say(2, "something else")
    holders.end_turn()
    assert outbox.peers[2] == ["something else"]
    [add] = outbox.peers[1]
    holders.acknowledged(1, add.turn)
    assert outbox.peers[2] == ["something else", "the end"]
