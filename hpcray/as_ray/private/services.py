"""`ray._private.services`: what programs ask of it. hpcray's processes are started elsewhere."""

from __future__ import annotations

from hpcray.util.address import get_node_ip_address

__all__ = ["get_node_ip_address"]
