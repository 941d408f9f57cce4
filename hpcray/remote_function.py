"""Remote functions: what `@remote` makes of a function.

`RemoteFunction.remote` is the hottest line of the face (aim: under 4 us without arguments).
All that can be decided before the call is: the template and its id, the number of returns, the
positional range. Per call there remain one comparison (is the client still the one we prepared
for?), the arguments, and `Client.submit`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from hpcray import environment
from hpcray import options as options_
from hpcray.client import context, process
from hpcray.client.references import ObjectRef
from hpcray.definition import Definition, pack_call, submitted_returns
from hpcray.protocol.messages import NO_ARGS, Template

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.client.core import Use
    from hpcray.client.streams import ObjectRefGenerator

P = ParamSpec("P")
R = TypeVar("R")


class RemoteFunction(Generic[P, R]):
    """A function that runs elsewhere: `f.remote(...)` returns refs to its results at once.

    Made by `@remote`; never directly. Pickles with its function, options and id.
    """

    def __init__(self, function: Callable[P, R], options: options_.Options) -> None:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ValueError(
                f"{function.__qualname__} is async, and only actors run coroutines; define an "
                "actor with async methods, or call asyncio.run inside a plain function")
        self._bind_to(Definition(function), self._for(function, options))
        functools.update_wrapper(self, function)

    @staticmethod
    def _for(function: Callable[..., Any], options: options_.Options) -> options_.Options:
        return options_.for_generator(
            options, inspect.isgeneratorfunction(inspect.unwrap(function)), function.__qualname__)

    def _bind_to(self, definition: Definition, options: options_.Options) -> None:
        # Nothing here may look at `definition.target`: while a function that refers to itself is
        # being unpickled, its defaults are not there yet, or the definition has no target yet.
        self._definition = definition
        self._options = options
        self._template: Template | None = None
        self._template_id = b""
        self._return_count = 1
        self._inherited = b""
        # The client our template is defined at; None before the first call.
        self._client: Client | None = None
        # Set by _prepare:
        self._use: Use  # keeps the template known there
        self._least: int
        self._most: int

    def remote(self, /, *args: Any, **kwargs: Any) -> ObjectRef[R]:
        """Submit one call; any argument may be an `ObjectRef` to its value instead.

        Returns the ref of its result, a list of refs if `num_returns` > 1, None if it is 0; of a
        generator an `ObjectRefGenerator`.

        Raises:
          TypeError: the arguments do not fit the signature or cannot be pickled.
          RaySystemError: the connection to the node is gone.
        """
        client = process.client
        if (client is None or client is not self._client
                or context.inherited is not self._inherited):
            client = self._prepare()
        returns = self._return_count
        if args or kwargs:
            if kwargs or not self._least <= len(args) <= self._most:
                self._definition.signature.check(self._definition.name, args, kwargs)
            # `keep` holds what the call refers to until it is submitted.
            packed, refs, count, keep = pack_call(client, self._definition.name, args, kwargs)
            result = client.submit(self._template_id, packed, refs, count, returns)
            del keep
        else:
            if self._least:
                self._definition.signature.check(self._definition.name, args, kwargs)
            result = client.submit(self._template_id, NO_ARGS, b"", 0, returns)
        if returns == 1 or returns < 0:
            return result[0]  # type: ignore[no-any-return]
        return result or None  # type: ignore[return-value]  # see `num_returns` above

    def _prepare(self) -> Client:
        """Connect if nobody has, and make our template known. Safe to repeat."""
        client = process.current_client()
        template = self._template
        if context.inherited is not self._inherited:
            self._inherited = context.inherited
            template = None
        if template is None:
            definition = self._definition
            template = options_.task_template(
                definition.function_id, definition.name,
                environment.inherited(client, self._options))
            self._least = definition.signature.least
            self._most = definition.signature.most
            self._return_count = submitted_returns(template)
            self._template_id = template.template_id
            self._template = template
        self._use = self._definition.define(client, template)
        self._client = client
        return client

    def options(self, **options: Any) -> RemoteFunction[P, R]:
        """The same function with other options, for the calls made through what is returned."""
        checked = options_.check_options(options, "t", later=True)
        other: RemoteFunction[P, R] = RemoteFunction.__new__(RemoteFunction)
        target = self._definition.target
        other._bind_to(self._definition, self._for(target, {**self._options, **checked}))
        functools.update_wrapper(other, self._definition.target)
        return other

    def _remote(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`options(...).remote(*args, **kwargs)`, as older Ray programs write it."""
        return self.options(**options).remote(*(args or ()), **(kwargs or {}))

    def bind(self, /, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self._definition.name}.bind(): graphs (DAGs) are not supported; pass refs from "
            ".remote() as arguments instead")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self._definition.name
        raise TypeError(
            f"{name} is a remote function and cannot be called directly: write "
            f"{name}.remote(...) instead of {name}(...), or {name}.__wrapped__(...) to run it here")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_blank_function, (), (self._definition, self._options))

    def __setstate__(self, state: tuple[Definition, options_.Options]) -> None:
        self._bind_to(*state)

    def __repr__(self) -> str:
        return f"RemoteFunction({self._definition.full_name})"


if TYPE_CHECKING:

    class RemoteGenerator(RemoteFunction[P, R]):
        """What type checkers see of a remote generator that yields R; it is a RemoteFunction."""

        def remote(  # type: ignore[override]
            self, /, *args: Any, **kwargs: Any
        ) -> ObjectRefGenerator[R]: ...

        def options(self, **options: Any) -> RemoteGenerator[P, R]: ...


def _blank_function() -> RemoteFunction[Any, Any]:
    return RemoteFunction.__new__(RemoteFunction)
