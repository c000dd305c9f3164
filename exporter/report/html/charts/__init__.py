"""The report's drawings, a module each: figures in, SVG out.

All are 360 units wide, so that their letters have their natural size on a phone, and take their
colours from the page's style, so that they are right in the dark and in print.
"""
