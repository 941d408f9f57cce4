"""A cluster in virtual time: real machines, and what everything they do costs.

    program --> Process (driver, workers) --datagrams--> Node(Machine, Peers) --frames--> Node
                   its own core                             its own core

What is real: every `Machine`, the bytes between processes, the numbered frames between nodes with
their windows and acknowledgements (`transport/peers.py`), and the core of every client that submits
(`client/core.py`). What is not: processes, sockets, MPI, and time.

    workload    what is to run, and what has run
    clock       virtual time, and processes that are busy or asleep
    costs       what things cost: read from costs.toml, which `measure` writes
    process     drivers and workers;  programs: what drivers do
    node        a machine and the loop around it
    cluster     all of them, and one run
    report      what came of it, in words;  plot: in a picture

What `testing/cluster.py` is for, and this is not: finding faults. Here the order of things is the
likely one, nobody dies, and values are small. Documented in docs/scale.md.
"""
