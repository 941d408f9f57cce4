"""Ray's package of this name is empty, too. Its `free` of earlier versions is not here."""

from hpcray.absent import attributes

__getattr__ = attributes(__name__)
