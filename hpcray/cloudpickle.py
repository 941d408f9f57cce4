"""Pickling as tasks do it, under Ray's name for it: cloudpickle, with what `register_serializer`
has taught it, slots of classes in `__main__`, and exceptions of any constructor.

An `ObjectRef` that is pickled here leaves hpcray's sight: its object stays until the job ends.
"""

from pickle import load, loads
from typing import Any

from hpcray.client.serialization import (
    CloudPickler,
    Pickler,
    dump,
    dumps,
    list_registry_pickle_by_value,
    register_pickle_by_value,
    unregister_pickle_by_value,
)


def dumps_debug(obj: Any, *args: Any, **kwargs: Any) -> bytes:
    """`dumps`; an object that cannot be pickled is searched for what is at fault.

    Raises:
      TypeError: it cannot be; the text names the parts that cannot.
    """
    try:
        return dumps(obj, *args, **kwargs)
    except (TypeError, AttributeError, RecursionError) as error:
        raise _explained(obj, error) from error


def dump_debug(obj: Any, *args: Any, **kwargs: Any) -> None:
    """`dump`, as `dumps_debug` is `dumps`."""
    try:
        dump(obj, *args, **kwargs)
    except (TypeError, AttributeError, RecursionError) as error:
        raise _explained(obj, error) from error


def _explained(obj: Any, error: Exception) -> TypeError:
    from io import StringIO

    from hpcray.util.check_serialize import inspect_serializability

    found = StringIO()
    inspect_serializability(obj, print_file=found)
    return TypeError(f"{error}\n{found.getvalue()}")


__all__ = [
    "CloudPickler",
    "Pickler",
    "dump",
    "dump_debug",
    "dumps",
    "dumps_debug",
    "list_registry_pickle_by_value",
    "load",
    "loads",
    "register_pickle_by_value",
    "unregister_pickle_by_value",
]
