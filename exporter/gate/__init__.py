"""The gate: has the candidate become slower, worse or larger than it may?

In come a report, limits, and a baseline or a history; out comes a verdict on each quantity and on
all. ``times``, ``quality`` and ``gate`` make a value with its interval of what reports hold, and
``verdicts`` one word of it. A limit is a field of :class:`Limits`, and a value made there.
"""
