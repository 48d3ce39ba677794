"""How a set of files gets its names: steps that can be taken back, a lock, and what ended runs have left."""
