"""How far a candidate's answers are from the baseline's, by several measures, with intervals."""
