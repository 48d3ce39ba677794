"""Show, write and assert the results of `parity`."""
