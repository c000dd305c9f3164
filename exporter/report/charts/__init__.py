"""The report's charts, a type each: figures in, SVG out.

All are 360 units wide, so that their letters have their natural size on a phone, and take their
colours from the page's style, so that they are right in the dark and in print. A new type is a
dataclass with a method ``draw(key)``, on the marks of ``drawing`` and the axes of ``axes``.
"""
