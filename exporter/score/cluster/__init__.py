"""Work spread over a Ray cluster, with results that equal a single process's.

Importing this costs neither Ray nor PyTorch.
"""
