"""What the kernel says about a process. Thin: reads /proc."""

from __future__ import annotations


def process_state(pid: int) -> str:
    """One letter: "R" runs, "S" sleeps, "D" waits for a disk, "T" stopped; "" if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read(512)
    except OSError:
        return ""
    return chr(text[text.rindex(b")") + 2])  # the name before it may hold anything
