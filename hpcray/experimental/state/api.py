"""`hpcray.util.state`, at its former place."""

from hpcray.absent import attributes
from hpcray.util.state.api import *  # noqa: F403

__getattr__ = attributes("hpcray.util.state.api")
