"""Popular clients, with a server with default settings.

A tap between client and server passes on and keeps all bytes. The tests find compression, fragments and
Close frames in these bytes (RFC 6455 5.2), and do not ask the clients.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pathlib
import queue
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import typing
import unittest
import warnings

from tests.tools.browser import chromium
from tests.tools.support import DEADLINE, ROOT, Client, Frame, Process, default_server, long, package, require

Message = typing.Union[str, bytes]
Conversation = typing.Sequence[typing.Sequence[Message]]  # a message is a list of one piece, or of its fragments
T = typing.TypeVar("T")

NOISE = random.Random(6455).randbytes(1 << 20)
CONVERSATION: Conversation = [
    ["Hello"],
    ["Grüße, 世界, 🦆"],
    [""],
    [b""],
    [bytes(range(256))],
    ["Grüße, 世界, 🦆"],  # again: a compressor with context takeover refers to the first one
    ["seventy thousand bytes" * 3182],  # 70 KB: a frame with a 64-bit length
    ["seventy thousand bytes" * 3182],
    [NOISE[:70_000]],  # data that does not compress
    ["é" * (1 << 19)],  # 1 MiB, the limit of some clients
    [NOISE],
    ["fragments ", "with Grü", "ße and 🦆", "."],
    [b"\x00\xff" * 35_000, b"", NOISE[:1000]],
]


def whole(pieces: typing.Sequence[Message]) -> Message:
    """Return a message, joined from its pieces."""
    empty: typing.Any = pieces[0][:0]
    return typing.cast(Message, empty.join(pieces))


class Report(typing.NamedTuple):
    """The report of a client."""

    echoes: list[Message]
    code: int  # of the Close frame that it received


# ---- the tap ----


class Recording:
    """One connection through the tap: the bytes of both directions."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.received = bytearray()


class Tap:
    """A proxy to a server that keeps all bytes of both directions."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._recordings: list[Recording] = []
        self.url = f"ws://localhost:{self._listener.getsockname()[1]}/"
        self._start(self._accept)

    def _start(self, target: typing.Callable[..., None], *args: typing.Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # the listener is closed
            server = socket.create_connection(("127.0.0.1", self._port), DEADLINE)
            recording = Recording()
            self._sockets += [client, server]
            self._recordings.append(recording)
            self._start(self._pump, client, server, recording.sent)
            self._start(self._pump, server, client, recording.received)

    def _pump(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        source.settimeout(3 * DEADLINE)
        try:
            while data := source.recv(65536):
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side has ended; the recording has the data up to then

    def recording(self) -> Recording:
        """Return the recording of the only connection, after its end."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        (recording,) = self._recordings
        return recording

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


def frames(data: bytearray, *, masked: bool) -> list[Frame]:
    """Return the frames after a handshake, all or none of which are masked (RFC 6455 5.1)."""
    position = data.index(b"\r\n\r\n") + 4
    found = []
    while position < len(data):
        first, second = data[position : position + 2]
        if second & 0x80 != masked << 7:
            raise AssertionError("a frame is masked that must not be, or not masked that must be")
        extended = {126: 2, 127: 8}.get(second & 0x7F, 0)
        start = position + 2 + extended
        length = int.from_bytes(data[position + 2 : start], "big") if extended else second & 0x7F
        key = data[start : start + 4] if masked else bytes(4)
        start += 4 * masked
        payload = bytes(data[start : start + length])
        if len(payload) < length:
            raise AssertionError("the connection ended within a frame")
        if masked and first & 0x0F == 8:
            payload = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
        found.append(Frame(first >= 128, bool(first & 0x40), first & 0x0F, payload))
        position = start + length
    return found


def within(deadline: float, function: typing.Callable[[], T]) -> T:
    """Call a function, which must return in time, since clients have different timeouts."""
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=deadline)
    except queue.Empty:
        raise AssertionError(f"not within {deadline} s") from None
    if error:
        raise error
    return typing.cast(T, result)


# ---- what is common to all clients ----

Converse = typing.Callable[[str, bool], Report]  # arguments: the URL, and whether to offer compression


class Interoperation(unittest.TestCase):
    """A server in a process of its own, with the settings that it has by default."""

    server: typing.ClassVar[Process]

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = default_server()

    def check(
        self,
        converse: Converse,
        *,
        offers: typing.Sequence[bool] = (True, False),
        compresses: bool = True,
        fragments: bool = False,
    ) -> None:
        """Have a client hold the conversation, with and without an offer of compression.

        `compresses`: the client compresses its messages, if it may; `fragments`: it can send fragments.
        """
        for offer in offers:
            with self.subTest(compression=offer), Tap(self.server.port) as tap, Client(self.server.port) as bystander:
                report = within(6 * DEADLINE, lambda offer=offer, tap=tap: converse(tap.url, offer))  # type: ignore[misc]
                self.check_messages("its echoes", report.echoes)
                self.check_messages("the bystander's", [bystander.read() for _ in CONVERSATION])
                self.assertEqual(report.code, 1000)
                self.check_wire(tap.recording(), offer, compresses=compresses, fragments=fragments)
        self.assertEqual(self.server.log().count("Traceback"), 0)

    def check_messages(self, whose: str, messages: list[Message]) -> None:
        """Compare message by message, so that a failure does not print megabytes."""
        for i, pieces in enumerate(CONVERSATION):
            self.assertTrue(messages[i] == whole(pieces), f"{whose}: message {i} is {messages[i][:80]!r}")
        self.assertEqual(len(messages), len(CONVERSATION), whose)

    def check_wire(self, recording: Recording, offer: bool, *, compresses: bool, fragments: bool) -> None:
        """Check the bytes of both directions."""
        sent, received = frames(recording.sent, masked=True), frames(recording.received, masked=False)
        request, _, _ = recording.sent.partition(b"\r\n\r\n")
        response, _, _ = recording.received.partition(b"\r\n\r\n")
        self.assertEqual(b"permessage-deflate" in request, offer, "the client's offer")
        self.assertEqual(b"permessage-deflate" in response, offer, "the server's answer")
        self.assertEqual(any(frame.rsv1 for frame in sent), offer and compresses, "the client compresses")
        self.assertEqual(any(frame.rsv1 for frame in received), offer, "the server compresses")
        # All messages except the random one compress well, and the server compresses them.
        pieces = [piece.encode() if isinstance(piece, str) else piece for pieces in CONVERSATION for piece in pieces]
        size, noise = sum(map(len, pieces)), sum(len(piece) for piece in pieces if piece in NOISE)
        self.assertTrue(len(recording.received) < 1.1 * noise if offer else len(recording.received) > size)
        if compresses and offer:
            self.assertLess(len(recording.sent), 1.1 * noise)
        if fragments:
            self.assertTrue(any(not frame.fin and frame.opcode == 1 for frame in sent), "fragments of text")
            self.assertTrue(any(not frame.fin and frame.opcode == 2 for frame in sent), "fragments of binary")
        for direction in (sent, received):  # 5.5.1: the Close is the last frame
            self.assertEqual([frame.payload[:2] for frame in direction if frame.opcode == 8], [struct.pack("!H", 1000)])
            self.assertEqual(direction[-1].opcode, 8)


# ---- Python ----


class Python(Interoperation):
    """Packages for Python."""

    def converse_asyncio(self, module: str) -> Converse:
        """Converse with websockets, or a package with the same interface."""
        connect = package(module).connect

        async def converse(url: str, compress: bool) -> Report:
            echoes = []
            async with connect(url, compression="deflate" if compress else None) as connection:
                for pieces in CONVERSATION:
                    await connection.send(pieces if len(pieces) > 1 else pieces[0])
                    echoes.append(await connection.recv())
            return Report(echoes, connection.close_code)

        return lambda url, compress: asyncio.run(converse(url, compress))

    def test_websockets_asyncio(self) -> None:
        self.check(self.converse_asyncio("websockets.asyncio.client"), fragments=True)

    def test_picows_websockets(self) -> None:
        self.check(self.converse_asyncio("picows.websockets.asyncio.client"), fragments=True)

    def test_websockets_sync(self) -> None:
        connect = package("websockets.sync.client").connect

        def converse(url: str, compress: bool) -> Report:
            echoes = []
            with connect(url, compression="deflate" if compress else None) as connection:
                for pieces in CONVERSATION:
                    connection.send(pieces if len(pieces) > 1 else pieces[0])
                    echoes.append(connection.recv())
            return Report(echoes, connection.close_code)

        self.check(converse, fragments=True)

    def test_aiohttp(self) -> None:
        aiohttp = package("aiohttp")

        async def converse(url: str, compress: bool) -> Report:
            echoes = []
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(url, compress=15 if compress else 0) as connection:
                    for pieces in CONVERSATION:
                        message = whole(pieces)
                        await (connection.send_str if isinstance(message, str) else connection.send_bytes)(message)
                        echoes.append((await connection.receive()).data)
                return Report(echoes, connection.close_code)

        self.check(lambda url, compress: asyncio.run(converse(url, compress)))

    def test_tornado(self) -> None:
        """Tornado ignores client_no_context_takeover, since it drops parameters without a value."""
        connect = package("tornado.websocket").websocket_connect

        async def converse(url: str, compress: bool) -> Report:
            echoes = []
            connection = await connect(url, compression_options={} if compress else None)
            for pieces in CONVERSATION:
                message = whole(pieces)
                await connection.write_message(message, isinstance(message, bytes))
                echoes.append(await connection.read_message())
            connection.close(1000, "done")
            while await connection.read_message() is not None:
                pass
            return Report(echoes, connection.close_code)

        self.check(lambda url, compress: asyncio.run(converse(url, compress)))

    def test_websocket_client(self) -> None:
        websocket = package("websocket")

        def converse(url: str, _: bool) -> Report:
            echoes: list[Message] = []
            connection = websocket.create_connection(url, DEADLINE)
            for pieces in CONVERSATION:
                opcode = 1 if isinstance(pieces[0], str) else 2
                for i, piece in enumerate(pieces):
                    fin = i == len(pieces) - 1
                    data = piece.encode() if isinstance(piece, str) else piece
                    connection.send_frame(websocket.ABNF.create_frame(data, 0 if i else opcode, fin))
                opcode, data = connection.recv_data()
                echoes.append(data.decode() if opcode == 1 else data)
            connection.send_close(1000, b"done")
            close = connection.recv_frame()
            connection.shutdown()
            return Report(echoes, int.from_bytes(close.data[:2], "big"))

        self.check(converse, offers=(False,), fragments=True)

    def test_picows(self) -> None:
        picows = package("picows")

        class Listener(picows.WSListener):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.messages: asyncio.Queue[Message] = asyncio.Queue()

            def on_ws_frame(self, _: typing.Any, frame: typing.Any) -> None:
                payload = frame.get_payload_as_bytes()
                if frame.msg_type in (picows.WSMsgType.TEXT, picows.WSMsgType.BINARY):
                    self.messages.put_nowait(payload.decode() if frame.msg_type == picows.WSMsgType.TEXT else payload)

        async def converse(url: str) -> Report:
            echoes = []
            transport, listener = await picows.ws_connect(Listener, url)
            for pieces in CONVERSATION:
                kind = picows.WSMsgType.TEXT if isinstance(pieces[0], str) else picows.WSMsgType.BINARY
                for i, piece in enumerate(pieces):
                    data = piece.encode() if isinstance(piece, str) else piece
                    transport.send(picows.WSMsgType.CONTINUATION if i else kind, data, fin=i == len(pieces) - 1)
                echoes.append(await listener.messages.get())
            transport.send_close(picows.WSCloseCode.OK, b"done")
            await transport.wait_disconnected()
            return Report(echoes, transport.close_handshake.recv.code.value)

        self.check(lambda url, _: asyncio.run(converse(url)), offers=(False,), fragments=True)


# ---- curl ----


class Curl(Interoperation):
    """curl: the library, through a binding for Python, and the program."""

    def test_library(self) -> None:
        curl = package("curl_cffi")
        text, binary = curl.CurlWsFlag.TEXT, curl.CurlWsFlag.BINARY

        def converse(url: str, _: bool) -> Report:
            echoes: list[Message] = []
            connection = curl.WebSocket(autoclose=False)
            connection.connect(url)
            for pieces in CONVERSATION:
                message = whole(pieces)
                kind = text if isinstance(message, str) else binary
                # Its send() does nothing for an empty message.
                connection.send(message, kind) if message else connection.curl.ws_send(b"", kind)
                data, flags = connection.recv()
                echoes.append(data.decode() if flags & text else data)
            connection.send(struct.pack("!H", 1000) + b"done", curl.CurlWsFlag.CLOSE)
            data, _ = connection.recv()
            connection.terminate()
            return Report(echoes, int.from_bytes(data[:2], "big"))

        self.check(converse, offers=(False,))

    def test_program_posts(self) -> None:
        program = shutil.which("curl")
        require(program, "curl")
        url = f"http://localhost:{self.server.port}"
        with Client(self.server.port) as client:
            for data, content in (("deploy done, 世界", None), (NOISE[:70_000], "application/octet-stream")):
                kind = ["--header", f"Content-Type: {content}"] if content else []
                command = [str(program), "--silent", "--show-error", "--fail", *kind, "--data-binary", "@-", url]
                body = data.encode() if isinstance(data, str) else data
                subprocess.run(command, input=body, check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL)
                self.assertEqual(client.read(), data)


# ---- JavaScript ----


def encode(piece: Message) -> dict[str, str]:
    """Encode a piece of a message for tests/tools/interop/converse.mjs."""
    return {"text": piece} if isinstance(piece, str) else {"base64": base64.b64encode(piece).decode()}


def report(result: typing.Any) -> Report:
    """Return the report of converse.mjs."""
    if "error" in result:
        raise AssertionError(result["error"])
    echoes = [echo["text"] if "text" in echo else base64.b64decode(echo["base64"]) for echo in result["echoes"]]
    if not result["wasClean"]:
        raise AssertionError(f"not a clean close: {result['code']}")
    return Report(echoes, result["code"])


ENCODED = [[encode(piece) for piece in pieces] for pieces in CONVERSATION]
SCRIPTS = ROOT / "tests" / "tools" / "interop"


def converse_in_program(encoded: typing.Any, *command: str) -> typing.Any:
    """Run a client in another language, with JSON as input and output."""
    with tempfile.TemporaryFile() as file:  # Node cannot read from an empty pipe
        file.write(json.dumps(encoded).encode())
        file.seek(0)
        done = subprocess.run(command, stdin=file, capture_output=True, timeout=3 * DEADLINE, check=False)
    if done.returncode:
        raise AssertionError(f"{command[0]}: exit status {done.returncode}: {done.stderr.decode()}")
    return json.loads(done.stdout)


def converse_in_page(browser: typing.Any, url: str, encoded: typing.Any) -> typing.Any:
    """Run converse.mjs in a page from disk; in Chromium, pages without an address cannot connect to localhost."""
    module = f"data:text/javascript;base64,{base64.b64encode((SCRIPTS / 'converse.mjs').read_bytes()).decode()}"
    script = """
        const [module, url, conversation, done] = arguments;
        import(module).then(({ converse, standard }) => converse(() => standard(new WebSocket(url)), conversation))
            .then(done, error => done({ error: String(error) }));
    """
    browser.get((SCRIPTS / "converse.mjs").as_uri())
    return browser.execute_async_script(script, module, url, encoded)


def run_client(*command: str, conversation: Conversation = CONVERSATION) -> Report:
    """Run a client in another language, and return its report."""
    encoded = [[encode(piece) for piece in pieces] for pieces in conversation]
    return report(converse_in_program(encoded, *command))


class JavaScript(Interoperation):
    """Runtimes and packages for JavaScript; packages of npm are in $PYWEBSOCK_NODE_MODULES, or in $NODE_PATH."""

    def installed(self, name: str) -> pathlib.Path:
        """Return a file of a package of npm."""
        folders = [os.environ.get("PYWEBSOCK_NODE_MODULES", ""), *os.environ.get("NODE_PATH", "").split(os.pathsep)]
        found = [path for path in (pathlib.Path(folder, name) for folder in folders if folder) if path.exists()]
        require(found, f"npm's {name}")
        return found[0].resolve()

    def node(self) -> str:
        """Return the path of Node.js."""
        program = shutil.which("node")
        require(program, "node")
        return str(program)

    def client(self, *runtime: str) -> Converse:
        """Check a runtime with its own WebSocket."""
        script = str(SCRIPTS / "client.mjs")
        return lambda url, compress: run_client(*runtime, script, url, "own" if compress else "plain")

    def test_ws(self) -> None:
        command = [self.node(), str(SCRIPTS / "client.mjs")]
        folder = str(self.installed("ws").parent)
        self.check(
            lambda url, compress: run_client(*command, url, "ws" if compress else "ws-plain", folder),
            fragments=True,
        )

    def test_node(self) -> None:
        node = self.node()
        version = subprocess.run([node, "--version"], capture_output=True, check=True, timeout=DEADLINE).stdout
        major = int(version.decode().lstrip("v").split(".")[0])
        require(major >= 20, "node 20 or later")
        option = ["--experimental-websocket"] if major < 22 else []
        self.check(self.client(node, *option), offers=(True,), compresses=False)

    def test_bun(self) -> None:
        self.check(self.client(str(self.installed("@oven/bun-linux-x64/bin/bun"))))

    def test_deno(self) -> None:
        deno = str(self.installed("@deno/linux-x64-glibc/deno"))
        self.check(self.client(deno, "run", "--quiet", "--no-config", "--allow-net", "--allow-read"), offers=(False,))

    def test_chromium(self) -> None:
        def converse(url: str, _: bool) -> Report:
            with chromium() as browser:
                return report(converse_in_page(browser, url, ENCODED))

        self.check(converse, offers=(True,))


# ---- other languages ----


def compile_c(source: str, folder: str, library: str) -> str:
    """The path of a program in C, which is compiled in this folder."""
    compiler = shutil.which("cc") or ""
    require(compiler, "a C compiler")
    program = f"{folder}/client"
    command = [compiler, "-o", program, str(SCRIPTS / source), f"-l{library.removeprefix('lib')}"]
    compiled = subprocess.run(command, check=False, capture_output=True, timeout=3 * DEADLINE)
    require(f"{library}.h: No such file".encode() not in compiled.stderr, library)
    if compiled.returncode:
        raise AssertionError(compiled.stderr.decode())
    return program


def converse_in_lines(program: str, url: str, offer: str) -> Report:
    """A run of client.c. Its library does not tell it the code of the server's Close."""
    messages = [whole(pieces) for pieces in CONVERSATION]
    payloads = [message.encode() if isinstance(message, str) else message for message in messages]
    kinds = [b"t" if isinstance(message, str) else b"b" for message in messages]
    told = b"".join(b"%b%d\n%b" % (kind, len(payload), payload) for kind, payload in zip(kinds, payloads))
    command = [program, url.rpartition(":")[2].strip("/"), offer]
    done = subprocess.run(command, input=told, capture_output=True, timeout=3 * DEADLINE, check=False)
    if done.returncode or done.stderr:
        raise AssertionError(f"exit status {done.returncode}: {done.stderr.decode()}")
    echoes: list[Message] = []
    rest = done.stdout
    while rest:
        head, _, rest = rest.partition(b"\n")
        payload, rest = rest[: int(head[1:])], rest[int(head[1:]) :]
        echoes.append(payload.decode() if head[:1] == b"t" else payload)
    return Report(echoes, 1000)


class Subprotocols(unittest.TestCase):
    """Clients that end the connection if the server chooses none of their subprotocols."""

    url: typing.ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        server = Process("--subprotocol", "json", "--subprotocol", "chat")
        cls.addClassCleanup(server.stop)
        cls.url = f"ws://localhost:{server.port}/"

    def test_websocket_client(self) -> None:
        connection = package("websocket").create_connection(self.url, DEADLINE, subprotocols=["x", "chat", "json"])
        self.addCleanup(connection.close)
        self.assertEqual(connection.getsubprotocol(), "chat")
        connection.send("Hello")
        self.assertEqual(connection.recv(), "Hello")

    def test_node(self) -> None:
        node = shutil.which("node")
        require(node, "node")
        script = """
            const socket = new WebSocket(process.argv[1], ['x', 'chat', 'json']);
            socket.onopen = () => socket.send('Hello');
            socket.onmessage = event => { console.log(socket.protocol, event.data); socket.close(); };
            socket.onerror = event => { console.log(event.message); process.exit(1); };
        """
        command = [str(node), "--experimental-websocket", "--eval", script, self.url]
        done = subprocess.run(command, capture_output=True, timeout=3 * DEADLINE, check=False)
        self.assertEqual(done.stdout, b"chat Hello\n", done.stderr)

    def test_mqtt(self) -> None:
        """With a list of subprotocols, a client with another one is refused."""
        mqtt = package("paho.mqtt.client")
        port = int(self.url.rpartition(":")[2].strip("/"))
        with Client(port) as witness:
            client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport="websockets")
            client.username_pw_set("user", "password")
            with warnings.catch_warnings(), self.assertRaisesRegex(Exception, "WebSocket handshake error"):
                warnings.simplefilter("ignore", ResourceWarning)  # then it leaves its socket open
                client.connect("localhost", port)
            witness.send("only this")
            self.assertEqual(witness.read(), "only this")


class Origins(unittest.TestCase):
    """Libraries with an Origin field that no browser sends."""

    def test_ws4py(self) -> None:
        """Origin: ws://localhost:4545."""
        module = package("ws4py.client.threadedclient")
        received: queue.Queue[bytes] = queue.Queue()

        class Ws4py(module.WebSocketClient):  # type: ignore[misc, name-defined]
            """A client of ws4py, which overrides its methods."""

            def opened(self) -> None:
                self.send("Hello")

            def received_message(self, message: typing.Any) -> None:
                received.put(message.data)

        with Process() as server:
            client = Ws4py(f"ws://localhost:{server.port}/")
            client.connect()
            self.assertEqual(received.get(timeout=DEADLINE), b"Hello")
            client.close()
            client.run_forever()


class KnownFaults(Interoperation):
    """Clients with known faults."""

    def check_echoes(self, conversation: Conversation, *command: str) -> None:
        """Check that a client gets its messages back."""
        with Client(self.server.port) as bystander:
            told = run_client(*command, conversation=conversation)
            expected = [whole(pieces) for pieces in conversation]
            for messages in (told.echoes, [bystander.read() for _ in conversation]):
                self.assertTrue(messages == expected)
            self.assertEqual(told.code, 1000)
        self.assertEqual(self.server.log().count("Traceback"), 0)

    @long
    def test_mojolicious(self) -> None:
        """Mojolicious uses context takeover even if it is forbidden, and ends the connection after its Close.

        It compresses an empty message to no bytes, which is invalid, so the test has no empty message.
        """
        program = shutil.which("perl") or ""
        require(program, "perl")
        probe = subprocess.run([program, "-MMojolicious", "-e", "1"], check=False, capture_output=True)
        require(not probe.returncode, "Mojolicious")
        script, url = str(SCRIPTS / "client.pl"), f"ws://localhost:{self.server.port}/"
        conversation = [pieces for pieces in CONVERSATION if whole(pieces)]
        for offer in ("1", "0"):
            with self.subTest(offer=offer):
                self.check_echoes(conversation, program, script, url, offer)

    def test_libwebsockets(self) -> None:
        """Where compression is agreed on, it loops at a frame that is not compressed: the README has two ways round."""
        with tempfile.TemporaryDirectory() as folder, Process("--no-compression") as plain:
            program = compile_c("client.c", folder, "libwebsockets")
            self.check(lambda url, _: converse_in_lines(program, url, ""), offers=(False,))
            told = converse_in_lines(program, f"ws://localhost:{plain.port}/", "permessage-deflate")
            self.check_messages("its echoes", told.echoes)

    @long
    def test_netty(self) -> None:
        """Netty's standard handler refuses parameters that it did not offer."""
        program, folder = shutil.which("java") or "java", pathlib.Path("/usr/share/java")
        parts = "buffer", "codec", "codec-http", "common", "handler", "resolver", "transport"
        jars = [folder / f"netty-{part}.jar" for part in parts]
        require(all(jar.exists() for jar in jars) and shutil.which("javac"), "Netty")
        path, script = os.pathsep.join(map(str, jars)), str(SCRIPTS / "NettyClient.java")
        with Tap(self.server.port) as tap:
            command = [program, "-cp", path, script, tap.url]
            done = subprocess.run(command, capture_output=True, timeout=6 * DEADLINE, check=False)
            self.assertEqual(done.stdout.split(), [b"5", b"5", b"70000", b"1000"], done.stderr)
            recording = tap.recording()
        self.assertTrue(all(frame.rsv1 for frame in frames(recording.sent, masked=True)[:3]))
        self.assertTrue(frames(recording.received, masked=False)[2].rsv1)


if __name__ == "__main__":
    unittest.main()
