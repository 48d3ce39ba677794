"""What is written: one file for each verb that makes a graph, a checkpoint or an adapter."""
