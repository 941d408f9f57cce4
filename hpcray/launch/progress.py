"""Whether another process of this host gets anywhere, as the kernel tells without its help."""

from __future__ import annotations


def cpu_progress(pid: int) -> tuple[int, ...]:
    """Nanoseconds it ran and nanoseconds it waited for a CPU, of its main thread.

    On a loaded machine a process that is not let run still waits for a CPU, so one of the two
    grows. Both stand still while it sleeps, is stopped or is dead. Empty if it is gone.
    """
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return tuple(int(number) for number in file.read().split()[:2])
    except (OSError, ValueError):
        pass
    try:  # a kernel without CONFIG_SCHED_INFO: ticks of 10 ms in user and kernel mode
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]), int(fields[12])
    except (OSError, ValueError, IndexError):
        return ()


def is_stopped(pid: int) -> bool:
    """By a signal or a debugger: it cannot do anything until somebody lets it go on."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
