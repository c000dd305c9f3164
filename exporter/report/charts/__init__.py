"""The report's charts, a type each: figures in, SVG out."""
