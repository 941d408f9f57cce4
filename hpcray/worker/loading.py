"""What a task needs before it runs: its function (or class), and its arguments.

    template id --load--> Loaded          fetched from the task's home the first time
    Run.args, Run.deps --arguments--> (args, kwargs)

What is pinned for the task and not opened is unpinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray import exceptions
from hpcray.client import serialization
from hpcray.client.arguments import Placeholder
from hpcray.client.client import Client
from hpcray.protocol import ids, values
from hpcray.protocol.messages import ARGS_IN_DEP, METHOD, NO_ARGS, Located, Run, Template

# Of so many templates, the ones loaded last.
_LOADED_KEPT = 1000


class Loaded:
    """A template and what it stands for in this process."""

    __slots__ = ("function", "template")

    def __init__(self, template: Template, function: Any) -> None:
        self.template = template
        self.function = function


class FailedDependency(Exception):
    """An argument is an error: the task fails with that error's own bytes."""

    def __init__(self, error: bytes) -> None:
        super().__init__("a dependency failed")
        self.error = error


class Loader:
    def __init__(self, client: Client, enter: Callable[[Run, Template], None]) -> None:
        """`enter`: the environment of the first task, in which this process stays."""
        self._client = client
        self._enter = enter
        self._entered = False
        self._loaded: dict[bytes, Loaded] = {}

    def load(self, run: Run) -> Loaded:
        """The function (class) behind the template; fetched the first time."""
        loaded = self._loaded.get(run.template_id)
        if loaded is not None:
            return loaded
        answer = self._client.fetch_template(run.template_id, ids.home_of_task(run.task_id))
        template = answer.template
        assert template is not None
        if not self._entered:
            # Before its function is unpickled: that may import what the packages bring.
            self._enter(run, template)
            self._entered = True
        function: Any = None
        if template.kind != METHOD:
            packed: Any = answer.function
            if answer.object_id:
                ref = self._client.intern(answer.object_id)
                packed = self._client.get_packed([ref], None)[0]
            if len(packed) == 0:
                raise exceptions.RaySystemError(
                    f"the definition of {template.name} is not known to its home (rank "
                    f"{ids.home_of_task(run.task_id)})")
            function = serialization.deserialize(packed)
            self._client.knows_function(template.function_id)
        if len(self._loaded) >= _LOADED_KEPT:
            del self._loaded[next(iter(self._loaded))]  # it is fetched again
        loaded = self._loaded[run.template_id] = Loaded(template, function)
        return loaded

    def arguments(self, run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if run.args == NO_ARGS:
            return (), {}
        if not run.deps:
            args, kwargs = serialization.deserialize(run.args)
            return args, kwargs
        deps, run.deps = run.deps, ()  # from here on they are opened, or unpinned below
        data: list[Any] = []
        try:
            fetched = self._fetch_dependencies(run, deps)
            for index, dep in enumerate(deps):
                if type(dep) is Located:
                    data.append(self._client.pinned(run.ids[index * 28 : index * 28 + 28], dep))
                else:
                    data.append(dep or fetched.pop())
        except BaseException:
            self.unpin(run, deps, len(data))
            raise
        for item in data:
            if item[0] >= values.ERROR:
                raise FailedDependency(bytes(item))
        if run.args == ARGS_IN_DEP:
            packed, data = data[0], data[1:]
        else:
            packed = run.args
        args, kwargs = serialization.deserialize(packed)
        found = [serialization.deserialize(item) for item in data]
        args = tuple(found[a.index] if type(a) is Placeholder else a for a in args)
        for key, value in kwargs.items():
            if type(value) is Placeholder:
                kwargs[key] = found[value.index]
        return args, kwargs

    def unpin(self, run: Run, deps: tuple[bytes | Located, ...], start: int = 0) -> None:
        """Let go of dependencies that will not be opened."""
        for index in range(start, len(deps)):
            if type(deps[index]) is Located:
                self._client.unpin(run.ids[index * 28 : index * 28 + 28])

    def _fetch_dependencies(self, run: Run, deps: tuple[bytes | Located, ...]) -> list[Any]:
        """Those that were too many for the message, the last one first."""
        absent = [self._client.intern(run.ids[index * 28 : index * 28 + 28])
                  for index, dep in enumerate(deps) if dep == b""]
        return self._client.get_packed(absent, None)[::-1] if absent else []

    def name_of(self, run: Run) -> str:
        loaded = self._loaded.get(run.template_id)
        return "task" if loaded is None else loaded.template.name
