"""The table is the only place a key comes from, and seals hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcray.control
from hpcray.control import schema
from hpcray.control.address import ControlAddress
from hpcray.control.schema import BadSeal, seal, unseal

JOB = b"\0\0\0\7"
SECRET = b"s" * 32


def test_keys_derive_from_their_patterns() -> None:
    assert schema.JOB.key(JOB) == b"hpcray:00000007:job"
    assert schema.LINEAGE.key(JOB, rank=3) == b"hpcray:00000007:lineage:3"
    assert schema.JOBS.key() == b"hpcray:jobs"
    wrong: list[tuple[schema.KeySpec, bytes, int | None]] = [
        (schema.JOB, b"", None), (schema.JOB, JOB, 1), (schema.LINEAGE, JOB, None),
        (schema.JOBS, JOB, None)]
    for spec, job, rank in wrong:
        with pytest.raises(ValueError, match="hpcray:"):
            spec.key(job, rank=rank)


def test_the_table_is_complete_and_unambiguous() -> None:
    specs = [value for value in vars(schema).values() if isinstance(value, schema.KeySpec)]
    assert set(specs) == set(schema.SCHEMA)
    assert len({spec.pattern for spec in specs}) == len({spec.name for spec in specs}) == len(specs)
    assert all(spec.pattern in schema.describe() for spec in specs)
    assert all(spec.contents and spec.writer and spec.lifetime for spec in specs)


def test_no_key_is_built_anywhere_else() -> None:
    """No string of the room but in the table (and in prose) starts like a key."""
    assert hpcray.control.__file__ is not None
    for path in Path(hpcray.control.__file__).parent.glob("*.py"):
        if path.name == "schema.py":
            continue
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in prose:
                text = node.value.decode() if isinstance(node.value, bytes) else node.value
                assert not str(text).startswith(schema.PREFIX + ":"), (path.name, node.lineno)


@given(blob=st.binary(max_size=200), place=st.binary(max_size=20), bit=st.integers(0))
def test_one_flipped_bit_is_refused(blob: bytes, place: bytes, bit: int) -> None:
    sealed = seal(SECRET, blob, place)
    assert unseal(SECRET, sealed, place) == blob
    bit %= len(sealed) * 8
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadSeal, match="BLAKE2 tag is wrong"):
        unseal(SECRET, bytes(changed), place)


def test_a_seal_is_bound_to_its_job_and_its_place() -> None:
    sealed = seal(SECRET, b"blob", schema.FUNCTIONS.place(JOB, b"f1"))
    with pytest.raises(BadSeal, match="moved"):
        unseal(SECRET, sealed, schema.FUNCTIONS.place(JOB, b"f2"))
    with pytest.raises(BadSeal):
        unseal(b"t" * 32, sealed, schema.FUNCTIONS.place(JOB, b"f1"))
    assert seal(SECRET, b"cd", b"ab") != seal(SECRET, b"d", b"abc")[:16] + b"cd"
    with pytest.raises(BadSeal, match="alone has 16 B"):
        unseal(SECRET, b"short")
    with pytest.raises(ValueError, match="needs 16"):
        seal(b"", b"blob")


@given(namespace=st.text(max_size=20), name=st.text(max_size=20))
def test_names_with_slashes_do_not_collide(namespace: str, name: str) -> None:
    field = schema.named_actor_field(namespace, name)
    assert schema.split_named_actor_field(field) == (namespace, name)


def test_addresses() -> None:
    address = ControlAddress.from_url("redis://me:s%2Fcret@host:7000/2")
    assert (address.host, address.port, address.database) == ("host", 7000, 2)
    assert (address.username, address.password) == ("me", "s/cret")
    assert ControlAddress.from_bytes(address.to_bytes()) == address
    assert "s/cret" not in repr(address) + str(address)
    assert ControlAddress.from_url("unix:///run/r.sock?db=1").unix_path == "/run/r.sock"
    assert ControlAddress.from_url("rediss://h").tls
    for url in ("http://x", "redis://", "localhost:6379", "unix://"):
        with pytest.raises(ValueError):
            ControlAddress.from_url(url)
