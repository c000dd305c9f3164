"""Timing of several arms in turns: clocks, warm-up, rounds, and when to stop."""
