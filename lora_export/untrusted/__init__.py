"""Read files from strangers within limits, check them field by field, and show their text safely."""
