"""Timing of several arms in turns: from one call to a verdict, as :mod:`.measuring` says."""
