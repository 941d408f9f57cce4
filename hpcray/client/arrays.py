"""How arrays of libraries are taken apart so that their memory travels beside the pickle.

A buffer beside the pickle is copied once into shared memory, aligned, and read there by everybody.
These kinds put theirs into the pickle itself, or put more there than they show:

    subclasses of numpy.ndarray   bytes in the pickle, copied at each read, so writable
    numpy.ma.MaskedArray          the same, data and mask
    slices of pyarrow's arrays    the whole array they are a slice of

Imports neither library: who has no array of theirs pays a look into `sys.modules`.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any


def reduce(obj: Any, kind: type) -> Any:
    """What pickle is to do with an array; None: what it does by itself."""
    numpy = sys.modules.get("numpy")
    # Another thread may be importing it.
    ndarray = getattr(numpy, "ndarray", None)
    if ndarray is not None and kind is not ndarray and issubclass(kind, ndarray):
        return _reduce_subclass(obj, kind, numpy)
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is not None and str(kind.__module__).startswith("pyarrow."):
        return _reduce_arrow(obj, pyarrow)
    return None


def _reduce_subclass(obj: Any, kind: Any, numpy: Any) -> Any:
    if obj.dtype.hasobject:
        return None
    if kind.__reduce_ex__ is not numpy.ndarray.__reduce_ex__:
        return None  # it says itself how
    if kind.__reduce__ is numpy.ndarray.__reduce__:
        if kind.__setstate__ is not numpy.ndarray.__setstate__:
            return None
        return _as_subclass, (obj.view(numpy.ndarray), kind)
    masked = getattr(getattr(numpy, "ma", None), "MaskedArray", None)
    if masked is None or kind.__reduce__ is not masked.__reduce__ \
            or kind.__setstate__ is not masked.__setstate__:
        return None
    mask = None if obj.mask is numpy.ma.nomask else obj.mask
    return _masked, (obj.data, kind, mask, obj.fill_value)


def _as_subclass(array: Any, kind: type) -> Any:
    return array.view(kind)


def _masked(data: Any, kind: Any, mask: Any, fill_value: Any) -> Any:
    if mask is None:
        return kind(data, fill_value=fill_value, copy=False)
    return kind(data, mask=mask, fill_value=fill_value, copy=False)


def _reduce_arrow(obj: Any, pyarrow: Any) -> Any:
    """A slice, through Arrow's own format: that writes what is shown and reads without a copy."""
    whole = obj
    if isinstance(obj, pyarrow.Array):
        whole = pyarrow.record_batch([obj], names=[""])
    elif isinstance(obj, pyarrow.ChunkedArray):
        whole = pyarrow.table([obj], names=[""])
    elif not isinstance(obj, (pyarrow.RecordBatch, pyarrow.Table)):
        return None
    if whole.get_total_buffer_size() <= whole.nbytes:
        return None
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, whole.schema) as writer:
        writer.write(whole)
    is_table = isinstance(whole, pyarrow.Table)
    return _from_arrow, (pickle.PickleBuffer(sink.getvalue()), is_table, whole is not obj)


def _from_arrow(buffer: Any, is_table: bool, is_column: bool) -> Any:
    import pyarrow

    reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(buffer))
    whole = reader.read_all() if is_table else reader.read_next_batch()
    return whole.column(0) if is_column else whole
