"""What strangers wrote: read within bounds, checked field by field, and shown as nothing but text."""
