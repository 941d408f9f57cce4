"""The control store: what must outlive a process, kept in Redis.

    address     where a store is and how to get in; small enough to travel by MPI
    schema      every key, in one table; seals for what could be unpickled (pure)
    sidecar     a store of our own, started beside node 0 and gone with it
    connection  the only place that imports the Redis client
    writer      a node's one control-store thread: takes facts without blocking, writes behind
    reader      synchronous reads for the command line, resume and tests

Nothing here decides anything about tasks or actors, and nothing on the path of a
task waits for it. This module imports none of them: the Redis client alone costs
170 ms, which a node that is starting does not have.
"""
