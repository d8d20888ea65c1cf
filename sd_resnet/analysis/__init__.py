"""What networks cost and reach: FLOPs, sub-networks, pruning, accuracy, data sets, training runs.

Imports `core`, `resnets`, `converted` and the base rooms.
"""
