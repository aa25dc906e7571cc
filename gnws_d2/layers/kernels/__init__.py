"""Triton kernels for GPUs. Their modules import Triton; :mod:`choice` imports them if needed."""
