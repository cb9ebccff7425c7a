"""Started in place of a process that compiles: has one forked (see forked.py) and ends as it ends. Imports little."""

import ctypes
import json
import os
import signal
import socket
import sys


def main() -> None:
    """Hand over pipes, environment and folder, or become a process of its own where none to fork from is the same."""
    (code,) = sys.argv[1:]
    path = os.path.join(os.environ.get("HDISPATCH_TEST_FORKED", ""), os.environ.get("CUTE_DSL_ARCH", "none"))  # noqa: PTH118
    same = "PYTHONPATH" not in os.environ and os.environ.get("PYTHONHASHSEED") == "0"
    if not same or not os.path.exists(path):  # noqa: PTH110
        os.execv(sys.executable, [sys.executable, "-P", "-c", code])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, as child.begin sets it in the worker
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        asked = {"code": code, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
        for number in range(3):
            os.close(number)  # the worker's alone: whoever reads them sees it end
        answer = server.recv(64)
    status = json.loads(answer) if answer else 1
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
