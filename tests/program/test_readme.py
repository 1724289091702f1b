"""README.md is correct and plain: its tables, its words, and its code, which runs here with real clients."""

from __future__ import annotations

import ast
import asyncio
import functools
import io
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
import textwrap
import threading
import tokenize
import typing
import unittest

import pywebsock
from pywebsock import BroadcastServer
from tests.tools.readme import CODE, HEADING, TEXT, ProgramTestCase, rows, section, sentences
from tests.tools.support import (
    DEADLINE,
    EVERYTHING,
    ROOT,
    Client,
    ServerTestCase,
    eventually,
    exchange,
    package,
    request,
    require,
)

SOURCE = pathlib.Path(pywebsock.__file__)
BANNER = re.compile(r"^# =+\n# (?P<title>[^\n]+)\n", re.MULTILINE)
IMPORT = "from pywebsock import BroadcastServer\n"  # recipes that are only a class leave it out
POST: dict[str, typing.Any] = {
    "method": "POST",
    "Upgrade": None,
    "Connection": None,
    "Sec_WebSocket_Key": None,
    "Content_Length": "5",
}


def spans(purpose: str) -> list[str]:
    """The code in the row of the table of recipes that begins with these words."""
    (cell,) = (row[1] for row in rows(section("Recipes")) if row[0].startswith(purpose))
    return re.findall(r"`(.*?)`", cell)


def recipe(heading: str) -> str:
    """The Python code under a heading, with its imports."""
    code = CODE[heading, "python"]
    return code if "from pywebsock import" in code else IMPORT + code


class Tables(unittest.TestCase):
    """The tables and examples agree with the module."""

    def test_parts(self) -> None:
        """The table lists every banner of the module, in order, with the section of its RFC."""
        listed = [(row[0].strip("* "), row[1]) for row in rows(section("Read it beside the RFC")) if row[0]]
        self.assertEqual(listed[0], ("docstring", "RFC 6455 5.2"))
        parts = []
        for title in BANNER.findall(SOURCE.read_text(encoding="utf-8")):
            match = re.fullmatch(r"([^(:]+?)(?:: .*| \((.*?)\).*)?", title)
            parts.append(match.groups("") if match else (title, ""))
        self.assertEqual(listed[1:], parts)

    def test_reading_path(self) -> None:
        """Each part after the docstring adds something, and the table says what goes wrong without it."""
        for part, _, adds, without in rows(section("Read it beside the RFC"))[1:]:
            self.assertTrue(adds, part)
            self.assertRegex(without, r"\.$")

    def test_options(self) -> None:
        """The table lists every option of the command, and no other."""
        described = {name for row in rows(section("Options")) for name in re.findall(r"`(--[a-z-]+)", row[0])}
        options = set(re.findall(r"(?<!\S)(--[a-z-]+)", pywebsock.argument_parser().format_help()))
        self.assertEqual(described, options - {"--help", "--version"})

    def test_settings(self) -> None:
        """The table lists every setting, and no other; keyword arguments in the examples are settings."""
        described = {name for row in rows(section("Options")) for name in re.findall(r"`(\w+)`", row[1])}
        self.assertEqual(described, {name for name in vars(pywebsock.Settings) if not name.startswith("_")})
        for arguments in re.findall(r"4545\),([^)]*)\)", TEXT):
            self.assertLessEqual(set(re.findall(r"(\w+)=", arguments)), described)

    def test_command_lines(self) -> None:
        """The command accepts each command line."""
        lines = re.findall(r"(?:python3? |py |/)pywebsock\.py((?: [^#\n`|;]*)?)", TEXT)
        self.assertGreater(len(lines), 8)
        for line in lines:
            with self.subTest(line):
                pywebsock.argument_parser().parse_args(shlex.split(line))

    def test_links(self) -> None:
        """Each link within the project leads to a file or a heading."""
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(TEXT)}
        for target in re.findall(r"\]\(([^):]+)\)", TEXT):
            if target.startswith("#"):
                self.assertIn(target[1:], anchors)
            else:
                self.assertTrue((ROOT / target).exists(), target)

    def test_license(self) -> None:
        """pyproject.toml names the license whose text is in the README."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (license_name,) = re.findall(r'^license = "(.*)"$', project, re.MULTILINE)
        self.assertTrue(section("License").strip().startswith(f"{license_name} License\n"))
        self.assertIn("the pywebsock authors", project)
        self.assertIn("the pywebsock authors", section("License"))

    def test_changes(self) -> None:
        """The changes name the version of the module."""
        self.assertIn(f"\n{pywebsock.__version__}: ", section("Changes"))

    def test_types(self) -> None:
        """mypy finds no error in the code."""
        package("mypy")
        with tempfile.TemporaryDirectory() as folder:
            files: list[pathlib.Path] = []
            for heading, language in CODE:
                if language == "python":
                    files.append(pathlib.Path(folder, f"example_{len(files)}.py"))
                    files[-1].write_text(recipe(heading), encoding="utf-8")
            options = "--check-untyped-defs", "--follow-imports=silent", "--python-version=3.9"
            mypy = subprocess.run(
                [sys.executable, "-m", "mypy", *options[: 2 + (sys.version_info < (3, 10))], *map(str, files)],
                cwd=folder,
                env={**os.environ, "MYPYPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
        self.assertEqual(mypy.returncode, 0, mypy.stdout + mypy.stderr)


# Habits that make a reader read a sentence twice. Patterns are searched in each sentence, without its code.
HABITS = {
    r"^(?:who|what)\b(?!.*\?$)|, what\b": "begin with a noun",
    r"\b(?:and|but|by|for|from|if|of|or|than|that|to|where|with) who\b": "name the person or the program",
    r"\b(?:who|what|where|how)(?:so)?ever\b": "name it",
    r"^(?:whether|(?:the|that) one (?:that|which))\b": "return whether",
    r"\bwho is\b(?!.*\?$)": "name the person or the program",
    r"\bone(?:'s|self)\b|\bone (?:can|could|has|likes|may|must|only|sees|types|wants|writes)\b": "you",
    r"\bso (?:many|much)\b(?! that)": "the number of, a number of",
    r"\bas long as (?:one|they|it) likes?\b|\bthere are those\b|\bthat is all\b|\bthe whole secret\b": "leave it out",
    r"\bfor ever\b": "forever",
    r"\bbut for\b": "except",
    r"\b(?:strangers?|goodbye)\b": "a pending connection; close",
    r"\b(?:any|every|some)body\b": "a client, all clients",
    r"\bin the place of\b": "in place of",
    r"\b(?:all the same|lest|however (?:long|many|much))\b": "use a plain conjunction",
    r"\b(?:easily|easy|just|obviously|of course|simple|simply)\b": "leave it out",
}
LONGEST = 32  # words of a sentence

PLAIN = {
    "--help": re.sub("\n  -", "\n\n-", pywebsock.argument_parser().format_help().partition("\n\n")[2]),
    "README.md": TEXT.partition("\n## License\n")[0],
    "pyproject.toml": "\n\n".join(
        re.findall(r'^description = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    ),
}


def docstrings(source: str) -> str:
    """The docstrings of a module or a part of one, a paragraph each. Examples end with an empty line."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return re.sub(r"^>>> .*(?:\n.+)*", "", "\n\n".join(filter(None, found)), flags=re.MULTILINE)


def comments(source: str) -> str:
    """The comments, a paragraph each; those of successive lines are one."""
    found = ""
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match("# (?:[=-]{3}|noqa|type:)", token.string):
            alone = token.line.lstrip().startswith("#")
            found += "\n" if alone and token.start[0] == last + 1 else "\n\n"
            found += token.string[1:].strip()
            last = token.start[0] if alone else 0
    return found


def messages(source: str) -> list[str]:
    """The texts of errors and log lines, with x in place of each value."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and re.search(
            "(?:require|Error|[.]log|[.]info|[.]warning|[.]error)$", ast.unparse(call.func)
        ):
            for argument in call.args:
                values = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                found.append("".join(str(each.value) if isinstance(each, ast.Constant) else "x" for each in values))
    return found


@functools.cache
def parts() -> dict[str, str]:
    """The texts of the parts of pywebsock.py: docstrings, comments and messages."""
    head, *found = BANNER.split(SOURCE.read_text(encoding="utf-8"))
    sources = {
        "docstring": head,
        **{re.split(" \\(|:", title)[0]: text for title, text in zip(found[::2], found[1::2])},
    }
    return {
        title: "\n\n".join([docstrings(source), comments(source), *messages(source)])
        for title, source in sources.items()
    }


class Words(unittest.TestCase):
    """The text is plain English."""

    def check(self, texts: typing.Mapping[str, str]) -> None:
        """Check each sentence of these texts."""
        for name, text in texts.items():
            for sentence in sentences(text):
                habits = [instead for habit, instead in HABITS.items() if re.search(habit, sentence, re.IGNORECASE)]
                self.assertEqual(habits, [], f"{name}: {sentence}")
                self.assertLessEqual(len(sentence.split()), LONGEST, f"{name}: {sentence}")

    def test_program(self) -> None:
        """README, --help and module."""
        self.check({**PLAIN, **parts()})

    @unittest.skipUnless(EVERYTHING, "takes seconds: PYWEBSOCK_TESTS=everything")
    def test_tests(self) -> None:
        """The docstrings and comments of tests, CI and build."""
        paths = [path for folder in ("tests", ".ci", ".hatch") for path in sorted((ROOT / folder).rglob("*.py"))]
        sources = {str(path): path.read_text(encoding="utf-8") for path in paths}
        self.check({path: f"{docstrings(source)}\n\n{comments(source)}" for path, source in sources.items()})

    def test_the_test(self) -> None:
        """Each pattern finds the habit for which it was written."""
        for text in (
            "What one client sends, all clients get.",
            "It is read from disk, what takes a while.",
            "The text is for who has time.",
            "Whoever counts them sets it to 0.",
            "A client who is just gone is left out.",
            "One can run it with a certificate of one's own.",
            "One looks every so many seconds.",
            "There are those that send as long as one likes.",
            "It waits for ever.",
            "All pass but for one.",
            "A stranger cannot fill the disk.",
            "It is easy.",
            "Whether to log a line.",
            "Everybody gets a 1001.",
            "It is used in the place of a list.",
            "All are read, however many there are.",
        ):
            found = [habit for habit in HABITS if re.search(f"(?i){habit}", text)]
            self.assertTrue(found, text)

    def test_parts(self) -> None:
        """The test reads the docstrings, comments and messages of each part."""
        texts = parts()
        for part, text in (
            ("Errors", "Raise HandshakeError if it is false."),
            ("Base framing", "XOR_WITH[key][byte] == key ^ byte"),
            ("Opening handshake", "a message must not have more than x bytes"),
            ("Many machines", "Redis is back"),
        ):
            self.assertIn(text, texts[part])
        self.assertNotIn("serialize_frame(TEXT", texts["Base framing"])

    def test_sentences(self) -> None:
        """The parts of a text that are read as sentences."""
        text = "# A title\n\nOne line\nand `code. Here`, [a link](https://a.b). Two\n\n    python x. y\n\n"
        text += "| a | b. c |\n|---|---|\n```python\nprint()\n```\n- an item; goes on\n"
        self.assertEqual(
            sentences(text), ["A title", "One line and CODE, a link.", "Two", "a", "b.", "c", "an item; goes on"]
        )


def server_of(heading: str, name: str) -> type[BroadcastServer]:
    """The class of this name in the code under a heading."""
    names: dict[str, typing.Any] = {}
    exec(recipe(heading).partition("\nwith ")[0], names)
    return typing.cast("type[BroadcastServer]", names[name])


def server_with(body: str) -> type[BroadcastServer]:
    """A class with the methods in this text."""
    names: dict[str, typing.Any] = {"BroadcastServer": BroadcastServer, "asyncio": asyncio, "loop": None}
    exec(f"class Server(BroadcastServer):\n{textwrap.indent(body, '    ')}", names)
    return typing.cast("type[BroadcastServer]", names["Server"])


class Recipes(ServerTestCase):
    """The recipes that are a class or an expression."""

    def say(self, speaker: Client, text: str, *hearers: Client) -> None:
        """Send a text from one client, and read it from others."""
        speaker.send(text)
        self.assertEqual([hearer.read() for hearer in hearers], [text] * len(hearers))

    def test_rooms(self) -> None:
        server = self.serve(server_of("Rooms, by path", "Rooms"))
        a, b, c = (self.connect(server, target=path) for path in ("/red", "/blue", "/red?mark=01"))
        self.assertEqual(c.read(), "01")
        self.say(a, "in red", a, c)
        self.say(b, "in blue", b)
        self.say(c, "in red, too", a, c)
        exchange(server.server_address[1], request(**POST) + b"posts")
        self.assertEqual([each.read() for each in (a, b, c)], ["posts"] * 3)

    def test_all_but_the_sender(self) -> None:
        (call,) = spans("send to all but the sender")
        server = self.serve(server_with(f"def on_message(self, client, message):\n    {call}"))
        a, b, c = (self.connect(server) for _ in range(3))
        self.say(a, "from a", b, c)
        self.say(b, "from b", a, c)

    def test_tokens(self) -> None:
        server = self.serve(server_of("Tokens", "Tokens"), history=1)
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

    def test_another_token(self) -> None:
        """The token is a setting."""
        server = self.serve(server_of("Tokens", "Tokens"), token="another")
        self.assertEqual(exchange(server.server_address[1], request(target="/?token=sesame"))[0], 401)
        self.connect(server, target="/?token=another")

    def test_news(self) -> None:
        """Clients only receive; programs with a token send."""
        (close,) = re.findall(r"`(client\.close\(1008\))`", section("Tokens"))
        admit = "def admit(self, client):\n    if client.method == 'POST':\n        tokens.admit(self, client)\n"
        news = server_with(f"{admit}\ndef on_message(self, client, message):\n    {close}")
        tokens = server_of("Tokens", "Tokens")
        news.admit.__globals__["tokens"] = tokens
        server: BroadcastServer = self.serve(type("News", (news, tokens), {}))
        port = server.server_address[1]
        listener, speaker = self.connect(server), self.connect(server)
        self.assertEqual(exchange(port, request(**POST) + b"never")[0], 401)
        speaker.send("never")
        self.assertEqual(speaker.read_frame().payload[:2], b"\x03\xf0")
        self.assertEqual(exchange(port, request(**POST, Authorization="Bearer sesame") + b"hello")[0], 202)
        self.assertEqual(listener.read(), "hello")

    def test_address(self) -> None:
        (assignment,) = spans("know the real address")[1:]
        server = self.serve(server_with(f"def admit(self, client):\n    {assignment}"))
        for fields, address in (
            ({"X_Forwarded_For": "192.0.2.1"}, "192.0.2.1"),
            ({"X_Forwarded_For": "nonsense, 10.0.0.1,2001:db8::1"}, "2001:db8::1"),
            ({}, "127.0.0.1:"),
        ):
            with self.connect(server, **fields), self.subTest(fields):
                (client,) = server.clients
                self.assertTrue(client.address.startswith(address), client.address)
            eventually(lambda: not server.clients)

    def test_asyncio(self) -> None:
        """A hook waits for a coroutine, and a coroutine broadcasts."""
        wait = spans("wait for a coroutine")[0].replace("coroutine,", "self.answer(message),")
        broadcast = spans("broadcast in a coroutine")[0].replace("server", "self")
        answer = f"async def answer(self, message):\n    {broadcast}\n    return 'an answer'\n"
        hook = f"def on_message(self, client, message):\n    client.send({wait})"
        kind = server_with(f"{answer}\n{hook}")
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        self.addCleanup(loop.close)
        self.addCleanup(thread.join)
        self.addCleanup(loop.call_soon_threadsafe, loop.stop)
        kind.on_message.__globals__["loop"] = loop
        client = self.connect(self.serve(kind))
        for word in ("hello", "world"):
            client.send(word)
            self.assertEqual([client.read(), client.read()], [word, "an answer"])

    def test_a_test(self) -> None:
        """A server in a test serves, stops, and leaves no thread behind."""
        (start,) = spans("run a server in a test")[:1]
        before = set(threading.enumerate())
        with BroadcastServer(("localhost", 0)) as server:
            exec(start, {"threading": threading, "server": server})
            with Client(server.server_address[1]) as client:
                client.send("hello")
                self.assertEqual(client.read(), "hello")
            server.shutdown()
        eventually(lambda: not {each for each in threading.enumerate() if not each.daemon} - before)


@unittest.skipUnless(EVERYTHING or os.name == "posix", "programs are ended with Ctrl-C")
class Programs(ProgramTestCase):
    """The complete programs."""

    def read_close(self, client: Client) -> None:
        """Read the Close of a server that stops."""
        self.assertEqual(client.read_frame().payload, b"\x03\xe9")
        client.socket.close()

    def test_chat(self) -> None:
        """A chat with names and a history; Ctrl-C closes its clients with 1001."""
        with self.program("Library") as port:
            anna, ben, nobody = (Client(port) for _ in range(3))
            self.assertEqual([each.read() for each in (anna, ben, nobody)], ["who are you?"] * 3)
            anna.send("Anna")
            self.assertEqual([anna.read(), ben.read()], ["Anna is here"] * 2)
            nobody.close()
            self.assertEqual([nobody.read(), nobody.read_close()[0]], ["Anna is here", 1000])
            nobody.socket.close()
            ben.send("Ben")
            self.assertEqual([anna.read(), ben.read()], ["Ben is here"] * 2)
            ben.send("hello")
            self.assertEqual([anna.read(), ben.read()], ["Ben: hello"] * 2)
            anna.close()
            anna.read_close()
            anna.socket.close()
            self.assertEqual(ben.read(), "Anna has left")
            with Client(port) as late:
                history = "Anna is here", "Ben is here", "Ben: hello", "Anna has left", "who are you?"
                self.assertEqual([late.read() for _ in history], list(history))
            closing = threading.Thread(target=self.read_close, args=(ben,))
            closing.start()
        closing.join(DEADLINE)

    def test_sigterm(self) -> None:
        """SIGTERM ends the program as Ctrl-C does."""
        with self.program("Library", signal.SIGTERM) as port, Client(port) as client:
            self.assertEqual(client.read(), "who are you?")

    def test_log(self) -> None:
        """The log of the text has warnings, and no line for a client that leaves."""
        prelude = "\n".join(["import logging", *spans("log to a file"), ""])
        self.assertEqual(prelude.count("logging."), 3)
        with self.program("Library", prelude=prelude) as port:
            exchange(port, b"nonsense\r\n\r\n")
            Client(port).socket.close()
        log = (self.folder / "chat.log").read_text(encoding="utf-8")
        self.assertRegex(log, "^WARNING:pywebsock:.* refused: 400")
        self.assertNotIn("left", log)

    def test_dashboard(self) -> None:
        with self.program("A dashboard") as port:
            with Client(port) as client:
                self.assertGreater(json.loads(client.read())["free bytes"], 0)
                client.send("not broadcast")
            self.assertEqual(exchange(port, request(**POST) + b"never")[0], 403)
            self.assertEqual(exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[0], 200)

    def test_python_client(self) -> None:
        package("websockets")
        self.check_client("python", sys.executable, "hello from Python\n")

    def test_javascript_client(self) -> None:
        bun = pathlib.Path(os.environ.get("PYWEBSOCK_NODE_MODULES", "."), "@oven/bun-linux-x64/bin/bun")
        require(bun.exists(), "bun")
        self.check_client("javascript", str(bun), "hello from JavaScript\nclosed 1001 \n")

    def check_client(self, language: str, runtime: str, output: str) -> None:
        """The client sends, receives its message, and ends when the server closes."""
        server = self.serve(BroadcastServer)
        witness = self.connect(server)
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "client.js" if language == "javascript" else "client.py")
            code = CODE["Use from programs", language].replace("4545", str(server.server_address[1]))
            file.write_text(code, encoding="utf-8")
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
        """systemd knows every line of it, and rates it as safe (exposure below 2 of 10)."""
        require(shutil.which("systemd-analyze"), "systemd-analyze")
        text = (
            CODE["Deployment", "ini"].replace("/usr/bin/python3", sys.executable).replace("/opt/pywebsock", str(ROOT))
        )
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "pywebsock.service")
            file.write_text(text, encoding="utf-8")
            verified = self.analyze("verify", str(file))
            self.assertEqual((verified.returncode, verified.stdout + verified.stderr), (0, ""))
            exposure = self.analyze("security", "--offline=yes", "--threshold=20", str(file))
            self.assertEqual(exposure.returncode, 0, exposure.stdout)

    def analyze(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run systemd-analyze."""
        command = ["systemd-analyze", "--man=no", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


if __name__ == "__main__":
    unittest.main()
