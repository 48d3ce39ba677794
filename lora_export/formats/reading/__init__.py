"""The common parts of the adapter formats: files, pairs, configs."""
