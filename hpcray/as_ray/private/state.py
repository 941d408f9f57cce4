"""`ray._private.state`."""

from __future__ import annotations

from typing import Any

import hpcray
from hpcray import available_resources, cluster_resources, nodes

__all__ = ["available_resources", "available_resources_per_node", "cluster_resources", "nodes",
           "state"]


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """What is free now, by node id."""
    from hpcray.client import process

    client = process.current_client()
    return {node["node_id"]: dict(node["available"]) for node in client.request("nodes")}


class _State:
    """`state.state`."""

    def get_draining_nodes(self) -> dict[str, int]:
        """Nodes that are about to be taken away: none, the launcher gave them to the job."""
        return {}

    def node_table(self) -> list[dict[str, Any]]:
        return hpcray.nodes()


state = _State()
