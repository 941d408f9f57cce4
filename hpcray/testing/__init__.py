"""The test kit: a whole cluster in one process, on a virtual clock, repeatable from a seed.

Ships with hpcray so that sites and extensions can test against it; production code never
imports it.
"""
