"""Write a pipeline of diffusers, or the halves of an encoder–decoder, as a folder of graphs."""
