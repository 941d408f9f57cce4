"""The network between nodes: control payloads in order, data straight into posted buffers.

`base` is the contract and the only module other rooms import for types. `mpi` is imported by
the launcher alone (it loads mpi4py), `loopback` and `faults` by tests and the simulated
cluster. Nothing in this room knows of tasks, objects or actors.
"""
