"""Hash whole files, and write files that hold their own hash."""
