"""The part of hpcray inside every driver and worker: submit, get, wait, count references."""
