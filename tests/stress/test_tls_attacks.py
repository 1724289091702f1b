"""TLS connections that end in every way at every moment, and TLS handshakes that do not end.

The tests of each ending are quick; the others are heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import typing
import unittest

from tests.tools import stress, support

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nthe beginning"


@functools.cache
def context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the context of a client with only this version, which accepts any certificate."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.minimum_version = made.maximum_version = version
    return made


class Records:
    """A TLS peer that can change its records."""

    def __init__(self, port: int, version: ssl.TLSVersion) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), support.DEADLINE)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context(version).wrap_bio(self._in, self._out)

    def shake(self) -> None:
        """Do the TLS handshake."""
        self._do(self._object.do_handshake)
        self.socket.sendall(self._out.read())

    def hello(self) -> bytes:
        """Return the first records, without sending them."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._object.do_handshake()
        return self._out.read()

    def send(self, plain: bytes) -> None:
        """Send plaintext."""
        self._object.write(plain)
        self.socket.sendall(self._out.read())

    def read(self) -> bytes:
        """Read plaintext."""
        return typing.cast(bytes, self._do(functools.partial(self._object.read, 65536)))

    def notify(self) -> None:
        """Send a close_notify."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        self.socket.sendall(self._out.read())

    def _do(self, act: typing.Callable[[], object]) -> object:
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                self.socket.sendall(self._out.read())
                data = self.socket.recv(65536)
                if not data:
                    raise EOFError from None
                self._in.write(data)


# Actions of a peer before it ends.


def at_the_hello(peer: Records) -> None:
    peer.socket.sendall(peer.hello()[:100])


def after_the_hello(peer: Records) -> None:
    peer.socket.sendall(peer.hello())


def after_the_handshake(peer: Records) -> None:
    peer.shake()


def within_the_head(peer: Records) -> None:
    peer.shake()
    peer.send(b"GET / HTTP/1.1\r\nHost: local")


def within_a_body(peer: Records) -> None:
    peer.shake()
    peer.send(POST)


def as_a_client(peer: Records) -> None:
    peer.shake()
    peer.send(support.request())
    assert peer.read().startswith(b"HTTP/1.1 101 ")


def within_a_frame(peer: Records) -> None:
    as_a_client(peer)
    peer.send(support.masked_frame(1, b"hel", length=5))


def after_the_close(peer: Records) -> None:
    as_a_client(peer)
    peer.send(support.masked_frame(8, b"\x03\xe8"))


MOMENTS: typing.Sequence[typing.Callable[[Records], None]] = (
    at_the_hello,
    after_the_hello,
    after_the_handshake,
    within_the_head,
    within_a_body,
    as_a_client,
    within_a_frame,
    after_the_close,
)


# Ways to end.


def notified(peer: Records) -> None:
    """End TLS, but not the connection."""
    peer.notify()


def notified_and_half_closed(peer: Records) -> None:
    peer.notify()
    peer.socket.shutdown(socket.SHUT_WR)


def notified_twice(peer: Records) -> None:
    peer.notify()
    peer.notify()


def notified_and_garbled(peer: Records) -> None:
    peer.notify()
    with contextlib.suppress(OSError):
        peer.socket.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))


def half_closed(peer: Records) -> None:
    """End without a close_notify: a truncation."""
    peer.socket.shutdown(socket.SHUT_WR)


def garbled(peer: Records) -> None:
    """Send an invalid record."""
    with contextlib.suppress(OSError):
        peer.socket.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))


def closed(peer: Records) -> None:
    peer.socket.close()


def notified_and_closed(peer: Records) -> None:
    peer.notify()
    peer.socket.close()


def reset(peer: Records) -> None:
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, stress.RESET)
    peer.socket.close()


def notified_and_reset(peer: Records) -> None:
    peer.notify()
    reset(peer)


ENDINGS: typing.Sequence[typing.Callable[[Records], None]] = (
    notified,
    notified_and_half_closed,
    notified_twice,
    notified_and_garbled,
    half_closed,
    garbled,
    closed,
    notified_and_closed,
    reset,
    notified_and_reset,
)


class TLSTestCase(stress.StressTestCase):
    """Tests with peers that can change their records."""

    def peer(self, port: int, version: ssl.TLSVersion) -> Records:
        """Connect such a peer."""
        peer = Records(port, version)
        self.addCleanup(peer.socket.close)
        return peer

    def end_all(self, port: int) -> list[Records]:
        """Connect peers and end them in each way, with each version, after each action."""
        peers = []
        for version, moment, ending in itertools.product(VERSIONS, MOMENTS, ENDINGS):
            peer = self.peer(port, version)
            moment(peer)
            ending(peer)
            peers.append(peer)
        return peers


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "there is no /proc")
class EndTest(TLSTestCase):
    """Each way to end TLS."""

    @unittest.skipIf(support.IS_WINDOWS, "Windows has no /proc")
    def test_leave(self) -> None:
        server = self.serve("--quiet", tls=True, code="pywebsock.IDLE_TIME = 0.1\n")
        support.Client(server.port, tls=stress.certificate()[1]).__exit__()  # all its threads have started
        gauge = stress.Gauge(server.pid)
        for peer in self.end_all(server.port):
            peer.socket.close()
        gauge.wait_until_idle(2, 0.2)
        self.assertLess(gauge.growth, 50)
        with support.Client(server.port, tls=stress.certificate()[1]) as client:
            client.send("still here")
            self.assertEqual(client.read(), "still here")
            server.send_signal(signal.SIGTERM)
            self.assertEqual(client.read_frame().payload, b"\x03\xe9")
        self.assertEqual((server.wait(stress.CLOSE_TIMEOUT + 2), server.log()), (0, ""))

    @stress.heavy
    def test_stay(self) -> None:
        """If peers end TLS, but not the connection, the server ends it."""
        watched = self.serve_watched(tls=True)
        self.end_all(watched.port)
        # The handshake timeout, the close timeout, and a second.
        self.check_recovery(watched, "every ending, and they stay", within=17)

    @stress.heavy
    def test_stop_meanwhile(self) -> None:
        """SIGTERM while all these connections end."""
        watched = self.serve_watched(tls=True)
        self.end_all(watched.port)
        self.stop(watched)


@stress.heavy
class HandshakeTest(TLSTestCase):
    """Every wait in a handshake ends at the handshake timeout."""

    SHORT = "pywebsock.BroadcastServer.handshake_timeout = 4.0\n"

    def test_single_bytes(self) -> None:
        watched = self.serve_watched(tls=True, code=self.SHORT)
        start = time.monotonic()
        peers = [self.peer(watched.port, version) for version in VERSIONS for _ in range(20)]
        hellos = [peer.hello() for peer in peers]
        for i in range(12):  # 6 seconds
            time.sleep(max(0.0, start + i * 0.5 - time.monotonic()))
            for peer, hello in zip(peers, hellos):
                with contextlib.suppress(OSError):
                    peer.socket.sendall(hello[i : i + 1])
        self.check_recovery(watched, "40 ClientHellos in single bytes", within=5)  # the close timeout

    def test_hello_and_no_more(self) -> None:
        """Silence after each number of bytes of the first flight."""
        watched = self.serve_watched(tls=True, code=self.SHORT)
        peers = [self.peer(watched.port, version) for version in VERSIONS for _ in range(20)]
        for i, peer in enumerate(peers):
            hello = peer.hello()
            peer.socket.sendall(hello[: len(hello) * (i % 20) // 19])
        time.sleep(3)
        self.check_recovery(watched, "40 incomplete TLS handshakes", within=7)


class LightHandshakeTest(support.ServerTestCase):
    """The same with a short timeout."""

    def test_single_bytes(self) -> None:
        path, _ = stress.certificate()
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(path)
        server = self.serve(tls_context=own, handshake_timeout=0.3, close_timeout=0.2)
        peer = Records(server.server_address[1], VERSIONS[1])
        self.addCleanup(peer.socket.close)
        peer.socket.settimeout(0.02)
        start, ended = time.monotonic(), False
        for byte in peer.hello():
            try:
                peer.socket.sendall(bytes([byte]))
                ended = not peer.socket.recv(1000)
            except socket.timeout:
                continue
            except OSError:
                ended = True
            if ended or time.monotonic() - start > 2:
                break
        self.assertTrue(ended, "the connection is still open")


@stress.heavy
class CommandTest(stress.StressTestCase):
    """Common programs as clients."""

    def run_all(self, *commands: typing.Sequence[str], stdin: bytes = b"") -> None:
        """Run a command many times at once, up to the end of each."""
        running = []
        for command in commands:
            support.require(shutil.which(command[0]), command[0])
            null = subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null)
            running.append(process)
        for process in running:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(stdin, timeout=30)

    def test_monitor(self) -> None:
        """A certificate monitor: `echo Q | openssl s_client`."""
        watched = self.serve_watched(tls=True)
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{watched.port}"]
        self.run_all(*[[*command, version] for version in ("-tls1_2", "-tls1_3") * 10], stdin=b"Q\n")
        self.check_recovery(watched, "20 monitors")

    def test_monitor_that_is_killed(self) -> None:
        watched = self.serve_watched(tls=True)
        command = ["timeout", "-s", "KILL", "1", "openssl", "s_client", "-connect", f"127.0.0.1:{watched.port}"]
        self.run_all(*[[*command, version] for version in ("-tls1_2", "-tls1_3") * 5])
        self.check_recovery(watched, "10 monitors that are killed")

    def test_curl_in_a_post(self) -> None:
        """curl gives up after a second, in the middle of its body."""
        watched = self.serve_watched(tls=True)
        url = f"https://127.0.0.1:{watched.port}/"
        command = ["curl", "-sk", "-m", "1", "--limit-rate", "1k", "-d", "x" * 100_000, url]
        self.run_all(*[[*command, *version] for version in (["--tlsv1.3"], ["--tls-max", "1.2"]) * 5])
        self.check_recovery(watched, "10 POSTs that were given up")


class Library:
    """OpenSSL through ctypes, for functions that Python's module lacks."""

    def __init__(self, port: int, version: int) -> None:
        path = ctypes.util.find_library("ssl")
        support.require(path, "libssl")
        self._lib = ctypes.CDLL(path)
        for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(self._lib, name).restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._lib.SSL_CTX_new(ctypes.c_void_p(self._lib.TLS_client_method())))
        self._lib.SSL_CTX_ctrl(self._context, 123, ctypes.c_long(version), None)  # lowest version
        self._lib.SSL_CTX_ctrl(self._context, 124, ctypes.c_long(version), None)  # highest version
        self._lib.SSL_CTX_ctrl(self._context, 33, ctypes.c_long(1), None)  # partial writes
        self.socket = socket.create_connection(("127.0.0.1", port), support.DEADLINE)
        self.socket.setblocking(True)
        self._ssl = ctypes.c_void_p(self._lib.SSL_new(self._context))
        self._lib.SSL_set_fd(self._ssl, self.socket.fileno())
        if self._lib.SSL_connect(self._ssl) != 1:
            raise ConnectionError("no TLS handshake")

    def write(self, data: bytes) -> bool:
        """Send plaintext; return whether it was sent."""
        return bool(self._lib.SSL_write(self._ssl, data, len(data)) > 0)

    def read(self) -> bytes:
        """Read plaintext."""
        buffer = ctypes.create_string_buffer(65536)
        return buffer.raw[: max(0, self._lib.SSL_read(self._ssl, buffer, 65536))]

    def update_keys(self) -> bool:
        """Send a KeyUpdate that asks for one; return whether it was sent."""
        return bool(self._lib.SSL_key_update(self._ssl, 1) == 1 and self._lib.SSL_do_handshake(self._ssl) == 1)

    def renegotiate(self) -> bool:
        """Ask for another handshake; return whether the request was sent."""
        return bool(self._lib.SSL_renegotiate(self._ssl) == 1 and self._lib.SSL_do_handshake(self._ssl) == 1)


@stress.heavy
class LibraryTest(stress.StressTestCase):
    """KeyUpdates and renegotiations, as fast as possible."""

    def flood(
        self,
        watched: stress.WatchedServer,
        version: int,
        what: str,
        *,
        before: bytes = b"",
        number: int = 1,
        worst: float = 0.5,
    ) -> None:
        """Flood the server for three seconds, from other processes, which end then, even if they block."""
        children = [os.fork() or self.act(watched.port, version, what, before) for _ in range(number)]
        for child in children:
            os.waitpid(child, 0)
        self.check_recovery(watched, f"{what} for three seconds", worst)

    def act(self, port: int, version: int, what: str, before: bytes) -> int:
        """Be a process that floods the server."""
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.alarm(4)
        with contextlib.suppress(BaseException):
            peer, end, count = Library(port, version), time.monotonic() + 3, 0
            if before:
                peer.write(before)
                peer.read()
            while time.monotonic() < end and getattr(peer, what)():
                count += 1
            os.write(2, f"    {count} times {what}\n".encode())
        os._exit(0)

    def test_key_updates_of_a_client(self) -> None:
        watched = self.serve_watched(tls=True)
        self.flood(watched, 0x304, "update_keys", before=support.request())

    def test_key_updates_before_the_request(self) -> None:
        watched = self.serve_watched(tls=True)
        self.flood(watched, 0x304, "update_keys")

    def test_key_updates_of_many(self) -> None:
        """They are read after the others, a few in each round."""
        watched = self.serve_watched(tls=True)
        self.flood(watched, 0x304, "update_keys", before=support.request(), number=20, worst=0.15)

    def test_renegotiation(self) -> None:
        watched = self.serve_watched(tls=True)
        self.flood(watched, 0x303, "renegotiate", before=support.request())


if __name__ == "__main__":
    unittest.main()
