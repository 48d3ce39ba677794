"""Report what this machine can do and what it lacks: `lora-export doctor`."""
