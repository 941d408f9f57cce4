"""Folding what workers print into what the driver's terminal shows.

Pure: bytes and a clock in, lines out. The node loop reads the pipes and prints.

    chunks -> lines                 -> folded
    cut at newlines, after 200 ms,     the first worker's line at once,
    at 64 KiB, by the next task        its like from others counted

A thousand workers that warn about the same thing print it once, at once; every five seconds it
is shown again, with how often it came meanwhile. Lines are alike if the words without digits
are (as in Ray): "loss 0.1 at step 3" and "loss 0.2 at step 4" are. One worker alone never folds:
it may be counting, and is shown as it is until a second one says the like.

LF-1  nothing is lost: every line given in comes out, as itself or in the count of a fold, unless
      `LogRules.skip` says that it is not wanted.
LF-2  the lines of one worker that come out as themselves do so in the order it wrote them, but for
      a like one that comes at the end of its fold's five seconds.
LF-3  memory is bounded: HELD_LIMIT_BYTES of unfinished lines, FOLDS_LIMIT folds of at most
      FOLD_LINE_LIMIT_CHARS. Beyond, lines come out early or unfolded; LF-1 still holds.

A carriage return draws over the line, as on a terminal: what it covers was never a line.
A progress bar is shown at most every PROGRESS_INTERVAL_S, and as it finally was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# An unfinished line (a prompt, a print with end="") is shown after this long.
PARTIAL_HOLD_S = 0.2
PROGRESS_INTERVAL_S = 5.0
LINE_LIMIT_BYTES = 64 * 1024
HELD_LIMIT_BYTES = 16 << 20
FOLDS_LIMIT = 1024
# Longer lines are data, not messages; to keep them for comparison costs more than it folds.
FOLD_LINE_LIMIT_CHARS = 4096
_DIGIT = re.compile(r"\d")


@dataclass(frozen=True, slots=True)
class LogRules:
    """What folds."""

    enabled: bool = True
    window_s: float = 5.0
    # Regular expressions, searched in each line: never fold it; do not show it at all.
    keep: str = ""
    skip: str = ""


@dataclass(frozen=True, slots=True)
class LogSource:
    """One stream of one worker. `name` is the task's or actor's, for people."""

    name: str
    pid: int
    rank: int
    stream: str = "stdout"  # or "stderr"
    address: str = ""  # of its host, if that is not the driver's

    @property
    def worker(self) -> tuple[int, int]:
        return (self.rank, self.pid)

    @property
    def key(self) -> tuple[int, int, str]:
        return (self.rank, self.pid, self.stream)

    @property
    def prefix(self) -> str:
        return f"({self.name} pid={self.pid}{self.address and ', ip=' + self.address}) "


Line = tuple[LogSource, str]


@dataclass(slots=True)
class _Partial:
    """A line not yet ended."""

    source: LogSource
    due_s: float
    data: bytearray = field(default_factory=bytearray)
    # The line has been drawn over: it is a progress bar until its newline.
    redrawn: bool = False
    # Something of this line was shown: a newline that adds nothing only ends it.
    shown: bool = False


@dataclass(slots=True)
class _Fold:
    """A line that was shown within the last `window_s`, and its like since."""

    worker: tuple[int, int]  # who said it first
    due_s: float
    shared: bool = False  # somebody else has said it, too
    repeated: int = 0
    last: Line | None = None


@dataclass(frozen=True, slots=True)
class LogFolderStatistics:
    held_bytes: int
    partial_lines: int
    folds: int
    folded_lines: int


class LogFolder:
    """`feed` bytes, `tick` when `next_deadline_s` has come, `flush` at the end."""

    def __init__(self, now_s: float, rules: LogRules | None = None) -> None:
        self._now_s = now_s
        self._rules = rules = rules or LogRules()
        self._keep = re.compile(rules.keep) if rules.keep else None
        self._skip = re.compile(rules.skip) if rules.skip else None
        self._explained = False
        self._partials: dict[tuple[int, int, str], _Partial] = {}
        # In order of due_s: all windows have one length and open as they are inserted.
        self._folds: dict[tuple[str, str], _Fold] = {}
        self._held_bytes = 0
        self._folded_lines = 0

    def feed(self, source: LogSource, chunk: bytes, now_s: float) -> list[Line]:
        """The lines to show now, each without its newline."""
        out = self._close_folds(self._advance(now_s))
        partial = self._partials.get(source.key)
        if partial is not None and partial.source != source:
            self._end_line(partial.source, out)  # that task is over, or the actor has got its name
        pieces = chunk.split(b"\n")
        for piece in pieces[:-1]:
            self._add(source, piece, out)
            self._end_line(source, out)
        if pieces[-1]:
            self._add(source, pieces[-1], out)
        while self._held_bytes > HELD_LIMIT_BYTES:
            self._release(min((p for p in self._partials.values() if p.data),
                              key=lambda p: p.due_s), out)
        return out

    def tick(self, now_s: float) -> list[Line]:
        """What has waited long enough: unfinished lines, progress bars, folds."""
        self._advance(now_s)
        out: list[Line] = []
        for partial in [p for p in self._partials.values() if p.due_s <= self._now_s]:
            self._release(partial, out)
        return out + self._close_folds(self._now_s)

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do; None while nothing is held."""
        due_s = [partial.due_s for partial in self._partials.values()]
        due_s += [fold.due_s for fold in list(self._folds.values())[:1]]
        return min(due_s, default=None)

    def flush(self) -> list[Line]:
        """Everything still held, at once."""
        out: list[Line] = []
        for partial in list(self._partials.values()):
            self._end_line(partial.source, out)
        while self._folds:
            self._close_fold(out)
        return out

    def statistics(self) -> LogFolderStatistics:
        return LogFolderStatistics(self._held_bytes, len(self._partials), len(self._folds),
                                   self._folded_lines)

    def validate(self) -> None:
        """Check LF-3. Slow: for tests."""
        assert self._held_bytes == sum(len(p.data) for p in self._partials.values())
        assert self._held_bytes <= HELD_LIMIT_BYTES
        assert len(self._folds) <= FOLDS_LIMIT
        dues_s = [fold.due_s for fold in self._folds.values()]
        assert dues_s == sorted(dues_s)
        for (_, key), fold in self._folds.items():
            assert len(key) <= FOLD_LINE_LIMIT_CHARS
            assert (fold.repeated > 0) == (fold.last is not None)
            assert fold.shared or not fold.repeated

    def _advance(self, now_s: float) -> float:
        self._now_s = max(self._now_s, now_s)
        return self._now_s

    # ------------------------------------------------------------ bytes to lines

    def _add(self, source: LogSource, piece: bytes, out: list[Line]) -> None:
        """Append what holds no newline; long lines leave in cuts of LINE_LIMIT_BYTES."""
        partial = self._partials.get(source.key)
        if partial is None:
            partial = self._partials[source.key] = _Partial(source, self._now_s + PARTIAL_HOLD_S)
        elif not partial.data and not partial.redrawn:
            partial.due_s = self._now_s + PARTIAL_HOLD_S
        self._held_bytes -= len(partial.data)
        partial.data += piece
        _redraw(partial)
        while len(partial.data) > LINE_LIMIT_BYTES:
            cut = _whole_characters(partial.data[:LINE_LIMIT_BYTES]) or LINE_LIMIT_BYTES
            self._show(source, _text(partial.data[:cut]), out)
            del partial.data[:cut]
            partial.shown = True
        self._held_bytes += len(partial.data)

    def _end_line(self, source: LogSource, out: list[Line]) -> None:
        """A newline came, or the end of everything."""
        partial = self._partials.pop(source.key)
        self._held_bytes -= len(partial.data)
        data = _visible(partial.data)
        if data or not partial.shown:
            self._show(source, _text(data), out)

    def _release(self, partial: _Partial, out: list[Line]) -> None:
        """Show an unfinished line, and remember for a while that it was.

        Its record stays: a progress bar must stay quiet, and a lone newline must not become a
        blank line. If nothing more comes, the next release forgets it.
        """
        source = partial.source
        data = bytes(_visible(partial.data))
        self._held_bytes -= len(partial.data)
        if not data:
            del self._partials[source.key]
            return
        # A character whose other bytes are still to come waits for them, once.
        cut = len(data) if partial.redrawn else _whole_characters(data) or len(data)
        self._show(source, _text(data[:cut]), out)
        hold_s = PARTIAL_HOLD_S if data[cut:] else PROGRESS_INTERVAL_S
        self._partials[source.key] = _Partial(source, self._now_s + hold_s, bytearray(data[cut:]),
                                              partial.redrawn, shown=True)
        self._held_bytes += len(data) - cut

    # ------------------------------------------------------------- lines to folds

    def _show(self, source: LogSource, text: str, out: list[Line]) -> None:
        """Show the line, or count it in a fold."""
        rules = self._rules
        # Longer lines are data, not messages; a line of numbers alone is what people want to see.
        key = ""
        if rules.enabled and len(text) <= FOLD_LINE_LIMIT_CHARS:
            key = " ".join(word for word in text.split() if not _DIGIT.search(word))
        kept = self._keep is not None and self._keep.search(text)
        if not kept and self._skip is not None and self._skip.search(text):
            return
        if kept or not key:
            out.append((source, text))
            return
        fold = self._folds.get((source.stream, key))
        if fold is None:
            if len(self._folds) >= FOLDS_LIMIT:
                self._close_fold(out)
            self._folds[source.stream, key] = _Fold(source.worker, self._now_s + rules.window_s)
        elif fold.shared or fold.worker != source.worker:
            fold.shared = True
            fold.repeated += 1
            fold.last = (source, text)
            self._folded_lines += 1
            return
        out.append((source, text))

    def _close_folds(self, now_s: float) -> list[Line]:
        """Those whose time is over; the ones that folded something go on."""
        out: list[Line] = []
        while self._folds:
            key, fold = next(iter(self._folds.items()))
            if fold.due_s > now_s:
                break
            if self._close_fold(out):
                self._folds[key] = _Fold(fold.worker, now_s + self._rules.window_s, shared=True)
        return out

    def _close_fold(self, out: list[Line]) -> bool:
        """Of the oldest; whether there was more than one line to count."""
        fold = self._folds.pop(next(iter(self._folds)))
        if fold.last is None:
            return False
        source, text = fold.last
        if fold.repeated > 1:
            text += f" [repeated {fold.repeated}x across cluster]"
            if not self._explained:
                self._explained = True
                text += " (lines that differ only in numbers fold; HPCRAY_DEDUP_LOGS=0 shows all)"
        out.append((source, text))
        return fold.repeated > 1


def _redraw(partial: _Partial) -> None:
    """Forget what carriage returns have drawn over, keeping one that ends the data.

    "\\r" at the end may be half of "\\r\\n", or the habit of drawing first and returning then:
    what stands before it is still what the terminal shows.
    """
    data = partial.data
    end = len(data.rstrip(b"\r"))
    del data[end + 1:]
    last = data.rfind(b"\r", 0, end)
    if last >= 0:
        del data[:last + 1]
        partial.redrawn = True


def _visible(data: bytes | bytearray) -> bytes | bytearray:
    return data.rstrip(b"\r")


def _whole_characters(data: bytes | bytearray) -> int:
    """How many bytes end with a whole UTF-8 character. Bytes that are not UTF-8 count as whole."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue  # a continuation: its first byte is further back
        needs = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else (
            4 if byte & 0xF8 == 0xF0 else 1)
        return len(data) - back if needs > back else len(data)
    return len(data)


def _text(data: bytes | bytearray) -> str:
    return data.decode(errors="replace")
