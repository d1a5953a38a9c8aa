"""Block shapes that were timed on a GPU; ``benchmarks.tune`` writes this file.

(name and arguments of a rule in tuning.py) -> options in place of the rule's; None takes one away.
"""

CHIP = 90  # compute capability, times ten
TIMED = {}
