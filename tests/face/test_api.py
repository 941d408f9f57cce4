"""get, put, wait, the session and the import: what is refused, and what needs no cluster to see."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hpcray as ray
from hpcray import api
from hpcray.client import process
from hpcray.client.client import Client
from hpcray.launch import terminal
from hpcray.protocol.ids import node_id_hex
from hpcray.protocol.messages import Output, Ready

ROOT = Path(__file__).resolve().parents[2]


@ray.remote
def nothing() -> None:
    pass


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_get_refuses_what_is_no_ref(node: Any) -> None:
    ref = ray.put(7)
    for wrong in (1, (ref,), {ref}, None, "x"):
        with pytest.raises(ValueError, match="list of them"):
            ray.get(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"holds 1 \(type int\)"):
        ray.get([ref, 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="timeout"):
        ray.get(ref, timeout=-1)
    with pytest.raises(TypeError, match="timeout must be None or a number of seconds, not '1'"):
        ray.get(ref, timeout="1")
    assert ray.get(ref) == 7
    assert ray.get([ref, ref]) == [7, 7]
    assert ray.get([]) == []


def test_get_gives_up_in_time(node: Any) -> None:
    ref = nothing.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(ref, timeout=0)
    with pytest.raises(TimeoutError):
        ray.get([ref], timeout=0.01)


def test_put_refuses_refs(node: Any) -> None:
    ref = ray.put(1)
    with pytest.raises(TypeError, match="use the ref itself"):
        ray.put(ref)
    assert ray.get(ray.put([ref])) == [ref]


def test_wait_refuses_what_cannot_be(node: Any) -> None:
    a, b = ray.put(1), ray.put(2)
    with pytest.raises(TypeError, match="put it into a list"):
        ray.wait(a)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="list of ObjectRefs, not tuple"):
        ray.wait((a,))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"holds 1 \(type int\)"):
        ray.wait([a, 1])
    with pytest.raises(ValueError, match="more than once"):
        ray.wait([a, a])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"from 1 to 2, the number of refs, not {count}"):
            ray.wait([a, b], num_returns=count)
    with pytest.raises(ValueError, match="must be 1, as there is one ref, not 2"):
        ray.wait([a], num_returns=2)
    with pytest.raises(TypeError, match="integer"):
        ray.wait([a], num_returns=1.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="timeout"):
        ray.wait([a], timeout=-1)
    assert ray.wait([]) == ([], [])
    assert ray.wait([a, b]) == ([a], [b])
    assert ray.wait([b, a], num_returns=2) == ([b, a], [])


def test_wait_keeps_the_order(node: Any) -> None:
    refs = [nothing.remote() for _ in range(4)]
    node.send(Ready(refs[3].binary() + refs[1].binary(), True))
    assert ray.wait(refs, num_returns=2) == ([refs[1], refs[3]], [refs[0], refs[2]])
    assert ray.wait([refs[0]], timeout=0.01) == ([], [refs[0]])


def test_init_twice(node: Any, client: Client) -> None:
    assert ray.is_initialized()
    with pytest.raises(RuntimeError, match="already"):
        ray.init()
    facts = ray.init(ignore_reinit_error=True)
    assert facts["node_id"] == node_id_hex(0, node.job_key)
    assert facts.address_info["nodes"] == 2
    client.is_driver = False
    with pytest.raises(RuntimeError, match="this process is a worker"):
        ray.init()
    with pytest.raises(RuntimeError, match="only the driver"):
        ray.shutdown()


@pytest.mark.parametrize(("arguments", "error", "says"), [
    ({"adress": "auto"}, TypeError, "adress"),
    ({"address": "ray://host:10001"}, ValueError, "mpirun"),
    ({"local_mode": True}, NotImplementedError, "__wrapped__"),
    ({"runtime_env": {"pip": ["x"]}}, NotImplementedError, "pip"),
    ({"num_cpus": -1}, ValueError, "num_cpus"),
    ({"job_config": 1}, TypeError, "namespace"),
    ({"logging_config": 1}, TypeError, "LoggingConfig"),
])
def test_init_refuses_before_anything_starts(
    arguments: dict[str, Any], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        ray.init(**arguments)
    assert not ray.is_initialized()


def test_shutdown_without_a_session_is_nothing() -> None:
    ray.shutdown()


def test_refs_and_handles_of_an_ended_session(node: Any) -> None:
    ref = ray.put(1)
    @ray.remote
    class Actor:
        def f(self) -> None: ...

    handle = Actor.remote()
    process.set_client(None)
    for use in (lambda: ray.get(ref), lambda: ray.get([ref]), lambda: ray.wait([ref]),
                lambda: ray.cancel(ref), lambda: handle.f.remote(), lambda: ray.kill(handle)):
        with pytest.raises(RuntimeError, match="has ended"):
            use()


def test_a_forked_child_has_no_session(node: Any) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run here.
        said = b"nothing"
        try:
            nothing.remote()
        except BaseException as error:
            said = str(error).encode()
        os.write(write, said)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert b"forked" in said
    nothing.remote()  # the parent's is as it was
    assert not api._forked_while_connected


def test_nodes_and_resources(node: Any) -> None:
    node.answers["nodes"] = lambda _: [
        {"rank": 0, "host": "a", "address": "10.0.0.1", "alive": True, "labels": {"x": "y"},
         "resources": {"CPU": 20_000, "GPU": 5_000}, "node_id": "ab"},
        {"rank": 1, "host": "b", "address": "10.0.0.2", "alive": False, "labels": {},
         "resources": {"CPU": 20_000}}]
    first, second = ray.nodes()
    assert (first["NodeID"], first["Alive"], first["Rank"]) == ("ab", True, 0)
    assert first["Resources"] == {"CPU": 2.0, "GPU": 0.5}
    assert first["Labels"] == {"x": "y"}
    assert (second["Alive"], second["Resources"]) == (False, {})
    assert second["NodeID"] == node_id_hex(1, node.job_key)
    node.answers["cluster_resources"] = lambda _: {"CPU": 40_000}
    node.answers["available_resources"] = lambda _: {"CPU": 1}
    assert ray.cluster_resources() == {"CPU": 4.0}
    assert ray.available_resources() == {"CPU": 0.0001}


def test_the_runtime_context_of_the_driver(node: Any) -> None:
    here = ray.get_runtime_context()
    assert here.get_job_id() == "00000001"
    assert here.get_node_id() == node_id_hex(0, node.job_key)
    assert here.get_rank() == 0
    assert len(here.get_worker_id()) == 56
    assert (here.get_task_id(), here.get_actor_id(), here.get_task_name()) == (None, None, None)
    assert here.namespace == "here"
    assert here.get_assigned_resources() == {}
    assert ray.get_gpu_ids() == []
    with pytest.raises(RuntimeError):
        here.current_actor  # noqa: B018
    with pytest.raises(RuntimeError):
        here.was_current_actor_reconstructed  # noqa: B018


def test_output_and_loss_never_raise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.print_output("", Output("(f pid=1) ", ("a", "b")))
    terminal.print_output("1", Output("(f pid=1) ", ("c",), True))
    api._print_lost("gone")
    shown = capsys.readouterr()
    assert shown.out == "(f pid=1) a\n(f pid=1) b\n"
    assert shown.err == "(f pid=1) c\nhpcray: the connection to the node is gone: gone\n"
    monkeypatch.setattr("sys.stdout", None)
    terminal.print_output("", Output("", ("lost",)))


@pytest.mark.parametrize(("wanted", "shown"), [
    ("", "\x1b[36m(f pid=8, ip=10.0.0.1)\x1b[0m a\n"), ("0", "(f pid=8, ip=10.0.0.1) a\n"),
    ("1", "\x1b[32m(f pid=8, ip=10.0.0.1)\x1b[0m a\n"),
])
def test_prefixes_are_coloured_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, wanted: str, shown: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", there := Terminal())
    terminal.print_output(wanted, Output("(f pid=8, ip=10.0.0.1) ", ("a",)))
    assert there.getvalue() == shown


def test_import_is_light() -> None:
    done = run_python(
        "import sys, hpcray\n"
        "heavy = {'numpy', 'mpi4py', 'redis', 'asyncio', 'multiprocessing', 'cupy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(hpcray.util.scheduling_strategies.NodeAffinitySchedulingStrategy.__name__)\n"
        "print(all(hasattr(hpcray, name) for name in hpcray.__all__), hasattr(hpcray, 'nonsense'))")
    assert done.stdout.splitlines() == ["[]", "NodeAffinitySchedulingStrategy", "True False"], done


def test_unknown_helpers_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ray.util.nonsense  # noqa: B018


@pytest.mark.parametrize(("ending", "status"), [
    ("pass", 0), ("raise ValueError", 1), ("raise KeyboardInterrupt", 130),
])
def test_the_exit_status_the_node_is_told(ending: str, status: int) -> None:
    done = run_python(
        "import atexit\nfrom hpcray import api\n"
        "atexit.register(lambda: print(api._exit_status()))\n" + ending)
    assert done.stdout == f"{status}\n"
