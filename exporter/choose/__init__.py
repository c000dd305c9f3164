"""Which sublayers to drop: search, budgets, measured costs, series of scores."""
