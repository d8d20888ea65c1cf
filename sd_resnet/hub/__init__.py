"""From a training run to a repository of the Hugging Face Hub, and back.

Imports `core`, `resnets`, `converted`, `analysis` and the base rooms.
"""
