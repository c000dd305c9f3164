"""The paper's studies: importance over training and over texts, pruning at several depths.

After "What Matters in Transformers?", arXiv 2406.15786v6: its figures over checkpoints, data sets
and sample counts, and its tables over numbers of dropped layers. Importing this costs no PyTorch.
"""
