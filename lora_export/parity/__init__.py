"""Compare a candidate (graph or engine) with its reference, with a verdict on everything checked."""
