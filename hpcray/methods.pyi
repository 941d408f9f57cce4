"""What type checkers see of a method under `@method`. There is nothing of it when a program runs.

    in the class            Method[P, D, S]
    through an instance     BoundMethod[P, D, S]: called directly it takes P and returns D, which is
                            how the actor's own code sees it; `.remote` returns S, which is how who
                            holds an `ActorProxy` sees it

`.remote` takes anything: each argument may be an `ObjectRef` to its value, and types cannot say so.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from hpcray.client.references import ObjectRef
from hpcray.client.streams import ObjectRefGenerator

P = ParamSpec("P")
R = TypeVar("R")
D_co = TypeVar("D_co", covariant=True)
S_co = TypeVar("S_co", covariant=True)

class BoundMethod(Protocol[P, D_co, S_co]):
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> D_co: ...
    def remote(self, /, *args: Any, **kwargs: Any) -> S_co: ...
    @overload
    def options(self, *, num_returns: int | str, **options: Any) -> BoundMethod[P, D_co, Any]: ...
    @overload
    def options(self, **options: Any) -> BoundMethod[P, D_co, S_co]: ...

class Method(Protocol[P, D_co, S_co]):
    def __get__(self, instance: object, owner: object = None) -> BoundMethod[P, D_co, S_co]: ...

class MethodDecorator(Protocol):
    """`@method(...)` with options: what is left to be given is the function."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
    ) -> Method[P, Coroutine[Any, Any, R], ObjectRef[R]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Any, P], Iterator[R]], /
    ) -> Method[P, Iterator[R], ObjectRefGenerator[R]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Any, P], AsyncIterator[R]], /
    ) -> Method[P, AsyncIterator[R], ObjectRefGenerator[R]]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[Any, P], R], /) -> Method[P, R, ObjectRef[R]]: ...

class SeveralReturnsDecorator(Protocol):
    """`@method(num_returns=...)`: a list of refs, None, or a stream."""

    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Method[P, R, Any]: ...
