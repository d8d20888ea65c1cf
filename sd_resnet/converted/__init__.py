"""Any other network, whose residual blocks are found and taken over in place.

Imports `core`, `resnets` and the base rooms.
"""
