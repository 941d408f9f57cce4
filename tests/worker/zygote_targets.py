"""What the workers of test_zygote.py and test_pool.py run instead of hpcray's own main.

Each behaviour is a function; settings["do"] names it. Replies go out on the client channel as
msgpack. The zygote finds this module through its --sys-path.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from typing import Any

import msgspec


def prepare() -> Any:
    return run


def run(number: int, task_fd: int, client_fd: int, settings: dict[str, Any]) -> int | None:
    tasks = socket.socket(fileno=task_fd)
    client = socket.socket(fileno=client_fd)

    def say(value: object) -> None:
        client.send(msgspec.msgpack.encode(value))

    result: int | None = globals()[settings["do"]](number, tasks, say, settings)
    return result


def echo(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """Every task datagram comes back; an "exit" ends."""
    say("up")
    while (datagram := tasks.recv(1 << 18)) != b"exit":
        say(datagram)


def look(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """Which of these modules are imported already, and what the environment says of these."""
    names = settings["look_for"]
    say([[name for name in names if name in sys.modules],
         {name: os.environ[name] for name in settings.get("variables", ()) if name in os.environ}])
    tasks.recv(1)


def load(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """Call the function `load` of a module that is imported already."""
    sys.modules[settings["module"]].load()
    say("loaded")
    tasks.recv(1)


def use_libraries(
    number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]
) -> None:
    """What a user does with libraries that were imported before the fork."""
    imported = [name for name in ("pandas", "pyarrow", "scipy", "torch") if name in sys.modules]
    found: dict[str, Any] = {"imported": imported}
    if "pyarrow" in imported:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pa.table({"n": list(range(100_000)), "s": ["x", "y"] * 50_000})
        path = f"{settings['folder']}/{number}.parquet"
        pq.write_table(table, path, row_group_size=1000)
        back = pq.read_table(path, use_threads=True)
        found["pyarrow"] = [pc.sum(back["n"]).as_py(), back.group_by("s").aggregate([]).num_rows]
    if "pandas" in imported:
        import pandas as pd

        frame = pd.DataFrame({"n": range(1000), "s": ["x", "y"] * 500})
        found["pandas"] = frame.groupby("s")["n"].sum().to_dict()
    if "scipy" in imported:
        import numpy as np
        import scipy.linalg

        found["scipy"] = round(float(scipy.linalg.det(np.eye(300) * 2 ** (1 / 300))), 6)
    if "torch" in imported:
        import torch

        ones = torch.ones(512, 512)
        found["torch"] = [torch.get_num_threads(), float((ones @ ones).sum()), torch.initial_seed()]
    from threadpoolctl import threadpool_info

    found["threads"] = sorted({library["num_threads"] for library in threadpool_info()})
    say(found)
    tasks.recv(1)


def leave(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> int:
    return int(settings["code"])


def fail(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    raise RuntimeError("as asked")


def quit_with_message(
    number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]
) -> None:
    print("buffered", end="")
    sys.exit("good bye")


def describe(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """What kind of process this is."""
    import numpy as np

    try:
        from threadpoolctl import threadpool_info
    except ImportError:  # Optional: then BLAS stays at one thread.
        libraries: list[Any] = []
    else:
        libraries = threadpool_info()
    with open(f"/proc/{os.getpid()}/smaps_rollup") as file:
        fields = {line.split()[0]: line.split()[1] for line in file.readlines()[1:]}
    private_kib = int(fields["Private_Clean:"]) + int(fields["Private_Dirty:"])
    with open("/proc/self/stat") as file:
        session = int(file.read().rpartition(")")[2].split()[3])
    say(
        {
            "number": number,
            "pid": os.getpid(),
            "session": session,
            # The listing's own descriptor is closed again by the time it is looked at.
            "descriptors": sorted(
                int(name)
                for name in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{name}")
            ),
            "stdin": os.readlink("/proc/self/fd/0"),
            "cwd": os.getcwd(),
            "sys_path": sys.path,
            "environ": dict(os.environ),
            "random": random.random(),
            "numpy_random": float(np.random.random()),
            "blas_threads": [library["num_threads"] for library in libraries],
            "main": sorted(vars(sys.modules["__main__"])),
            "signals": [
                signal.getsignal(s) is d
                for s, d in (
                    (signal.SIGTERM, signal.SIG_DFL),
                    (signal.SIGCHLD, signal.SIG_DFL),
                    (signal.SIGINT, signal.default_int_handler),
                )
            ],
            "private_kib": private_kib,
            "extra": len(settings.get("extra", "")),
        }
    )
    tasks.recv(1)


def draw(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    import numpy as np

    say([random.random(), random.gauss(0, 1), float(np.random.normal()), float(np.random.normal()),
         float(np.random.random()), *np.random.random(700).tolist()])


def chatter(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """One full line and one half on stdout; then wait."""
    print("first line")
    print("half", end="")
    print("to stderr", file=sys.stderr)
    say("said")
    tasks.recv(1)


def flood(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """More than a pipe takes: blocks for ever unless somebody reads."""
    os.write(1, b"x" * (4 << 20))


def family(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """A child in the same process group, and one in a group of its own, both stubborn."""
    script = "trap '' TERM; while :; do sleep 1000; done"
    near = subprocess.Popen(["sh", "-c", script])
    far = subprocess.Popen(["sh", "-c", script], process_group=0)
    say([os.getpid(), near.pid, far.pid])
    tasks.recv(1)


def breeder(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """Children that start long-lived children all the time."""
    for _ in range(4):
        subprocess.Popen(["sh", "-c", "while :; do sleep 1000 & sleep 0.002; done"])
    say("up")
    tasks.recv(1)


def stubborn(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("up")
    while True:
        signal.pause()


def race(number: int, tasks: socket.socket, say: Any, settings: dict[str, Any]) -> None:
    """Read tasks as fast as possible; after "exit" report which numbers came."""
    seen = []
    while (datagram := tasks.recv(1 << 18)) != b"exit":
        seen.append(int(datagram))
    packed = msgspec.msgpack.encode(seen)
    os.write(1, len(packed).to_bytes(8, "little") + packed)
