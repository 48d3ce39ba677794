"""Add LoRA branches beside the weights of a graph: y = W x + (x·A)·B, whatever operator computes W x.

`calls` describes what a node computes and what a branch reads there, `bundles` finds modules that share a
pair of tensors, `write` adds the products and `attach` the sums. Swap and bank differ only in where A and B
come from, and in a gate between the two products.
"""
