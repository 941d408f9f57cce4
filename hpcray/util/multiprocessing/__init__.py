"""`multiprocessing.Pool` on the cluster: change the import, and nothing else.

    from hpcray.util.multiprocessing import Pool
"""

from __future__ import annotations

from multiprocessing import TimeoutError

from hpcray.util.multiprocessing.pool import AsyncResult, Pool

__all__ = ["AsyncResult", "Pool", "TimeoutError"]
