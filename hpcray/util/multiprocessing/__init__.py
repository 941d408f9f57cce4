"""`multiprocessing.Pool` on the cluster: change the import, and nothing else.

    from hpcray.util.multiprocessing import Pool
"""

from multiprocessing import JoinableQueue, TimeoutError

from hpcray.util.multiprocessing.pool import AsyncResult, Pool

__all__ = ["AsyncResult", "JoinableQueue", "Pool", "TimeoutError"]
