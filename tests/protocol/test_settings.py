"""Settings and the log: valid settings, the address for other devices, the limit of log lines."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import sys
import unittest
import unittest.mock

import pywebsock
from pywebsock import BroadcastServer, check_setting
from tests.tools.support import DEADLINE, ROOT, at_once


class Settings(unittest.TestCase):
    """check_setting: wrong settings raise an error with the name."""

    def check(self, name: str, value: object) -> object:
        """Return the setting as the server uses it."""
        return check_setting(name, value, getattr(BroadcastServer, name))

    def test_good(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for name, value in (
            ("max_message", 0),
            ("max_backlog", 1 << 40),
            ("max_clients", 1),
            ("history", 3),
            ("compression", False),
            ("rate", 2.5),
            ("rate", 3),
            ("ping_interval", 0),
            ("send_timeout", 1e9),
            ("tls_context", None),
            ("tls_context", context),
            ("redis", None),
            ("subprotocols", None),
            ("subprotocols", ()),
            ("subprotocols", ["chat", "v2.json"]),
            ("redis", "redis://localhost"),
        ):
            with self.subTest(name, value=value):
                self.assertIs(self.check(name, value), value)

    def test_defaults(self) -> None:
        """Each default is valid."""
        for name in ("max_message", "max_clients", "origins", "compression", "rate", "tls_context", "redis"):
            default = getattr(BroadcastServer, name)
            self.assertEqual(self.check(name, default) or None, default or None)

    def test_origins(self) -> None:
        """Origins are changed to the form that browsers send."""
        for value in (["HTTPS://Example.com:443/", "*"], ("https://example.com", "*")):
            self.assertEqual(self.check("origins", value), ["https://example.com", "*"])
        self.assertEqual(self.check("origins", ()), [])

    def test_wrong(self) -> None:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # as ssl.create_default_context() has, from 3.10 on
        for name, value, line in (
            ("history", "3", "history must be an integer of 0 or more, not '3'"),
            ("history", -1, "history must be an integer of 0 or more, not -1"),
            ("history", 1.0, "history must be an integer of 0 or more, not 1.0"),
            ("history", True, "history must be an integer of 0 or more, not True"),
            ("max_clients", 0, "max_clients must be an integer of 1 or more, not 0"),
            ("max_message", None, "max_message must be an integer of 0 or more, not None"),
            ("rate", -0.5, "rate must be a number of 0 or more, not -0.5"),
            ("rate", "5", "rate must be a number of 0 or more, not '5'"),
            ("rate", float("nan"), "rate must be a number of 0 or more, not nan"),
            ("ping_timeout", float("inf"), "ping_timeout must be a number of 0 or more, not inf"),
            ("compression", 1, "compression must be True or False, not 1"),
            ("compression", "no", "compression must be True or False, not 'no'"),
            (
                "origins",
                "https://example.com",
                """origins must be a list such as ["https://example.com"], not 'https://example.com'""",
            ),
            ("origins", None, """origins must be a list such as ["https://example.com"], not None"""),
            ("origins", [None], "an origin must be a scheme and a host, such as https://example.com, not 'None'"),
            (
                "origins",
                ["example.com"],
                "an origin must be a scheme and a host, such as https://example.com, not 'example.com'",
            ),
            ("tls_context", "cert.pem", "tls_context must be an SSLContext of a server, not 'cert.pem'"),
            ("tls_context", client, f"tls_context must be an SSLContext of a server, not {client!r}"),
            ("subprotocols", "chat", """subprotocols must be a list such as ["chat"], not 'chat'"""),
            ("subprotocols", [""], "a subprotocol must be one word such as chat, not ''"),
            ("subprotocols", ["a b"], "a subprotocol must be one word such as chat, not 'a b'"),
            ("subprotocols", ["chat\r\nX: y"], r"a subprotocol must be one word such as chat, not 'chat\r\nX: y'"),
            ("redis", 6379, "redis must be a URL, not 6379"),
        ):
            with self.subTest(name, value=value):
                with self.assertRaises(ValueError) as caught:
                    self.check(name, value)
                self.assertEqual(str(caught.exception), line)


class NetworkAddress(unittest.TestCase):
    """network_address: the address for a phone on the same network."""

    def test_given(self) -> None:
        for bound, expected in (
            ("127.0.0.1", None),
            ("127.1.2.3", None),
            ("::1", None),
            ("192.168.1.2", "192.168.1.2"),
            ("fe80::1", "fe80::1"),
        ):
            with self.subTest(bound):
                self.assertEqual(pywebsock.network_address(bound), expected)

    def test_all(self) -> None:
        """The local address of connections by IPv4, or else IPv6; none without a network."""
        for bound, ways, expected in (
            ("0.0.0.0", {socket.AF_INET: "10.0.0.7"}, "10.0.0.7"),
            ("0.0.0.0", {socket.AF_INET6: "2001:db8::7"}, None),
            ("0.0.0.0", {}, None),
            ("::", {socket.AF_INET: "10.0.0.7", socket.AF_INET6: "2001:db8::7"}, "10.0.0.7"),
            ("::", {socket.AF_INET6: "2001:db8::7"}, "2001:db8::7"),
            ("::", {}, None),
        ):

            class Probe(socket.socket):
                """A socket of a machine with only these routes."""

                def connect(self, address: object, ways: dict[socket.AddressFamily, str] = ways) -> None:
                    if self.family not in ways or self.type != socket.SOCK_DGRAM:
                        raise OSError("Network is unreachable")

                def getsockname(self, ways: dict[socket.AddressFamily, str] = ways) -> object:
                    return (ways[socket.AddressFamily(self.family)], 40000)

            with self.subTest(bound, ways=ways), unittest.mock.patch("pywebsock.socket.socket", Probe):
                self.assertEqual(pywebsock.network_address(bound), expected)

    def test_here(self) -> None:
        """On this machine, with any network."""
        for bound in ("0.0.0.0", "::"):
            address = pywebsock.network_address(bound)
            if address:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with socket.socket(family) as probe:
                    probe.bind((address, 0))  # a local address


class Flood(unittest.TestCase):
    """FloodFilter: clients cannot fill the disk with log lines."""

    def setUp(self) -> None:
        self.now = 1000.0
        clock = unittest.mock.patch("pywebsock.time.monotonic", lambda: self.now)
        clock.start()
        self.addCleanup(clock.stop)
        self.filter = pywebsock.FloodFilter()

    def log(self, message: str = "%s refused", *arguments: object) -> str | None:
        """Return the line that is logged, or None."""
        record = logging.LogRecord("pywebsock", logging.WARNING, "pywebsock.py", 1, message, arguments or ("x",), None)
        return record.getMessage() if self.filter.filter(record) else None

    def test_each_kind_has_its_own_number(self) -> None:
        """Lines of a kind have the same format string."""
        for kind in ("a", "b"):
            lines = [self.log(f"{kind} %s", i) for i in range(100)]
            self.assertEqual(lines[:20], [f"{kind} {i}" for i in range(20)])
            self.assertEqual(lines[20:], [None] * 80)

    def test_number_of_dropped_lines(self) -> None:
        for _ in range(50):
            self.log()
        self.now += 9.9
        self.assertIsNone(self.log())
        self.now += 0.2
        self.assertEqual(self.log(), "x refused (31 more like this were left out)")
        self.assertEqual(self.log(), "x refused")

    def test_counted_anew(self) -> None:
        """The line with the number of dropped lines counts for its kind."""
        for _ in range(3):
            lines = [self.log() for _ in range(100)]
            self.assertEqual([line is None for line in lines], [False] * 20 + [True] * 80)
            self.now += 10.0

    def test_few_lines(self) -> None:
        for _ in range(100):
            self.assertEqual(self.log(), "x refused")
            self.now += 1.0

    def test_two_filters(self) -> None:
        """Each filter counts separately."""
        for _ in range(2):
            self.assertEqual([self.log() is None for _ in range(30)], [False] * 20 + [True] * 10)
            self.filter = pywebsock.FloodFilter()

    def test_where_it_is(self) -> None:
        """Only the command has the filter; the library does not change the log of a program."""
        flood = "for i in range(100): pywebsock.log.warning('line %s', i)"
        start = "pywebsock.start_logging(pywebsock.argument_parser().parse_args([]))"

        def lines(*steps: str) -> int:
            program = "\n".join(("import pywebsock", *steps))
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=DEADLINE, check=True
            )
            return done.stderr.count(b"line ")

        self.assertEqual(at_once(lines, ("", start), (flood, flood)), [100, 20])


if __name__ == "__main__":
    unittest.main()
