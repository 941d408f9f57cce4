"""The layers, as data: who may import whom, read from the source (imports inside functions too).

Between rooms, imports under TYPE_CHECKING are not edges: they name a type and bring no code along.
Within a room they are: files that name each other's types cannot be read one after the other.
A new exception is a line in EXCEPTIONS with its reason, or a better place for what is imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpcray"

# From the top floor down. A room imports rooms of lower floors, and of its own floor only what
# NEIGHBOURS allows. The modules of the face are one room.
FLOORS = (
    ("testing", "__main__"),
    ("observe",),
    ("as_ray",),
    ("face",),
    ("client", "worker", "node", "launch"),
    ("objects", "recovery", "collective", "gpu"),
    ("transport", "control"),
    ("protocol", "exceptions", "config"),
)
FACE = {"__init__", "absent", "api", "actor", "bundles", "cloudpickle", "definition", "environment",
        "experimental", "futures", "internal", "job_config", "options", "remote_function",
        "runtime_context", "runtime_env", "types", "util", "version"}
NEIGHBOURS = {
    ("worker", "client"): "a worker is a client of its node",
    ("launch", "client"): "connecting a driver makes its client",
    ("node", "launch"): "a node reads its own identity and resources before it exists",
    ("exceptions", "protocol"): "sizes for people, in words.py",
    ("config", "protocol"): "labels are checked where they are given, in the words of labels.py",
    ("node", "worker"): "the zygote's messages, and only those: see NODE_KNOWS_OF_WORKER",
}
# (importing module, imported module) -> why it is so in spite of the floors.
EXCEPTIONS = {
    ("node.output", "observe.logs"):
        "the folder of worker output runs in node 0; it imports nothing and could live in node/",
    ("node.pool", "__init__"): "hpcray.__file__: where the zygote finds the package",
    ("worker.main", "actor"):
        "loads the handles of actors before the first fork; a worker has no face otherwise",
    ("worker.preload", "launch.progress"):
        "what the kernel says of another process; it imports nothing",
}
# Of the worker's room a node may know these.
NODE_KNOWS_OF_WORKER = {"worker", "worker.own_process", "worker.zygote_messages"}
# External packages and where they may be imported.
EXTERNAL = {
    "mpi4py": ("transport.mpi", "collective."),
    "redis": ("control.",),
    "dask": ("util.dask",),
    "cupy": ("gpu.",),
    "pyarrow": ("client.arrays",),
    "setproctitle": ("worker.title",),
    "numpy": ("objects.segments", "gpu.", "collective."),
    "cloudpickle": ("client.serialization", "as_ray.private.worker"),
}
# Files of node/ that carry out: all others there decide.
THIN = {"__init__", "__main__", "connections", "journal", "local_workers", "output", "pool",
        "processes", "server", "transfers", "watcher"}
# Decide in pure code: these import no clock, socket, thread, process or file.
PURE = ("protocol.", "objects.allocator", "objects.budget", "transport.peers", "transport.frames",
        "transport.transfers", "transport.base", "control.schema", "control.address",
        *(f"node.{path.stem}" for path in sorted((PACKAGE / "node").glob("*.py"))
          if path.stem not in THIN),
        *(f"client.{name}" for name in (
            "core", "objects", "groups", "requests", "waiters", "pending")))
WORLD = {"socket", "select", "selectors", "threading", "time", "os", "signal", "subprocess", "mmap",
         "multiprocessing", "asyncio", "ctypes", "fcntl", "pathlib", "random", "secrets", "mpi4py"}

Edge = tuple[str, str, int]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below `node`, less what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield child
            yield from statements(child)


def imports(
    tree: ast.Module, below: Callable[[ast.AST], Iterable[ast.AST]] = statements
) -> Iterator[tuple[str, int]]:
    """(full name of what is imported, line)."""
    for node in below(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                own = full.removeprefix("hpcray.")
                # `from hpcray.protocol import ids` imports a module, `... import Message` a name.
                yield (full if own != full and own in MODULES else node.module), node.lineno


def inner_edges(below: Callable[[ast.AST], Iterable[ast.AST]] = statements) -> list[Edge]:
    found = []
    for name, tree in MODULES.items():
        for full, line in imports(tree, below):
            if full == "hpcray":
                found.append((name, "__init__", line))
            elif full.startswith("hpcray."):
                found.append((name, full.removeprefix("hpcray."), line))
    return found


def room_of(module: str) -> str:
    room = module.split(".")[0]
    return "face" if room in FACE else room


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(module == p or (p.endswith(".") and module.startswith(p)) for p in patterns)


def test_every_module_has_a_floor() -> None:
    known = {room for rooms in FLOORS for room in rooms}
    assert {room_of(module) for module in MODULES} <= known


def test_imports_point_down() -> None:
    wrong = []
    for module, imported, line in inner_edges():
        room, other = room_of(module), room_of(imported)
        if room == other or floor_of(room) < floor_of(other):
            continue
        if (room, other) not in NEIGHBOURS and (module, imported) not in EXCEPTIONS:
            wrong.append(f"hpcray/{module.replace('.', '/')}.py:{line} imports hpcray.{imported}")
    assert not wrong, "\n".join(["imports that point up or sideways:", *wrong])


def circle_in(room: str) -> list[str]:
    """Files of the room that import each other round and round; none if there is an order."""
    graph: dict[str, set[str]] = {}
    for module, imported, _ in inner_edges(ast.walk):
        if room_of(module) == room_of(imported) == room and module != imported:
            graph.setdefault(module, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES}))
def test_files_of_a_room_have_an_order(room: str) -> None:
    circle = circle_in(room)
    assert not circle, " <- ".join(circle)


def test_client_and_node_meet_only_as_messages() -> None:
    sides = {"client": "node", "node": "client", "worker": "node"}
    wrong = [edge for edge in inner_edges() if sides.get(room_of(edge[0])) == room_of(edge[1])
             and edge[:2] not in EXCEPTIONS]
    assert not wrong
    beyond = [edge for edge in inner_edges() if room_of(edge[0]) == "node"
              and room_of(edge[1]) == "worker" and edge[1] not in NODE_KNOWS_OF_WORKER]
    assert not beyond, "of the worker a node knows the zygote's messages only"


def test_every_exception_is_needed() -> None:
    edges = {edge[:2] for edge in inner_edges()}
    assert not set(EXCEPTIONS) - edges, "no longer there: take them off the list"
    rooms = {(room_of(a), room_of(b)) for a, b in edges}
    assert not set(NEIGHBOURS) - rooms


def test_external_packages_stay_in_their_rooms() -> None:
    wrong = [f"hpcray.{module}:{line} imports {full}"
             for module, tree in MODULES.items() for full, line in imports(tree)
             if full.split(".")[0] in EXTERNAL
             and not matches(module, EXTERNAL[full.split(".")[0]])]
    assert not wrong, "\n".join(wrong)


def test_pure_modules_touch_nothing() -> None:
    wrong = [f"hpcray.{module}:{line} imports {full}"
             for module, tree in MODULES.items() if matches(module, PURE)
             for full, line in imports(tree)
             if full.split(".")[0] in WORLD]
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, timeout=60, check=True,
        cwd=PACKAGE.parent)
    return done.stdout


def test_importing_hpcray_loads_nothing_heavy() -> None:
    found = run("import hpcray, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))")
    heavy = {"mpi4py", "numpy", "redis", "cupy", "cloudpickle", "asyncio", "multiprocessing"}
    assert not heavy & set(found.split())


# 0.09 s here. A driver, a node and a zygote all pay it. CPU time and not wall time: on a quiet
# machine they are the same, and on a loaded one only the first is the import's own.
IMPORT_CPU_S = 0.25
TRIES = 5


@pytest.mark.timeout(100)
def test_importing_hpcray_is_quick() -> None:
    """The best of several: neighbours that empty the caches slow an import as well."""
    code = ("import time; began_s = time.process_time(); import hpcray; "
            "print(time.process_time() - began_s)")
    best_s = min(float(run(code)) for _ in range(TRIES))
    assert best_s < IMPORT_CPU_S, f"import hpcray took {best_s:.3f} s of CPU at best"
