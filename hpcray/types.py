"""Under Ray's name: what annotations of Ray programs use."""

from hpcray.client.references import ObjectRef

__all__ = ["ObjectRef"]
