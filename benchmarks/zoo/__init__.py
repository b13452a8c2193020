"""Which published models can be pruned: lists of architectures through the whole flow, a record of each.

Each model runs in a process of its own, with a limit of time and of memory, so that one that hangs or is
too large becomes a record like any other. `levels` says what is checked, `lists` which models there are.
"""
