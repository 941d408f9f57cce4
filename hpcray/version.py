"""The version of hpcray: also in `pyproject.toml`, which cannot read it from here."""

__version__ = "0.1.0"
