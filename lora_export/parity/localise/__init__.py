"""Where the error of a candidate begins."""
