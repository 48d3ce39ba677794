"""What this machine has and lacks for the work: `lora-export doctor`."""
