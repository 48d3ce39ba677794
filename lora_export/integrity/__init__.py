"""Return whether files are still what was written: every file of a set by its full hash."""
