"""Placeholder."""


def measure(effort):
    return iter(())
