"""Makes up for dropped branches: replacements in their places, or new values of kept weights."""
