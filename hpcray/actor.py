"""Actors: what `@remote` makes of a class, and the handles through which its instances are called.

    ActorClass.remote() --> CreateActor --> ActorHandle --.method--> ActorMethod.remote() --> refs
                                             |
                                             +-- holds the ref of the creation object

Holding a handle *is* holding a ref to the actor's creation object: when the last one is gone
anywhere, the actor ends after its queue. So a handle never forms a reference cycle: its methods
are made anew at each access and are not kept on it.

What a handle knows of its class is an `ActorDescription`: plain data, the same bytes for all actors
of one class and options. It travels inside handles and, opaque to nodes, with the creation.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NoReturn,
    ParamSpec,
    TypeAlias,
    TypeVar,
    overload,
)

import msgspec

from hpcray import environment
from hpcray import options as options_
from hpcray.client import context, process
from hpcray.client.context import ActorExitRequest
from hpcray.client.identifiers import ActorID
from hpcray.client.references import ObjectRef
from hpcray.config import check_namespace
from hpcray.definition import (
    CallSignature,
    Definition,
    pack_call,
    parameters_of,
    submitted_returns,
)
from hpcray.exceptions import ActorHandleNotFoundError
from hpcray.protocol import ids
from hpcray.protocol.messages import NO_ARGS, CreateActor, Template

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.client.core import Use
    from hpcray.client.streams import ObjectRefGenerator
    from hpcray.methods import Method, MethodDecorator, SeveralReturnsDecorator

    # To type checkers a handle is also what it may be declared as: the `ActorProxy` of its class.
    _Anything: TypeAlias = Any
else:

    class _Anything:
        __slots__ = ()


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Where `@method` leaves its options on the function.
_METHOD_OPTIONS = "__hpcray_method__"


def exit_actor() -> NoReturn:
    """End the current actor: this call and those not started fail with `ActorDiedError`.

    It ends whoever catches what this raises, and from whichever thread or coroutine, as soon as no
    call runs any more: those of a threaded or async actor that run beside this one may finish. This
    call waits for them, too, however long they run; `kill` ends an actor whose calls never end.

    Raises:
      TypeError: not inside an actor.
    """
    if not context.current().actor_id:
        raise TypeError("exit_actor() ends the actor that calls it; this is not an actor's method")
    if context.on_exit is not None:
        context.on_exit()
    raise ActorExitRequest


@overload
def method(
    function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
) -> Method[P, Coroutine[Any, Any, R], ObjectRef[R]]: ...
@overload
def method(  # type: ignore[overload-overlap]
    function: Callable[Concatenate[Any, P], Iterator[R]], /
) -> Method[P, Iterator[R], ObjectRefGenerator[R]]: ...
@overload
def method(  # type: ignore[overload-overlap]
    function: Callable[Concatenate[Any, P], AsyncIterator[R]], /
) -> Method[P, AsyncIterator[R], ObjectRefGenerator[R]]: ...
@overload
def method(function: Callable[Concatenate[Any, P], R], /) -> Method[P, R, ObjectRef[R]]: ...
@overload
def method(*, num_returns: int | str, **options: Any) -> SeveralReturnsDecorator: ...
@overload
def method(**options: Any) -> MethodDecorator: ...


def method(*functions: Any, **options: Any) -> Any:
    """Options of an actor's method: `@method(num_returns=2)`. There are: num_returns, name,
    concurrency_group, max_task_retries, retry_exceptions, enable_task_events,
    _generator_backpressure_num_objects.

    Bare or empty, `@method` changes nothing but what type checkers know of it (see `ActorProxy`).

    Raises:
      TypeError: neither a function alone nor options alone, or it is on something else.
    """
    if len(functions) == 1 and not options:
        return _with_method_options(functions[0], {})
    if functions:
        raise TypeError("@method goes onto a function as it is, or with options by keyword, such "
                        "as @method(num_returns=2)")
    checked = options_.check_options(options, "m")
    return lambda function: _with_method_options(function, checked)


def _with_method_options(function: Any, options: options_.Options) -> Any:
    if not callable(function):
        raise TypeError(f"@method goes onto a method, not onto {function!r}")
    options_.for_generator(options, _is_generator(function), function.__qualname__)
    setattr(function, _METHOD_OPTIONS, options)
    return function


# --- descriptions: what a handle knows of its class ----------------------------------------------


class MethodDescription(msgspec.Struct, array_like=True, frozen=True, gc=False):
    parameters: tuple[tuple[str, int, bool], ...]
    num_returns: int | str | None = None
    max_task_retries: int | None = None  # None: the actor's
    retry_exceptions: bool | bytes = False  # bytes: of some classes only, pickled
    name: str = ""  # for people, if it is not "Class.method"
    is_generator: bool = False
    window: int | None = None
    concurrency_group: str = ""
    events: bool | None = None  # None: as the actor


class ActorDescription(msgspec.Struct, array_like=True, frozen=True, gc=False):
    class_name: str
    module: str
    function_id: bytes
    max_task_retries: int
    is_async: bool
    methods: dict[str, MethodDescription]
    unordered: bool = False
    groups: tuple[str, ...] = ()
    max_pending_calls: int = -1
    events: bool = True  # enable_task_events


_decode_description = msgspec.msgpack.Decoder(ActorDescription).decode

_OPEN = MethodDescription((("args", 2, False), ("kwargs", 4, False)))
# Every actor answers these; the worker implements them.
_BUILT_IN = {
    "__ray_ready__": MethodDescription(()),
    "__ray_terminate__": MethodDescription(()),
    "__ray_call__": _OPEN,
}


def _underlying(cls: type, name: str) -> tuple[Any, int]:
    """(function, parameters to skip) of a method as the class defines it; else (None, 0)."""
    member = inspect.getattr_static(cls, name)
    if isinstance(member, staticmethod):
        return member.__func__, 0
    if isinstance(member, classmethod):
        return member.__func__, 1
    if inspect.isfunction(member) or inspect.isbuiltin(member):
        return member, 1
    if inspect.ismethoddescriptor(member) and callable(member):
        return member, 1  # of an extension type, or wrapped by something like lru_cache
    return None, 0


def _is_generator(function: Any) -> bool:
    target = inspect.unwrap(function)
    return inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target)


def describe_methods(cls: type) -> dict[str, MethodDescription]:
    """The methods of a class, inherited ones too, but what every object has."""
    found = {}
    for name in sorted(set(dir(cls)).difference(dir(object))):
        function, skip = _underlying(cls, name)
        if function is None or isinstance(function, type):
            continue
        options: dict[str, Any] = getattr(function, _METHOD_OPTIONS, {})
        retries = options_.retries(options)
        found[name] = MethodDescription(
            parameters=parameters_of(function, skip),
            num_returns=options.get("num_returns"),
            max_task_retries=options.get("max_task_retries"),
            retry_exceptions=retries.get("retry_only") or retries["retry_exceptions"],
            name=options.get("name") or "",
            is_generator=_is_generator(function),
            window=options.get("_generator_backpressure_num_objects"),
            concurrency_group=options.get("concurrency_group") or "",
            events=options.get("enable_task_events"),
        )
    return found


def is_async_class(cls: type) -> bool:
    """Whether any method, or the constructor, is a coroutine: then calls run on event loops."""
    for name in dir(cls):
        function, _ = _underlying(cls, name)
        if function is not None:
            target = inspect.unwrap(function) if callable(function) else function
            if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
                return True
    return False


# --- kinds: a description at work in this process ------------------------------------------------


class _Method:
    """One method of a kind with one set of options, ready to be called."""

    __slots__ = ("client", "description", "full_name", "least", "max_pending", "most", "name",
                 "options", "return_count", "signature", "template", "template_id", "unreturned")

    def __init__(self, kind: _Kind, name: str, description: MethodDescription,
                 options: options_.Options) -> None:
        actor = kind.description
        self.name = name
        self.full_name = f"{actor.class_name}.{name}"
        self.description = description
        self.options = options = options_.for_generator(
            options, description.is_generator, self.full_name)
        self.signature = CallSignature(description.parameters)
        self.least = self.signature.least
        self.most = self.signature.most
        group = options.get("concurrency_group")
        if group and group not in actor.groups:
            raise ValueError(
                f"{self.full_name}: {group!r} is not a concurrency group of "
                f"{actor.class_name} (concurrency_groups={list(actor.groups)})")
        self.max_pending = actor.max_pending_calls
        # Such calls are counted by their results: where there is none to be, its end is one.
        self.unreturned = self.max_pending > 0 and options.get("num_returns") == 0
        if self.unreturned:
            options = {**options, "num_returns": 1}
        self.template: Template = options_.method_template(
            actor.function_id, actor.class_name, name, options, actor.unordered)
        self.template_id = self.template.template_id
        self.return_count = submitted_returns(self.template)
        self.client: Client | None = None

    def prepare(self, client: Client) -> None:
        # The class itself is known to nodes since the actor's creation.
        if not client.is_defined(self.template_id):
            client.define(self.template, None)
        self.client = client


class _Kind:
    """All actors of one class and options, as seen from this process."""

    __slots__ = ("__weakref__", "description", "encoded", "methods")

    def __init__(self, encoded: bytes, description: ActorDescription) -> None:
        self.encoded = encoded
        self.description = description
        self.methods: dict[str, _Method] = {}  # those called so far

    def method(self, name: str) -> _Method | None:
        """The method as its class declares it; None if there is none of that name."""
        found = self.methods.get(name)
        if found is not None:
            return found
        actor = self.description
        description = actor.methods.get(name) or _BUILT_IN.get(name)
        if description is None:
            return None
        retries = description.max_task_retries
        events = description.events
        options: options_.Options = {
            "num_returns": description.num_returns,
            "_generator_backpressure_num_objects": description.window,
            "concurrency_group": description.concurrency_group or None,
            "max_task_retries": actor.max_task_retries if retries is None else retries,
            "retry_exceptions": description.retry_exceptions,
            "name": description.name or None,
            "enable_task_events": actor.events if events is None else events,
        }
        found = self.methods[name] = _Method(self, name, description, options)
        return found


# Weak: a kind lives as long as some handle or class of it.
_kinds: weakref.WeakValueDictionary[bytes, _Kind] = weakref.WeakValueDictionary()


def _kind_of(encoded: bytes) -> _Kind:
    kind = _kinds.get(encoded)
    if kind is None:
        kind = _kinds[encoded] = _Kind(encoded, _decode_description(encoded))
    return kind


# --- classes -------------------------------------------------------------------------------------


class ActorClassInheritanceException(TypeError):
    """A class was to inherit from an actor class."""


class ActorClass(Generic[T]):
    """A class whose instances are actors: `C.remote(...)` starts one and returns its handle.

    Made by `@remote`; never directly.
    """

    def __init__(self, cls: type[T], options: options_.Options) -> None:
        if missing := getattr(cls, "__abstractmethods__", None):
            raise TypeError(f"{cls.__name__} is abstract, so it has no instances, and no actors: "
                            f"it lacks {', '.join(sorted(missing))}")
        options_.actor_concurrency(cls.__name__, options, is_async_class(cls))
        self._bind_to(Definition(cls), options)
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__
        self.__doc__ = cls.__doc__
        self.__wrapped__ = cls

    def _bind_to(self, definition: Definition, options: options_.Options) -> None:
        # Must not look at `definition.target`: see RemoteFunction._bind_to.
        self._definition = definition
        self._options = options
        self._template: Template | None = None
        self._inherited = b""
        self._client: Client | None = None
        # Set by _prepare:
        self._use: Use  # keeps the template known there
        self._kind: _Kind

    def remote(self, /, *args: Any, **kwargs: Any) -> ActorHandle[T]:
        """Start an actor; arguments go to its constructor, refs among them as their values.

        Returns at once; a constructor that raises shows at the first call.

        Raises:
          TypeError: the arguments do not fit the constructor or cannot be pickled.
          ValueError: the name is taken.
        """
        client = process.client
        if (client is None or client is not self._client
                or context.inherited is not self._inherited):
            client = self._prepare()
        options = self._options
        name: str = options.get("name") or ""
        namespace: str = options.get("namespace") or context.current().namespace
        class_name = self._definition.name
        self._definition.signature.check(class_name, args, kwargs)
        packed, refs, count, keep = NO_ARGS, b"", 0, None
        if args or kwargs:
            packed, refs, count, keep = pack_call(client, class_name, args, kwargs)
        assert self._template is not None
        actor = client.new_actor_id()
        encoded = self._kind.encoded
        detached = options.get("lifetime") == "detached"
        if name:
            # Last of all: nothing that fails after it may leave the name reserved.
            other, held = client.look_up("reserve_name", {
                "namespace": namespace, "name": name, "actor_id": actor, "handle": encoded,
                "get_if_exists": bool(options.get("get_if_exists")),
            })
            if held is not None:
                return _handle_of(client, other, held)
        ref = client.create_actor(CreateActor(
            actor, self._template.template_id, packed, refs, count, name, namespace, detached,
            encoded))
        del keep
        return _new_handle(self._kind, actor, ref, client)

    def _prepare(self) -> Client:
        client = process.current_client()
        template = self._template
        if context.inherited is not self._inherited:
            self._inherited = context.inherited
            template = None
        if template is None:
            definition = self._definition
            cls = definition.target
            assert isinstance(cls, type)
            is_async = is_async_class(cls)
            description = ActorDescription(
                class_name=cls.__name__,
                module=cls.__module__,
                function_id=definition.function_id,
                max_task_retries=options_.value_of(self._options, "max_task_retries"),
                is_async=is_async,
                methods=describe_methods(cls),
                unordered=bool(
                    self._options.get("allow_out_of_order_execution")
                    or options_.overlapping(self._options, is_async)),
                groups=tuple(sorted(self._options.get("concurrency_groups") or ())),
                max_pending_calls=options_.value_of(self._options, "max_pending_calls"),
                events=options_.value_of(self._options, "enable_task_events"),
            )
            for name, described in description.methods.items():
                group = described.concurrency_group
                if group and group not in description.groups:
                    raise ValueError(
                        f"{cls.__name__}.{name} is in the concurrency group {group!r}; give the "
                        f"class concurrency_groups={{{group!r}: ...}}")
            self._kind = _kind_of(msgspec.msgpack.encode(description))
            template = options_.actor_template(
                definition.function_id, cls.__name__,
                environment.inherited(client, self._options), is_async)
            self._template = template
        self._use = self._definition.define(client, template)
        self._client = client
        return client

    def options(self, **options: Any) -> ActorClass[T]:
        """The same class with other options, for the actors started through what is returned."""
        merged = {**self._options, **options_.check_options(options, "a", later=True)}
        if merged.get("get_if_exists") and not merged.get("name"):
            raise ValueError("get_if_exists needs a name")
        other: ActorClass[T] = ActorClass.__new__(ActorClass)
        other._bind_to(self._definition, merged)
        if "__wrapped__" in self.__dict__:
            other.__dict__.update({
                name: self.__dict__[name]
                for name in ("__name__", "__qualname__", "__module__", "__doc__", "__wrapped__")})
        return other

    def _remote(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`options(...).remote(*args, **kwargs)`, as older Ray programs write it."""
        return self.options(**options).remote(*(args or ()), **(kwargs or {}))

    @property
    def __ray_metadata__(self) -> Any:
        """Half of Ray's: the class that was decorated, and its name."""
        cls = self._definition.target
        return types.SimpleNamespace(
            modified_class=cls, class_name=cls.__name__, actor_creation_options=dict(self._options))

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._definition.target)})

    def bind(self, /, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self._definition.name}.bind(): graphs (DAGs) are not supported; use .remote()")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self._definition.name
        raise TypeError(
            f"{name} is an actor class and cannot be instantiated directly: write "
            f"{name}.remote(...) instead of {name}(...), or {name}.__wrapped__(...) for a plain "
            "object in this process")

    if not TYPE_CHECKING:  # to whom a misspelt `.remote` would look like one of these

        def __getattr__(self, name: str) -> Any:
            """The class's own constants, static and class methods: of this process."""
            if name[:1] == "_":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self._definition.target, name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> NoReturn:
        name = self._definition.name
        raise ActorClassInheritanceException(
            f"{name} is an actor class and cannot be inherited from: inherit from the plain class "
            f"({name}.__wrapped__) and put @remote onto the new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_blank_class, (), (self._definition, self._options))

    def __setstate__(self, state: tuple[Definition, options_.Options]) -> None:
        self._bind_to(*state)

    def __repr__(self) -> str:
        return f"ActorClass({self._definition.full_name})"


def _blank_class() -> ActorClass[Any]:
    return ActorClass.__new__(ActorClass)


# --- handles -------------------------------------------------------------------------------------


class ActorHandle(_Anything, Generic[T]):  # type: ignore[misc]
    """An actor: `handle.method.remote(...)` calls it. Handles may be passed to tasks and actors.

    The actor ends when its last handle is gone. Two handles of one actor are equal.
    """

    # Long names: every other attribute belongs to the user's class.
    __slots__ = ("__weakref__", "_hpcray_client", "_hpcray_id", "_hpcray_kind", "_hpcray_ref")

    _hpcray_client: Client | None
    _hpcray_id: bytes
    _hpcray_kind: _Kind
    _hpcray_ref: ObjectRef[Any]

    def __init__(self, *_: object) -> None:
        raise TypeError(
            "an ActorHandle cannot be built directly; C.remote() and get_actor() return them")

    def __getattr__(self, name: str) -> ActorMethod:
        if name[:8] == "_hpcray_":
            raise AttributeError(name)  # a blank handle: copy and pickle look at those
        kind = self._hpcray_kind
        found = kind.methods.get(name) or kind.method(name)
        if found is None:
            raise AttributeError(
                f"actor class {kind.description.class_name!r} has no method {name!r}")
        return ActorMethod(self, found)

    def __dir__(self) -> list[str]:
        return sorted(self._hpcray_kind.description.methods)

    @property
    def _actor_id(self) -> ActorID:
        return ActorID(self._hpcray_id)

    _ray_actor_id = _actor_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._hpcray_id == self._hpcray_id

    def __hash__(self) -> int:
        return hash(self._hpcray_id)

    def __repr__(self) -> str:
        return f"Actor({self._hpcray_kind.description.class_name}, {self._hpcray_id.hex()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_load_handle, (self._hpcray_kind.encoded, self._hpcray_ref))

    def __copy__(self) -> ActorHandle[T]:
        return self

    def __deepcopy__(self, memo: object) -> ActorHandle[T]:
        return self


# A handle whose methods type checkers know, those under `@method`, with their results:
# `counter: ActorProxy[Counter] = RemoteCounter.remote()`. When a program runs there are handles.
if TYPE_CHECKING:
    ActorProxy: TypeAlias = T
else:
    ActorProxy = ActorHandle


class ActorMethod:
    """A method of an actor: `.remote(...)` calls it, `.options(...)` changes how."""

    # The handle is kept: `C.remote().method.remote()` must not end the actor in between.
    __slots__ = ("_handle", "_method")

    def __init__(self, handle: ActorHandle[Any], method: _Method) -> None:
        self._handle = handle
        self._method = method

    def remote(self, /, *args: Any, **kwargs: Any) -> ObjectRef[Any]:
        """Submit one call. Calls of one process on one actor start in the order submitted (unless
        the actor is threaded or async).

        Returns the ref of its result, a list of refs if `num_returns` > 1, None if it is 0; of a
        generator an `ObjectRefGenerator`.

        Raises:
          TypeError: the arguments do not fit the signature or cannot be pickled.
          PendingCallsLimitExceeded: this process has `max_pending_calls` calls in the air.
          RaySystemError: the connection to the node is gone.
        """
        method = self._method
        handle = self._handle
        client = process.client
        if client is None or client is not handle._hpcray_client:
            raise_stale("actor handle")
        if client is not method.client:
            method.prepare(client)
        if method.max_pending > 0:
            client.check_pending(handle._hpcray_id, method.max_pending, method.full_name)
        count = method.return_count
        if args or kwargs:
            if kwargs or not method.least <= len(args) <= method.most:
                method.signature.check(method.full_name, args, kwargs)
            packed, refs, dep_count, keep = pack_call(client, method.full_name, args, kwargs)
            result = client.submit(
                method.template_id, packed, refs, dep_count, count, handle._hpcray_id)
            del keep
        else:
            if method.least:
                method.signature.check(method.full_name, args, kwargs)
            result = client.submit(method.template_id, NO_ARGS, b"", 0, count, handle._hpcray_id)
        if method.max_pending > 0:
            client.note_pending(handle._hpcray_id, result[0])
            if method.unreturned:
                return None  # type: ignore[return-value]  # as below
        if count == 1 or count < 0:
            return result[0]  # type: ignore[no-any-return]
        return result or None  # type: ignore[return-value]  # see `num_returns` above

    def options(self, **options: Any) -> ActorMethod:
        """The same method with other options, for the calls made through what is returned."""
        method = self._method
        merged = {**method.options, **options_.check_options(options, "m", later=True)}
        kind = self._handle._hpcray_kind
        return ActorMethod(self._handle, _Method(kind, method.name, method.description, merged))

    def _remote(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`options(...).remote(*args, **kwargs)`, as older Ray programs write it."""
        return self.options(**options).remote(*(args or ()), **(kwargs or {}))

    def bind(self, /, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self._method.full_name}.bind(): graphs (DAGs) are not supported; use .remote()")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self._method.name
        raise TypeError(
            f"{self._method.full_name} is a method of an actor and cannot be called directly: "
            f"write handle.{name}.remote(...) instead of handle.{name}(...)")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_load_method, (self._handle, self._method.name, self._method.options))

    def __repr__(self) -> str:
        return f"ActorMethod({self._method.full_name})"


def raise_stale(what: str) -> NoReturn:
    """Why a ref or handle does not go with the client of now."""
    if process.client is None:
        raise RuntimeError(
            f"this {what} is of a session that has ended (shutdown, or a fork of its process)")
    error = ActorHandleNotFoundError if what == "actor handle" else ValueError
    raise error(f"this {what} is of an earlier session: shutdown() ended what it refers to")


def _new_handle(
    kind: _Kind, actor: bytes, ref: ObjectRef[Any], client: Client | None
) -> ActorHandle[Any]:
    handle: ActorHandle[Any] = ActorHandle.__new__(ActorHandle)
    handle._hpcray_kind = kind
    handle._hpcray_id = actor
    handle._hpcray_ref = ref
    handle._hpcray_client = client
    return handle


def _load_handle(encoded: bytes, ref: ObjectRef[Any]) -> ActorHandle[Any]:
    # In a fork of a process that has a session there is none: calls say so (`raise_stale`).
    return _new_handle(_kind_of(encoded), ids.actor_of_object(ref.binary()), ref,
                       process.client)


def _load_method(handle: ActorHandle[Any], name: str, options: options_.Options) -> ActorMethod:
    kind = handle._hpcray_kind
    known = kind.method(name)
    assert known is not None
    if known.options == options:
        return ActorMethod(handle, known)
    return ActorMethod(handle, _Method(kind, name, known.description, options))


def _handle_of(client: Client, found: dict[str, Any], ref: ObjectRef[Any]) -> ActorHandle[Any]:
    """The handle of an actor the node has told us about."""
    return _new_handle(_kind_of(found["handle"]), found["actor_id"], ref, client)


# --- by name and by id ---------------------------------------------------------------------------


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """The handle of a named actor.

    Raises:
      ValueError: there is none of that name, or no name.
    """
    if not name:
        raise ValueError("get_actor needs a non-empty name")
    if not isinstance(name, str):
        raise TypeError(f"an actor's name is a string, not {name!r}")
    if namespace is not None:
        check_namespace(namespace)
    client = process.current_client()
    where = context.current().namespace if namespace is None else namespace
    found, held = client.look_up("get_actor", {"name": name, "namespace": where})
    assert held is not None
    return _handle_of(client, found, held)


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """Names of the living named actors of this namespace, or {"name", "namespace"} of all."""
    client = process.current_client()
    found: list[dict[str, str]] = client.request(
        "list_named_actors", {"all_namespaces": all_namespaces,
                              "namespace": context.current().namespace})
    if all_namespaces:
        return [{"name": one["name"], "namespace": one["namespace"]} for one in found]
    return [one["name"] for one in found]


def current_actor() -> ActorHandle[Any]:
    """A handle of the actor whose method is running.

    Raises:
      RuntimeError: none is.
    """
    actor = context.current().actor_id
    if not actor:
        raise RuntimeError("no actor is running here; there is one inside an actor's methods only")
    client = process.current_client()
    # Of itself: an actor's refs to itself count for nothing.
    return _handle_of(client, client.request("actor_handle", {"actor_id": actor}),
                      client.intern(ids.creation_object_id(actor)))


__all__ = ["ActorClass", "ActorExitRequest", "ActorHandle", "ActorMethod", "ActorProxy",
           "exit_actor",
           "get_actor", "list_named_actors", "method"]
