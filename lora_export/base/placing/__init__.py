"""Where an adapter's changes are in a checkpoint, and the plan's rows."""
