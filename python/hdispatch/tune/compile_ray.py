"""Compiling candidates on the CPUs of a Ray cluster: actors that need no GPU, on whichever nodes have CPUs free.

An actor keeps a worker process as this host's pool has them, and sends back what it built with its files. Imports ray.
"""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import ray

from ..compile import op_package
from ..compile.build_unit import Built, Unit
from ..compile.pool import Pool, WorkerLost
from ..compile.store import Store, digest
from ..compile.target import GpuTarget
from ..compile.versions import tool_versions
from ..errors import BuildError, HdispatchError
from ..manifest import artifacts_of
from .farm_ray import connect

#: How often a unit is tried when the actor that has it is lost.
TRIES = 3
#: Seconds for actors to remove their folders.
CLOSE_SECONDS = 30.0


class Answer(TypedDict):
    """An actor's answer: records and their files by SHA-256, or the reason for none; `lost`: the process ended, try again."""

    built: list[Built]
    files: dict[str, bytes]
    problem: str
    lost: bool


class RayCompilers:
    """The CPUs of a cluster; see `connect` for the address."""

    def __init__(self, address: str | None = None) -> None:
        self._joined = connect(address)

    def pool(self, target: GpuTarget, store: Store, sources: Mapping[str, Mapping[str, str]]) -> Pool:
        """A pool whose units are compiled on the cluster; its other requests are answered here."""
        return _RayPool(target, store, sources)

    def jobs(self) -> int:
        """One for each CPU."""
        return max(1, int(ray.cluster_resources().get("CPU", 0)))

    def close(self) -> None:
        """Leave the cluster if this has joined it."""
        if self._joined:
            ray.shutdown()


class _RayPool(Pool):
    def __init__(self, target: GpuTarget, store: Store, sources: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(target, store.root)
        self._sources = {package: digest(dict(hashes)) for package, hashes in sources.items()}
        self._results = store
        self._make = ray.remote(num_cpus=1, num_gpus=0, max_concurrency=2)(Compiler)  # `close` is heard beside a `build`
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._actors: list[Any] = []
        self._guard = threading.Lock()
        self._over = False

    def build(self, unit: Unit, tools: Mapping[str, str], seconds: float | None = None) -> list[Built]:
        """As `Pool.build`. HdispatchError where a node has another hdispatch, or other tools."""
        for left in reversed(range(TRIES)):
            actor = self._actor(unit)
            try:
                answer = cast(
                    Answer,
                    ray.get(actor.build.remote(unit.to_json(), dict(tools), self._sources[unit.package], seconds)),
                )
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, HdispatchError) else HdispatchError(f"{unit.label}: {error}")) from None
            except ray.exceptions.RayError as error:
                if left and not self._over:
                    continue
                raise WorkerLost(f"{unit.label}: Ray lost it: {str(error).splitlines()[0]}") from error
            self._free.put(actor)
            break
        if answer["problem"]:
            raise (WorkerLost if answer["lost"] else BuildError)(answer["problem"])
        for content in answer["files"].values():
            self._results.put_blob(content)
        return answer["built"]

    def _actor(self, unit: Unit) -> Any:
        with self._guard:
            if self._over:
                raise WorkerLost(f"{unit.label}: the run was broken off")
            with contextlib.suppress(queue.Empty):
                return self._free.get_nowait()
            self._actors.append(self._make.remote(self._target.to_json()))
            return self._actors[-1]

    def kill(self) -> None:
        """End every actor: what they work on is lost, and no other begins."""
        with self._guard:
            over, self._over = self._over, True
            if not over:
                ended = [actor.close.remote() for actor in self._actors]
                if ended:
                    ray.wait(ended, num_returns=len(ended), timeout=CLOSE_SECONDS)
                for actor in self._actors:
                    ray.kill(actor)
        super().kill()


# ---- on a node ----


class Compiler:
    """The actor: a worker process and the store that it writes to."""

    def __init__(self, target: dict[str, Any]) -> None:
        self._target = GpuTarget(**target)
        self._folder = tempfile.TemporaryDirectory(prefix="hdispatch-compile-")
        self._store = Store(Path(self._folder.name))
        self._pool = Pool(self._target, self._store.root)
        self._sources: dict[str, str] = {}

    def build(self, unit: dict[str, Any], tools: dict[str, str], sources: str, seconds: float | None) -> Answer:
        """A unit, compiled by what is installed on the node, which must be what the run is started with."""
        whole = Unit.from_json(unit)
        self._check(whole, tools, sources)
        try:
            built = self._pool.build(whole, tools, seconds)
        except BuildError as error:
            return {"built": [], "files": {}, "problem": str(error), "lost": isinstance(error, WorkerLost)}
        names = {name for each in built for name in artifacts_of(each["record"])}
        files = {name: content for name in names if (content := self._store.blob(name)) is not None}
        return {"built": built, "files": files, "problem": "", "lost": False}

    def _check(self, unit: Unit, tools: dict[str, str], sources: str) -> None:
        node, package = ray.util.get_node_ip_address(), unit.package
        here = tool_versions(unit.backend, self._target)
        if here != tools:
            raise HdispatchError(f"node {node} compiles with {here}, the run is started with {tools}: install the same there")
        if package not in self._sources:
            self._sources[package] = digest(op_package.sources({package})[package])
        if self._sources[package] != sources:
            raise HdispatchError(f"node {node} has other code of {package}: install the hdispatch that the run is started with")

    def close(self) -> None:
        """End the process, which breaks off a build, and remove the folders of both."""
        self._pool.__exit__()
        self._folder.cleanup()
