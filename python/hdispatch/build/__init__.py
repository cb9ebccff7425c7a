"""The build wing: kernels and configs become a bundle. Nothing of it is imported when a bundle is served."""

from .builder import BuildReport, Selection, available_ops, build, buildable_ops
from .target import DESCRIBED, GpuTarget

__all__ = ["DESCRIBED", "BuildReport", "GpuTarget", "Selection", "available_ops", "build", "buildable_ops"]
