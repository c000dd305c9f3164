"""`depthcut export`: load, score, plan, export, prune, verify, measure, report.

Each stage is skipped when its result is already there, made from the same inputs.
"""
