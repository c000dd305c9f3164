"""`depthcut export`: load, score, plan, export, prune, verify, measure, report."""
