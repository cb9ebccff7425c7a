"""The configs of an op that has no config file yet: of what its kernel would have measured, the first."""

from __future__ import annotations

from ..errors import BuildError
from . import candidate_lists
from .configs import FALLBACK, ConfigEntry, ConfigFile
from .op_package import OpPackage
from .pool import Pool
from .target import GpuTarget


def first_candidates(package: OpPackage, target: GpuTarget, workers: Pool) -> tuple[ConfigFile, str]:
    """An entry for every shape and bucket, and a note that says so.

    The list of the op's default backend decides, or else Helion's default config. BuildError if there is neither.
    """
    spec, backend, folder = package.spec, package.backends[0], package.configs
    points = [(shape, spec.ladders.edges(bucket)) for shape in spec.shapes for bucket in range(spec.ladders.count)]
    hinted = {symbol: spec.hint(symbol) for symbol in spec.symbols() if symbol != "M"}
    question = candidate_lists.Question(
        package=package.package,
        backend=backend,
        variant=spec.typical_variant().name,
        points=[{**shape, **edges} for shape, edges in points],
        full=[{**hinted, **shape, **edges} for shape, edges in points],
        shapes=[dict(shape) for shape, _ in points],
        radius=0,
    )
    (found,) = candidate_lists.ask([question], workers)
    entries = [ConfigEntry({**shape, **edges}, said[0]) for (shape, edges), said in zip(points, found, strict=True) if said]
    if not entries:
        raise BuildError(
            f"{spec.name}: no configs; {folder} has neither {target.config_file} nor {FALLBACK}, and "
            f"{package.package}.{backend} lists no candidates"
        )
    note = f"{spec.name}: no configs in {folder}, using the first of the kernel's candidates; `hdispatch tune` finds the best"
    return ConfigFile(folder / target.config_file, tuple(entries)), note
