"""Benchmarks of fastclip against torch: ``python -m benchmarks``, or ``make bench``."""
