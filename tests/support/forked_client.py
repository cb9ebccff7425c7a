"""Started in place of Python: has a process forked (see forked.py) and ends as it ends. Imports little.

Its arguments are the kind of process and Python's own.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import sys


def main() -> None:
    """Hand over arguments, pipes, environment and folder, or become a process of its own where no server is of the kind."""
    kind, *arguments = sys.argv[1:]
    name = os.environ.get("CUTE_DSL_ARCH", "none") if kind == "worker" else kind
    ctypes.CDLL(None).prctl(1, signal.SIGKILL) if kind == "worker" else None  # as child.begin has it for itself
    answer = asked(os.path.join(os.environ.get("HDISPATCH_TEST_FORKED", ""), name), arguments)  # noqa: PTH118
    if answer == "other":
        ctypes.CDLL(None).prctl(1, 0)
        os.execv(sys.executable, [sys.executable, *arguments])
    if answer < 0:
        signal.signal(-answer, signal.SIG_DFL) if -answer not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -answer)
    os._exit(answer)


def asked(path: str, arguments: list[str]) -> int | str:
    """How the process ended that a server forked; "other" if none did."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            server.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return "other"
        message = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        try:
            socket.send_fds(server, [json.dumps(message).encode()], [0, 1, 2])
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            return "other"  # its environment and arguments are more than a message holds
        taken = server.recv(64)
        if taken != b'"forked"':
            return "other"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in range(3):
            os.close(number)  # the forked process's alone: whoever reads them sees it end
        answer = server.recv(64)
    return json.loads(answer) if answer else 1


main()
