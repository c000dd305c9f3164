"""Plans: made from scores, read from others' configurations, loaded with their replacements."""
