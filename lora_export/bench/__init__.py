"""Measure how fast models run, side by side; `run.run_bench` is the entry point."""
