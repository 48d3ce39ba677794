"""From two runs to verdicts: metrics, limits, verdicts."""
