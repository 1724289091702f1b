"""Fuzzing of the pure parts, guided by coverage: `python -m tests.tools.fuzz SECONDS`.

It needs the package atheris, and does not run with the other tests. It stops at the first exception that is not a
ProtocolError or HandshakeError, and names a file with the input; `python -m tests.tools.fuzz FILE` runs that input
again. Otherwise it prints statistics at the end.
"""

from __future__ import annotations

import importlib
import itertools
import pathlib
import sys
import tempfile
import typing
import zlib

atheris: typing.Any = importlib.import_module("atheris")
with atheris.instrument_imports(include=["pywebsock"]):
    import pywebsock
    from tests.tools import support

LIMIT = 1000  # bytes of a message
Outcome = typing.Tuple[typing.List[typing.Any], typing.Any]  # noqa: UP006 (what came, and the error that ended it)


def cut(data: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces of this size; 0 for one piece."""
    return [data[i : i + size] for i in range(0, len(data), size)] if size else [data]


def read_messages(pieces: list[bytes], compressed: bool, takeover: bool) -> Outcome:
    """Return the messages of a reader, and the code of its error; without an error, also the bytes that it keeps."""
    reader = pywebsock.MessageReader(LIMIT, compressed, takeover)
    messages: list[typing.Any] = []
    try:
        for opcode, payload in itertools.chain.from_iterable(map(reader.feed, pieces)):
            assert len(payload) <= LIMIT
            assert reader.size <= LIMIT + pywebsock.INFLATER_SIZE
            if opcode == pywebsock.Opcode.CONT:
                assert payload == b""
                continue
            messages.append((opcode, bytes(payload)))
            if opcode == pywebsock.Opcode.TEXT:
                payload.decode()
            elif opcode == pywebsock.Opcode.CLOSE:
                messages.append(pywebsock.parse_close(bytes(payload)))
    except pywebsock.ProtocolError as error:
        return messages, error.code
    assert takeover or not reader.context
    return [*messages, reader.size, reader.context], None


def try_messages(data: bytes) -> None:
    """Read any bytes, in one piece and in pieces, with and without compression and context takeover."""
    mode, stream = data[0] if data else 0, data[1:]
    compressed, takeover, size = mode >= 0x80, mode & 0x40 != 0, mode & 0x3F
    whole = read_messages([stream], compressed, takeover)
    pieces = read_messages(cut(stream, size), compressed, takeover)
    # The codes may differ: in pieces, one error may be found before another.
    assert whole[0] == pieces[0], (whole, pieces)
    assert (whole[1] is None) == (pieces[1] is None), (whole, pieces)


def try_trace(data: bytes) -> None:
    """Trace any bytes after a handshake, in one piece and in pieces."""
    size, stream = data[0] if data else 0, support.request() + data[1:]
    said: list[list[str]] = []
    for pieces in ([stream], cut(stream, size)):
        lines: list[str] = []
        trace = pywebsock.follow("X", lambda line, *arguments, lines=lines: lines.append(line % arguments))
        next(trace)
        for piece in pieces:
            trace.send(piece)
        assert all(line.isascii() and line.isprintable() for line in lines), lines
        said.append(lines)
    assert said[0] == said[1], said


def try_frames(data: bytes) -> None:
    """Read frames with any first byte and any payload, but correct lengths and masks."""
    stream, position = data[:1], 1
    while position + 1 < len(data):
        first, length = data[position], data[position + 1]
        payload = data[position + 2 : position + 2 + length]
        stream += support.masked_frame(first & 15, payload, fin=first > 127, rsv=first >> 4 & 7, key=bytes(4))
        position += 2 + length
    try_messages(stream)


def try_inflate(data: bytes) -> None:
    """Inflate any bytes, and compare with zlib."""
    try:
        plain = b"".join(pywebsock.Inflater().inflate(data, True))
    except pywebsock.ProtocolError:
        return
    other = zlib.decompressobj(-15).decompress(data + b"\x00\x00\xff\xff")  # may end at a final block
    assert plain.startswith(other)


def try_handshake(data: bytes) -> None:
    """Parse a request, in one piece and in pieces."""
    size, head = data[0] if data else 0, data[1:]
    whole, pieces = support.answer_to_request([head]), support.answer_to_request(cut(head, size))
    assert whole == pieces, (whole, pieces)


def try_extensions(data: bytes) -> None:
    """Negotiate extensions."""
    field = data.decode("latin-1")
    try:
        window, extension = pywebsock.negotiate_deflate(field)
    except pywebsock.HandshakeError as error:
        assert error.status == 400
        return
    assert window in (0, *range(9, 16))
    assert not extension or pywebsock.parse_extensions(extension)[0][0] == "permessage-deflate"


def try_close(data: bytes) -> None:
    """Parse the payload of a Close frame; if it is valid, it can be sent again."""
    try:
        code, reason = pywebsock.parse_close(data[:125])
    except pywebsock.ProtocolError:
        return
    assert pywebsock.parse_close(pywebsock.serialize_close(code, reason)[2:]) == (code, reason)


TARGETS = (try_messages, try_handshake, try_extensions, try_inflate, try_close, try_frames, try_trace)


def try_one(data: bytes) -> None:
    """Run the target that the first byte selects with the other bytes."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds() -> typing.Iterator[bytes]:
    """Yield inputs to begin with, for each target."""
    text, long = "κόσμε €𝄞".encode(), bytes(range(200)) * 4
    stream = (
        support.masked_frame(1, text),
        support.masked_frame(1, text[:4], fin=False)
        + support.masked_frame(9, b"ping")
        + support.masked_frame(0, text[4:]),
        support.masked_frame(2, long, key=bytes(4)),
        support.masked_frame(2, b"", length=1 << 16, key=bytes(4)),
        support.masked_frame(8, b"\x03\xe8bye", key=bytes(4)),
        support.masked_frame(2, pywebsock.deflate(long, 15), rsv=4, key=bytes(4)),
        support.masked_frame(1, bytes.fromhex("f2 48 cd"), rsv=4, fin=False)
        + support.masked_frame(0, b"\xc9\xc9\x07\x00"),
    )
    for mode in (b"\x00", b"\x01", b"\x80", b"\x83", b"\xc2", b"\xff"):
        for frames in (*stream, b"".join(stream)):
            yield b"\x00" + mode + frames
            yield b"\x06" + mode + frames
    offer = 'permessage-deflate; client_max_window_bits; server_max_window_bits=10, x; a="b"'
    for size in (b"\x00", b"\x01", b"\x1d"):
        yield b"\x01" + size + support.request()
        yield b"\x01" + size + support.request(Origin="http://localhost:4545", Sec_WebSocket_Extensions=offer) + b"rest"
        yield b"\x01" + size + support.request(target="http://[::1]:4545/a?b=c", Host="[::1]:4545", Origin="null")
        yield b"\x01" + size + support.request(method="POST", version="1.0", Host=None, Content_Length="5") + b"hello"
    yield b"\x02" + offer.encode()
    yield b"\x03" + pywebsock.deflate(long, 9)
    yield b"\x03" + bytes.fromhex("f3 48 cd c9 c9 07 00 00")
    yield b"\x04\x0f\xa0" + text
    zipped = pywebsock.deflate(text, 15)
    for mode in (b"\x00", b"\x80", b"\xff"):
        yield b"\x05" + mode + b"\x01\x05" + text[:5] + b"\x89\x01p\x00\x00\x80" + bytes((len(text) - 5,)) + text[5:]
        yield b"\x05" + mode + b"\x41\x05" + zipped[:5] + b"\x8a\x00\x80" + bytes((len(zipped) - 5,)) + zipped[5:]
        yield b"\x05" + mode + b"\x81\x00\x82\x03abc\x88\x05\x03\xe8bye"


def main(argument: str) -> None:
    """Search for a number of seconds, or run the input in a file."""
    if not argument.isdigit():
        try_one(pathlib.Path(argument).read_bytes())
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pywebsock-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    options = (
        f"-max_total_time={argument}",
        "-max_len=4096",
        "-timeout=5",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1])
