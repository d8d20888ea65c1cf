"""timm's ResNet with blocks of its own: the networks, their checkpoints, and the weights that come with the package.

Imports `core` and the base rooms.
"""
