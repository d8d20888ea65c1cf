"""The paper's claims, and parity with timm's drop path, at a scale that a CPU can do: `python -m sd_resnet.study`.

Imports `core`, `resnets`, `converted`, `analysis`, `bench` and the base rooms. Maintainers' work.
"""
