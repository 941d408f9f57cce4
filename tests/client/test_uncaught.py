"""An error that nobody catches is shown without frames of the package, and told once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import traceback
from typing import Any

from hpcray.client.uncaught import Uncaught, cut
from hpcray.protocol.words import listed


def test_our_frames_at_the_end_go_and_others_stay():
    def ours() -> None:
        listed(None, 1)  # type: ignore[arg-type]  # fails in there

    try:
        try:
            ours()
        except TypeError as cause:
            raise ValueError("mine") from cause
    except ValueError as error:
        cut(error)
        text = "".join(traceback.format_exception(error))
    assert "words.py" not in text and "in ours" in text and "ValueError: mine" in text


def test_a_cycle_of_causes_ends():
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    cut(first)


def test_threads_and_hooks_of_the_program():
    """The program's own hooks are called, and threads are treated alike."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import sys, threading
        sys.excepthook = lambda kind, error, trace: print("mine", kind.__name__, file=sys.stderr)
        import hpcray as ray
        ray.init(num_cpus=1)
        @ray.remote
        def f():
            raise KeyError("in f")
        thread = threading.Thread(target=lambda: ray.get(f.remote()))
        thread.start()
        thread.join()
        ray.get(f.remote(), timeout="x")
    """)], capture_output=True, text=True, timeout=60)
    assert done.stderr.count("KeyError") >= 1 and "client.py" not in done.stderr
    assert done.stderr.rstrip().endswith("mine TypeError")




def test_a_hook_of_the_program_between_two_sessions_calls_ours(monkeypatch):
    """As error trackers do: they keep the hook that they replace, and call it."""
    shown: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append("first"))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: shown.append("first"))
    uncaught = Uncaught()
    uncaught.install()
    ours, ours_of_threads = sys.excepthook, threading.excepthook

    def theirs(*arguments: Any) -> None:
        shown.append("theirs")
        ours(*arguments)

    def theirs_of_threads(arguments: Any) -> None:
        shown.append("theirs")
        ours_of_threads(arguments)

    sys.excepthook, threading.excepthook = theirs, theirs_of_threads
    uncaught.install()
    error = KeyError(1)
    sys.excepthook(KeyError, error, None)
    threading.excepthook(threading.ExceptHookArgs((KeyError, error, None, None)))
    assert shown == ["theirs", "first"] * 2
