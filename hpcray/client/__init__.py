"""The part of hpcray inside every driver and worker: it submits, gets, waits and counts references."""
