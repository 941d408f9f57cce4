"""From an allocation to processes: who we are, what we have, how to start more of us.

`identity`   which rank of which launch this process is, read from the environment; pure
`resources`  the CPUs, GPUs and memory this rank may use, and where each number came from
`cgroups`    the limits of control groups, for `resources`
`mpirun`     finding an `mpirun` and writing its command line
`world`      whether MPI sees the ranks that the launcher has started
`script`     running a user's script as `python script.py` would
`last_words` where the last sentence of a job is read
`doctor`     what a person should fix before the first job
`start`      starting this rank's node

Nothing here imports MPI, Redis or CuPy: all of it must work where those are missing or broken,
and before `MPI_Init`.
"""
