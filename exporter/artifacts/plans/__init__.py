"""Plans: made from scores, read from others' configurations, written beside a result."""
