"""The address of the host this process is on."""

from __future__ import annotations


def get_node_ip_address(address: str = "") -> str:
    """The address other hosts reach this one by; needs no session.

    `address` is Ray's, for choosing among interfaces; the routing table chooses here.
    """
    from hpcray.launch.resources import node_ip  # reads the host: not on import

    return node_ip()


__all__ = ["get_node_ip_address"]
