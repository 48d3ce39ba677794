"""Check whether files are unchanged since they were written, every file of a set by its full hash."""
