"""Folders that strangers prepared, given to every command: nothing of theirs may come of it."""
