"""README.md says what is so: its table of parts, its options, and every piece of code in it, which is run here."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import typing
import unittest

import pywebsock
from pywebsock import BroadcastServer
from tests.tools.support import (
    DEADLINE,
    EVERYTHING,
    ROOT,
    Client,
    ServerTestCase,
    eventually,
    exchange,
    free_port,
    package,
    request,
    require,
)

TEXT = (ROOT / "README.md").read_text()
SOURCE = pathlib.Path(pywebsock.__file__)
BANNER = re.compile(r"^# =+\n# (?P<title>[^\n]+)\n", re.MULTILINE)
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = {
    (HEADING.findall(TEXT, 0, match.start())[-1], match[1]): match[2] for match in BLOCK.finditer(TEXT)
}  # by heading and language
POST: dict[str, typing.Any] = {
    "method": "POST",
    "Upgrade": None,
    "Connection": None,
    "Sec_WebSocket_Key": None,
    "Content_Length": "5",
}


class Readme(unittest.TestCase):
    """What a reader may rely on."""

    def test_parts(self) -> None:
        """The table names every banner, in their order, with its section of an RFC."""
        table = TEXT.partition("## Read it beside the RFC")[2].partition("\n## ")[0]
        rows = [tuple(cell.strip("* ") for cell in row.split("|")[1:3]) for row in re.findall(r"^\|.*", table, re.M)]
        self.assertEqual(rows[2], ("docstring", "RFC 6455 5.2"))
        parts = []
        for title in BANNER.findall(SOURCE.read_text()):
            name, section = re.fullmatch(r"([^(:]+?)(?:: .*| \((.*?)\).*)?", title).groups("")  # type: ignore[union-attr]
            parts.append((name, section))
        self.assertEqual(rows[3:], parts)

    def test_options(self) -> None:
        """Every option is in the table, and none that is not there."""
        described = set(re.findall(r"`(--[a-z-]+)", TEXT.partition("## Options")[2].partition("\n## ")[0]))
        options = set(re.findall(r"(?<!\S)(--[a-z-]+)", pywebsock.argument_parser().format_help()))
        self.assertEqual(described, options - {"--help", "--version"})

    def test_command_lines(self) -> None:
        """Each is one that the program takes."""
        lines = re.findall(r"(?:python3? |/)pywebsock\.py((?: [^#\n`|]*)?)", TEXT)
        self.assertGreater(len(lines), 8)
        for line in lines:
            with self.subTest(line):
                pywebsock.argument_parser().parse_args(shlex.split(line))

    def test_settings(self) -> None:
        """Where a keyword argument is shown, there is such a setting."""
        for name in re.findall(r"4545\),([^)]*)\)", TEXT):
            for setting in re.findall(r"(\w+)=", name):
                self.assertTrue(setting == "token" or hasattr(BroadcastServer, setting), setting)

    def test_links(self) -> None:
        """What it links to is there: files, and headings of its own."""
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(TEXT)}
        for target in re.findall(r"\]\(([^):]+)\)", TEXT):
            if target.startswith("#"):
                self.assertIn(target[1:], anchors)
            else:
                self.assertTrue((ROOT / target).exists(), target)

    def test_types(self) -> None:
        """mypy finds nothing wrong in the code."""
        package("mypy")
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for number, text in enumerate(text for (_, language), text in CODE.items() if language == "python"):
                files.append(pathlib.Path(folder, f"example_{number}.py"))
                files[-1].write_text(text)
            command = [
                sys.executable,
                "-m",
                "mypy",
                "--check-untyped-defs",
                "--follow-imports=silent",
                *map(str, files),
            ]
            environment = {**os.environ, "MYPYPATH": str(ROOT)}
            mypy = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
            )
        self.assertEqual(mypy.returncode, 0, mypy.stdout + mypy.stderr)


def server_of(heading: str) -> type[BroadcastServer]:
    """The class that the code under a heading defines."""
    names: dict[str, typing.Any] = {}
    exec(CODE[heading, "python"].partition("\nwith ")[0], names)
    (kind,) = (
        each
        for each in names.values()
        if isinstance(each, type)
        and each.__name__ in CODE[heading, "python"]
        and issubclass(each, BroadcastServer)
        and each is not BroadcastServer
    )
    return kind


class Recipes(ServerTestCase):
    """Those that are a class, with real clients."""

    def say(self, speaker: Client, text: str, *hearers: Client) -> None:
        """What one says, these hear next."""
        speaker.send(text)
        self.assertEqual([hearer.read() for hearer in hearers], [text] * len(hearers))

    def test_names(self) -> None:
        server = self.serve(server_of("A chat with names"))
        anna, ben = self.connect(server), self.connect(server)
        self.assertEqual([anna.read(), ben.read()], ["who are you?"] * 2)
        anna.send("Anna")
        self.assertEqual([anna.read(), ben.read()], ["Anna is here"] * 2)
        ben.send("Ben")
        self.assertEqual([anna.read(), ben.read()], ["Ben is here"] * 2)
        ben.send("hello")
        self.assertEqual([anna.read(), ben.read()], ["Ben: hello"] * 2)
        nobody = self.connect(server)
        nobody.read()
        nobody.close()
        nobody.read_close()
        ben.close()
        self.assertEqual(anna.read(), "Ben has left")

    def test_rooms(self) -> None:
        server = self.serve(server_of("Rooms, by path"))
        a, b, c = (self.connect(server, target=path) for path in ("/red", "/blue", "/red?mark=01"))
        self.assertEqual(c.read(), "01")
        self.say(a, "in red", a, c)
        self.say(b, "in blue", b)
        self.say(c, "in red, too", a, c)
        exchange(server.server_address[1], request(**POST) + b"posts")
        self.assertEqual([each.read() for each in (a, b, c)], ["posts"] * 3)

    def test_all_but_the_sender(self) -> None:
        server = self.serve(server_of("All but the sender"))
        a, b, c = (self.connect(server) for _ in range(3))
        self.say(a, "from a", b, c)
        self.say(b, "from b", a, c)

    def test_tokens(self) -> None:
        server = self.serve(server_of("Tokens"), history=1)
        port = server.server_address[1]
        server.broadcast("secret")
        for bad in (
            request(),
            request(target="/?token=nonsense"),
            request(Authorization="Bearer caf\xe9"),
            request(target="/?token=%ff%00&token="),
            request(**POST) + b"hello",
        ):
            status, fields, body = exchange(port, bad)
            self.assertEqual((status, fields["www-authenticate"]), (401, "bearer"))
            self.assertNotIn(b"secret", body)
        for good in ({"Authorization": "Bearer sesame"}, {"target": "/?mark=01&token=sesame"}):
            self.assertIn(self.connect(server, **good).read(), ("secret", "01"))
        self.assertEqual(exchange(port, request(**POST, Authorization="Bearer sesame") + b"hello")[0], 202)

    def test_token_of_ones_own(self) -> None:
        server = self.serve(server_of("Tokens"), token="another")
        self.assertEqual(exchange(server.server_address[1], request(target="/?token=sesame"))[0], 401)
        self.connect(server, target="/?token=another")

    def test_all_listen_some_send(self) -> None:
        server = self.serve(server_of("All listen, some send"))
        port = server.server_address[1]
        listener, speaker = self.connect(server), self.connect(server)
        self.assertEqual(exchange(port, request(**POST) + b"never")[0], 401)
        speaker.send("never")
        self.assertEqual(speaker.read_frame().payload[:2], b"\x03\xf0")
        self.assertEqual(exchange(port, request(**POST, Authorization="Bearer sesame") + b"hello")[0], 202)
        self.assertEqual(listener.read(), "hello")

    def test_address(self) -> None:
        server = self.serve(server_of("The real address, behind a proxy"))
        for fields, address in (
            ({"X_Forwarded_For": "192.0.2.1"}, "192.0.2.1"),
            ({"X_Forwarded_For": "nonsense, 10.0.0.1,2001:db8::1"}, "2001:db8::1"),
            ({}, "127.0.0.1:"),
        ):
            with self.connect(server, **fields), self.subTest(fields):
                (client,) = server.clients
                self.assertTrue(client.address.startswith(address), client.address)
            eventually(lambda: not server.clients)

    def test_a_test(self) -> None:
        """The test case of the recipe passes, and leaves no thread behind."""
        names: dict[str, typing.Any] = {"__name__": "recipe"}
        exec(CODE["Inside a test", "python"], names)
        before = set(threading.enumerate())
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(names["TestSomething"]).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (1, [], []))
        self.assertEqual({each for each in threading.enumerate() if not each.daemon} - before, set())


@unittest.skipUnless(EVERYTHING or os.name == "posix", "programs are ended with Ctrl-C")
class Programs(ServerTestCase):
    """Those that are whole programs, in a process; 4545 becomes a free port."""

    @contextlib.contextmanager
    def program(self, heading: str, number: int = signal.SIGINT) -> typing.Iterator[int]:
        """Run it and end it: its port. What it has printed is in `output`, its folder in `folder`."""
        port = free_port()
        text = CODE[heading, "python"].replace("4545", str(port))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        process = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + text],
            cwd=folder.name,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: process.poll() is not None or self.listens(port), heading)
            yield port
            process.send_signal(number)
            self.output, errors = process.communicate(timeout=DEADLINE)
            self.assertEqual((process.returncode, re.sub(".* refused: 403, .*\n", "", errors)), (0, ""))
        finally:
            process.kill()
            process.communicate()

    def listens(self, port: int) -> bool:
        """Whether anybody does."""
        with contextlib.suppress(OSError):
            Client(port, handshake=False).socket.close()
            return True
        return False

    def goodbye(self, client: Client) -> None:
        """The Close of a server that stops."""
        self.assertEqual(client.read_frame().payload, b"\x03\xe9")
        client.socket.close()

    def test_chat(self) -> None:
        """The example; Ctrl-C says goodbye to its clients."""
        with self.program("Library") as port:
            one, other = Client(port), Client(port)
            address = ":".join(map(str, one.socket.getsockname()))
            self.assertEqual(one.read(), f"welcome, {address}")
            other.read()
            one.send("hello")
            self.assertEqual([one.read(), other.read()], [f"{address}: hello"] * 2)
            one.close()
            one.read_close()
            one.socket.close()
            self.assertEqual(other.read(), f"{address} has left (1000)")
            with Client(port) as late:
                self.assertEqual(late.read(), f"{address}: hello")
            closing = threading.Thread(target=self.goodbye, args=(other,))
            other.read()  # late has left
            closing.start()
        closing.join(DEADLINE)
        self.assertEqual(self.output, f"listening on http://localhost:{port}/\nstopping\n")

    def test_dashboard(self) -> None:
        with self.program("A dashboard") as port:
            with Client(port) as client:
                self.assertEqual(len(json.loads(client.read())["load"]), 3)
                client.send("nobody hears this")
            self.assertEqual(exchange(port, request(**POST) + b"never")[0], 403)
            self.assertEqual(exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[0], 200)

    def test_asyncio(self) -> None:
        with self.program("Inside asyncio") as port, Client(port) as client:
            for word in ("hello", "world"):
                client.send(word)
            self.assertEqual([client.read(), client.read()], ["HELLO", "WORLD"])

    def test_log(self) -> None:
        """SIGTERM ends it as Ctrl-C does."""
        with self.program("A log of its own", signal.SIGTERM) as port:
            exchange(port, b"nonsense\r\n\r\n")
            Client(port).socket.close()
        log = (self.folder / "chat.log").read_text()
        self.assertRegex(log, rf"INFO listening on port {port}\n(.|\n)*WARNING .* refused: 400(.|\n)*INFO stopping\n$")
        self.assertNotIn("left", log)

    def test_python_client(self) -> None:
        package("websockets")
        self.check_client("python", sys.executable, "hello from Python\n")

    def test_javascript_client(self) -> None:
        bun = pathlib.Path(os.environ.get("PYWEBSOCK_NODE_MODULES", "."), "@oven/bun-linux-x64/bin/bun")
        require(bun.exists(), "bun")
        self.check_client("javascript", str(bun), "hello from JavaScript\nclosed 1001 \n")

    def check_client(self, language: str, runtime: str, output: str) -> None:
        """It says hello, hears it, and ends when the server does."""
        server = self.serve(BroadcastServer)
        witness = self.connect(server)
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "client.js" if language == "javascript" else "client.py")
            file.write_text(CODE["Clients", language].replace("4545", str(server.server_address[1])))
            process = subprocess.Popen([runtime, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                self.assertIn("hello from", str(witness.read()))
                for client in server.clients:
                    client.close(1001)
                heard, errors = process.communicate(timeout=DEADLINE)
            finally:
                process.kill()
                process.communicate()
        self.assertEqual((heard, errors, process.returncode), (output, "", 0))


class Service(unittest.TestCase):
    """The file for systemd."""

    def test_verify(self) -> None:
        """systemd knows every line of it, and finds it safe."""
        require(shutil.which("systemd-analyze"), "systemd-analyze")
        text = (
            CODE["As a service", "ini"].replace("/usr/bin/python3", sys.executable).replace("/opt/pywebsock", str(ROOT))
        )
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "pywebsock.service")
            file.write_text(text)
            verified = self.analyze("verify", str(file))
            self.assertEqual((verified.returncode, verified.stdout + verified.stderr), (0, ""))
            exposure = self.analyze("security", "--offline=yes", "--threshold=20", str(file))
            self.assertEqual(exposure.returncode, 0, exposure.stdout)

    def analyze(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What systemd-analyze says."""
        command = ["systemd-analyze", "--man=no", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


if __name__ == "__main__":
    unittest.main()
