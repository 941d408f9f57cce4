"""Serialisers of the user's own, under the name Ray has for this module."""

from __future__ import annotations

from hpcray.client.serialization import deregister_serializer, register_serializer

__all__ = ["deregister_serializer", "register_serializer"]
