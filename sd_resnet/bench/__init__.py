"""Measured training steps: one race, one record.

Imports all that stands before `bench`: `core`, `resnets`, `converted`, `analysis` and the base rooms.
"""
