"""`python pywebsock.py`, as a process: its options, its output, and how it ends."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    COMPILED,
    DEADLINE,
    EVERYTHING,
    IS_WINDOWS,
    IS_WINE,
    NO_BREAK,
    ROOT,
    Client,
    Process,
    ServerTestCase,
    at_once,
    certificate,
    eventually,
    exchange,
    free_port,
    in_thread,
    masked_frame,
    request,
    require,
    running,
)

CLOSE = 8
LOCAL = "127.0.0.1" if IS_WINDOWS else "localhost"  # the name in the first line
GOING_AWAY = b"\x03\xe9"


def run(*arguments: str, shell: str = "") -> tuple[int, str, str]:
    """Run the command to its end; return exit status, standard output and standard error. `shell` comes before it."""
    command = [sys.executable, *COMPILED, *arguments]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    nothing = subprocess.DEVNULL
    done = subprocess.run(command, cwd=ROOT, stdin=nothing, capture_output=True, timeout=DEADLINE, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def call(*arguments: str) -> tuple[int, str, str]:
    """Do the same as `run` without a process: call main(), which must end at an option or at an error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in ("start_logging", "tune_malloc"):  # they are for the whole process
            stack.enter_context(unittest.mock.patch.object(pywebsock, name))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            status = pywebsock.main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, output.getvalue(), errors.getvalue()


def answers(port: int) -> bool:
    """Return whether a server answers."""
    try:
        return exchange(port, b"GET / HTTP/1.0\r\n\r\n")[0] == 200
    except OSError:
        return False


class CommandLineTestCase(unittest.TestCase):
    """Tests with processes, none of which may print a traceback."""

    def start(self, *arguments: str, **how: typing.Any) -> Process:
        """Start a process, which must end with status 0 after the test, unless the test has ended it."""
        process = Process(*arguments, **how)
        self.addClassCleanup(self.check_end, process)
        self.addCleanup(process.begin_stop)
        return process

    @staticmethod
    def check_end(process: Process) -> None:
        """It ends, and has had no error that it did not expect."""
        process.wait()
        assert "Traceback" not in process.log(), process.log()

    def connect(self, process: Process, **how: typing.Any) -> Client:
        """Connect a client to a process."""
        client = Client(process.port, **how)
        self.addCleanup(client.__exit__)
        return client


class Start(CommandLineTestCase):
    """The first line of output has the address."""

    def test_first_line(self) -> None:
        process = self.start(program=[sys.executable, str(ROOT / "pywebsock.py")])
        expected = f"pywebsock: listening on http://{LOCAL}:{process.port}/ (ws://{LOCAL}:{process.port}/)"
        self.assertEqual(process.first_line, expected + os.linesep)
        self.assertGreater(process.port, 0)
        client = self.connect(process)
        client.send("Hello")
        self.assertEqual(client.read(), "Hello")

    def test_addresses(self) -> None:
        for process in at_once(lambda host: self.start("--host", host), ("localhost", "0.0.0.0", "127.0.0.1")):
            with self.subTest(process.first_line):
                self.assertIn(f"(ws://{LOCAL}:{process.port}/)", process.first_line)
                self.connect(process).socket.close()

    def test_everything(self) -> None:
        """An empty host is all addresses."""
        process = self.start("--host", "")
        self.assertIn(f"(ws://{LOCAL}:{process.port}/)", process.first_line)
        address = pywebsock.network_address("0.0.0.0")
        if address:
            with socket.create_connection((address, process.port), DEADLINE) as client:
                client.sendall(request())
                self.assertTrue(client.recv(100).startswith(b"HTTP/1.1 101 "))

    def test_for_other_devices(self) -> None:
        """The second line has the address for other devices, if they can reach the server."""
        for host, bound in (("0.0.0.0", "0.0.0.0"), ("", "0.0.0.0"), ("127.0.0.1", "127.0.0.1")):
            address = pywebsock.network_address(bound)
            with self.subTest(host), pywebsock.BroadcastServer((host, 0)) as server:
                port = server.server_address[1]
                first, *more = pywebsock.locations(server, host).split("\n")
                self.assertEqual(first, f"pywebsock: listening on http://{LOCAL}:{port}/ (ws://{LOCAL}:{port}/)")
                expected = f"pywebsock: on the network: http://{address}:{port}/ (ws://{address}:{port}/)"
                self.assertEqual(more, [expected] if address else [])

    def test_locations(self) -> None:
        """Each name and address once, IPv6 in brackets."""
        for host, bound, secure, expected in (
            ("127.0.0.2", "127.0.0.2", False, ["http://127.0.0.2:1/ (ws://127.0.0.2:1/)"]),
            ("10.0.0.7", "10.0.0.7", False, ["http://10.0.0.7:1/ (ws://10.0.0.7:1/)"]),
            ("box", "10.0.0.7", False, ["http://box:1/ (ws://box:1/)", "http://10.0.0.7:1/ (ws://10.0.0.7:1/)"]),
            ("fd00::7", "fd00::7", True, ["https://[fd00::7]:1/ (wss://[fd00::7]:1/)"]),
            ("box", "fd00::7", False, ["http://box:1/ (ws://box:1/)", "http://[fd00::7]:1/ (ws://[fd00::7]:1/)"]),
        ):
            with self.subTest(host, bound=bound):
                server = unittest.mock.Mock(server_address=(bound, 1), tls_context=secure)
                lines = pywebsock.locations(server, host).split("\n")
                self.assertEqual([line.partition("http")[1] + line.partition("http")[2] for line in lines], expected)

    def test_the_name_on_windows(self) -> None:
        """127.0.0.1, unless it listens with IPv6, too, or a certificate is for the other."""
        for bound, secure, name in (
            ("127.0.0.1", False, "127.0.0.1"),
            ("0.0.0.0", False, "127.0.0.1"),
            ("127.0.0.1", True, "localhost"),
            ("::", False, "localhost"),
            ("::1", False, "localhost"),
            ("10.0.0.7", False, "box"),
        ):
            server = unittest.mock.Mock(server_address=(bound, 1), tls_context=secure)
            with self.subTest(bound, secure=secure), unittest.mock.patch.object(pywebsock, "IS_WINDOWS", True):
                self.assertRegex(
                    pywebsock.locations(server, "box"), rf"^pywebsock: listening on https?://\[?{name}\]?:1/ "
                )

    def test_ipv6_and_ipv4(self) -> None:
        with socket.socket(socket.AF_INET6) if socket.has_ipv6 else contextlib.nullcontext() as probe:
            try:
                require(probe, "IPv6")
                assert probe
                probe.bind(("::1", 0))
            except OSError:
                require(None, "IPv6")
        process = self.start("--host", "::")
        client = self.connect(process)
        with socket.create_connection(("::1", process.port), DEADLINE) as six:
            six.sendall(request() + masked_frame(1, b"by IPv6"))
            self.assertEqual(client.read(), "by IPv6")
        self.assertRegex(process.first_line, r"http://localhost:\d+/")

    def test_tls(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path, context = certificate(directory)
            process = self.start("--cert", path)
        self.assertIn(f"https://localhost:{process.port}/ (wss://localhost:{process.port}/)", process.first_line)
        client = self.connect(process, tls=context)
        client.send("secret")
        self.assertEqual(client.read(), "secret")

    def test_ciphers(self) -> None:
        """TLS 1.2 has only ciphers with forward secrecy and AEAD, as TLS 1.3."""
        with tempfile.TemporaryDirectory() as directory:
            path, context = certificate(directory)
            process = self.start("--cert", path)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        for ciphers, good in (
            ("ECDHE-ECDSA-AES128-GCM-SHA256", True),
            ("ECDHE-ECDSA-AES256-GCM-SHA384", True),
            ("ECDHE-ECDSA-CHACHA20-POLY1305", True),
            ("ECDHE-ECDSA-AES256-SHA384:ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES128-SHA", False),
        ):
            with self.subTest(ciphers), contextlib.ExitStack() as stack:
                context.set_ciphers(ciphers)
                if not good:
                    stack.enter_context(self.assertRaises(ssl.SSLError))
                Client(process.port, tls=context).socket.close()

    @unittest.skipIf(IS_WINE, NO_BREAK)
    def test_restart_on_the_same_port_at_once(self) -> None:
        first = self.start("--port", str(free_port()))
        clients = [self.connect(first) for _ in range(3)]
        first.send_signal(signal.SIGTERM)
        for client in clients:
            self.assertEqual(client.read_frame().payload, GOING_AWAY)
            client.close(1001)
            client.socket.close()
        self.assertEqual(first.wait(), 0)
        second = self.start("--port", str(first.port))
        self.assertEqual(second.port, first.port)
        client = self.connect(second)
        client.send("again")
        self.assertEqual(client.read(), "again")


class Errors(CommandLineTestCase):
    """An error is one line on standard error, with exit status 1; a usage error has 2."""

    def check(self, *arguments: str, how: typing.Callable[..., tuple[int, str, str]] = run) -> str:
        """Check the line."""
        status, output, errors = how("--port", "0", *arguments)
        self.assertEqual((status, output), (1, ""), errors)
        self.assertRegex(errors, r"\Apywebsock: [^\n]+\n\Z")
        return errors

    def test_port_taken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.assertIn(f"127.0.0.1 port {port}: ", self.check("--port", str(port)))

    def test_addresses(self) -> None:
        hosts = "203.0.113.1", "no such host", "name.invalid"  # RFC 5737: no machine has it
        for host, line in zip(hosts, at_once(lambda host: self.check("--host", host), hosts)):
            self.assertIn(f"pywebsock: {host} port 0: ", line)

    def test_certificates(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            folder = pathlib.Path(directory)
            missing, empty, bad = (str(folder / f"{name}.pem") for name in ("missing", "empty", "bad"))
            pathlib.Path(empty).touch()
            pathlib.Path(bad).write_text("no certificate")
            for name, *options in (
                ("missing", "--cert", missing),
                ("empty", "--cert", empty),
                ("bad", "--cert", bad),
                ("missing", "--cert", bad, "--key", missing),
            ):
                line = self.check(*options, how=call)
                self.assertEqual(line.count(f"{name}.pem"), 1, line)
        self.check("--cert", "", how=call)  # such as "$CERT" without a value; serving without TLS would be worse

    def test_a_passphrase(self) -> None:
        """The passphrase is asked once, on the terminal; without a terminal, that is an error."""
        require(shutil.which("openssl"), "the openssl command")
        with tempfile.TemporaryDirectory() as directory:
            path, context = certificate(directory)
            key = str(pathlib.Path(directory, "key.pem"))
            encrypt = ["openssl", "pkey", "-in", path, "-aes128", "-passout", "pass:sesame", "-out", key]
            subprocess.run(encrypt, check=True)
            done = subprocess.run(
                [sys.executable, *COMPILED, "--port", "0", "--cert", path, "--key", key],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DEADLINE,
                check=False,
                start_new_session=True,  # without a terminal
            )
            self.assertEqual((done.returncode, done.stdout), (1, b""))
            self.assertRegex(done.stderr, rb"\Apywebsock: [^\n]*key\.pem: the key has a passphrase[^\n]*\n\Z")
            program = pywebsock.Program(("localhost", 0))
            self.addCleanup(program.server_close)
            program.files = (path, key)
            self.addCleanup(pywebsock.ask_passphrase.cache_clear)
            with unittest.mock.patch("getpass.getpass", return_value="sesame") as asked:
                with self.assertLogs("pywebsock") as logs:
                    program.renew()  # while it runs, it does not ask
                self.assertRegex(logs.output[0], r"keeping the old certificate: .*key\.pem")
                for _ in range(2):
                    made = pywebsock.load_certificate(path, key)
                program.renew()
                self.assertTrue(program.tls_context)
            asked.assert_called_once()
            with running(tls_context=made) as server:
                Client(server.server_address[1], tls=context).socket.close()

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_standard_output_is_not_read(self) -> None:
        """If standard output is closed, the server logs that, and goes on."""
        reader, writer = os.pipe()
        os.close(reader)

        def log_of(output: int) -> tuple[int, bytes]:
            port = free_port()
            command = [sys.executable, *COMPILED, "--port", str(port)]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE
            )
            os.close(output)
            try:
                eventually(lambda: answers(port))
            finally:
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=DEADLINE)
            return process.returncode, errors

        outputs = {"a pipe without a reader": writer, "a full disk": os.open("/dev/full", os.O_WRONLY)}
        for name, (status, log) in zip(outputs, at_once(log_of, outputs.values())):
            with self.subTest(name):
                self.assertEqual(status, 0)
                self.assertRegex(log, rb"\A\S+ \S+ WARNING standard output: [^\n]+\n\S+ \S+ INFO stopping\n\Z")

    def test_an_old_python(self) -> None:
        """An old Python prints one line, without a SyntaxError."""
        source = (ROOT / "pywebsock.py").read_text("utf-8")
        ast.parse(source, feature_version=(3, 8))
        script = "import sys; sys.version_info = (3, 8, 18); sys.argv[0] = 'x'; import pywebsock"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
        self.assertEqual(
            (done.returncode, done.stderr.split(b"\n")[0].strip()), (1, b"pywebsock needs Python 3.9 or later")
        )

    def test_in_another_thread(self) -> None:
        """If a program runs main() in another thread, signals belong to the program."""
        script = """if 1:
            import sys, threading, pywebsock
            arguments = ["--port", "0"]
            threading.Thread(target=pywebsock.main, args=(arguments,), daemon=True).start()
            sys.stdin.read()
        """
        process = self.start(program=[sys.executable, "-c", script], stdin=subprocess.PIPE)
        self.connect(process).socket.close()
        assert process.stdin
        process.stdin.close()
        self.assertEqual(process.wait(), 0)

    @unittest.skipIf(os.name == "nt", "POSIX shell")
    def test_standard_input_is_closed(self) -> None:
        """If standard input is closed, its descriptor is reused for a socket, which --stdin must not read."""
        status, output, errors = run("--port", "0", "--stdin", shell="<&-")
        self.assertEqual((status, output, errors), (1, "", "pywebsock: standard input is closed\n"))

    def test_usage(self) -> None:
        for arguments in (
            ("--port", "http"),
            ("--max-message", "16X"),
            ("--max-message", "-1"),
            ("--max-backlog", ""),
            ("--max-clients", "many"),
            ("--history", "1.5"),
            ("--rate", "fast"),
            ("--key", "key.pem"),
            ("--quiet", "--verbose"),
            ("--quiet", "--trace"),
            ("--nonsense",),
            ("more",),
        ):
            with self.subTest(arguments=arguments):
                status, output, errors = call(*arguments)
                self.assertEqual((status, output), (2, ""))
                self.assertRegex(errors, r"\Ausage: pywebsock[^$]*\npywebsock: error: .+\n\Z")

    def test_settings(self) -> None:
        """A wrong setting is one line, after the usage."""
        for how, option, value, what in (
            (run, "--port", "65536", "port"),
            (call, "--max-clients", "0", "max_clients must be an integer of 1 or more"),
            (call, "--origin", "example.com", "such as https://example.com"),
            (call, "--origin", "wss://example.com", "such as https://example.com"),
            (call, "--redis", "localhost", "redis://"),
            (call, "--ping", "-1", "ping_interval must be a number of 0 or more"),
            (call, "--rate", "inf", "rate must be a number of 0 or more"),
        ):
            with self.subTest(option, value=value):
                status, output, errors = how(option, value)
                self.assertEqual((status, output), (2, ""))
                self.assertRegex(errors, rf"\Ausage: pywebsock[^$]*\npywebsock: error: .*{re.escape(what)}.*\n\Z")


class Help(unittest.TestCase):
    """--help and --version."""

    OPTIONS = (
        *("host", "port", "origin", "subprotocol", "cert", "key", "redis", "no-compression", "stdin", "read-only"),
        *("max-message", "max-backlog", "max-clients", "ping", "history", "rate"),
        *("quiet", "verbose", "trace", "version"),
    )

    def test_version(self) -> None:
        self.assertEqual(run("--version"), (0, f"pywebsock {pywebsock.__version__}{os.linesep}", ""))

    def test_help(self) -> None:
        status, output, errors = call("--help")
        self.assertEqual((status, errors), (0, ""))
        for option in self.OPTIONS:
            self.assertIn(f"--{option}", output)
        groups = ["--version", "network:", "limits (", "logging:", "examples:"]
        self.assertEqual(sorted(groups, key=output.rindex), groups)

    def test_examples(self) -> None:
        """The page that a server serves may connect to it."""
        for line in call("--help")[1].partition("examples:\n")[2].splitlines():
            options = pywebsock.argument_parser().parse_args(line.partition("pywebsock ")[2].split())
            port = "" if options.port == 443 else f":{options.port}"
            self.assertIn(options.origins, ([], [f"https://example.com{port}"]), line)

    def test_help_is_one_screen(self) -> None:
        with unittest.mock.patch.dict(os.environ, COLUMNS="100"):
            lines = call("--help")[1].splitlines()
        self.assertLessEqual(len(lines), 40)
        self.assertLessEqual(max(map(len, lines)), 100)


class StandardInput(CommandLineTestCase):
    """--stdin: `tail -f log | python pywebsock.py --stdin`."""

    def pipe(self, *arguments: str) -> tuple[typing.IO[bytes], Client]:
        """Yield the standard input of a process, and a client."""
        process = self.start("--stdin", *arguments, stdin=subprocess.PIPE)
        assert process.stdin
        return process.stdin, self.connect(process)

    def test_lines(self) -> None:
        stdin, client = self.pipe("--max-message", "1000")
        for written, expected in (
            (b"one\n", ["one"]),
            (b"two\nthree\n", ["two", "three"]),
            (b"\n", [""]),
            (b"with CR\r\n", ["with CR"]),
            ("κόσμε\n".encode(), ["κόσμε"]),
            (b"not \xff UTF-8\n", ["not \ufffd UTF-8"]),
            (b"x" * 1000 + b"\n", ["x" * 1000]),
            (b"last, without an end", []),
        ):
            with self.subTest(written=written[:30]):
                stdin.write(written)
                stdin.flush()
                self.assertEqual([client.read() for _ in expected], expected)
        stdin.close()
        self.assertEqual(client.read(), "last, without an end")
        client.send("and it goes on")
        self.assertEqual(client.read(), "and it goes on")

    def test_long_lines(self) -> None:
        """A line longer than the message limit (bytes) is sent in pieces, none longer than the limit."""
        stdin, client = self.pipe("--max-message", "1000")
        stdin.write(("a" * 1001 + "\n" + "\u20ac" * 400 + "\r\n" + "b" * 2000 + "\nend\n").encode())
        stdin.flush()
        expected = ["a" * 1000, "a", "\u20ac" * 333, "\u20ac" * 67, "b" * 1000, "b" * 1000, "end"]
        self.assertEqual([client.read() for _ in expected], expected)

    def test_a_long_line_that_does_not_end(self) -> None:
        stdin, client = self.pipe("--max-message", "1000")
        stdin.write(b"x" * 300_000)
        stdin.close()
        received = 0
        while received < 300_000:
            received += len(client.read())
        self.assertEqual(received, 300_000)

    def test_very_many_lines(self) -> None:
        stdin, client = self.pipe()
        stdin.write(b"".join(b"%d\n" % i for i in range(20_000)))
        stdin.close()
        self.assertEqual([client.read() for _ in range(20_000)], [str(i) for i in range(20_000)])

    def test_its_end_is_logged(self) -> None:
        process = self.start("--stdin")  # without any data
        eventually(lambda: "standard input has ended" in process.log())

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_unreadable_input(self) -> None:
        """If standard input cannot be read, the server logs that and goes on."""
        stdin = os.open(os.devnull, os.O_WRONLY)
        process = self.start("--stdin", stdin=stdin)
        os.close(stdin)
        eventually(lambda: "WARNING standard input: " in process.log())
        client = self.connect(process)
        client.send("it goes on")
        self.assertEqual(client.read(), "it goes on")

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_non_blocking_input(self) -> None:
        """Another program has left standard input in non-blocking mode."""
        stdin, writer = os.pipe()
        self.addCleanup(os.close, writer)
        os.set_blocking(stdin, False)
        client = self.connect(self.start("--stdin", stdin=stdin))
        os.close(stdin)
        for line in ("one", "two"):
            os.write(writer, f"{line}\n".encode())
            self.assertEqual(client.read(), line)


class Lines(unittest.TestCase):
    """split_lines: messages up to a number of bytes."""

    def split(self, text: str, size: int) -> list[str]:
        """Return the messages."""
        stream = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="\n")
        return list(pywebsock.split_lines(stream, size))

    def test_lines(self) -> None:
        for text, size, messages in (
            ("", 5, []),
            ("\n", 5, [""]),
            ("\r\n\n", 5, ["", ""]),
            ("abc", 5, ["abc"]),
            ("abcde\n", 5, ["abcde"]),
            ("abcde\r\n", 5, ["abcde"]),
            ("abcdef\n", 5, ["abcde", "f"]),
            ("abcdefghij\n\n", 5, ["abcde", "fghij", ""]),
            ("abcdefghij\r\n", 5, ["abcde", "fghij"]),
            ("abcdefghij", 5, ["abcde", "fghij"]),
            ("a\rb\n", 5, ["a\rb"]),
            ("\u20ac\u20ac\n", 5, ["\u20ac", "\u20ac"]),
            ("\u20ac\n", 3, ["\u20ac"]),
            ("\u20aca\n\n", 2, ["a", ""]),
            ("a\n", 0, []),
            ("\n", 0, [""]),
        ):
            with self.subTest(text, size=size):
                self.assertEqual(self.split(text, size), messages)

    def test_nothing_is_lost(self) -> None:
        """Each length of a line, with limits near it, gives the same text as one read."""
        for size in range(4, 9):
            for length in range(30):
                for character in ("x", "é", "\u20ac", "\U0001f986"):
                    for end in ("\n", "\r\n"):
                        line = ("xé\u20ac" * 10)[: length // 2] + character * (length - length // 2)
                        messages = self.split(f"{line}{end}{line}", size)
                        with self.subTest(line, size=size, end=end):
                            self.assertEqual("".join(messages), line + line)
                            self.assertLessEqual(max(len(message.encode()) for message in [*messages, ""]), size)
                            self.assertEqual("" in messages, not line)


class Settings(ServerTestCase):
    """Options that are settings of the server."""

    def start(self, *arguments: str) -> pywebsock.Program:
        """Start the server of the command line with these options in this process."""
        options = pywebsock.argument_parser().parse_args(["--port", "0", *arguments])
        return self.serve(typing.cast("type[pywebsock.Program]", lambda _: pywebsock.create_server(options)))

    def test_history(self) -> None:
        server = self.start("--history", "2")
        first = self.connect(server)
        for text in ("1", "2", "3"):
            first.send(text)
            self.assertEqual(first.read(), text)
        second = self.connect(server)
        self.assertEqual([second.read(), second.read()], ["2", "3"])

    def test_rate(self) -> None:
        client = self.connect(self.start("--rate", "80.5"))
        start = time.monotonic()
        client.send_raw(b"".join(masked_frame(1, b"%d" % i) for i in range(100)))
        self.assertEqual([client.read() for _ in range(100)], [str(i) for i in range(100)])
        self.assertGreater(time.monotonic() - start, 0.2)

    def test_max_message(self) -> None:
        client = self.connect(self.start("--max-message", "1K"))
        client.send("x" * 1024)
        self.assertEqual(client.read(), "x" * 1024)
        client.send("x" * 1025)
        self.assertEqual(client.read_close()[0], 1009)

    def test_max_clients_and_origin(self) -> None:
        server = self.start("--max-clients", "1", "--origin", "https://a.example", "--origin", "https://b.example")
        for origin, status in (("https://c.example", 403), ("null", 403)):
            self.assertEqual(exchange(server.server_address[1], request(Origin=origin))[0], status)
        self.connect(server, Origin="https://b.example")
        self.assertEqual(exchange(server.server_address[1], request(Origin="https://a.example"))[0], 503)

    def test_ping(self) -> None:
        client = self.connect(self.start("--ping", "0.1"))
        self.assertEqual(client.read_frame().opcode, 9)
        self.assertEqual(client.read_all(), b"")

    def test_subprotocol(self) -> None:
        server = self.start("--subprotocol", "chat", "--subprotocol", "json")
        client = self.connect(server, Sec_WebSocket_Protocol="x, json, chat")
        self.assertIn(b"\r\nSec-WebSocket-Protocol: json\r\n", client.response)
        self.assertEqual(exchange(server.server_address[1], request(Sec_WebSocket_Protocol="mqtt"))[0], 400)

    def test_no_compression(self) -> None:
        server = self.start("--no-compression")
        client = self.connect(server, Sec_WebSocket_Extensions="permessage-deflate")
        self.assertNotIn(b"Extensions", client.response)


@unittest.skipIf(IS_WINE, NO_BREAK)
class Log(CommandLineTestCase):
    """Lines on standard error."""

    default: str
    quiet: str
    verbose: str

    @classmethod
    def setUpClass(cls) -> None:
        cls.default, cls.quiet, cls.verbose = at_once(cls.log_of, ((), ("--quiet",), ("--verbose",)))

    @staticmethod
    def log_of(options: typing.Sequence[str]) -> str:
        """Return the log of a client that joins and leaves, a refused one, and the end."""
        with Process(*options) as process, Client(process.port) as client:
            client.close(4000, "goodbye")
            assert client.read_close()[0] == 4000
            client.socket.close()
            assert exchange(process.port, request(Origin="https://example.com"))[0] == 403
        assert process.wait() == 0
        return process.log()

    def test_default(self) -> None:
        for word, count in (("joined", 0), ("left: 4000 goodbye", 1), ("refused: 403", 1), ("stopping", 1)):
            self.assertEqual(self.default.count(word), count, word)

    def test_quiet(self) -> None:
        for word, count in (("joined", 0), ("left", 0), ("refused: 403", 1), ("stopping", 0)):
            self.assertEqual(self.quiet.count(word), count, word)

    def test_verbose(self) -> None:
        for word, count in (("joined /: 1 client", 1), ("left: 4000 goodbye", 1), ("refused: 403", 1), ("stopping", 1)):
            self.assertEqual(self.verbose.count(word), count, word)

    def test_lines(self) -> None:
        """A line has the time, the level and a message."""
        lines = self.verbose.splitlines()
        self.assertEqual(len(lines), 4)
        for line in lines:
            level = "WARNING" if "refused" in line else "DEBUG" if "joined" in line else "INFO"
            self.assertRegex(line, rf"\A\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {level} [!-~].*[!-~]\Z")

    def test_stays_short(self) -> None:
        """Refused clients cannot fill the disk."""
        process = self.start()
        for i in range(240):
            with Client(process.port, handshake=False) as client:
                client.send_raw((b"garbage\r\n\r\n", request(Origin="http://x"), b"", request() + b"\x81\x00")[i % 4])
                client.socket.shutdown(socket.SHUT_WR)
                client.read_all()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(), 0)
        lines = process.log().splitlines()
        self.assertGreater(len(lines), 3)
        self.assertLess(len(lines), 100)


@unittest.skipIf(IS_WINE, NO_BREAK)
@unittest.skipIf(os.name == "nt", "Windows does not tell whether a pipe has space")
class Pipe(unittest.TestCase):
    """A log to a full pipe: no thread waits for it."""

    def test_longer_than_its_space(self) -> None:
        """A pipe that has space for the beginning of a traceback would block at the rest."""
        reader, writer = os.pipe()
        stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
        self.addCleanup(stream.close)
        self.addCleanup(os.close, reader)  # first: a thread that writes ends then
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        size = len(os.read(reader, 20_000))
        os.set_blocking(writer, True)
        patient = pywebsock.PatientStream(stream)
        patient.PATIENCE = 0.01
        handler = logging.StreamHandler(patient)
        with in_thread(handler.handle, logging.makeLogRecord({"msg": "é" * 2 * size})):
            pass
        os.read(reader, 1 << 20)
        handler.handle(logging.makeLogRecord({"msg": "a long line " * 1000}))
        self.assertEqual(os.read(reader, 1 << 20).decode()[-12_001:], "a long line " * 1000 + "\n")


LATE_SIGNAL = """if 1:
    import os, signal
    class Late:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
            kill(pid, number)
    pywebsock.late = Late()
"""


class Memory(unittest.TestCase):
    """Memory that malloc has freed."""

    def test_it_is_returned_at_times(self) -> None:
        with (
            unittest.mock.patch.object(pywebsock, "call_libc") as call,
            pywebsock.Program(("127.0.0.1", 0)) as server,
        ):
            server.signals = []
            for rounds, expected in ((3, 1), (3, 2)):
                for _ in range(rounds):
                    server.service_actions()
                self.assertEqual(call.call_args_list, [unittest.mock.call("malloc_trim", 0)] * expected)
                server.next_trim -= pywebsock.TRIM_TIME


class Signals(CommandLineTestCase):
    """Ctrl-C and SIGTERM: all clients get 1001, exit status 0; a second Ctrl-C stops at once."""

    def test_1001_to_all_clients(self) -> None:
        def stop(number: int) -> int:
            process = self.start()
            clients = [self.connect(process) for _ in range(3)]
            clients[0].send("last words")
            self.assertEqual(clients[0].read(), "last words")
            process.send_signal(number)
            for client in clients[1:]:
                self.assertEqual(client.read(), "last words")
            for client in clients:
                frame = client.read_frame()
                self.assertEqual((frame.opcode, frame.payload), (CLOSE, GOING_AWAY))
                client.close(1001)
                client.socket.close()
            return process.wait(4)  # less than the close timeout

        self.assertEqual(at_once(stop, (signal.SIGTERM, signal.SIGINT)), [0, 0])

    def test_clients_that_do_not_answer(self) -> None:
        """The server waits for clients that do not answer, up to the close timeout."""
        process = self.start(python=faults.changed("pywebsock.BroadcastServer.close_timeout = 0.1"))
        self.connect(process)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(4), 0)

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_a_second_signal(self) -> None:
        """Only a second Ctrl-C has an effect: `timeout` and supervisors send SIGTERM twice, terminals SIGHUP."""
        pairs = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM), (signal.SIGINT, signal.SIGHUP)]
        pauses = (0, 0.01, 0, 0.001, 0.003, 0.03, 0.1, 0.2) if EVERYTHING else (0, 0.01)

        def stop(case: tuple[tuple[int, int], float]) -> tuple[bytes, int]:
            (first, second), pause = case
            process = self.start()
            client = self.connect(process)
            process.send_signal(first)
            time.sleep(pause)  # the process may have ended by then
            process.send_signal(second)
            frame = client.read_frame()
            client.socket.close()
            return frame.payload, process.wait(4)

        for i in range(0, len(pauses), 2):  # six processes at once
            cases = [(pair, pause) for pause in pauses[i : i + 2] for pair in pairs]
            self.assertEqual(at_once(stop, cases), [(GOING_AWAY, 0)] * len(cases), pauses[i : i + 2])

    @unittest.skipIf(IS_WINDOWS or sys.implementation.name != "cpython", "CPython deletes modules when it ends")
    def test_a_second_signal_while_python_ends(self) -> None:
        """The exit status is 0 even if the signal comes after Python has removed its handlers."""
        process = self.start(python=faults.changed(LATE_SIGNAL))
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(4), 0)

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_right_after_the_first_line(self) -> None:
        def stop(number: int) -> int:
            process = self.start()
            process.send_signal(number)
            return process.wait(4)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * (3 if EVERYTHING else 1)
        self.assertEqual(at_once(stop, numbers), [0] * len(numbers))

    def start_with_ignored(self, signals: str) -> Process:
        """Start a process whose parent has set these signals to be ignored."""
        program = sys.executable, *faults.changed("")
        return self.start(program=("sh", "-c", f'trap "" {signals}; exec "$@"', "sh", *program))

    @unittest.skipIf(os.name == "nt", "POSIX")
    def test_ignored_interrupt(self) -> None:
        """In the background of a shell, SIGINT is ignored; the server stops nevertheless."""
        process = self.start_with_ignored("INT HUP")
        client = self.connect(process)
        process.send_signal(signal.SIGINT)
        self.assertEqual(client.read_frame().payload, GOING_AWAY)
        client.socket.close()
        self.assertEqual(process.wait(4), 0)

    @unittest.skipIf(os.name == "nt", "POSIX")
    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy does not tell that its parent had a signal ignored")
    def test_ignored_hangup(self) -> None:
        """SIGHUP stays ignored, as after nohup."""
        process = self.start_with_ignored("HUP")
        process.send_signal(signal.SIGHUP)
        client = self.connect(process)
        client.send("still here")
        self.assertEqual(client.read(), "still here")
        client.socket.close()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(4), 0)

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "POSIX")
    def test_hangup_loads_the_certificate(self) -> None:
        """New connections get the new certificate; after an error, the old one stays. Without TLS, SIGHUP ends."""
        with tempfile.TemporaryDirectory() as directory:
            path, old = certificate(directory)
            process = self.start("--cert", path)
            before = self.connect(process, tls=old)
            for wrong in ("no certificate", pathlib.Path(path).read_text().partition("-----BEGIN CERT")[0]):
                with self.subTest(wrong[:30]):
                    lines = process.log().count("keeping the old certificate")
                    pathlib.Path(path).write_text(wrong)
                    process.send_signal(signal.SIGHUP)
                    eventually(lambda: process.log().count("keeping the old certificate") > lines)  # noqa: B023
                    self.connect(process, tls=old).socket.close()
            path, new = certificate(directory)
            process.send_signal(signal.SIGHUP)
            eventually(lambda: "INFO the certificate is loaded again" in process.log())
            after = self.connect(process, tls=new)
            before.send("over the old one")
            self.assertEqual([before.read(), after.read()], ["over the old one"] * 2)
            with self.assertRaises(ssl.SSLCertVerificationError):
                self.connect(process, tls=old)
        plain = self.start()
        plain.send_signal(signal.SIGHUP)
        self.assertEqual(plain.wait(), 0)

    def test_second_interrupt(self) -> None:
        process = self.start()
        client = self.connect(process)
        process.send_signal(signal.SIGINT)
        self.assertEqual(client.read_frame().payload, GOING_AWAY)  # the client does not answer
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(4), 130)

    def test_with_standard_input_open(self) -> None:
        process = self.start("--stdin", stdin=subprocess.PIPE)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(4), 0)

    def test_while_messages_flow(self) -> None:
        process = self.start("--quiet")
        client = self.connect(process)
        client.send_raw(masked_frame(1, b"x" * 100) * 1000)
        self.assertEqual(client.read(), "x" * 100)
        process.send_signal(signal.SIGTERM)
        frame = client.read_frame()
        while frame.opcode != CLOSE:
            frame = client.read_frame()
        self.assertEqual(frame.payload, GOING_AWAY)
        client.socket.close()
        self.assertEqual(process.wait(4), 0)
        eventually(lambda: not process.log())
