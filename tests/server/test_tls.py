"""wss:// and https://."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import socket
import ssl
import tempfile
import time
import typing
import unittest
import unittest.mock

from tests.tools import faults, load
from tests.tools.support import (
    CLOSE,
    IS_WINDOWS,
    IS_WINE,
    PING,
    PONG,
    TEXT,
    Client,
    Frame,
    Process,
    Recorder,
    ServerTestCase,
    certificate,
    eventually,
    exchange,
    in_thread,
    masked_frame,
    request,
)


class TLS(ServerTestCase):
    """wss:// and https://, on the same port."""

    server_context: ssl.SSLContext
    context: ssl.SSLContext

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        path, cls.context = certificate(directory.name)
        cls.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.server_context.load_cert_chain(path)

    def secure(self, **settings: typing.Any) -> Recorder:
        """Start a server with the certificate."""
        return self.serve(Recorder, tls_context=self.server_context, **settings)

    def client(self, server: Recorder, **how: typing.Any) -> Client:
        """Connect a client that trusts the certificate."""
        return self.connect(server, tls=self.context, **how)

    def test_both_versions(self) -> None:
        server = self.secure()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            with self.subTest(version=version.name):
                client = self.connect(server, tls=context)
                for message in ("Hello", b"", bytes(300_000)):
                    client.send(message)
                    self.assertEqual(client.read(), message)
                client.frame(PING, b"?")
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))
                client.close(4000)
                self.assertEqual(client.read_close(), (4000, ""))  # read_close() needs a close_notify

    def test_one_order(self) -> None:
        """All clients send to all: reading and writing use one TLS object."""
        server = self.secure()
        clients = [self.client(server) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            for name, client in enumerate(clients):
                frames = b"".join(masked_frame(TEXT, b"%d %d" % (name, i)) for i in range(200))
                stack.enter_context(in_thread(client.send_raw, frames))
        seen = [[client.read() for _ in range(4 * 200)] for client in clients]
        self.assertEqual(seen, [seen[0]] * 4)

    def test_http(self) -> None:
        port = self.secure().server_address[1]
        for target, expected in (("/", 200), ("/status", 200), ("/nothing", 404)):
            data = request(target=target, Upgrade=None, Sec_WebSocket_Key=None)
            status, fields, body = exchange(port, data, tls=self.context)
            self.assertEqual((status, fields["content-length"]), (expected, str(len(body))))

    def test_slow_client(self) -> None:
        server = self.secure()
        faults.small_buffers(server)
        quick, slow = self.client(server), self.client(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(50)]
        for message in messages:
            server.broadcast(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)

    def test_pongs_between_slices(self) -> None:
        """A Pong gets between the messages that wait for a slow client, not into a record that waits to be sent."""
        server = self.secure()
        faults.small_buffers(server)
        client = self.client(server, small=True)
        number = 300
        for i in range(number):
            server.broadcast(f"{i:04}" * 250)
            eventually(lambda i=i: server._room.messages > i)  # type: ignore[misc]
        (connection,) = server._room.connections
        eventually(lambda: connection.size > 100_000)
        heard, pongs = list[bytes](), 0
        while len(heard) < number:
            if len(heard) % 20 == 0:
                client.frame(PING, b"?")
                eventually(lambda: connection.pong or not connection.pieces)
            frame = client.read_frame()
            if frame.opcode == PONG:
                pongs += 1
            else:
                heard.append(frame.payload[:4])
        self.assertEqual(heard, [b"%04d" % i for i in range(number)])
        self.assertGreater(pongs, 1)

    def test_close_notify_is_answered(self) -> None:
        """RFC 8446 6.1: a close_notify of a client, and one before a request."""
        server = self.secure()
        for handshake in (True, False):
            with self.subTest(handshake=handshake):
                client = self.client(server, handshake=handshake)
                assert isinstance(client.socket, ssl.SSLSocket)
                client.socket.unwrap().close()  # it raises an error if TCP ends without a close_notify

    def test_invalid_records(self) -> None:
        """RFC 8446 5.2: an alert answers an invalid record."""
        if IS_WINDOWS:
            self.skipTest("os.dup() takes no sockets on Windows")
        client = self.client(self.secure())
        with socket.socket(fileno=os.dup(client.socket.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\0\x20" + bytes(32))
        with self.assertRaisesRegex(ssl.SSLError, "(?i)bad.record.mac"):
            client.socket.recv(1000)

    def test_the_end(self) -> None:
        server = self.secure()
        client = self.client(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()

    def test_other_data(self) -> None:
        """Data that is not TLS, incomplete handshakes, silence: one log line, no traceback, and others go on."""
        server = self.secure(handshake_timeout=0.3)
        witness = self.client(server)
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        for data, level in (
            (b"", "DEBUG"),
            (request(), "WARNING"),
            (b"garbage\r\n\r\n", "WARNING"),
            (hello, "INFO"),
            (bytes(1000), "INFO"),
        ):
            with self.subTest(data=data[:20]), self.assertLogs("pywebsock", "DEBUG") as logged:
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                start = time.monotonic()
                client.read_all()
                took = time.monotonic() - start
                self.assertLess(took, server.close_timeout)  # that is for connections that got a response
                client.socket.close()
                eventually(functools.partial(getattr, logged, "records"))
                self.assertEqual([(record.levelname, record.exc_info) for record in logged.records], [(level, None)])
        witness.send("all is well")
        self.assertEqual(witness.read(), "all is well")

    def test_plain_http(self) -> None:
        """Plain HTTP on a port with TLS gets a response that says why."""
        status, _, body = exchange(self.secure().server_address[1], request())
        self.assertEqual((status, body[:40]), (400, b"400 Bad Request: this port speaks TLS: t"))

    def test_a_client_that_does_not_trust_it(self) -> None:
        server = self.secure()
        with self.assertLogs("pywebsock", "INFO") as logged:
            with self.assertRaises(ssl.SSLError):
                self.connect(server, tls=ssl.create_default_context())
            eventually(lambda: logged.records)
        self.assertEqual([record.exc_info for record in logged.records], [None])


class TLSEnds(unittest.TestCase):
    """All ways to end TLS or one direction of it (RFC 8446 6.1), at each point of a connection."""

    FIRST = (b"", request(), request(method="POST", Upgrade=None, Content_Length="9") + b"half")

    def test_others_go_on(self) -> None:
        """The room works after each end, and the server is idle at the end."""
        with tempfile.TemporaryDirectory() as directory:
            path, context = certificate(directory)
            server = Process("--cert", path)
        with server, contextlib.ExitStack() as stack:
            witness = stack.enter_context(Client(server.port, tls=context))
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, version
                for first in self.FIRST:
                    with self.subTest(version=version.name, first=first[:4]):
                        client = stack.enter_context(Client(server.port, tls=context, handshake=False))
                        # In another thread: on PyPy, the witness would see its errors in the same one.
                        with concurrent.futures.ThreadPoolExecutor() as pool:
                            pool.submit(self.end_of_tls, client, first).result()
                        witness.send("Hello")
                        self.assertEqual(witness.read(), "Hello")
            self.check_idle(server, witness)
        if not IS_WINE:  # where it is killed
            self.assertEqual(server.wait(), 0)

    def end_of_tls(self, client: Client, first: bytes) -> None:
        """Send data, then close_notify, and wait for that of the server; do not close the TCP connection."""
        client.send_raw(first)
        if first.startswith(b"GET"):
            client.read_head()
        assert isinstance(client.socket, ssl.SSLSocket)
        with contextlib.suppress(OSError):
            client.socket.unwrap()

    def check_idle(self, server: Process, witness: Client) -> None:
        """Check that the server uses no CPU: a busy loop would use all of this half second."""
        before, end = load.cpu(server.pid), time.monotonic() + 0.5
        while time.monotonic() < end:
            witness.send("Hello")
            self.assertEqual(witness.read(), "Hello")
            time.sleep(0.02)
        self.assertLess(load.cpu(server.pid) - before, 0.3)
