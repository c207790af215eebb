"""Pixel kernels for whole slides: arrays in, arrays out, NumPy and Numba only, usable without the engine.

Import the modules (``wsikernels.clahe``, ``wsikernels.stain``, …): each compiles, or loads from its cache, what it
holds.
Functions without a leading underscore check their arguments and say what they need; the compiled functions behind them
state their contract and check nothing.
"""
