"""The options of tasks, actors and methods: one table, and what they mean as templates.

    @remote(num_cpus=2)  -->  check_options  -->  {"num_cpus": 2}  -->  task_template  -->  Template

Pure: options in, `Template` out. An option that cannot work fails here, where it is written.
Whatever Ray has and hpcray does not (yet) is in the table too, with a sentence saying so: a
program must never run with an option silently without effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from hpcray.config import SETUP_HOOK, check_namespace, check_resource_name, check_runtime_env
from hpcray.protocol import labels, messages, sizes, words
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    DYNAMIC,
    FAIL,
    METHOD,
    SPILL,
    STREAM,
    TASK,
    UNIT,
    WAIT,
    Template,
)

# Ray's defaults.
TASK_MAX_RETRIES = 3
ASYNC_MAX_CONCURRENCY = 1000
# What a task takes of an `accelerator_type:X`, in ten-thousandths.
_ACCELERATOR_UNITS = 10
_PRIORITY_MAX = 2**31 - 1

Options = dict[str, Any]
Resources = tuple[tuple[str, int], ...]


# --- validators: what the value must be, or an error that says so --------------------------------


def _whole(low: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < low:
            without_limit = " (-1: without limit)" if low == -1 else ""
            raise ValueError(f"{name} must be at least {low}{without_limit}, not {value}")

    return check


def _instance(kind: type, none: bool = True) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not (isinstance(value, kind) or (none and value is None)):
            raise TypeError(f"{name} must be of type {kind.__name__}, not {value!r}")

    return check


def _any(_name: str, _value: Any) -> None:
    pass


def amount(name: str, value: Any, resource: str = "") -> int:
    """A quantity of a resource (`name` if not told) in ten-thousandths; of memory whole bytes,
    rounded up.

    Raises:
      ValueError: negative, not finite, or finer than 1/10000.
    """
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, not {value!r}")
    scaled = (math.ceil(value) if (resource or name) == "memory" else value) * UNIT
    units = round(scaled)
    # A float product is off by an ulp or two; anything more is a finer fraction.
    if abs(scaled - units) > 1e-9 * max(1.0, abs(scaled)):
        raise ValueError(f"{name}={value!r} is finer than 1/{UNIT}, the smallest fraction there is")
    return units


def _resource(name: str, value: Any) -> None:
    if value is not None:
        amount(name, value)


def _gpus(name: str, value: Any) -> None:
    if value is not None and amount(name, value) > UNIT and float(value) != int(value):
        raise ValueError(f"{name} above 1 must be a whole number, not {value!r}: "
                         "only one device can be shared")


_OWN_OPTION = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def _resources(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, not {value!r}")
    for resource, quantity in value.items():
        if not isinstance(resource, str) or not resource:
            raise TypeError(f"a resource is named by a non-empty string, not {resource!r}")
        if resource in _OWN_OPTION:
            raise ValueError(f"use {_OWN_OPTION[resource]}= instead of {resource!r} in {name}")
        check_resource_name(resource)
        amount(f"{name}[{resource!r}]", quantity)


def _accelerator(name: str, value: Any) -> None:
    _name(name, value)


def _label_selector(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, not {value!r}")
    labels.parse_selector(value)


def _fallback(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of dicts, not {value!r}")
    for choice in value:
        if not isinstance(choice, Mapping):
            raise TypeError(f"{name} must be a list of dicts; {choice!r} is none")
        if set(choice) != {"label_selector"}:
            raise ValueError(f"a choice in {name} has a label_selector and nothing else, not "
                             f"{choice!r}")
        _label_selector("label_selector", choice["label_selector"])


def _priority(name: str, value: Any) -> None:
    _whole(-_PRIORITY_MAX)(name, value)
    if value is not None and value > _PRIORITY_MAX:
        raise ValueError(f"{name} must be at most {_PRIORITY_MAX}, not {value}")


def _num_returns(name: str, value: Any) -> None:
    if value not in ("streaming", "dynamic"):
        _whole(0)(name, value)
        if value is not None and value > sizes.RETURNS_MAX:
            raise ValueError(
                f"{name} must be at most {sizes.RETURNS_MAX:,}, not {value:,}; return a list")


def _window(name: str, value: Any) -> None:
    _whole(-1)(name, value)
    if value == 0:
        raise ValueError(f"{name} must be at least 1, or -1 (without limit), not 0: with 1 the "
                         "task makes an item for each one taken")


def _retry_exceptions(name: str, value: Any) -> None:
    if isinstance(value, bool) or value is None:
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be True, False or a list of exception classes, not {value!r}")
    if not all(isinstance(item, type) and issubclass(item, Exception) for item in value):
        raise ValueError(f"{name} must hold exception classes only, not {value!r}")


def _groups(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of names and limits, not {value!r}")
    for group, limit in value.items():
        if not isinstance(group, str) or not group:
            raise TypeError(f"a concurrency group is named by a non-empty string, not {group!r}")
        if limit is None:
            raise TypeError(f"{name}[{group!r}] must be an integer, not None")
        _whole(1)(f"{name}[{group!r}]", limit)


def _lifetime(name: str, value: Any) -> None:
    if value not in (None, "detached", "non_detached"):
        raise ValueError(f"{name} must be 'detached', 'non_detached' or None, not {value!r}")


def _name(name: str, value: Any) -> None:
    _instance(str)(name, value)
    if value == "":
        raise ValueError(f"{name} may not be empty")


def _namespace(_name: str, value: Any) -> None:
    if value is not None:
        check_namespace(value)


def _runtime_env(_name: str, value: Any) -> None:
    if SETUP_HOOK in check_runtime_env(value):
        raise ValueError(f"{SETUP_HOOK} is for all workers of the job: give it to init()")


def _group(name: str, value: Any) -> None:
    if value is not None and value != "default":
        from hpcray.bundles import Bundles

        if not isinstance(value, Bundles):
            raise TypeError(f"{name} must be of type PlacementGroup, not {value!r}")


def _strategy(_name: str, value: Any) -> None:
    placement(value)


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """`unsupported`: why any value but the default is refused; empty if hpcray has it."""

    applies_to: str  # of "t"asks, "a"ctors, "m"ethods
    default: Any
    check: Callable[[str, Any], None]
    unsupported: str = ""


TABLE: dict[str, Option] = {
    "num_cpus": Option("ta", None, _resource),
    "num_gpus": Option("ta", None, _gpus),
    "memory": Option("ta", None, _resource),
    "resources": Option("ta", None, _resources),
    "scheduling_strategy": Option("ta", None, _strategy),
    "runtime_env": Option("ta", None, _runtime_env),
    "name": Option("tam", None, _instance(str)),
    "num_returns": Option("tm", None, _num_returns),
    "max_retries": Option("t", TASK_MAX_RETRIES, _whole(-1)),
    "retry_exceptions": Option("tm", False, _retry_exceptions),
    "max_calls": Option("t", 0, _whole(0)),
    "priority": Option("t", 0, _priority),  # ours
    "namespace": Option("a", None, _namespace),
    "lifetime": Option("a", None, _lifetime),
    "get_if_exists": Option("a", False, _instance(bool, none=False)),
    "max_restarts": Option("a", 0, _whole(-1)),
    "max_task_retries": Option("am", 0, _whole(-1)),
    "max_concurrency": Option("a", None, _whole(1)),
    "allow_out_of_order_execution": Option("a", None, _instance(bool)),
    # Whether `util.state` tells of the task.
    "enable_task_events": Option("tam", True, _instance(bool)),
    "max_pending_calls": Option("a", -1, _whole(-1)),
    "concurrency_groups": Option("a", None, _groups),
    "concurrency_group": Option("m", None, _instance(str)),
    "accelerator_type": Option("ta", None, _accelerator),
    "label_selector": Option("ta", None, _label_selector),
    "fallback_strategy": Option("ta", None, _fallback),
    # Ray's, refused unless they say what happens anyway.
    "object_store_memory": Option(
        "ta", None, _any, "object_store_memory can be set for the job only: init(...)"),
    # Ray's older way to say PlacementGroupSchedulingStrategy.
    "placement_group": Option("ta", "default", _group),
    "placement_group_bundle_index": Option("ta", -1, _whole(-1)),
    "placement_group_capture_child_tasks": Option("ta", None, _instance(bool)),
    "tensor_transport": Option("m", None, _any, "tensor_transport is not supported"),
    "enable_tensor_transport": Option("a", None, _any, "tensor_transport is not supported"),
    "_generator_backpressure_num_objects": Option("tm", None, _window),
    "_num_objects_per_yield": Option("tm", 1, _any, "each yield makes one object"),
    "_actor_generator_backpressure_num_objects": Option(
        "a", -1, _any, "every stream has a limit of its own, _generator_backpressure_num_objects "
        "of the method"),
    "_labels": Option("ta", None, _any, "nodes have labels (HPCRAY_LABELS), tasks select them"),
}

_WHOM = {"t": "tasks", "a": "actors", "m": "actor methods"}


def valid_names(whom: str) -> list[str]:
    """The options a task ("t"), actor ("a") or method ("m") can have with effect."""
    return sorted(n for n, o in TABLE.items() if whom in o.applies_to and not o.unsupported)


def _instead(name: str, whom: str) -> str:
    known = valid_names(whom)
    return f"{words.did_you_mean(name, known)} There are: {', '.join(known)}".lstrip()


def check_options(options: Mapping[str, Any], whom: str, *, later: bool = False) -> Options:
    """The options that say something, checked. `later`: given to `.options`, not at declaration.

    Raises:
      ValueError: unknown, or a value that cannot be.
      TypeError: a value of the wrong type.
      NotImplementedError: Ray has it, hpcray does not (yet).
    """
    checked: Options = {}
    for name, value in options.items():
        option = TABLE.get(name)
        if option is None or whom not in option.applies_to:
            raise ValueError(f"{name!r} is not an option of {_WHOM[whom]}. {_instead(name, whom)}")
        if option.unsupported:
            if value is not None and value != option.default:
                option.check(name, value)  # what is wrong anywhere is said first
                raise NotImplementedError(f"{name}={value!r}: {option.unsupported}")
            continue
        option.check(name, value)
        # Paths are meant from where they are written.
        checked[name] = check_runtime_env(value) if name == "runtime_env" and value else value
    if later and whom == "t" and options.get("max_calls") is not None:
        raise ValueError("max_calls belongs to the function: give it to @remote, not to .options()")
    if whom == "a" and options.get("name") == "":
        raise ValueError("an actor's name may not be empty")
    if whom == "a" and options.get("get_if_exists") and not options.get("name") and not later:
        raise ValueError("get_if_exists needs a name")
    return checked


def value_of(options: Mapping[str, Any], name: str) -> Any:
    """The option's value; unset and None mean its default."""
    value = options.get(name)
    return TABLE[name].default if value is None else value


def for_generator(options: Options, is_generator: bool, name: str) -> Options:
    """The options of a callable that is, or is not, a generator: one streams unless told otherwise.

    Raises:
      ValueError: a stream of something that does not yield.
    """
    count = options.get("num_returns")
    if is_generator:
        return options if count is not None else {**options, "num_returns": "streaming"}
    if count in ("streaming", "dynamic"):
        raise ValueError(
            f"{name} does not yield: num_returns={count!r} is for generators")
    return options


# --- what they mean ------------------------------------------------------------------------------


def placement(strategy: Any) -> dict[str, Any]:
    """What a scheduling strategy says in a template."""
    if strategy is None or strategy == "DEFAULT":
        return {}
    if strategy == "SPREAD":
        return {"spread": True}
    # Only now: most programs never load it.
    from hpcray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        NodeLabelSchedulingStrategy,
        PlacementGroupSchedulingStrategy,
        rank_of,
    )

    if isinstance(strategy, NodeAffinitySchedulingStrategy):
        return {"rank": rank_of(strategy.node_id), "soft": strategy.soft,
                "unavailable": SPILL if strategy._spill_on_unavailable
                else FAIL if strategy._fail_on_unavailable else WAIT}
    if isinstance(strategy, NodeLabelSchedulingStrategy):
        return {"spread": bool(strategy.soft)}
    if isinstance(strategy, PlacementGroupSchedulingStrategy):
        return {}
    if isinstance(strategy, str):
        raise ValueError(f"scheduling_strategy must be 'DEFAULT', 'SPREAD' or a strategy object, "
                         f"not {strategy!r}")
    raise TypeError("scheduling_strategy must be 'DEFAULT', 'SPREAD' or one of the classes of "
                    "hpcray.util.scheduling_strategies, such as NodeAffinitySchedulingStrategy, "
                    f"not {strategy!r}")


def _on_labels(template: Template, options: Mapping[str, Any]) -> Template:
    """The template with its conditions on labels among its resources: see protocol/labels.py."""
    strategy = options.get("scheduling_strategy")
    choices = [labels.parse_selector(selector or {}) for selector in (
        options.get("label_selector"),
        *(choice["label_selector"] for choice in options.get("fallback_strategy") or ()))]
    hard: list[labels.Condition] = []
    soft: list[labels.Condition] = []
    if strategy is not None and not isinstance(strategy, str):
        from hpcray.util.scheduling_strategies import NodeLabelSchedulingStrategy, conditions

        if isinstance(strategy, NodeLabelSchedulingStrategy):
            hard = conditions(strategy.hard)
            soft = conditions(strategy.soft)
    names = [labels.name(labels.SOFT, soft)] if soft else []
    if hard or any(choices):
        names.append(labels.name(labels.HARD, *([*choice, *hard] for choice in choices)))
    if not names:
        return template
    if len(choices) > 1:  # not where there happens to be room, but where it is preferred
        template = msgspec.structs.replace(template, spread=True)

    def also(shape: Resources) -> Resources:
        return tuple(sorted((*shape, *((name, labels.TAKEN) for name in names))))

    return msgspec.structs.replace(template, resources=also(template.resources))


def group_strategy(options: Mapping[str, Any]) -> Any:
    """The PlacementGroupSchedulingStrategy that the options ask for, or None."""
    strategy = options.get("scheduling_strategy")
    old = options.get("placement_group", "default")
    if old not in (None, "default"):
        if strategy is not None:
            raise ValueError("give either placement_group or scheduling_strategy, not both")
        from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(
            old, value_of(options, "placement_group_bundle_index"),
            options.get("placement_group_capture_child_tasks"))
    if getattr(strategy, "placement_group", None) not in (None, "default"):
        return strategy
    index = getattr(strategy, "placement_group_bundle_index", -1)
    if index != -1 or value_of(options, "placement_group_bundle_index") != -1:
        raise ValueError("a placement group bundle index without a placement group")
    return None


# What every task in a group takes of its bundle: see node/placement.py.
_MEMBER = ("bundle", 10)


def _in_group(template: Template, options: Mapping[str, Any]) -> Template:
    """The template with its resources as the group offers them.

    Raises:
      ValueError: no bundle is large enough.
    """
    strategy = group_strategy(options)
    if strategy is None or strategy.placement_group.is_empty:
        return template
    group, index = strategy.placement_group, strategy.placement_group_bundle_index
    bundles = [{name: amount(name, have) for name, have in bundle.items()}
               for bundle in group.bundle_specs]
    wanted = dict(template.resources)
    if not any(all(bundle.get(name, 0) >= units for name, units in wanted.items())
               for bundle in (bundles if index < 0 else [bundles[index]])):
        asked = {name: units / UNIT for name, units in wanted.items()}
        where = "any bundle" if index < 0 else f"bundle {index}"
        raise ValueError(
            f"Cannot schedule {template.name} with the placement group because the resource "
            f"request {asked} cannot fit into {where} of the placement group, "
            f"{group.bundle_specs}.")

    def offered(shape: Resources) -> Resources:
        suffixes = [f"@{group.id.hex()}"]
        if index >= 0:
            suffixes.append(f"@{group.id.hex()}:{index}")
        return tuple(sorted((name + suffix, units) for name, units in (*shape, _MEMBER)
                            for suffix in suffixes))

    held = template.held_resources
    return msgspec.structs.replace(
        template, resources=offered(template.resources),
        held_resources=None if held is None else offered(held), group_id=group.id.binary(),
        captures=bool(strategy.placement_group_capture_child_tasks))


def _explicit(options: Mapping[str, Any]) -> dict[str, int]:
    """What the options name, zero amounts included."""
    found = {str(name): amount(f"resources[{name!r}]", quantity)
             for name, quantity in (options.get("resources") or {}).items()}
    for option, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory", "memory")):
        value = options.get(option)
        if value is not None:
            found[resource] = amount(option, value)
    if options.get("accelerator_type"):
        found[f"accelerator_type:{options['accelerator_type']}"] = _ACCELERATOR_UNITS
    return found


def _pairs(found: Mapping[str, int]) -> Resources:
    return tuple(sorted((name, units) for name, units in found.items() if units))


def task_resources(options: Mapping[str, Any]) -> Resources:
    """One CPU unless `num_cpus` says otherwise."""
    return _pairs({"CPU": UNIT, **_explicit(options)})


def actor_resources(options: Mapping[str, Any]) -> tuple[Resources, Resources]:
    """(to place it, held while it lives), as Ray has it.

    An actor that asks for nothing needs a CPU to be placed and holds none; one that asks for
    anything but memory holds all of it, and a CPU unless `num_cpus` says otherwise.
    """
    found = _explicit(options)
    if set(found) <= {"memory"}:
        return _pairs({**found, "CPU": UNIT}), _pairs(found)
    pairs = _pairs({"CPU": UNIT, **found})
    return pairs, pairs


def _returns(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a template says of its returns. A stream has one, its end, and then its items."""
    count = options.get("num_returns")
    if count == "dynamic":
        return {"return_count": 1, "stream": DYNAMIC}
    if count == "streaming":
        window = value_of(options, "_generator_backpressure_num_objects") or 0
        return {"return_count": 1, "stream": STREAM, "stream_window": max(window, 0)}
    return {"return_count": 1 if count is None else count}


def retries(options: Mapping[str, Any]) -> dict[str, Any]:
    """`retry_exceptions` as templates have it; a list of classes travels pickled (as bytes)."""
    given = value_of(options, "retry_exceptions")
    if isinstance(given, (list, tuple)) and given:
        from hpcray.client.serialization import dump_classes

        given = dump_classes(given)
    if isinstance(given, bytes):
        return {"retry_exceptions": True, "retry_only": given}
    return {"retry_exceptions": bool(given)}


def _with_id(template: Template) -> Template:
    """Named by content: equal options of one function are one template, wherever they are given.

    Raises:
      ValueError: its name, resources or runtime_env are too long to travel.
    """
    encoded = messages.encode(template)
    sizes.check_template(len(encoded), template.name)
    digest = blake2b(encoded, digest_size=16).digest()
    return msgspec.structs.replace(template, template_id=digest)


def _with_environment(template: Template, options: Mapping[str, Any]) -> Template:
    env_vars = (options.get("runtime_env") or {}).get("env_vars")
    packages = options.get("_packages")
    if env_vars:
        template = msgspec.structs.replace(template, env_vars=tuple(sorted(env_vars.items())))
    if packages:
        template = msgspec.structs.replace(template, packages=packages)
    if env_vars or packages:
        digest = blake2b(messages.encode((template.env_vars, template.packages)), digest_size=16)
        template = msgspec.structs.replace(template, environment=digest.digest())
    return template


def _placed(template: Template, options: Mapping[str, Any]) -> Template:
    return _with_id(_on_labels(_in_group(_with_environment(template, options), options), options))


def max_calls(options: Mapping[str, Any]) -> int:
    """As given; 1 of a task with a GPU, since only the end of a process frees all of its memory
    there (as in Ray)."""
    given: int | None = options.get("max_calls")
    if given is None:
        return 1 if options.get("num_gpus") else 0
    return given


def task_template(function_id: bytes, name: str, options: Mapping[str, Any]) -> Template:
    template = Template(
        template_id=b"",
        function_id=function_id,
        kind=TASK,
        name=options.get("name") or name,
        **_returns(options),
        resources=task_resources(options),
        max_retries=value_of(options, "max_retries"),
        **retries(options),
        **placement(options.get("scheduling_strategy")),
        max_calls=max_calls(options),
        function_name=name if options.get("name") else "",
        priority=value_of(options, "priority"),
        events=value_of(options, "enable_task_events"),
    )
    return _placed(template, options)


def actor_concurrency(class_name: str, options: Mapping[str, Any], is_async: bool) -> int:
    """How many calls run at once.

    Raises:
      ValueError: in order was asked for, but more than one may run at a time.
    """
    given = options.get("max_concurrency")
    concurrency: int = given or (ASYNC_MAX_CONCURRENCY if is_async else 1)
    if options.get("allow_out_of_order_execution") is False and overlapping(options, is_async):
        raise ValueError(
            f"{class_name}: calls that overlap cannot run in order; drop "
            "allow_out_of_order_execution=False, or the async methods and max_concurrency")
    return concurrency


def overlapping(options: Mapping[str, Any], is_async: bool) -> bool:
    """Whether calls of such an actor may run at the same time."""
    return bool(is_async or (options.get("max_concurrency") or 1) > 1
                or options.get("concurrency_groups"))


def actor_template(
    function_id: bytes, class_name: str, options: Mapping[str, Any], is_async: bool
) -> Template:
    place, held = actor_resources(options)
    template = Template(
        template_id=b"",
        function_id=function_id,
        kind=ACTOR_CREATION,
        name=f"{class_name}.__init__",
        resources=place,
        held_resources=None if held == place else held,
        **placement(options.get("scheduling_strategy")),
        max_restarts=value_of(options, "max_restarts"),
        max_concurrency=actor_concurrency(class_name, options, is_async),
        is_async=is_async,
        groups=tuple(sorted((options.get("concurrency_groups") or {}).items())),
        events=value_of(options, "enable_task_events"),
    )
    return _placed(template, options)


def method_template(
    function_id: bytes, class_name: str, method: str, options: Mapping[str, Any],
    unordered: bool = False,
) -> Template:
    """`options` are the method's, its class's `max_task_retries` among them."""
    return _with_id(Template(
        template_id=b"",
        function_id=function_id,
        kind=METHOD,
        name=options.get("name") or f"{class_name}.{method}",
        method=method,
        **_returns(options),
        max_retries=value_of(options, "max_task_retries"),
        group=options.get("concurrency_group") or "",
        unordered=unordered,
        **retries(options),
        function_name=f"{class_name}.{method}" if options.get("name") else "",
        events=value_of(options, "enable_task_events"),
    ))
