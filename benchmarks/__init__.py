"""Benchmarks: cases under one harness, `python -m benchmarks list`; results in `results/`."""
