"""Write a pipeline of diffusers as a folder of graphs."""
