"""`python -m hpcray` is the `hpcray` command, for where the command itself is not on PATH."""

from __future__ import annotations

import sys

from hpcray.observe.cli import main

if __name__ == "__main__":
    sys.exit(main())
