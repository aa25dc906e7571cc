"""Triton kernels for GPUs. Their modules import Triton, so :mod:`choice` imports them if needed."""
