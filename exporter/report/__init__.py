"""Reports for people and for CI systems, from what other rooms found."""
