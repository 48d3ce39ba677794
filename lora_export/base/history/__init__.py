"""Read which adapters earlier merges have put into a base."""
