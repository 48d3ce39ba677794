"""`lora-export demo`: train three adapters on a real model, merge, export and check, all offline."""
