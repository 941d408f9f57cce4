"""Serialisers of the user's own, under the name Ray has for this module."""

from hpcray.absent import attributes
from hpcray.client.serialization import deregister_serializer, register_serializer

__getattr__ = attributes(__name__)

__all__ = ["deregister_serializer", "register_serializer"]
