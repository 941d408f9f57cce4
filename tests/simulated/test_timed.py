"""The simulator: a cluster in virtual time. What it counts adds up, and a seed repeats it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcray.protocol import messages
from hpcray.testing import simulate
from hpcray.testing.timed import costs, plot
from hpcray.testing.timed.clock import Clock, NeverEnds
from hpcray.testing.timed.cluster import TimedCluster
from hpcray.testing.timed.report import Report
from hpcray.testing.timed.workload import Workload

COSTS = costs.load()
WORKLOADS = {
    "driver": Workload(nodes=6, tasks=400, task_s=0.005),
    "one node": Workload(nodes=1, tasks=400, task_s=0.0),
    "homes": Workload(nodes=6, tasks=400, task_s=0.003, homes=6, vary=1.0),
    "two homes": Workload(nodes=6, tasks=400, task_s=0.001, homes=2),
    "actors": Workload(nodes=6, tasks=400, task_s=0.002, actors=9),
}
modes = pytest.mark.parametrize("name", WORKLOADS)


def run(work: Workload, cost: costs.Costs = COSTS, **kwargs: Any) -> Report:
    cluster = TimedCluster(work, cost, **kwargs)
    cluster.run()
    return Report(cluster)


@modes
def test_every_task_runs_once_and_accounts_add_up(name: str) -> None:
    report = run(WORKLOADS[name], recording=True)
    cluster = report.cluster
    assert cluster.runs.each_once
    assert sum(cluster.runs.tasks_of) == report.work.tasks
    assert cluster.runs.worked_s == pytest.approx(sum(report.work.durations_s()))
    assert report.ideal_s <= report.makespan_s
    for node in cluster.nodes:
        for process in (node, *node.processes.values()):
            # What it has begun at the end goes a little further.
            assert process.usage.busy_s <= report.makespan_s + 0.002
            spans = process.usage.spans
            assert spans is not None
            assert sum(spans[1::2]) == pytest.approx(process.usage.busy_s)
            began = list(spans[::2])
            assert all(one + length <= following + 1e-12 for one, length, following in zip(
                began, spans[1::2], began[1:], strict=False)), "two things at once"


@modes
def test_rows_of_the_report_are_all_that_nodes_did(name: str) -> None:
    report = run(WORKLOADS[name])
    for account in filter(None, (report.node0, report.others)):
        rows = account.rows(report.cluster.world)
        assert sum(row.seconds for row in rows.values()) == pytest.approx(
            account.mean_busy * report.makespan_s)
        assert all(row.mean <= row.most for row in rows.values())
    assert report.node0.rows(report.cluster.world)["turns"].most > 0


@modes
def test_the_file_has_a_cost_of_every_message_that_is_counted(name: str) -> None:
    report = run(WORKLOADS[name])
    assert not report.cluster.world.unknown_kinds, (
        "measure again: python -m hpcray.testing.simulate --measure")


def test_the_file_has_costs_of_messages_that_there_are() -> None:
    kinds = {*COSTS.node.received_s, *COSTS.node.sent_s} - {costs.OTHER}
    assert all(hasattr(messages, kind) for kind in kinds)


def test_a_message_without_a_cost_is_told_of() -> None:
    known = {kind: seconds for kind, seconds in COSTS.node.received_s.items() if kind != "Done"}
    node = msgspec.structs.replace(COSTS.node, received_s=known)
    report = run(WORKLOADS["one node"], msgspec.structs.replace(COSTS, node=node))
    assert "No cost is known of Done" in "\n".join(report.lines())


def output(seed: int, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hpcray.testing.simulate", "--nodes", "5", "--tasks", "300",
         "--task-ms", "3", "--homes", "3", "--seed", str(seed)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True,
        timeout=60, check=True)
    return re.sub(r"^Clock: .*\n(So this .*\n)?", "", done.stdout, flags=re.M)


def test_a_seed_repeats_a_run() -> None:
    first = output(1, "1")
    assert first == output(1, "2")
    assert first.replace("seed 1", "") != output(2, "1").replace("seed 2", "")


def costing(**of_client: float) -> costs.Costs:
    return msgspec.structs.replace(
        COSTS, client=msgspec.structs.replace(COSTS.client, **of_client))


def test_who_is_saturated_is_named() -> None:
    empty = Workload(nodes=4, tasks=500, task_s=0.0)
    assert "the driver" in run(empty, costing(submit_s=0.001)).saturated[0]
    slow = msgspec.structs.replace(
        COSTS, node=msgspec.structs.replace(COSTS.node, factor=50.0))
    assert "node 0" in run(WORKLOADS["one node"], slow).saturated[0]
    [only] = run(Workload(nodes=4, tasks=200, task_s=0.2)).saturated
    assert only.startswith("the 8 CPUs with the tasks themselves")
    text = "\n".join(run(Workload(nodes=4, tasks=1, task_s=0.0)).lines())
    assert "Nothing is busy for 90 % of the makespan" in text


def test_costs_and_latencies_make_a_run_longer() -> None:
    work = Workload(nodes=4, tasks=200, task_s=0.0, homes=4)
    usual_s = run(work).makespan_s
    wire = msgspec.structs.replace(COSTS.wire, latency_s=0.01)
    assert run(work, msgspec.structs.replace(COSTS, wire=wire)).makespan_s > usual_s + 0.02
    assert run(work, costing(submit_s=0.001)).makespan_s > 200 / 4 * 0.001


def test_the_clock_instead_of_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--nodes", "3", "--tasks", "100", "--task-ms", "1", "--clock"]) == 0
    text = capsys.readouterr().out
    assert "by counting, where the makespan goes by the clock" in text
    assert re.search(r"^Clock: node 0's own code took \S+ m?s on this computer", text, flags=re.M)


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(costs.dump(COSTS))
    assert costs.dump(costs.load(path)) == path.read_text()


@pytest.mark.parametrize("change", [
    lambda text: text.replace("turn_s", "turns"), lambda text: text + "\n[",
    lambda text: re.sub("factor = .*", 'factor = "large"', text)])
def test_costs_that_cannot_be_read(
    change: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(change(costs.dump(COSTS)))
    assert simulate.main(["--costs", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{path} cannot be used as a file of costs")
    assert f"--measure --output {path}" in said


@pytest.mark.parametrize(("arguments", "why"), [
    (["--nodes", "0"], "at least 1 of nodes"),
    (["--nodes", "3", "--homes", "4"], "there are 3"),
    (["--homes", "2", "--actors", "2"], "not allowed with"),
    (["--tasks", "5", "--actors", "6"], "each actor needs a task"),
    (["--vary", "2"], "varies by 0 to 1"),
    (["--output", "x"], "--output is for --measure"),
])
def test_a_wrong_command_line(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        simulate.main(arguments)
    assert left.value.code == 2
    assert why in capsys.readouterr().err


SMALL = ["--nodes", "2", "--tasks", "50", "--task-ms", "1"]


def test_a_picture(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps the files of its fonts open."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "busy.png"
    subprocess.run([sys.executable, "-m", "hpcray.testing.simulate", *SMALL, "--plot", str(path)],
                   timeout=60, check=True, stdout=subprocess.DEVNULL)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the run, which may take minutes."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert simulate.main([*SMALL, "--plot", str(tmp_path / "busy.png")]) == 1
    said = capsys.readouterr()
    assert said.err == "--plot needs matplotlib: pip install matplotlib\n"
    assert not said.out


def test_who_reads_has_read_enough() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hpcray.testing.simulate", *SMALL],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is printed
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_shares_of_a_picture() -> None:
    parts = plot.shares([[10.0, 0.5], [10.25, 0.5]], 10.0, 1.0, 2)
    quarter = len(parts) // 4
    assert parts == pytest.approx(
        [0.5] * quarter + [1.0] * quarter + [0.5] * quarter + [0.0] * quarter)


def test_what_never_ends_is_told() -> None:
    clock = Clock()
    with pytest.raises(NeverEnds, match="nothing can happen"):
        clock.run(lambda: False, 1.0)

    def again() -> None:
        clock.at(clock.now_s + 0.1, again)

    again()
    with pytest.raises(NeverEnds, match="virtual time"):
        clock.run(lambda: False, 1.0)


def test_what_is_for_one_moment_happens_in_order() -> None:
    clock = Clock()
    happened: list[int] = []
    for number in (1, 2, 3):
        clock.at(0.5, happened.append, number)
    clock.at(0.25, happened.append, 0)
    clock.run(lambda: len(happened) == 4, 1.0)
    assert happened == [0, 1, 2, 3]
