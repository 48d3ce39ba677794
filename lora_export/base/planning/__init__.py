"""Find an adapter's sites in a checkpoint, and write the plan's rows."""
