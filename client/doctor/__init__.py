"""`lydian doctor`: what would keep this machine from training, coordinating or reaching a coordinator, and what to do.

findings.py   what a check says, and how it is shown
judging.py    PURE: numbers and answers in, findings out
asking.py     asks this machine, the network and the coordinator, with limits of time
checks.py     the table of checks, and the run through it
"""
