"""``make gpu-check``: one command that proves the GPU path, in phases that each write a report.

`bundle` packs all that it needs for a CUDA machine without internet.
"""
