"""The paper's claims at a scale that a CPU can do. Maintainers' work: `python -m sd_resnet.study`.

Imports `core`, `resnets`, `converted`, `analysis` and the base rooms.
"""
