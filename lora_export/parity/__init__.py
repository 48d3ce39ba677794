"""Parity: a candidate, graph or engine, against its reference, with a verdict on everything checked."""
