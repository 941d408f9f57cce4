"""Ray's package of this name is empty, too."""
