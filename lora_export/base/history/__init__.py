"""What earlier merges have put into a base."""
