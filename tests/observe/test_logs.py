"""The log folder: a machine, so every test is bytes and clock in, lines out."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcray.observe import logs
from hpcray.observe.logs import LogFolder, LogRules, LogSource
from hpcray.protocol import marks

A = LogSource("train", 11, 0)
B = LogSource("train", 22, 1)
C = LogSource("eval", 33, 2, address="10.0.0.2")


class Folder(LogFolder):
    """Whose lines are text, as the driver prints them."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(0.0, LogRules(**rules))

    def feed(self, source: LogSource, chunk: bytes, now_s: float) -> list[Any]:
        return [source.prefix + text for source, text in super().feed(source, chunk, now_s)]

    def tick(self, now_s: float) -> list[Any]:
        return [source.prefix + text for source, text in super().tick(now_s)]

    def flush(self) -> list[Any]:
        return [source.prefix + text for source, text in super().flush()]


def test_the_first_worker_is_shown_at_once_and_its_like_are_counted_later() -> None:
    folder = Folder()
    assert folder.feed(A, b"careful at 0x1f, id=0\n", 0.0) == [
        "(train pid=11) careful at 0x1f, id=0"]
    assert folder.feed(B, b"careful at 7 id=1\ncareful at id=2\n", 1.0) == []
    assert folder.feed(C, b"careful   at 2.5 id=3\n", 4.9) == []
    assert folder.next_deadline_s() == 5.0
    assert folder.tick(4.99) == []
    (counted,) = folder.tick(5.0)
    assert counted.startswith(
        "(eval pid=33, ip=10.0.0.2) careful   at 2.5 id=3 [repeated 3x across cluster] (")
    assert "HPCRAY_DEDUP_LOGS=0" in counted, "the first time says how to see all"


def test_what_goes_on_is_counted_every_five_seconds_until_it_ends() -> None:
    folder = Folder()
    folder.feed(A, b"step 1\n", 0.0)
    folder.feed(B, b"step 1\nstep 2\n", 1.0)
    folder.tick(5.0)
    assert folder.feed(A, b"step 3\n", 6.0) == [], "whoever says it"
    assert folder.feed(B, b"step 3\n", 6.0) == []
    assert folder.tick(10.0) == ["(train pid=22) step 3 [repeated 2x across cluster]"]
    assert folder.next_deadline_s() == 15.0
    assert folder.tick(15.0) == [] and folder.next_deadline_s() is None
    assert folder.feed(B, b"step 4\n", 15.1) == ["(train pid=22) step 4"]


def test_one_repetition_is_shown_as_it_is() -> None:
    folder = Folder()
    folder.feed(A, b"step 1\n", 0.0)
    assert folder.feed(B, b"step 2\n", 0.0) == []
    assert folder.tick(5.0) == ["(train pid=22) step 2"]
    assert folder.next_deadline_s() is None


@pytest.mark.parametrize("text", [b"1\n", b"0.5 0.25\n", b"\n", b"x" * 5000 + b"\n"])
def test_numbers_blanks_and_data_do_not_fold(text: bytes) -> None:
    folder = Folder()
    assert len(folder.feed(A, text, 0.0) + folder.feed(B, text, 0.0)) == 2


def test_stdout_and_stderr_fold_apart() -> None:
    folder = Folder()
    error = LogSource("eval", 33, 2, "stderr")
    assert len(folder.feed(A, b"x\n", 0.0) + folder.feed(error, b"x\n", 0.0)) == 2


def test_rules() -> None:
    folder = Folder(window_s=1.0, keep="loss", skip="noise|loss")
    assert len(folder.feed(A, b"loss 1\n", 0.0) + folder.feed(B, b"loss 1\n", 0.0)) == 2
    assert folder.feed(A, b"some noise\n", 0.0) == []
    folder.feed(A, b"x\n", 0.0)
    assert folder.feed(B, b"x\n", 0.0) == [] and folder.next_deadline_s() == 1.0
    unfolded = Folder(enabled=False)
    assert len(unfolded.feed(A, b"x\n", 0.0) + unfolded.feed(B, b"x\n", 0.0)) == 2
    assert unfolded.next_deadline_s() is None


def test_a_worker_that_repeats_itself_is_shown() -> None:
    folder = Folder()
    assert len(folder.feed(A, b"step\nstep\nstep\n", 0.0)) == 3


def test_two_streams_of_one_worker_are_one_worker() -> None:
    folder = Folder()
    error = LogSource("train", 11, 0, "stderr")
    assert len(folder.feed(A, b"x\n", 0.0) + folder.feed(error, b"x\n", 0.0)) == 2


def test_an_unfinished_line_waits_200_ms() -> None:
    folder = Folder()
    assert folder.feed(A, b"load", 0.0) == []
    assert folder.feed(A, b"ing\nne", 0.1) == ["(train pid=11) loading"]
    assert folder.next_deadline_s() == pytest.approx(0.3)
    assert folder.tick(0.31) == ["(train pid=11) ne"]
    assert folder.feed(A, b"\n", 0.4) == [], "the newline only ends what was shown"
    assert folder.feed(A, b"\n", 0.5) == ["(train pid=11) "], "a blank line is a line"


def test_a_character_is_never_cut_in_two() -> None:
    folder = Folder()
    euro = "€".encode()
    assert folder.feed(A, b"5 " + euro[:2], 0.0) == []
    assert folder.tick(0.2) == ["(train pid=11) 5 "]
    assert folder.feed(A, euro[2:] + b"\n", 0.25) == ["(train pid=11) €"]
    long = euro * 30_000
    text = "".join(line.partition(") ")[2] for line in folder.feed(A, long + b"\n", 1.0))
    assert text == long.decode()


def test_a_broken_character_does_not_wait_for_ever() -> None:
    folder = Folder()
    folder.feed(A, b"\xe2\x82", 0.0)
    assert folder.tick(0.2) == ["(train pid=11) \ufffd"]


def test_very_long_lines_are_cut() -> None:
    folder = Folder()
    out = folder.feed(A, b"x" * (3 * logs.LINE_LIMIT_BYTES + 5) + b"\n", 0.0)
    prefix = len(A.prefix)
    assert [len(line) - prefix for line in out] == [logs.LINE_LIMIT_BYTES] * 3 + [5]


def test_a_progress_bar_is_shown_seldom_and_at_its_end() -> None:
    folder = Folder()
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
    folder = Folder()
    out = [line for chunk in chunks for line in folder.feed(A, chunk, 0.0)]
    assert out == [A.prefix + "one", A.prefix + "two"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "HELD_LIMIT_BYTES", 1000)
    monkeypatch.setattr(logs, "FOLDS_LIMIT", 10)
    folder = Folder()
    shown = []
    for pid in range(100):
        shown += folder.feed(LogSource("f", pid, 0), b"p%099d" % pid, 0.0)
        shown += folder.feed(LogSource("g", pid, 0), b"line %s\n" % (b"x" * pid), 0.0)
        shown += folder.feed(LogSource("\r", pid, 0), b"\r" * 500, 0.0)
        folder.validate()
    shown += folder.flush()
    assert sum(" line " in line for line in shown) == sum(") p" in line for line in shown) == 100
    assert folder.statistics().held_bytes == 0


def test_sources_that_went_away_are_forgotten() -> None:
    folder = Folder()
    folder.feed(A, b"\rhalf", 0.0)
    for _ in range(5):
        deadline_s = folder.next_deadline_s()
        if deadline_s is None:
            break
        folder.tick(deadline_s)
    assert folder.next_deadline_s() is None
    assert folder.statistics() == logs.LogFolderStatistics(0, 0, 0, 0)


TEXTS = st.sampled_from(["alpha", "alpha 1", "beta", "gamma 3", "7", "", "delta é"])
STEPS = st.lists(st.tuples(st.integers(0, 3), TEXTS, st.floats(0, 3)), max_size=60)
LINE = re.compile(r"^\(\w+ pid=(\d+)\) (.*?)(?: \[repeated (\d+)x across cluster\].*)?$")


def without_numbers(text: str) -> str:
    return " ".join(word for word in text.split() if word.isalpha()) or text


@settings(deadline=None)
@given(steps=STEPS, cuts=st.lists(st.integers(1, 9), max_size=40), limit=st.integers(1, 4),
       enabled=st.booleans())
def test_nothing_is_lost_and_each_worker_is_in_order(
    steps: list[tuple[int, str, float]], cuts: list[int], limit: int, enabled: bool,
) -> None:
    """LF-1, LF-2, LF-3, with lines cut into chunks anywhere and a fold table that overflows."""
    saved, logs.FOLDS_LIMIT = logs.FOLDS_LIMIT, limit
    try:
        folder, now_s = Folder(enabled=enabled), 0.0
        given: Counter[str] = Counter()
        written: dict[int, list[str]] = {}
        out: list[str] = []
        cut_at = iter(cuts)
        for pid, text, later_s in steps:
            now_s += later_s
            source = LogSource("w", pid, pid)
            given[without_numbers(text)] += 1
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
        match = LINE.match(line)
        assert match is not None
        seen[without_numbers(match[2])] += int(match[3] or 1)
        shown.setdefault(int(match[1]), []).append(match[2])
    assert seen == given
    if not enabled:
        assert shown == written


@settings(deadline=None)
@given(chunks=st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=30), st.floats(0, 1)),
                       max_size=40))
def test_any_bytes_at_any_time(chunks: list[tuple[int, bytes, float]]) -> None:
    folder, now_s = Folder(), 0.0
    for pid, chunk, later_s in chunks:
        now_s += later_s
        lines = folder.feed(LogSource("w", pid, 0), chunk, now_s) + folder.tick(now_s)
        assert all("\n" not in line for line in lines)
        folder.validate()
        deadline_s = folder.next_deadline_s()
        assert deadline_s is None or deadline_s > now_s
    folder.flush()
    assert folder.next_deadline_s() is None


@settings(deadline=None)
@given(parts=st.lists(st.one_of(
           st.tuples(st.none(), st.binary(max_size=20)),
           st.tuples(st.text(min_size=1, max_size=9), st.just(b""))), max_size=20),
       cuts=st.lists(st.integers(1, 30), max_size=60))
def test_marks_are_found_wherever_chunks_end(
    parts: list[tuple[str | None, bytes]], cuts: list[int]
) -> None:
    said: list[tuple[str | None, int]] = []
    name, data = None, b""
    for called, printed in parts:
        if called is not None:
            data += marks.mark(called)
            name = "".join(c if c.isprintable() else " " for c in called)
        data += printed
        said += [(name, byte) for byte in printed]
    found: list[tuple[str | None, int]] = []
    reader = marks.Marks()
    at = 0
    for cut in [*cuts, len(data)]:
        pieces = reader.split(data[at:at + cut])
        found += [(called, byte) for called, piece in pieces for byte in piece]
        at += cut
    rest = reader.rest()
    assert [byte for _, byte in found] + list(rest) == [byte for _, byte in said]
    assert found == said[:len(found)]


def test_what_only_looks_like_a_mark_passes() -> None:
    reader = marks.Marks()
    data = b"\x1e\x1e\0hpcray:" + b"x" * 1000 + marks.mark("f") + b"y"
    assert reader.split(data) == [
        (None, b"\x1e\x1e\0hpcray:" + b"x" * 1000), ("f", b""), ("f", b"y")]
    long = marks.mark("\n" + "é" * 1000)
    assert reader.split(b"\n") == [("f", b"\n")]
    ((name, piece),) = reader.split(long + b"z")
    assert piece == b"z" and name is not None and name.startswith(" éé") and "\n" not in name
