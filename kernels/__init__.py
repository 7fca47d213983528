"""Triton kernels, installed as forde_fast.kernels."""

if __name__ == "kernels":  # this folder of the source tree, found on sys.path under a name that is not ours
    raise ImportError("import forde_fast.kernels: the top-level name 'kernels' is not this package")
