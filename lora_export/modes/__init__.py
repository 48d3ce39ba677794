"""Write graphs, checkpoints and adapters: one file for each verb."""
