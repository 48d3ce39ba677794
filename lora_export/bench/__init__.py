"""How fast models run, measured side by side: `run.run_bench` is the door."""
