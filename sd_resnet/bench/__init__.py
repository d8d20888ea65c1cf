"""Measured training steps: one race, one record.

Imports `core`, `resnets`, `converted`, `analysis` and the base rooms.
"""
