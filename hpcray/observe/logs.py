"""Folding what workers print into what the driver's terminal shows.

Pure: bytes and a clock in, lines out. The node loop reads the pipes and prints.

    chunks -> lines                 -> prefixed             -> folded
    cut at newlines, after 200 ms,     (name pid=1 rank=0)     the first worker's line at once,
    at 64 KiB                                                  the same from others counted

A thousand workers that warn about the same thing print it once, at once, and five seconds
later how often and by how many it was repeated. Only *other* workers' lines fold: a worker
that repeats itself may be counting, and is shown as it is.

LF-1  nothing is lost: every line given in comes out, as itself or in the count of a fold.
LF-2  the lines of one worker that come out as themselves do so in the order it wrote them.
LF-3  memory is bounded: HELD_LIMIT_BYTES of unfinished lines, FOLDS_LIMIT folds of at most
      FOLD_LINE_LIMIT_CHARS, WORKERS_COUNTED workers in each. Beyond, lines come out early or
      unfolded; LF-1 still holds.

A carriage return draws over the line, as on a terminal: what it covers was never a line.
A progress bar is shown at most every PROGRESS_INTERVAL_S, and as it finally was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# An unfinished line (a prompt, a print with end="") is shown after this long.
PARTIAL_HOLD_S = 0.2
PROGRESS_INTERVAL_S = 5.0
FOLD_WINDOW_S = 5.0
LINE_LIMIT_BYTES = 64 * 1024
HELD_LIMIT_BYTES = 16 << 20
FOLDS_LIMIT = 1024
# Longer lines are data, not messages; to keep them for comparison costs more than it folds.
FOLD_LINE_LIMIT_CHARS = 4096
WORKERS_COUNTED = 1024


@dataclass(frozen=True, slots=True)
class LogSource:
    """One stream of one worker. `name` is the task's or actor's, for people."""

    name: str
    pid: int
    rank: int
    stream: str = "stdout"  # or "stderr"

    @property
    def worker(self) -> tuple[int, int]:
        return (self.rank, self.pid)

    def prefixed(self, text: str) -> str:
        return f"({self.name} pid={self.pid} rank={self.rank}) {text}"


@dataclass(slots=True)
class _Partial:
    """A line not yet ended."""

    due_s: float
    data: bytearray = field(default_factory=bytearray)
    # The line has been drawn over: it is a progress bar until its newline.
    redrawn: bool = False
    # Something of this line was shown: a newline that adds nothing only ends it.
    shown: bool = False


@dataclass(slots=True)
class _Fold:
    """A line shown within the last FOLD_WINDOW_S, and who else said it since."""

    first: tuple[int, int]
    due_s: float
    repeated: int = 0
    source: LogSource | None = None  # the first of the others
    workers: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class LogFolderStatistics:
    held_bytes: int
    partial_lines: int
    folds: int
    folded_lines: int


class LogFolder:
    """`feed` bytes, `tick` when `next_deadline_s` has come, `flush` at the end."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._partials: dict[LogSource, _Partial] = {}
        # In order of due_s: all windows have one length and open as they are inserted.
        self._folds: dict[str, _Fold] = {}
        self._held_bytes = 0
        self._folded_lines = 0

    def feed(self, source: LogSource, chunk: bytes, now_s: float) -> list[str]:
        """The lines to show now, each without its newline."""
        out = self._close_folds(self._advance(now_s))
        pieces = chunk.split(b"\n")
        for piece in pieces[:-1]:
            self._add(source, piece, out)
            self._end_line(source, out)
        if pieces[-1]:
            self._add(source, pieces[-1], out)
        while self._held_bytes > HELD_LIMIT_BYTES:
            self._release(min((s for s, p in self._partials.items() if p.data),
                              key=lambda s: self._partials[s].due_s), out)
        return out

    def tick(self, now_s: float) -> list[str]:
        """What has waited long enough: unfinished lines, progress bars, folds."""
        self._advance(now_s)
        out: list[str] = []
        for source in [s for s, p in self._partials.items() if p.due_s <= self._now_s]:
            self._release(source, out)
        return out + self._close_folds(self._now_s)

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do; None while nothing is held."""
        due_s = [partial.due_s for partial in self._partials.values()]
        due_s += [fold.due_s for fold in list(self._folds.values())[:1]]
        return min(due_s, default=None)

    def flush(self) -> list[str]:
        """Everything still held, at once."""
        out: list[str] = []
        for source in list(self._partials):
            self._end_line(source, out)
        for text in list(self._folds):
            self._close_fold(text, out)
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
        for text, fold in self._folds.items():
            assert len(text) <= FOLD_LINE_LIMIT_CHARS
            assert len(fold.workers) <= WORKERS_COUNTED and fold.first not in fold.workers

    def _advance(self, now_s: float) -> float:
        self._now_s = max(self._now_s, now_s)
        return self._now_s

    # ------------------------------------------------------------ bytes to lines

    def _add(self, source: LogSource, piece: bytes, out: list[str]) -> None:
        """Append what holds no newline; long lines leave in cuts of LINE_LIMIT_BYTES."""
        partial = self._partials.get(source)
        if partial is None:
            partial = self._partials[source] = _Partial(self._now_s + PARTIAL_HOLD_S)
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

    def _end_line(self, source: LogSource, out: list[str]) -> None:
        """A newline came, or the end of everything."""
        partial = self._partials.pop(source)
        self._held_bytes -= len(partial.data)
        data = _visible(partial.data)
        if data or not partial.shown:
            self._show(source, _text(data), out)

    def _release(self, source: LogSource, out: list[str]) -> None:
        """Show an unfinished line, and remember for a while that it was.

        Its record stays: a progress bar must stay quiet, and a lone newline must not become a
        blank line. If nothing more comes, the next release forgets it.
        """
        partial = self._partials[source]
        data = bytes(_visible(partial.data))
        self._held_bytes -= len(partial.data)
        if not data:
            del self._partials[source]
            return
        # A character whose other bytes are still to come waits for them, once.
        cut = len(data) if partial.redrawn else _whole_characters(data) or len(data)
        self._show(source, _text(data[:cut]), out)
        hold_s = PARTIAL_HOLD_S if data[cut:] else PROGRESS_INTERVAL_S
        self._partials[source] = _Partial(self._now_s + hold_s, bytearray(data[cut:]),
                                          partial.redrawn, shown=True)
        self._held_bytes += len(data) - cut

    # ------------------------------------------------------------- lines to folds

    def _show(self, source: LogSource, text: str, out: list[str]) -> None:
        """Show the line, or count it in a fold."""
        fold = self._folds.get(text)
        if fold is not None and fold.first != source.worker:
            if source.worker in fold.workers or len(fold.workers) < WORKERS_COUNTED:
                fold.workers.add(source.worker)
            fold.source = fold.source or source
            fold.repeated += 1
            self._folded_lines += 1
            return
        out.append(source.prefixed(text))
        # A blank line says nothing that could be repeated.
        if fold is None and text.strip() and len(text) <= FOLD_LINE_LIMIT_CHARS:
            if len(self._folds) >= FOLDS_LIMIT:
                self._close_fold(next(iter(self._folds)), out)
            self._folds[text] = _Fold(source.worker, self._now_s + FOLD_WINDOW_S)

    def _close_folds(self, now_s: float) -> list[str]:
        out: list[str] = []
        while self._folds:
            text, fold = next(iter(self._folds.items()))
            if fold.due_s > now_s:
                break
            self._close_fold(text, out)
        return out

    def _close_fold(self, text: str, out: list[str]) -> None:
        fold = self._folds.pop(text)
        if fold.source is None:
            return
        workers = len(fold.workers)
        out.append(fold.source.prefixed(
            f"{text} [repeated {fold.repeated}x by {workers}"
            f"{'+' if workers == WORKERS_COUNTED else ''} other worker{'s' * (workers > 1)}]"))


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
