"""`lora-export demo`: train three adapters on a real encoder, merge, export, check; offline."""
