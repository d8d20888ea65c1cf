"""Stochastic depth itself: schedules, draws, the drop path, and the operations that skip.

Imports torch, timm and the standard library; nothing else of this package.
"""
