"""Turn two runs into verdicts: metrics, limits, verdicts."""
