"""Shared by the tests: servers in this process and in others, and a client that can break the rules.

Every wait has a deadline, servers use free ports, and each process and thread that is started is ended.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import importlib
import logging
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unittest
import zlib

import pywebsock

T = typing.TypeVar("T")
ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPILED = ("-m", "pywebsock")  # for Python in ROOT; a path would be compiled each time
IS_WINDOWS = os.name == "nt"
IS_WINE = IS_WINDOWS and hasattr(getattr(ctypes, "windll").ntdll, "wine_get_version")  # noqa: B009 (mypy)
DEADLINE = 30.0  # seconds that a test waits for anything; a busy machine may be three times slower
NO_BREAK = "Wine sends no Ctrl-Break to another process"
NO_RESET = "Wine's recv() returns the end of a connection that is reset"
MISSING = " is missing"  # the end of a reason to skip
EVERYTHING = os.environ.get("PYWEBSOCK_TESTS") == "everything"  # CI: a missing package fails its tests
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes, RFC 6455 11.8
DEFLATE = "permessage-deflate"
XOR = [bytes(byte ^ other for byte in range(256)) for other in range(256)]

logging.getLogger("pywebsock").addHandler(logging.NullHandler())  # a server in this process logs to assertLogs alone
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process that a test starts compiles the module again
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # under nohup; child processes would ignore it, too


_skipped: collections.Counter[str] = collections.Counter()  # number of skipped tests by reason


def _add_skip(
    result: unittest.TestResult, test: unittest.TestCase, reason: str, add: typing.Any = unittest.TestResult.addSkip
) -> None:
    _skipped[reason] += 1
    add(result, test, reason)


def _say_what_was_skipped() -> None:
    """Print one line at the end; without it, a run that skips half of the tests looks like a complete one."""
    if _skipped:
        whats = (reason.replace("the package ", "").partition(MISSING) for reason in _skipped)
        missing = sorted(what for what, is_missing, _ in whats if is_missing)
        reasons = sorted(reason for reason in _skipped if MISSING not in reason)
        reasons += [f"no {', '.join(missing)}"] if missing else []
        how = "To run them: pip install --group dev; PYWEBSOCK_TESTS=everything python -m unittest (see README)"
        print(f"skipped {sum(_skipped.values())} tests: {'; '.join(reasons)}. {how}", file=sys.stderr)


unittest.TestResult.addSkip = _add_skip  # type: ignore[method-assign, assignment]
atexit.register(_say_what_was_skipped)


def require(present: object, what: str) -> None:
    """Skip the test if something is missing; fail it if PYWEBSOCK_TESTS=everything."""
    if not present:
        if EVERYTHING:
            raise AssertionError(what + MISSING)
        raise unittest.SkipTest(what + MISSING)


long = unittest.skipUnless(EVERYTHING, "takes long: PYWEBSOCK_TESTS=everything")


def package(name: str) -> typing.Any:
    """Return a module that does not come with Python; see `require`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return require(None, f"the package {name.partition('.')[0]}")


@contextlib.contextmanager
def scratch() -> typing.Iterator[str]:
    """Yield a temporary folder. It is removed even if a browser still writes into it."""
    folder = tempfile.mkdtemp(prefix="pywebsock-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which no program listens, and that no system gives to programs that ask for 0."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def eventually(condition: typing.Callable[[], object], what: str = "", deadline: float = DEADLINE) -> None:
    """Poll until a condition holds; for conditions without an event, such as a counter of another thread."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {what or condition}")
        time.sleep(0.005)


@contextlib.contextmanager
def in_thread(call: typing.Callable[..., object], *arguments: object) -> typing.Iterator[threading.Thread]:
    """Call a function in another thread, which must end with the block or soon after."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive(), f"{call} did not return"


def growth(act: typing.Callable[[int], object], size: int) -> float:
    """Return the CPU time of `act(4 * size)` divided by that of `act(size)`: 4 if it is linear, 16 if it is quadratic.

    Each is the minimum of two runs if the ratio is clear, and of all runs within ten seconds otherwise: other work of
    the process, such as PyPy's compiler, only adds time. The garbage collector waits: it would look at all objects of
    the process, in each long run and in few short ones.
    """
    if IS_WINDOWS:
        raise unittest.SkipTest("Windows counts the CPU time of a thread in steps of 15.6 ms")
    end = time.thread_time() + 10
    times: dict[int, list[float]] = {size: [], 4 * size: []}
    ratio = math.inf
    gc.disable()
    try:
        while len(times[size]) < 2 or (ratio >= 6 and time.thread_time() < end):
            for each, spent in times.items():
                if len(spent) >= 2:
                    gc.collect()
                start = time.thread_time()
                act(each)
                spent.append(time.thread_time() - start)
            ratio = min(times[4 * size]) / max(min(times[size]), 1e-6)
    finally:
        gc.enable()
    return ratio


def peak_memory(act: typing.Callable[[], object]) -> int:
    """Return the peak memory of a call (bytes)."""
    tracemalloc = package("tracemalloc")  # not in PyPy
    tracemalloc.start()
    try:
        act()
        return int(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class Pipe:
    """A socket that accepts `room` bytes, at most `most` in one send, and keeps them in `taken`."""

    family = pywebsock.AF_UNIX

    def __init__(self) -> None:
        self.room = self.most = 1 << 40
        self.taken: list[bytes] = []
        self.ends: list[int] = []  # shutdowns
        self.error: OSError | None = None

    def send(self, data: typing.Any) -> int:
        """Do the same as socket.send."""
        if self.error:
            raise self.error
        size = min(len(data), self.room, self.most)
        if data and not size:
            raise BlockingIOError
        self.room -= size
        self.taken.append(data if size == len(data) else bytes(data[:size]))
        return size

    def shutdown(self, how: int) -> None:
        """Record the call."""
        self.ends.append(how)

    @property
    def stream(self) -> bytes:
        """All accepted bytes."""
        return b"".join(self.taken)


class Recorder(pywebsock.BroadcastServer):
    """A server that records the calls of its hooks."""

    def __init__(self, *args: typing.Any, **settings: typing.Any) -> None:
        self.heard: list[tuple[typing.Any, ...]] = []
        self._news = threading.Condition()
        super().__init__(*args, **settings)

    def _tell(self, *what: typing.Any) -> None:
        with self._news:
            self.heard.append(what)
            self._news.notify_all()

    def wait_for(self, *what: typing.Any) -> None:
        """Wait for a call of a hook with these arguments."""
        with self._news:
            if not self._news.wait_for(lambda: what in self.heard, DEADLINE):
                raise AssertionError(f"{what} not in {self.heard}")

    def on_open(self, client: pywebsock.WebSocketHandler) -> None:
        self._tell("open", client.target)

    def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
        self._tell("message", message)
        super().on_message(client, message)

    def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
        self._tell("close", code, reason)


class Blocking(Recorder):
    """A server whose on_message blocks, until a test sets `go_on`."""

    def __init__(self, *args: typing.Any, **settings: typing.Any) -> None:
        self.blocks, self.go_on = threading.Event(), threading.Event()
        super().__init__(*args, **settings)

    def block(self) -> None:
        """Block for longer than a test waits for anything."""
        self.blocks.set()
        self.go_on.wait(2 * DEADLINE)

    def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
        self.block()

    def server_close(self) -> None:
        self.go_on.set()
        super().server_close()


S = typing.TypeVar("S", bound=pywebsock.BroadcastServer)


@typing.overload
def running(**settings: typing.Any) -> contextlib.AbstractContextManager[Recorder]: ...
@typing.overload
def running(kind: type[S], **settings: typing.Any) -> contextlib.AbstractContextManager[S]: ...
@contextlib.contextmanager
def running(
    kind: typing.Any = Recorder, address: tuple[str, int] = ("127.0.0.1", 0), **settings: typing.Any
) -> typing.Iterator[typing.Any]:
    """Run a server in this process, on a free port: `with running(rate=5) as server`."""
    server = kind(address, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.005,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(DEADLINE)
        server.server_close()


def at_once(call: typing.Callable[..., T], *arguments: typing.Iterable[typing.Any]) -> list[T]:
    """Return list(map(call, *arguments)), with all calls at the same time: processes take long to start."""
    with concurrent.futures.ThreadPoolExecutor(len(list(zip(*arguments)))) as pool:
        return list(pool.map(call, *arguments))


class Process:
    """`python -m pywebsock` in a process of its own, on a free port; its log is in `log()`."""

    def __init__(
        self,
        *arguments: str,
        stdin: typing.Any = subprocess.DEVNULL,
        python: typing.Sequence[str] = (),
        program: typing.Sequence[str] = (),  # in place of `python -m pywebsock`
    ) -> None:
        folder = None if program else ROOT
        program = program or [sys.executable, *python, *(() if "-c" in python else COMPILED)]
        command = [*program, "--port", "0", *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Ctrl-Break goes to a whole group
        )
        self._log: list[bytes] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self._process.stdout
        self.first_line = self._process.stdout.readline().decode()
        self.stdin = self._process.stdin
        self.pid = self._process.pid
        if ":" not in self.first_line:
            self.wait()
            raise AssertionError(f"did not start: {self.first_line}{self.log()}")
        self.port = int(self.first_line.split("/")[2].rpartition(":")[2]) if "http" in self.first_line else 0

    def _read_log(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._log.append(line)

    def log(self) -> str:
        """Return the text that the process has written to standard error."""
        return b"".join(self._log).decode()

    def send_signal(self, number: int) -> None:
        """Send a signal, such as SIGTERM; on Windows, where SIGTERM would kill the process, send Ctrl-Break."""
        if IS_WINE:
            raise unittest.SkipTest(NO_BREAK)
        if IS_WINDOWS and number != signal.SIGTERM:
            raise unittest.SkipTest("Windows sends no Ctrl-C to a process group")
        self._process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    def wait(self, deadline: float = DEADLINE) -> int:
        """Wait for the end and return the exit status; kill the process and raise AssertionError after the deadline."""
        end = time.monotonic() + deadline
        self._reader.join(deadline)  # standard error ends with the process; Popen.wait() polls every 50 ms
        try:
            return self._process.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"did not end within {deadline} s") from None
        finally:
            self._reader.join(DEADLINE)
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self.wait()

    def begin_stop(self) -> None:
        """Send SIGTERM, or kill the process under Wine."""
        if self._process.poll() is None:
            if IS_WINE:
                self._process.kill()
            else:
                self.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop the process, and return the exit status."""
        self.begin_stop()
        return self.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@functools.cache
def default_server() -> Process:
    """Return a server with default settings, for all tests that need no other. It ends with the tests."""
    process = Process()
    atexit.register(process.stop)
    return process


def certificate(directory: str) -> tuple[str, ssl.SSLContext]:
    """Return a file with a new certificate for localhost and its key, and a context for clients that trust it."""
    path = os.path.join(directory, "localhost.pem")
    made_before = os.environ.get("PYWEBSOCK_CERTIFICATE")
    if made_before:  # on a system that has openssl
        shutil.copyfile(made_before, path)
        return path, ssl.create_default_context(cafile=path)
    require(shutil.which("openssl"), "the openssl command")
    command = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=localhost"
    extensions = "-addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    made = subprocess.run(
        [*command.split(), *extensions.split(), "-keyout", "-", "-out", "-"], check=True, capture_output=True
    )
    pathlib.Path(path).write_bytes(made.stdout)
    return path, ssl.create_default_context(cafile=path)


class Frame(typing.NamedTuple):
    """A frame from the server."""

    fin: bool
    rsv1: bool
    opcode: int
    payload: bytes


def masked_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes = b"\x37\xfa\x21\x3d",
    length: int = -1,
) -> bytes:
    """Return a frame from a client (RFC 6455 5.2); `rsv` is 4 for RSV1; `length` announces another length."""
    size = len(payload) if length < 0 else length
    first = fin << 7 | rsv << 4 | opcode
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    masked = bytearray(payload)
    for i, byte in enumerate(key):  # an independent implementation, to compare with
        masked[i::4] = payload[i::4].translate(XOR[byte])
    return head + key + bytes(masked)


def pieces(opcode: int, *payloads: bytes) -> bytes:
    """Return a message in fragments, one for each payload (RFC 6455 5.4)."""
    last = len(payloads) - 1
    return b"".join(masked_frame(CONT if i else opcode, payload, fin=i == last) for i, payload in enumerate(payloads))


def compress(payload: bytes) -> bytes:
    """Return a compressed message, as any client sends it (RFC 7692 7.2.1)."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def request(*, method: str = "GET", target: str = "/", version: str = "1.1", **changes: str | None) -> bytes:
    """Return an opening handshake; header fields are keyword arguments, with _ for -, and None for no such field."""
    fields: dict[str, str | None] = {
        "Host": "localhost:4545",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": KEY,
        "Sec_WebSocket_Version": "13",
    }
    fields.update(changes)
    lines = [f"{method} {target} HTTP/{version}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def brought(feed: typing.Callable[[bytes], typing.Iterable[T]], *pieces: bytes) -> list[list[T]]:
    """Return the messages that a reader gives for each piece of its input."""
    return [list(feed(piece)) for piece in pieces]


def arriving(pieces: typing.Iterable[bytes]) -> typing.Iterator[bytes]:
    """Pieces of a body on a connection, and then its end."""
    yield from pieces
    raise pywebsock.HandshakeError(400, "the connection ended")


def answer_to_request(pieces: typing.Iterable[bytes]) -> tuple[typing.Any, ...]:
    """Return the response of the pure parts to a request whose head comes in these pieces."""
    data, left = bytearray(), iter(pieces)
    request = None
    try:
        for piece in left:
            request = pywebsock.parse_request(data, piece)
            if request:
                break
        if not request:
            return ()
        rest = bytes(data) + b"".join(left)
        host = pywebsock.check_host(request)
        for listed in ((), ("https://example.com",), ("null",), ("*",)):
            pywebsock.check_origin(request, listed)
        accept = pywebsock.check_upgrade(request)
        window, extension = pywebsock.negotiate_deflate(request.headers.get("sec-websocket-extensions", ""))
        assert bool(window) == bool(extension)
        body = b""
        if request.method == "POST":
            length = pywebsock.body_length(request, 1000)
            body = b"".join(pywebsock.read_body(request, length, arriving([rest]), 1000))
        message = pywebsock.decode_body(request, body)
        return request, rest, message, host, accept, extension, request.path, request.upgrades
    except pywebsock.HandshakeError as error:
        text = pywebsock.printable(str(error))
        assert text.isascii() and text.isprintable()
        return error.status, text
    finally:
        assert request is None or (request.path and request.upgrades in (True, False))


class Client:
    """A WebSocket client for tests, which shows every frame and can break every rule."""

    def __init__(
        self,
        port: int | str,  # or the path of a Unix socket
        *,
        tls: ssl.SSLContext | None = None,
        handshake: bool = True,
        small: bool = False,
        **fields: typing.Any,
    ) -> None:
        local = isinstance(port, str)
        self.socket: socket.socket = socket.socket(socket.AF_UNIX if local else socket.AF_INET)
        if small:  # a small receive buffer
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(DEADLINE)
        self._buffer = b""
        self.response = b""
        try:
            self.socket.connect(port if isinstance(port, str) else ("127.0.0.1", port))
            if not local:
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
            if handshake:
                self.send_raw(request(**fields))
                self.response = self.read_head()
                assert self.response.startswith(b"HTTP/1.1 101 "), self.response
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # ---- sending ----

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def send(self, message: str | bytes) -> None:
        """Send a message in one frame."""
        if isinstance(message, str):
            self.frame(1, message.encode())
        else:
            self.frame(2, message)

    def frame(self, opcode: int, payload: bytes = b"", **how: typing.Any) -> None:
        """Send a frame; see `masked_frame`."""
        self.send_raw(masked_frame(opcode, payload, **how))

    def close(self, code: int | None = 1000, reason: str = "") -> None:
        """Send a Close frame."""
        self.frame(8, b"" if code is None else struct.pack("!H", code) + reason.encode())

    # ---- receiving; each raises TimeoutError or EOFError ----

    def _need(self, size: int) -> None:
        while len(self._buffer) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(f"the connection ended with {self._buffer[:200]!r}")
            self._buffer += data

    def _take(self, size: int) -> bytes:
        self._need(size)
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def read_some(self, size: int) -> None:
        """Read at most this number of bytes into the buffer, with one system call."""
        self._buffer += self.socket.recv(size)

    def read_head(self) -> bytes:
        """Read the head of an HTTP response."""
        while b"\r\n\r\n" not in self._buffer:
            self._need(len(self._buffer) + 1)
        return self._take(self._buffer.index(b"\r\n\r\n") + 4)

    def read_all(self) -> bytes:
        """Read up to the end of the connection."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self._need(len(self._buffer) + 1)
        return self._take(len(self._buffer))

    def read_frame(self) -> Frame:
        """Read the next frame, which must not be masked."""
        first, second = self._take(2)
        length = second
        if second == 126:
            length = struct.unpack("!H", self._take(2))[0]
            assert length >= 126, "not the shortest encoding"
        elif second == 127:
            length = struct.unpack("!Q", self._take(8))[0]
            assert length >= 1 << 16, "not the shortest encoding"
        assert second < 128, "a frame from the server is masked"
        assert not first & 0x30, "RSV2 or RSV3 is set"
        return Frame(first >= 128, bool(first & 0x40), first & 0x0F, self._take(length))

    def read(self) -> str | bytes:
        """Read the next message, which must be in one frame; skip Pings and Pongs."""
        frame = self.read_frame()
        while frame.opcode in (9, 10):
            frame = self.read_frame()
        assert frame.fin and frame.opcode in (1, 2), f"not a message: {frame}"
        payload = frame.payload
        if frame.rsv1:
            payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
        return payload.decode() if frame.opcode == 1 else payload

    def read_close(self) -> tuple[int, str]:
        """Read a Close frame and the end of the connection; return its code (1005 for none) and reason."""
        frame = self.read_frame()
        assert frame.fin and frame.opcode == 8, f"not a Close: {frame}"
        rest = self.read_all()
        assert not rest, f"something after the Close: {rest[:100]!r}"
        if not frame.payload:
            return 1005, ""
        return struct.unpack("!H", frame.payload[:2])[0], frame.payload[2:].decode()


def exchange(port: int | str, data: bytes, *, tls: ssl.SSLContext | None = None) -> tuple[int, dict[str, str], bytes]:
    """Send bytes and read the HTTP response; return its status, header fields and body."""
    with Client(port, handshake=False, tls=tls) as client:
        client.send_raw(data)
        response = client.read_all()
    head, _, body = response.partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(start.split(" ")[1]), fields, body


class ServerTestCase(unittest.TestCase):
    """Tests of running servers. After each test, its clients are closed, then its servers."""

    kind: type[pywebsock.BroadcastServer] = Recorder  # of the servers that serve() starts

    @contextlib.contextmanager
    def assertLogs(  # type: ignore[override]  # noqa: N802
        self, *arguments: typing.Any, **options: typing.Any
    ) -> typing.Iterator[typing.Any]:
        """Do the same as unittest's method, and wait for the threads that write the logs of the servers."""
        with super().assertLogs(*arguments, **options) as logged:
            yield logged
            for server in vars(self).get("servers", ()):
                eventually(lambda server=server: not server._hooks._journal.taken)  # type: ignore[misc]

    @typing.overload
    def serve(self, **settings: typing.Any) -> Recorder: ...
    @typing.overload
    def serve(self, kind: type[S], **settings: typing.Any) -> S: ...

    def serve(self, kind: typing.Any = None, **settings: typing.Any) -> typing.Any:
        """Start a server in this process; see `running`."""
        context = running(kind or self.kind, **settings)
        self.addCleanup(context.__exit__, None, None, None)
        server = context.__enter__()
        vars(self).setdefault("servers", []).append(server)
        return server

    def connect(self, server: pywebsock.BroadcastServer, **how: typing.Any) -> Client:
        """Connect a client to a server; see `Client`."""
        client = Client(server.server_address[1], **how)
        self.addCleanup(client.__exit__)
        return client
