"""The log folder: a machine, so every test is bytes and clock in, lines out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcray.observe import logs
from hpcray.observe.logs import LogFolder, LogSource

A = LogSource("train", 11, 0)
B = LogSource("train", 22, 1)
C = LogSource("eval", 33, 2)


def test_the_first_worker_is_shown_at_once_and_others_are_counted_later() -> None:
    folder = LogFolder(0.0)
    assert folder.feed(A, b"careful\n", 0.0) == ["(train pid=11 rank=0) careful"]
    assert folder.feed(B, b"careful\ncareful\n", 1.0) == []
    assert folder.feed(C, b"careful\n", 4.9) == []
    assert folder.next_deadline_s() == 5.0
    assert folder.tick(4.99) == []
    assert folder.tick(5.0) == [
        "(train pid=22 rank=1) careful [repeated 3x by 2 other workers]"]
    assert folder.next_deadline_s() is None
    assert folder.feed(B, b"careful\n", 5.1) == ["(train pid=22 rank=1) careful"]


def test_a_worker_that_repeats_itself_is_shown() -> None:
    folder = LogFolder(0.0)
    assert len(folder.feed(A, b"step\nstep\nstep\n", 0.0)) == 3


def test_two_streams_of_one_worker_are_one_worker() -> None:
    folder = LogFolder(0.0)
    error = LogSource("train", 11, 0, "stderr")
    assert len(folder.feed(A, b"x\n", 0.0) + folder.feed(error, b"x\n", 0.0)) == 2


def test_an_unfinished_line_waits_200_ms() -> None:
    folder = LogFolder(0.0)
    assert folder.feed(A, b"load", 0.0) == []
    assert folder.feed(A, b"ing\nne", 0.1) == ["(train pid=11 rank=0) loading"]
    assert folder.next_deadline_s() == pytest.approx(0.3)
    assert folder.tick(0.31) == ["(train pid=11 rank=0) ne"]
    assert folder.feed(A, b"\n", 0.4) == [], "the newline only ends what was shown"
    assert folder.feed(A, b"\n", 0.5) == ["(train pid=11 rank=0) "], "a blank line is a line"


def test_a_character_is_never_cut_in_two() -> None:
    folder = LogFolder(0.0)
    euro = "€".encode()
    assert folder.feed(A, b"5 " + euro[:2], 0.0) == []
    assert folder.tick(0.2) == ["(train pid=11 rank=0) 5 "]
    assert folder.feed(A, euro[2:] + b"\n", 0.25) == ["(train pid=11 rank=0) €"]
    long = euro * 30_000
    text = "".join(line.partition(") ")[2] for line in folder.feed(A, long + b"\n", 1.0))
    assert text == long.decode()


def test_a_broken_character_does_not_wait_for_ever() -> None:
    folder = LogFolder(0.0)
    folder.feed(A, b"\xe2\x82", 0.0)
    assert folder.tick(0.2) == ["(train pid=11 rank=0) \ufffd"]


def test_very_long_lines_are_cut() -> None:
    folder = LogFolder(0.0)
    out = folder.feed(A, b"x" * (3 * logs.LINE_LIMIT_BYTES + 5) + b"\n", 0.0)
    prefix = len(A.prefixed(""))
    assert [len(line) - prefix for line in out] == [logs.LINE_LIMIT_BYTES] * 3 + [5]


def test_a_progress_bar_is_shown_seldom_and_at_its_end() -> None:
    folder = LogFolder(0.0)
    out: list[str] = []
    for percent in range(100):  # 10 redraws a second, for 10 s
        now_s = percent / 10
        out += folder.feed(A, b"\r%3d%%" % percent, now_s)
        deadline_s = folder.next_deadline_s()
        if deadline_s is not None and deadline_s <= now_s:
            out += folder.tick(now_s)
    out += folder.feed(A, b"\r100%\nnext\n", 10.0)
    texts = [line.partition(") ")[2].strip() for line in out]
    assert texts[-2:] == ["100%", "next"]
    assert 3 <= len(texts) <= 6


@pytest.mark.parametrize("chunks", [[b"one\r\ntwo\r\n"], [b"one\r", b"\ntwo", b"\r\n"]])
def test_windows_line_ends(chunks: list[bytes]) -> None:
    folder = LogFolder(0.0)
    out = [line for chunk in chunks for line in folder.feed(A, chunk, 0.0)]
    assert out == [A.prefixed("one"), A.prefixed("two")]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "HELD_LIMIT_BYTES", 1000)
    monkeypatch.setattr(logs, "FOLDS_LIMIT", 10)
    folder = LogFolder(0.0)
    shown = []
    for pid in range(100):
        shown += folder.feed(LogSource("f", pid, 0), b"p%099d" % pid, 0.0)
        shown += folder.feed(LogSource("g", pid, 0), b"line %d\n" % pid, 0.0)
        shown += folder.feed(LogSource("\r", pid, 0), b"\r" * 500, 0.0)
        folder.validate()
    shown += folder.flush()
    assert sum(" line " in line for line in shown) == sum(") p" in line for line in shown) == 100
    assert folder.statistics().held_bytes == 0


def test_sources_that_went_away_are_forgotten() -> None:
    folder = LogFolder(0.0)
    folder.feed(A, b"\rhalf", 0.0)
    for _ in range(5):
        deadline_s = folder.next_deadline_s()
        if deadline_s is None:
            break
        folder.tick(deadline_s)
    assert folder.next_deadline_s() is None
    assert folder.statistics() == logs.LogFolderStatistics(0, 0, 0, 0)


TEXTS = st.sampled_from(["alpha", "beta", "gamma", "", "delta é"])
STEPS = st.lists(st.tuples(st.integers(0, 3), TEXTS, st.floats(0, 3)), max_size=60)
FOLD = re.compile(r"^\(\w+ pid=\d+ rank=\d+\) (.*) \[repeated (\d+)x by \d+ other workers?\]$")
LINE = re.compile(r"^\(\w+ pid=(\d+) rank=\d+\) (.*)$")


@settings(deadline=None)
@given(steps=STEPS, cuts=st.lists(st.integers(1, 9), max_size=40), limit=st.integers(1, 4))
def test_nothing_is_lost_and_each_worker_is_in_order(
    steps: list[tuple[int, str, float]], cuts: list[int], limit: int,
) -> None:
    """LF-1, LF-2, LF-3, with lines cut into chunks anywhere and a fold table that overflows."""
    saved, logs.FOLDS_LIMIT = logs.FOLDS_LIMIT, limit
    try:
        folder, now_s = LogFolder(0.0), 0.0
        given: Counter[str] = Counter()
        written: dict[int, list[str]] = {}
        out: list[str] = []
        cut_at = iter(cuts)
        for pid, text, later_s in steps:
            now_s += later_s
            source = LogSource("w", pid, pid)
            given[text] += 1
            written.setdefault(pid, []).append(text)
            data = text.encode() + b"\n"
            while data:  # pieces of one line come at one moment: no hold runs out between them
                cut = next(cut_at, len(data))
                out += folder.feed(source, data[:cut], now_s)
                data = data[cut:]
            folder.validate()
            deadline_s = folder.next_deadline_s()
            if deadline_s is not None and deadline_s <= now_s:
                out += folder.tick(now_s)
        out += folder.flush()
    finally:
        logs.FOLDS_LIMIT = saved

    seen: Counter[str] = Counter()
    shown: dict[int, list[str]] = {}
    for line in out:
        if fold := FOLD.match(line):
            seen[fold[1]] += int(fold[2])
        else:
            match = LINE.match(line)
            assert match is not None
            seen[match[2]] += 1
            shown.setdefault(int(match[1]), []).append(match[2])
    assert seen == given
    for pid, texts in shown.items():
        remaining = iter(written[pid])
        assert all(text in remaining for text in texts), "not a subsequence: out of order"


@settings(deadline=None)
@given(chunks=st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=30), st.floats(0, 1)),
                       max_size=40))
def test_any_bytes_at_any_time(chunks: list[tuple[int, bytes, float]]) -> None:
    folder, now_s = LogFolder(0.0), 0.0
    for pid, chunk, later_s in chunks:
        now_s += later_s
        lines = folder.feed(LogSource("w", pid, 0), chunk, now_s) + folder.tick(now_s)
        assert all("\n" not in line for line in lines)
        folder.validate()
        deadline_s = folder.next_deadline_s()
        assert deadline_s is None or deadline_s > now_s
    folder.flush()
    assert folder.next_deadline_s() is None
