"""Faults for tests: small buffers, a server whose code is changed, paused processes, cut networks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import typing

import pywebsock
from tests.tools import support

_CHANGED = "import sys\nsys.path.insert(0, {root!r})\nimport pywebsock\n{code}\nsys.exit(pywebsock.main(sys.argv[1:]))"


def small_buffers(server: pywebsock.BroadcastServer) -> None:
    """Give the sockets that the server accepts from now on a small send buffer, so that it soon has a backlog.

    `Client(small=True)` and `Load.join(small=True)` have a small receive buffer.
    """
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def changed(code: str) -> list[str]:
    """Return arguments for `Process(python=...)` that run code, which may change `pywebsock`, before the server."""
    return ["-c", _CHANGED.format(root=str(support.ROOT), code=code)]


def few_files(number: int) -> str:
    """Return code for `changed` that limits the number of file descriptors."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({number}, {number}))"


@contextlib.contextmanager
def paused(pid: int) -> typing.Iterator[None]:
    """Pause a child process with all its threads, and continue it at the end of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        # Its threads run until one of them has handled the signal. (PyPy has no waitid.)
        how = os.WUNTRACED | os.WNOHANG
        support.eventually(lambda: os.WIFSTOPPED(os.waitpid(pid, how)[1]), f"process {pid} has not stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Cable(contextlib.AbstractContextManager["Cable"]):
    """Two network namespaces and the only link between them. When it is cut, no packet arrives, not even a reset."""

    address = "10.0.0.1"  # of the near end; the far one is 10.0.0.2

    def __init__(self) -> None:
        self._ip = shutil.which("ip") or ""
        self._near, self._far = f"pywebsock-a{os.getpid()}", f"pywebsock-b{os.getpid()}"
        support.require(self._ip, "the ip command")
        with contextlib.ExitStack() as stack:
            for name in (self._near, self._far):
                made = subprocess.run([self._ip, "netns", "add", name], capture_output=True, check=False)
                support.require(made.returncode == 0, "a permission for network namespaces")
                stack.callback(self._run, f"netns delete {name}")
            self._run(f"-n {self._near} link add name va type veth peer name vb netns {self._far}")
            for name, device, address in ((self._near, "va", self.address), (self._far, "vb", "10.0.0.2")):
                self._run(f"-n {name} addr add {address}/30 dev {device}")
                self._run(f"-n {name} link set {device} up")
            self._stack = stack.pop_all()

    def _run(self, arguments: str) -> None:
        subprocess.run([self._ip, *arguments.split()], check=True, timeout=support.DEADLINE)

    @property
    def near(self) -> str:
        """Code for `changed` that moves the server to the near end."""
        folder = f"/run/netns/{self._near}"
        return f"import ctypes, os; assert not ctypes.CDLL(None).setns(os.open({folder!r}, os.O_RDONLY), 0)"

    @property
    def far(self) -> list[str]:
        """The beginning of a command that runs at the far end."""
        return [self._ip, "netns", "exec", self._far]

    def cut(self) -> None:
        """Cut the link: from now on, no packet arrives."""
        self._run(f"-n {self._far} link set vb down")

    def __exit__(self, *_: object) -> None:
        self._stack.close()
