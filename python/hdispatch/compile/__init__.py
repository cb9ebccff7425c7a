"""The build wing: kernels and configs become a bundle. Nothing of it is imported when a bundle is served."""

from .builder import BuildReport, Selection, build, build_onto, buildable_ops
from .op_package import available_ops
from .target import DESCRIBED, GpuTarget

__all__ = ["DESCRIBED", "BuildReport", "GpuTarget", "Selection", "available_ops", "build", "build_onto", "buildable_ops"]
