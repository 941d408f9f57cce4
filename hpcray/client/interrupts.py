"""Exceptions that a signal handler of the program has raised in the middle of something else."""

from __future__ import annotations

import signal


def raised_by_handler(error: BaseException) -> bool:
    """Whether it comes out of a function that handles some signal now.

    Such an exception may strike anywhere, so where others would be explained it is passed on.
    """
    handlers = {getattr(signal.getsignal(number), "__code__", None)
                for number in signal.valid_signals()}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False
