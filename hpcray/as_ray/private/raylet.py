"""`ray._raylet`: names of Ray's compiled core, without it."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import hpcray
from hpcray.as_ray import stubs

RAY_NODE_ID_KEY = "ray.io/node-id"  # a label that every node has
GRPC_STATUS_CODE_RESOURCE_EXHAUSTED = 8
GRPC_STATUS_CODE_UNAVAILABLE = 14
RESOURCE_UNIT_SCALING = 10_000  # what is smaller is no resource

GcsClient = stubs.stub("ray._raylet", "GcsClient")
RayEvent = stubs.stub("ray._raylet", "RayEvent")


def build_address(host: str, port: int | str) -> str:
    """`host:port`; an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(address: str) -> tuple[str, str] | None:
    """(host, port) of `host:port`, or None."""
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        return None
    return host.strip("[]"), port


def is_ipv6(host: str) -> bool:
    """Whether this is an IPv6 address."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def is_localhost(host: str) -> bool:
    """Whether this names the machine itself."""
    return host in ("localhost", "127.0.0.1", "::1")


def get_localhost_ip() -> str:
    return "127.0.0.1"


def get_all_interfaces_ip() -> str:
    return "0.0.0.0"


def node_ip_address_from_perspective(address: str | None = None) -> str:
    """This host's address on the way to that one (host:port)."""
    found = parse_address(address) if address else None
    host, port = found or ("8.8.8.8", "53")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return get_localhost_ip()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(hpcray, name)  # ids, ObjectRef, generators
