"""The first hour on a card: measurements in order of worth, each in a process of its own."""
