"""The command `sd-resnet`: what can be typed, and what a wing is then asked to do.

Imports `resnets`, `analysis`, `bench`, `hub`, `quickstart`, the package's version and the base rooms.
"""
