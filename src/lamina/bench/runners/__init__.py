"""What plays the rounds of a workload: a module per system, each in a process of its own.

A runner is started as `python -m runners SYSTEM FOLDER OUT`, in the environment of its system, and tells what it
measures on standard output, an object of JSON a line. Only `lean` and `ours` import anything of lamina.
"""
