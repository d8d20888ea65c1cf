"""The command `sd-resnet`: parsing only.

Imports whatever it runs; nothing imports it.
"""
