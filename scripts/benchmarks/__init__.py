"""Benchmarks: each a module with `run(scratch) -> Table`, measured in pairs, medians quoted."""
