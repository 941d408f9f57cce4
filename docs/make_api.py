"""Writes docs/api.md: every public name and every option, and the test that exercises it.

    python docs/make_api.py            # after a change of names, docstrings, options or tests

What is there is read from the source (`ast`: nothing is imported, so an optional package need not
be installed) and from `hpcray/options.py`. What cannot be read is said below, once:

    TESTS           public name, or module -> the test file that uses it. What a class says goes
                    for its methods, what a module says for its names, unless they say otherwise
    OPTION_TESTS    option -> the test file that uses it
    RAY_DEFAULTS    Ray's defaults; tests/api/test_ray_defaults.py compares them with Ray's own

`tests/docs/test_api_page.py` fails, saying what to add, when a name has no entry, when a file does
not mention what it is an entry for, and when the page is not what this program writes.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = ROOT / "hpcray"

# The modules whose names are public, in the order of the page; those that are not there are left
# out. Below `hpcray.util` every module without an underscore is.
MODULES = ("hpcray", "hpcray.actor", "hpcray.exceptions", "hpcray.runtime_env",
           "hpcray.runtime_context", "hpcray.job_config", "hpcray.cloudpickle", "hpcray.types",
           "hpcray.futures", "hpcray.experimental", "hpcray.experimental.internal_kv",
           "hpcray.experimental.tqdm_ray", "hpcray.util")

# Public name (or module) -> test file below tests/. A name is that of the module that lists it
# first. `file#word`: the file shows it by this word, where its own name does not occur.
# None: a name only: nothing here raises it, or does more than hold it.
TESTS: dict[str, str | None] = {
    "hpcray.ActorClassID": "api/test_public_names.py",
    "hpcray.ActorID": "api/test_public_names.py",
    "hpcray.ActorID.from_random": "api/test_public_names.py",
    "hpcray.ClusterID": None,
    "hpcray.FunctionID": "api/test_public_names.py",
    "hpcray.JobConfig": "api/test_public_names.py",
    "hpcray.JobConfig.set_default_actor_lifetime":
        "api/test_public_names.py#default_actor_lifetime",
    "hpcray.JobConfig.set_ray_namespace": "api/test_public_names.py#ray_namespace",
    "hpcray.JobConfig.set_runtime_env": "api/test_public_names.py#runtime_env",
    "hpcray.JobID": "api/test_public_names.py",
    "hpcray.LoggingConfig": "api/test_public_names.py",
    "hpcray.LoggingConfig.fields": "api/test_public_names.py#LoggingConfig",
    "hpcray.NodeID": "api/test_public_names.py",
    "hpcray.PlacementGroupID": "api/test_public_names.py",
    "hpcray.TaskID": "api/test_public_names.py",
    "hpcray.TaskID.actor_id": "api/test_public_names.py",
    "hpcray.UniqueID": "api/test_public_names.py",
    "hpcray.UniqueID.from_random": "api/test_public_names.py",
    "hpcray.WorkerID": "api/test_public_names.py",
    "hpcray.cloudpickle.CloudPickler.reducer_override": None,
    "hpcray.cloudpickle": "api/test_public_names.py",
    "hpcray.experimental.internal_kv": "api/test_public_names.py",
    "hpcray.experimental.tqdm_ray": "api/test_public_names.py",
    "hpcray.runtime_env.RuntimeEnvConfig": "api/test_public_names.py",
    "hpcray.runtime_env.RuntimeEnvConfig.to_dict": "api/test_public_names.py#RuntimeEnvConfig",
    "hpcray.util.annotations": "api/test_public_names.py",
    "hpcray.util.debug": "api/test_public_names.py",
    "hpcray.util.disable_log_once_globally": "api/test_public_names.py",
    "hpcray.util.enable_periodic_logging": "api/test_public_names.py",
    "hpcray.util.log_once": "api/test_public_names.py",
    "hpcray.util.iter": "util/test_iter.py",
    "hpcray.util.iter.ParallelIteratorWorker.par_iter_next": "util/test_iter.py#from_actors",
    "hpcray.util.iter.ParallelIteratorWorker.par_iter_next_batch": "util/test_iter.py#from_actors",
    "hpcray.util.iter.ParallelIteratorWorker.par_iter_slice_batch":
        "util/test_iter.py#repartition",
    "hpcray.util.metrics": "api/test_public_names.py",
    "hpcray.ActorClass": "api/test_actors.py#remote",
    "hpcray.ActorClass.bind": "face/test_remote_function.py",
    "hpcray.ActorHandle": "face/test_actor.py",
    "hpcray.ObjectRef": "api/test_refs.py",
    "hpcray.ObjectRef.from_binary": "api/test_public_names.py",
    "hpcray.ObjectRef.from_hex": "api/test_public_names.py",
    "hpcray.ObjectRef.from_random": "api/test_public_names.py",
    "hpcray.ObjectRef.is_nil": "api/test_public_names.py",
    "hpcray.ObjectRef.nil": "api/test_public_names.py",
    "hpcray.ObjectRef.size": "api/test_public_names.py",
    "hpcray.ObjectRef.as_future": "util/test_futures.py#future",
    "hpcray.ObjectRef.future": "util/test_futures.py",
    "hpcray.DynamicObjectRefGenerator": "api/test_generators.py#dynamic",
    "hpcray.ObjectRefGenerator": "api/test_generators.py",
    "hpcray.ObjectRefGenerator.close": "api/test_generators.py",
    "hpcray.ObjectRefGenerator.send": "api/test_generators.py",
    "hpcray.RemoteFunction": "face/test_remote_function.py",
    "hpcray.available_resources": "api/test_resources.py",
    "hpcray.cancel": "api/test_errors.py",
    "hpcray.cluster_resources": "api/test_resources.py",
    "hpcray.get": "api/test_get.py",
    "hpcray.get_actor": "api/test_named_actors.py",
    "hpcray.get_gpu_ids": "api/test_context.py",
    "hpcray.get_runtime_context": "api/test_context.py",
    "hpcray.init": "api/test_init.py",
    "hpcray.is_initialized": "api/test_init.py",
    "hpcray.kill": "api/test_worker_death.py",
    "hpcray.method": "api/test_actors.py",
    "hpcray.nodes": "face/test_api.py",
    "hpcray.put": "api/test_put.py",
    "hpcray.remote": "api/test_tasks.py",
    "hpcray.shutdown": "api/test_init.py",
    "hpcray.wait": "api/test_wait.py",
    "hpcray.actor": "face/test_actor.py",
    "hpcray.actor.ActorMethod.bind": "face/test_remote_function.py",
    "hpcray.actor.ActorMethod.options": "api/test_named_actors.py",
    "hpcray.actor.list_named_actors": "api/test_named_actors.py",
    "hpcray.exceptions": "api/test_errors.py",
    "hpcray.exceptions.ActorPlacementGroupRemoved": None,
    "hpcray.exceptions.AsyncioActorExit": None,
    "hpcray.exceptions.CrossLanguageError": None,
    "hpcray.exceptions.LaunchError": "launch/test_launch_mpirun.py",
    "hpcray.exceptions.LocalRayletDiedError": None,
    "hpcray.exceptions.ObjectFreedError": None,
    "hpcray.exceptions.UnserializableException": None,
    "hpcray.exceptions.OutOfDiskError": None,
    "hpcray.exceptions.ObjectFetchTimedOutError": None,
    "hpcray.exceptions.ObjectReconstructionFailedError": None,
    "hpcray.exceptions.OwnerDiedError": None,
    "hpcray.exceptions.NodeDiedError": None,
    "hpcray.exceptions.OutOfMemoryError": None,
    "hpcray.exceptions.RayChannelError": None,
    "hpcray.exceptions.AuthenticationError": None,
    "hpcray.exceptions.ObjectRefStreamEndOfStreamError": None,
    "hpcray.exceptions.OufOfBandObjectRefSerializationException": None,
    "hpcray.exceptions.PlasmaObjectNotAvailable": None,
    "hpcray.exceptions.RpcError": None,
    "hpcray.exceptions.StreamingGeneratorReplayInconsistentError": None,
    "hpcray.exceptions.RayChannelTimeoutError": None,
    "hpcray.exceptions.RayCgraphCapacityExceeded": None,
    "hpcray.exceptions.RayDirectTransportError": None,
    "hpcray.exceptions.ReferenceCountingAssertionError": None,
    "hpcray.exceptions.TaskError": "util/test_futures.py",
    "hpcray.exceptions.TaskError.as_instanceof_cause": "api/test_errors.py#RayTaskError",
    "hpcray.exceptions.TaskError.make_dual_exception_instance": "api/test_errors.py",
    "hpcray.exceptions.TaskError.proctitle": "api/test_errors.py",
    "hpcray.exceptions.TaskPlacementGroupRemoved": None,
    "hpcray.experimental": "api/test_state.py",
    "hpcray.futures": "util/test_futures.py",
    "hpcray.runtime_env.RuntimeEnv": "api/test_runtime_env.py",
    "hpcray.runtime_context": "api/test_context.py",
    "hpcray.runtime_context.RuntimeContext": "api/test_context.py#get_runtime_context",
    "hpcray.runtime_context.RuntimeContext.gcs_address": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get": "api/test_context.py",
    "hpcray.runtime_context.RuntimeContext.get_accelerator_ids": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get_node_labels": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get_placement_group_id": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get_rank": "face/test_api.py",
    "hpcray.runtime_context.RuntimeContext.job_id": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get_resource_ids": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.get_temp_dir": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.current_placement_group_id": "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.should_capture_child_tasks_in_placement_group":
        "util/test_names.py",
    "hpcray.runtime_context.RuntimeContext.task_id": "util/test_names.py",
    "hpcray.util": "util/test_serialization.py",
    "hpcray.util.ActorPool": "util/test_actor_pool.py",
    "hpcray.util.get_current_placement_group": "api/test_placement_groups.py",
    "hpcray.util.get_placement_group": "api/test_placement_groups.py",
    "hpcray.util.placement_group": "api/test_placement_groups.py",
    "hpcray.util.placement_group.PlacementGroup.empty": "util/test_names.py",
    "hpcray.util.placement_group_table": "api/test_placement_groups.py",
    "hpcray.util.remove_placement_group": "api/test_placement_groups.py",
    "hpcray.util.check_serialize": "util/test_serialization.py#inspect_serializability",
    "hpcray.util.collective": "util/test_collective.py",
    "hpcray.util.dask": "util/test_dask.py",
    "hpcray.util.joblib": "util/test_joblib.py",
    "hpcray.util.multiprocessing": "util/test_multiprocessing.py",
    "hpcray.util.multiprocessing.AsyncResult": "util/test_multiprocessing.py#apply_async",
    "hpcray.util.multiprocessing.pool.IMapIterator": "util/test_multiprocessing.py#imap",
    "hpcray.util.multiprocessing.pool.RemoteTraceback": "util/test_multiprocessing.py#__cause__",
    "hpcray.util.queue": "util/test_queue.py",
    "hpcray.util.scheduling_strategies": "face/test_options.py",
    "hpcray.util.accelerators": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.DoesNotExist": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.Exists": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.In": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.NodeLabelSchedulingStrategy": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.NotIn": "api/test_placing.py",
    "hpcray.util.scheduling_strategies.PlacementGroupSchedulingStrategy":
        "api/test_placement_groups.py",
    "hpcray.util.state": "api/test_state.py",
    "hpcray.util.state.common": "api/test_state.py",
    "hpcray.util.state.exception": "api/test_state.py",
}
# Of the modules below hpcray.util: nothing that a program imports.
INTERNAL = ("hpcray.util.joblib.ray_backend",)

OPTION_TESTS: dict[str, str] = {
    "_generator_backpressure_num_objects": "api/test_generators.py",
    "accelerator_type": "api/test_placing.py",
    "allow_out_of_order_execution": "api/test_actor_options.py",
    "concurrency_group": "api/test_actor_options.py",
    "concurrency_groups": "api/test_actor_options.py",
    "enable_task_events": "api/test_state.py",
    "fallback_strategy": "api/test_resources.py",
    "get_if_exists": "api/test_named_actors.py",
    "label_selector": "api/test_placing.py",
    "lifetime": "api/test_named_actors.py",
    "max_calls": "api/test_tasks.py",
    "max_concurrency": "api/test_actors.py",
    "max_pending_calls": "api/test_actor_options.py",
    "max_restarts": "api/test_worker_death.py",
    "max_retries": "api/test_worker_death.py",
    "max_task_retries": "api/test_worker_death.py",
    "memory": "api/test_resources.py",
    "name": "api/test_named_actors.py",
    "namespace": "api/test_named_actors.py",
    "num_cpus": "api/test_resources.py",
    "num_gpus": "api/test_context.py",
    "num_returns": "api/test_tasks.py",
    "placement_group": "api/test_placement_groups.py",
    "placement_group_bundle_index": "api/test_placement_groups.py",
    "placement_group_capture_child_tasks": "api/test_placement_groups.py",
    "priority": "api/test_placing.py",
    "resources": "api/test_resources.py",
    "retry_exceptions": "api/test_errors.py",
    "runtime_env": "api/test_runtime_env.py",
    "scheduling_strategy": "mpirun/test_objects_between_ranks.py",
}

# What a task (t) and an actor (a) have if they say nothing, in Ray 2.60.
RAY_DEFAULTS: dict[str, dict[str, Any]] = {
    "t": {
        "_generator_backpressure_num_objects": None, "_labels": None, "_num_objects_per_yield": 1,
        "accelerator_type": None, "enable_task_events": True, "fallback_strategy": None,
        "label_selector": None, "max_calls": 0, "max_retries": 3, "memory": None, "name": None,
        "num_cpus": 1, "num_gpus": None, "num_returns": None, "object_store_memory": None,
        "placement_group": "default", "placement_group_bundle_index": -1,
        "placement_group_capture_child_tasks": None, "resources": None, "retry_exceptions": False,
        "runtime_env": None, "scheduling_strategy": None,
    },
    "a": {
        "_actor_generator_backpressure_num_objects": None, "_labels": None,
        "accelerator_type": None, "allow_out_of_order_execution": None,
        "concurrency_groups": None, "enable_task_events": True, "enable_tensor_transport": None,
        "fallback_strategy": None, "get_if_exists": False, "label_selector": None,
        "lifetime": None, "max_concurrency": None, "max_pending_calls": -1, "max_restarts": 0,
        "max_task_retries": 0, "memory": None, "name": None, "namespace": None, "num_cpus": None,
        "num_gpus": None, "object_store_memory": None, "placement_group": "default",
        "placement_group_bundle_index": -1, "placement_group_capture_child_tasks": None,
        "resources": None, "runtime_env": None, "scheduling_strategy": None,
    },
}
_WHOM = {"t": "tasks", "a": "actors", "m": "methods"}
# Where no value means more than None.
_MEANS = {"num_cpus": "None: 1, of an actor that asks for nothing 1 to start and 0 to live",
          "max_concurrency": "None: 1, with async methods 1000",
          "num_returns": "None: 1"}


@dataclass
class Name:
    """A public name: where it is listed, what it is, and the first sentence of its docstring."""

    module: str
    name: str
    kind: str
    text: str
    members: list[Name] = field(default_factory=list)

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


class Problem(Exception):
    """Something to add, said so that one can."""


# --- reading the source --------------------------------------------------------------------------


def path_of(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.exists():
            return path
    return None


def public_modules() -> list[str]:
    found = [module for module in MODULES if path_of(module) is not None]
    below = sorted((PACKAGE / "util").rglob("*.py"), key=lambda p: (len(p.parts), str(p)))
    for path in sorted(below):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("hpcray", *parts)).removesuffix(".__init__")
        if name not in (*found, *INTERNAL) and not any(part.startswith("_") for part in parts
                                         if part != "__init__"):
            found.append(name)
    return found


@functools.cache
def tree_of(module: str) -> ast.Module:
    path = path_of(module)
    assert path is not None, module
    return ast.parse(path.read_text(), str(path))


def listed(tree: ast.Module) -> list[str]:
    """What `__all__` says; without it, the classes and functions without an underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return [node.name for node in tree.body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


def definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """(module, node) where the name is defined; follows imports within hpcray."""
    tree = tree_of(module)
    found: ast.AST | None = None
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name == name:
                found = node  # the last one: overloads stand before it
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if isinstance(node.value, ast.Name):
                return definition(module, node.value.id)
    if found is not None:
        return module, found
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpcray"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    if path_of(f"{node.module}.{alias.name}") is not None:
                        return None  # a module
                    return definition(str(node.module), alias.name)
    return None


def first_sentence(node: ast.AST) -> str:
    text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?:;])\s", paragraph)[0].rstrip(":;") if paragraph else ""


def members_of(module: str, name: str, node: ast.ClassDef) -> Iterator[Name]:
    """Of the class, and of a base in a module beside the public ones (`hpcray/bundles.py`)."""
    seen = set()
    inherited: list[ast.stmt] = []
    for base in node.bases:
        place = definition(module, base.id) if isinstance(base, ast.Name) else None
        if place is not None and place[0].count(".") == 1 and place[0] not in public_modules():
            assert isinstance(place[1], ast.ClassDef)
            inherited += place[1].body
    for child in [*inherited, *node.body]:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_") and child.name not in seen:
                seen.add(child.name)
                kind = "property" if any(
                    ast.unparse(d) == "property" for d in child.decorator_list) else "method"
                yield Name(module, f"{name}.{child.name}", kind, first_sentence(child))


def public_names() -> list[Name]:
    """Every definition once, where it is listed first."""
    found: list[Name] = []
    defined: set[tuple[str, str]] = set()
    for module in public_modules():
        for name in listed(tree_of(module)):
            place = definition(module, name)
            if place is None:
                continue  # a module, or a constant
            where, node = place
            assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if (where, node.name) in defined or (
                    name != node.name and node.name in listed(tree_of(module))):
                continue  # listed before, or another name of one that is listed too
            defined.add((where, node.name))
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            entry = Name(module, name, kind, first_sentence(node))
            if isinstance(node, ast.ClassDef):
                entry.members = list(members_of(module, name, node))
            found.append(entry)
    return found


# --- checking the entries ------------------------------------------------------------------------


def mentions(file: str, word: str) -> bool:
    path = ROOT / "tests" / file
    if not path.exists():
        raise Problem(f"docs/make_api.py names tests/{file}, which does not exist")
    return re.search(rf"\b{re.escape(word)}\b", path.read_text()) is not None


def entry_of(name: Name, owner: Name | None) -> Any:
    """Its own, its class's, its module's, or `...` if there is none."""
    key = name.full
    if key in TESTS:
        return TESTS[key]
    if owner is not None and owner.full in TESTS:
        entry = TESTS[owner.full]
        return entry if entry is None else entry.partition("#")[0]
    return TESTS.get(name.module, ...)


def test_of(name: Name, owner: Name | None = None) -> str | None:
    """The test file of a name.

    Raises:
      Problem: it has no entry, or one that does not mention it.
    """
    entry = entry_of(name, owner)
    if entry is ...:
        raise Problem(f"{name.full} is public and docs/make_api.py does not know its test: add "
                      f'"{name.full}": "<file below tests/ that uses it>" to TESTS')
    if entry is None:
        return None
    file, _, word = str(entry).partition("#")
    word = word or name.name.rpartition(".")[2]
    if not mentions(file, word):
        raise Problem(f"tests/{file} does not mention {word}: test {name.full} there, or add "
                      f'"{name.full}": "<the file that does>" to TESTS in docs/make_api.py')
    return file


def problems() -> list[str]:
    """Everything that is missing or wrong in the tables above."""
    from hpcray.options import TABLE

    found: list[str] = []
    known: set[str] = set()
    for name in public_names():
        for item, owner in [(name, None), *((member, name) for member in name.members)]:
            known.add(item.full)
            try:
                test_of(item, owner)
            except Problem as problem:
                found.append(str(problem))
    found += [f"TESTS in docs/make_api.py names {name}, which is not public: take it off"
              for name in sorted(set(TESTS) - known - set(public_modules()))]
    for option, facts in TABLE.items():
        if facts.unsupported:
            continue
        file = OPTION_TESTS.get(option)
        if file is None:
            found.append(f"the option {option} has no test in docs/make_api.py: add "
                         f'"{option}": "<file below tests/ that uses it>" to OPTION_TESTS')
        elif not mentions(file, option):
            found.append(f"tests/{file} does not mention the option {option}")
    found += [f"OPTION_TESTS in docs/make_api.py names {option}, which is no (supported) option"
              for option in sorted(OPTION_TESTS)
              if option not in TABLE or TABLE[option].unsupported]
    return found


# --- writing the page ----------------------------------------------------------------------------


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def link(entry: str | None) -> str:
    file = "" if entry is None else entry.partition("#")[0]
    return f"[{file}](../tests/{file})" if file else "a name only"


def option_rows() -> Iterator[str]:
    from hpcray.options import TABLE

    for name, option in sorted(TABLE.items(), key=lambda item: (bool(item[1].unsupported),
                                                                 item[0].lstrip("_"))):
        whom = ", ".join(_WHOM[letter] for letter in option.applies_to)
        rays = {repr(RAY_DEFAULTS[letter][name]): letter for letter in option.applies_to
                if letter in RAY_DEFAULTS and name in RAY_DEFAULTS[letter]}
        ray = " / ".join(f"{value} ({_WHOM[letter]})" if len(rays) > 1 else value
                         for value, letter in rays.items()) or "not told"
        ours = repr(option.default)
        if option.unsupported:
            yield f"| `{name}` | {whom} | {ray} | refused: {cell(option.unsupported)} | |"
        else:
            yield (f"| `{name}` | {whom} | {ray} | {_MEANS.get(name, ours)} | "
                   f"{link(OPTION_TESTS.get(name))} |")


def not_options() -> list[str]:
    from hpcray.options import TABLE

    return sorted({name for table in RAY_DEFAULTS.values() for name in table} - set(TABLE))


def render() -> str:
    lines = [
        "# The public names, and their tests",
        "",
        "`docs/make_api.py` writes this page from the source. `tests/docs/test_api_page.py` fails",
        "if the page is not what it writes. The names and their meaning are Ray's.",
        "[differences.md](differences.md) says what differs.",
        "",
        "## Options of tasks, actors and methods",
        "",
        "These are the keywords of `@remote(...)`, `.options(...)` and `@method(...)`. Some are",
        "refused: for them only the default is accepted.",
        "",
        "| option | of | Ray's default | here | tested by |",
        "|---|---|---|---|---|",
        *option_rows(),
        "",
    ]
    if not_options():
        lines += [f"No options here: {', '.join(f'`{name}`' for name in not_options())}.", ""]
    names = public_names()
    for module in dict.fromkeys(name.module for name in names):
        lines += [f"## `{module}`", "", "| name | | tested by |", "|---|---|---|"]
        for name in names:
            if name.module == module:
                lines.append(row(name, None))
                lines += [row(member, name) for member in name.members]
        lines.append("")
    return "\n".join(lines)


def row(name: Name, owner: Name | None) -> str:
    shown = name.name + ("()" if name.kind in ("function", "method") else "")
    file = entry_of(name, owner)
    return f"| `{shown}` | {cell(name.text)} | {'' if file is ... else link(file)} |"


def main() -> int:
    wrong = problems()
    for text in wrong:
        print(text, file=sys.stderr)
    PAGE.write_text(render())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
