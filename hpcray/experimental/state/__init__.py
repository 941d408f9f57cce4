"""The former place of `hpcray.util.state`."""
