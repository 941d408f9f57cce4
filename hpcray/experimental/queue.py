"""`hpcray.util.queue`, at its former place."""

from hpcray.util.queue import *  # noqa: F403
