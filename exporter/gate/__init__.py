"""The gate: has the candidate become slower, worse or larger than it may?"""
