"""The drop-in on the null driver: what is served, what is not, and how it lives with torch, threads and other overrides."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import hdispatch
import pytest
import torch
import toy
from hdispatch.testing import null
from standin import DOORS, TOY, Library, counts, hits, missed, write_bundle
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: What writes the bundle in `folder` (conftest.py).
WRITE = write_bundle

pytestmark = [
    pytest.mark.usefixtures("bundle"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's own
]


@pytest.fixture
def library() -> Library:
    return Library(TOY)


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, library: Library) -> Callable[..., None]:
    return DOORS[request.param](library.ops.toy)  # held since before the override


# ---- hits, misses, undo ----


def test_a_hit_is_launched_and_a_miss_runs_the_former_kernel(library, door):
    with library.override() as override:
        assert override.served == ["toy"]
        with null.recording():
            door(*toy.arguments(4, 64))
        assert len(null.launches()) == 1
        assert hits(1)
        assert library.calls == []
        hdispatch.stats(reset=True)
        args, wanted = toy.arguments(4, 513), toy.arguments(4, 513)
        toy.reference(*wanted)
        door(*args)
        assert missed("no row")
        assert library.calls == ["toy"]
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(args, wanted, strict=True) if isinstance(a, torch.Tensor))
        hdispatch.stats(reset=True)
        door(*toy.arguments(0))
        assert counts()["empty"] == 1
        assert library.calls == ["toy"]
    door(*toy.arguments(4, 64))
    assert library.calls == ["toy", "toy"]


def test_every_reason_to_miss(library, door, bundle):
    with library.override():
        args = toy.arguments(4, 64)
        args[1] = torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]
        door(*args)
        assert missed("guard: input.stride(0) % 16 == 0")
        hdispatch.stats(reset=True)
        bundle.unload()
        door(*toy.arguments(4, 64))
        assert missed("no table")
        assert library.calls == ["toy"] * 2


def test_a_wrong_call_gets_the_former_kernels_error(library, door):
    args = toy.arguments(4, 64)
    args[0] = args[0][:3]
    with library.override():
        with pytest.raises(ValueError, match="the other library's own words"):
            door(*args)
        assert missed("override: result: size")
        args = toy.arguments(4, 64)
        args[1], args[2] = args[1].float(), args[2].float()  # which only the former kernel takes
        door(*args)
        assert library.calls == ["toy"] * 2
        assert counts()["fallbacks"] == 2


def test_wrong_types_get_torchs_error(library, door):
    before = []
    for wrong in ({4: "1"}, {4: None}, {1: 3}, {5: 1.5}):
        args = toy.arguments(4, 64)
        for index, value in wrong.items():
            args[index] = value
        with pytest.raises((RuntimeError, TypeError)) as raised:
            door(*args)
        before.append((args, str(raised.value)))
    with library.override():
        for args, text in before:
            with pytest.raises((RuntimeError, TypeError)) as raised:
                door(*args)
            assert str(raised.value).split("\n")[0] == text.split("\n")[0]
    assert library.calls == []


def test_missing_and_surplus_arguments(library):
    args = toy.arguments(4, 64)
    with library.override():
        library.ops.toy(*args[:6])  # its last argument has a default
        assert hits(1)
        for wrong in (args[:5], [*args, None], []):
            with pytest.raises(RuntimeError):
                library.ops.toy(*wrong)
        with pytest.raises(RuntimeError):
            library.ops.toy(*args, nonsense=1)
        library.ops.toy(*args[:4], scale_ub=None, epsilon=1)
        assert hits(2)
    assert library.calls == []


def test_strict_mode(library, door):
    with library.override(), hdispatch.strict():
        door(*toy.arguments(4, 64))
        with pytest.raises(hdispatch.MissError, match="nearest rows"):
            door(*toy.arguments(4, 513))
        args = toy.arguments(4, 64)
        args[0] = args[0][:3]
        with pytest.raises(hdispatch.MissError, match=r"toy is not served by toy: toy: result has size\(0\) = 3; it takes 4"):
            door(*args)
    assert library.calls == []
    assert counts()["hits"] == 1


def test_undo(library):
    """The packet is as it was, and torch's dispatcher comes to the former kernel, by way of ours."""
    packet, default = library.ops.toy, library.ops.toy.default
    override = library.override()
    assert library.ops.toy is packet
    assert packet.default is default
    assert type(packet) is not torch._ops.OpOverloadPacket
    assert isinstance(packet, torch._ops.OpOverloadPacket)
    assert repr(packet) == f"<OpOverloadPacket(op='{library.namespace}.toy')>"
    held = packet.__call__
    for _ in range(2):
        override.undo()
        assert type(packet) is torch._ops.OpOverloadPacket
        assert override.served == []
    for call in (held, packet, default):
        call(*toy.arguments(4, 64))
        call(*toy.arguments(4, 513))
    assert library.calls == ["toy"] * 6
    assert counts() == {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {}}


def test_nested_overrides(library):
    outer = library.override()
    with library.override() as inner, library.override():
        assert inner.served == ["toy"]
        library.ops.toy(*toy.arguments(4, 513))
        assert missed("no row")  # once
    library.ops.toy(*toy.arguments(4, 64))
    assert counts()["hits"] == 1
    inner.undo()
    inner = library.override()
    outer.undo()
    library.ops.toy.default(*toy.arguments(4, 64))
    assert counts()["hits"] == 2
    inner.undo()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["toy"] * 2


def test_many_times(library):
    """One kernel of ours is in the dispatcher, however often."""
    with library.override():
        before = library.dump("toy")
        assert before.count("hdispatch") == 1
    for _ in range(200):
        with library.override():
            library.ops.toy.default(*toy.arguments(4, 64))
    assert hits(200)
    assert library.dump("toy") == before


def test_torchs_warning_is_left_to_others(library):
    """torch warns of an overridden kernel once in a process; an override neither shows the warning nor uses it up."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with library.override():
            pass
    assert not seen


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_another_override_on_top(library):
    """Whoever overrides later wins, and stays after our undo."""
    override = library.override()
    theirs = torch.library.Library(library.namespace, "IMPL")
    theirs.impl("toy", lambda *_: library.calls.append("theirs"), "CPU", allow_override=True)
    library.ops.toy.default(*toy.arguments(4, 64))
    override.undo()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["theirs"] * 2
    assert hits(0)
    with library.override():  # over theirs now
        for args in (toy.arguments(4, 64), toy.arguments(4, 513)):
            library.ops.toy.default(*args)
        assert hits_and_fallbacks() == (1, 1)
    assert library.calls == ["theirs"] * 3
    theirs._destroy()
    with library.override():  # over what was under theirs
        library.ops.toy.default(*toy.arguments(4, 64))
    assert hits_and_fallbacks() == (2, 1)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_another_override_that_goes_away(library):
    override = library.override()
    theirs = torch.library.Library(library.namespace, "IMPL")
    theirs.impl("toy", lambda *_: library.calls.append("theirs"), "CPU", allow_override=True)
    theirs._destroy()
    library.ops.toy.default(*toy.arguments(4, 64))
    assert hits(1)
    override.undo()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["toy"]


def hits_and_fallbacks() -> tuple[int, int]:
    return counts()["hits"], counts()["fallbacks"]


# ---- torch's machinery ----


def test_kernels_that_torch_calls_first_are_called(library):
    """Then the packet stays as it is: the door would leave them out."""
    library.torch.impl("toy", lambda keys, *args: redispatch(keys, args), "AutogradCPU", with_keyset=True)
    seen = []

    def redispatch(keys: torch._C.DispatchKeySet, args: tuple[object, ...]) -> None:
        seen.append("autograd")
        library.ops.toy.default.redispatch(keys & torch._C._after_autograd_keyset, *args)

    with library.override():
        library.ops.toy(*toy.arguments(4, 64))
    assert seen == ["autograd"]
    assert hits(1)


def test_inference_mode(library, door):
    with library.override():
        with torch.inference_mode():
            args = toy.arguments(4, 64)
            assert args[0].is_inference()
            door(*args)
        with torch.no_grad():
            door(*toy.arguments(4, 64))
        door(*args[:1], *toy.arguments(4, 64)[1:])
    assert hits(3)


def test_writes_bump_versions(library, door):
    args = toy.arguments(4, 64, "bfloat16+scale_ub+residual")
    before = [a._version if isinstance(a, torch.Tensor) else 0 for a in args]
    with library.override():
        door(*args)
    after = [a._version if isinstance(a, torch.Tensor) else 0 for a in args]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 0, 0, 1, 0, 0, 1]


def test_tensors_that_require_grad_are_torchs_to_judge(library, door):
    """As without us: torch has no derivative and says so in the backward pass, if one comes."""
    args = toy.arguments(4, 64)
    args[2] = torch.nn.Parameter(args[2])
    with library.override():
        door(*args)
        with torch.no_grad():
            door(*args)
    assert hits(2)


def test_modes_and_subclasses_go_through_torch(library):
    seen = []

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    args = toy.arguments(4, 64)
    with library.override():
        for mode in (Function, Dispatch):
            with mode():
                library.ops.toy(*args)
        args[1] = args[1].as_subclass(Subclass)
        library.ops.toy(*args)
    assert len(seen) == 2
    assert all("toy" in name for name in seen)
    assert hits(3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_code(library, backend):
    torch._dynamo.reset()
    packet = library.ops.toy

    def by_attribute(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        library.ops.toy(result, x, WEIGHT, scale, 1e-6, None)
        packet(result, x, WEIGHT, scale, 1e-6, None)
        packet.default(result, x, WEIGHT, scale, 1e-6, None)
        return result

    x, scale = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(4, 1)
    compiled = torch.compile(by_attribute, fullgraph=True, backend=backend)
    override = library.override()
    compiled(x, scale)
    assert hits(3)
    assert library.calls == []
    override.undo()
    compiled(x, scale)
    assert library.calls == ["toy"] * 3
    with library.override(), torch.compiler.set_stance("fail_on_recompile"):
        compiled(x, scale)
    assert hits(6)
    with library.override():
        compiled(torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(5, 1))
    assert hits(9)


WEIGHT = torch.ones(64, dtype=torch.bfloat16)


def test_compiled_before_the_library_is_looked_up():
    """Dynamo's own look-up is the first one."""
    torch._dynamo.reset()
    late = Library()
    override = late.override()
    late.torch.define(TOY)
    late.add_kernel("toy")
    namespace = late.ops

    def function(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        namespace.toy(result, x, WEIGHT, scale, 1e-6, None)
        return result

    torch.compile(function, fullgraph=True, backend="aot_eager")(torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(4, 1))
    assert override.served == ["toy"]
    assert hits(1)
    override.undo()


# ---- threads, and the end of the process ----


def call_in_threads(library: Library, calls: Callable[[Callable[..., None]], None]) -> Callable[[], None]:
    """Eight threads, half of which call the packet and half its overload; the result waits and raises what they raised."""
    failures = []

    def work(index: int) -> None:
        try:
            calls(library.ops.toy if index % 2 else library.ops.toy.default)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()

    def join() -> None:
        for thread in threads:
            thread.join()
        assert not failures

    return join


def test_threads(library):
    def calls(call: Callable[..., None]) -> None:
        for m in range(1, 101):
            call(*toy.arguments(m, 64))
            call(*toy.arguments(m, 72))

    with library.override():
        call_in_threads(library, calls)()
    assert counts() == {"hits": 800, "empty": 0, "fallbacks": 800, "misses": {"no row": 800}}
    assert len(library.calls) == 800


def test_overriding_while_threads_call(library):
    """torch's table of kernels is not for that; ours changes once and is switched then."""
    stop = threading.Event()

    def calls(call: Callable[..., None]) -> None:
        args = toy.arguments(4, 64)
        while not stop.is_set():
            call(*args)

    with library.override():
        pass
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        join = call_in_threads(library, calls)
        for _ in range(500):
            with library.override():
                library.ops.toy(*toy.arguments(4, 64))
        stop.set()
        join()
    finally:
        sys.setswitchinterval(interval)
    assert counts()["hits"] >= 500
    assert counts()["fallbacks"] == 0
    hdispatch.stats(reset=True)
    library.calls.clear()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["toy"]


EXIT = """
import threading
import hdispatch, toy
from standin import TOY, Library
hdispatch.load({bundle!r}, driver="null")
libraries = [Library(TOY) for _ in range(3)]
for library in libraries:
    library.override()
    library.ops.toy(*toy.arguments(4, 64))
    library.ops.toy.default(*toy.arguments(4, 513))
libraries[0].torch._destroy()
del libraries[1]

call, args = libraries[-1].ops.toy, toy.arguments(4, 64)

def work():  # in torch's own calls, a thread that outlives the interpreter aborts
    while True:
        call(*args)

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
print(hdispatch.stats()["toy"]["fallbacks"])
"""


def test_a_process_ends_with_overrides_on(folder):
    """Over libraries that are there, that were destroyed before, and that other threads are calling."""
    code = EXIT.format(bundle=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


def test_a_launch_that_fails_is_final(library, door):
    """Its error is raised once, at every door; it is not launched again, and the former kernel does not run."""
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    calls = []

    def once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the first time")

    registration = hdispatch.register(
        "toy", hdispatch.Key("bfloat16", K=999), tvm_ffi.convert(once), args=[], stream="none", driver="null"
    )
    try:
        with library.override():
            with pytest.raises(hdispatch.FunctionError, match="the first time"):
                door(*toy.arguments(4, 999))
            assert calls == [1]
            door(*toy.arguments(4, 999))
            assert calls == [1, 1]
        assert library.calls == []
    finally:
        registration.unregister()
