#!/usr/bin/env python3
"""A WebSocket broadcast server in one file: each message from a client goes to all clients.

    python pywebsock.py                 # then open pywebsock.html in several tabs

It is the whole of RFC 6455 (The WebSocket Protocol) and RFC 7692 (compression) on the
standard library, written to be read beside them from top to bottom.  Every client sees
the same messages in the same order, a client that stops reading holds up nobody, and
the busier the room, the less a message costs.  As a library:

    from pywebsock import BroadcastServer

    class Chat(BroadcastServer):
        def on_message(self, client, message):          # str or bytes
            self.broadcast(f"{client.address}: {message}")

    with Chat(("localhost", 4545)) as server:
        server.serve_forever()

The frame (RFC 6455 5.2), which is all there is on the wire after the opening handshake:

      0                   1                   2                   3
      0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
     +-+-+-+-+-------+-+-------------+-------------------------------+
     |F|R|R|R| opcode|M| Payload len |    Extended payload length    |
     |I|S|S|S|  (4)  |A|     (7)     |             (16/64)           |
     |N|V|V|V|       |S|             |   (if payload len==126/127)   |
     | |1|2|3|       |K|             |                               |
     +-+-+-+-+-------+-+-------------+ - - - - - - - - - - - - - - - +
     |     Extended payload length continued, if payload len == 127  |
     + - - - - - - - - - - - - - - - +-------------------------------+
     |                               |Masking-key, if MASK set to 1  |
     +-------------------------------+-------------------------------+
     | Masking-key (continued)       |          Payload Data         |
     +-------------------------------- - - - - - - - - - - - - - - - +
     :                     Payload Data continued ...                :
     + - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - +
     |                     Payload Data continued ...                |
     +---------------------------------------------------------------+

How to read it.  The README has the idea in sixty lines; this file adds what those lack.  First the
protocol: the parts up to "Opening handshake" know no sockets and no threads; they take bytes, and
return values or raise.  Then the engine: State, Connection, WebSocketHandler, Room and Loop.  Skip
the rest until you need it.

    Vocabulary            opcodes, status codes                RFC 6455 5.2, 7.4
    Errors                what the pure parts raise
    Base framing          masking, frames out, frames in       RFC 6455 5
    permessage-deflate    offers, inflating, deflating         RFC 7692
    Messages              fragments, UTF-8, what to broadcast  RFC 6455 5.4, 5.6, 8.1
    Opening handshake     requests, checks, origins, answers   RFC 6455 4, RFC 9112
    HTTP                  the page, the status, POST           RFC 9110
    Trace                 frames drawn as in 5.2
    Settings and the log
    Hooks                 the program's code, in its threads
    Connections           State, Connection, WebSocketHandler  RFC 6455 5.5, 7
    Room                  the set of clients, and the queue
    Loop                  reading, sending, ending, deadlines
    Server                BroadcastServer
    Many machines         servers that share a Redis stream    (RESP2)
    Command line          main()

Threads.  One thread accepts connections: it runs serve_forever(), and answers requests for a
WebSocket if that calls no hook.  The *loop* thread owns the sockets of all clients: it reads them,
decodes frames, sends, and enforces deadlines.  Hook threads answer other requests, run the
program's hooks, and write the log; there is one of them as long as no hook blocks.  With --redis,
two more threads keep the link.  Any other thread may call broadcast(), send() and close().

One rule: the loop waits for sockets, and owns those of open connections; other threads put
operations into its queue; a lock guards the set of clients.  An operation is a message, a client
that joins, or a Close.  The queue is the one order in which all clients see them.  Nothing in the
loop waits.

Words.  A client is a connection after its opening handshake; before it, a connection is pending.
A window is the LZ77 window of deflate, 9 to 15 bits, or 0 without compression.  A client is slow
while something waits in its outbox.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import enum
import errno
import functools
import getpass
import hashlib
import heapq
import http
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import queue
import re
import select
import selectors
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import warnings
import zlib
from collections import defaultdict, deque
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Callable, NamedTuple, TextIO, TypeVar, Union

if sys.version_info < (3, 9):  # noqa: UP036 (a line instead of a traceback)
    sys.exit("pywebsock needs Python 3.9 or later")

__all__ = ["BroadcastServer", "CloseCode", "HandshakeError", "Message", "Opcode", "ProtocolError", "WebSocketHandler"]
__version__ = "1.0.0"

log = logging.getLogger("pywebsock")
Message = Union[str, bytes]  # text or binary (RFC 6455 5.6)
T = TypeVar("T")
Steps = Generator[int, None, T]  # of a handler; it yields the events of its socket that the next step waits for
Octets = Union[bytes, bytearray]


# ======================================================================================
# Vocabulary (RFC 6455 5.2, 7.4)
# ======================================================================================


class Opcode(enum.IntEnum):
    """The opcode of a frame (RFC 6455 5.2, 11.8). Control frames have 8 or more."""

    CONT = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """The reason for closing a connection (RFC 6455 7.4.1; the names are those of the IANA registry)."""

    NORMAL_CLOSURE = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS_RCVD = 1005  # never sent: the Close frame had no code
    ABNORMAL_CLOSURE = 1006  # never sent: there was no Close frame
    INVALID_FRAME_PAYLOAD_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    MANDATORY_EXT = 1010
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013
    BAD_GATEWAY = 1014
    TLS_HANDSHAKE = 1015  # never sent


# The codes that a Close frame may have (7.4.2). Programs may register 3000-3999; 4000-4999 are private.
CODES_ON_THE_WIRE = frozenset(CloseCode) - {1005, 1006, 1015} | frozenset(range(3000, 5000))

TEXT, BINARY, CONT, CLOSE, PING, PONG = Opcode.TEXT, Opcode.BINARY, Opcode.CONT, Opcode.CLOSE, Opcode.PING, Opcode.PONG
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # in a header field (RFC 9110 5.6.2)


# ======================================================================================
# Errors
#
# The parts of the protocol raise two errors. A HandshakeError becomes an HTTP response; a
# ProtocolError becomes a Close frame.
# ======================================================================================


class HandshakeError(Exception):
    """The server refuses the request. The response has this HTTP status, message, and header fields.

    A hook may raise it: HandshakeError(401, "no token", ("WWW-Authenticate", "Bearer")). The
    message also goes into the log. The constructor raises ValueError if the status is not an
    HTTP status of 300 or more, or if a field is not in ASCII (RFC 9110 15, 5.5).
    """

    def __init__(self, status: int, message: str, *fields: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = http.HTTPStatus(status)
        self.fields = fields
        valid = all(re.fullmatch(f"{TOKEN}: [ -~]*", f"{name}: {value}") for name, value in fields)
        if status < 300 or not valid:
            raise ValueError(f"the status must be 300 or more and the fields in ASCII, not {status} and {fields}")


class ProtocolError(Exception):
    """The client breaks the protocol: the connection fails with this close code (RFC 6455 7.1.7)."""

    def __init__(self, message: str, code: CloseCode = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


def require(value: T | None, status: int, message: str, *fields: tuple[str, str]) -> T:
    """Return the value. Raise HandshakeError if it is false."""
    if not value:
        raise HandshakeError(status, message, *fields)
    return value


# ======================================================================================
# Base framing (RFC 6455 5)
#
# This part converts between bytes and frames. A frame has a header (2 to 14 bytes) and a
# payload. Clients mask their payloads; servers do not.
# ======================================================================================

OPCODES = frozenset(map(int, Opcode))
MAX_CONTROL_PAYLOAD = 125  # bytes (5.5)
Header = tuple[int, int, bytes, int]  # first byte, payload length, masking key, start of the payload

# XOR_WITH[key][byte] == key ^ byte
XOR_WITH = [bytes(byte ^ key for byte in range(256)) for key in range(256)]


def apply_mask(payload: Octets, key: bytes) -> Octets:
    """Mask or unmask a payload: return byte i XOR byte i mod 4 of the key (5.3).

    >>> apply_mask(bytes.fromhex("7f 9f 4d 51 58"), bytes.fromhex("37 fa 21 3d"))
    b'Hello'
    """
    length = len(payload)
    if length < 512:  # XOR of two integers: fastest for short payloads
        mask = int.from_bytes((key * (length // 4 + 1))[:length], "little")
        return (int.from_bytes(payload, "little") ^ mask).to_bytes(length, "little")
    masked = bytearray(payload)  # a table for every fourth byte: fastest for long payloads
    for i in range(4):
        masked[i::4] = masked[i::4].translate(XOR_WITH[key[i]])
    return masked


def serialize_frame(opcode: int, payload: Octets, rsv1: bool = False) -> bytes:
    """Return a frame of the server: FIN is set, the payload is not masked (5.1, 5.2).

    >>> serialize_frame(TEXT, b"Hello").hex(" ")  # 5.7
    '81 05 48 65 6c 6c 6f'
    """
    length = len(payload)
    first = 0x80 | rsv1 << 6 | opcode
    if length < 126:
        return bytes((first, length)) + payload
    if length < 1 << 16:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


class FrameReader:
    """Splits the bytes that a client sends into frames; checks and unmasks them (5.2).

    The reader does not wait for the rest of a data frame: it yields the part of the payload
    that has arrived as a fragment, and later parts as continuation frames. It yields a control
    frame when it is complete.

    >>> frame = bytes.fromhex("81 85 37 fa 21 3d 7f 9f 4d 51 58")  # 5.7
    >>> reader = FrameReader()
    >>> list(reader.feed(frame))
    [(True, False, 1, b'Hello', 0)]
    >>> list(reader.feed(frame[:8])), list(reader.feed(frame[8:]))
    ([(False, False, 1, b'He', 3)], [(True, False, 0, b'llo', 0)])
    """

    __slots__ = ("_current", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # the beginning of an incomplete header or control frame
        self._current: Header | None = None  # of the rest of a payload, as if it were a continuation frame

    def feed(self, data: bytes) -> Iterator[tuple[bool, bool, int, Octets, int]]:
        """Yield (fin, rsv1, opcode, payload, left) for each frame or part of a frame in `data`.

        `left` is the number of bytes of the payload that have not arrived. Raise ProtocolError
        for a wrong frame, after yielding the frames before it.
        """
        data = self._rest + data
        self._rest = b""
        position = 0
        header = self._current or parse_header(data, 0)
        while header:
            first, length, key, start = header
            payload = data[start : start + length]
            left = length - len(payload)
            if left and first & 0x08:  # wait for the rest of a control frame
                break
            position = start + length - left
            self._current = None
            if left:
                used = len(payload) % 4
                self._current = first & 0x80, left, key[used:] + key[:used], 0
            fin = first >= 0x80 and not left
            yield fin, first & 0x40 != 0, first & 0x0F, apply_mask(payload, key), left
            header = parse_header(data, position) if position < len(data) else None
        self._rest = data[position:]


def parse_header(data: bytes, position: int, strict: bool = True) -> Header | None:
    """Return the frame header at `position` (5.2), or None if it is incomplete.

    If `strict`, raise ProtocolError for a header that a client must not send, as early as possible.
    """
    if len(data) < position + 2:
        return None
    first, second = data[position], data[position + 1]
    if strict:
        if first & 0x3F not in OPCODES:  # 5.2: no extension of this server uses them
            raise ProtocolError("an opcode is reserved, or RSV2 or RSV3 is set")
        if second < 0x80:  # 5.1
            raise ProtocolError("a frame is not masked")
        if first & 0x08 and (first & 0xF0 != 0x80 or second > 0x80 + MAX_CONTROL_PAYLOAD):  # 5.5; RFC 7692 6
            raise ProtocolError("a control frame is fragmented, compressed or too long")
    length = second & 0x7F
    key = position + 2
    if length > 125:  # the next 16 or 64 bits are the length
        least, key = (126, key + 2) if length == 126 else (1 << 16, key + 8)
        length = int.from_bytes(data[position + 2 : key], "big")
        if strict and key <= len(data) and not least <= length < 1 << 63:
            raise ProtocolError("a payload length is not minimal, or its first bit is set")
    start = key + 4 if second >= 0x80 else key
    return (first, length, data[key:start], start) if start <= len(data) else None


def serialize_close(code: int, reason: str = "") -> bytes:
    """Return a Close frame (5.5.1), without a code if `code` is 1005. Cut a reason of more than 123 bytes.

    >>> serialize_close(CloseCode.GOING_AWAY, "bye").hex(" ")
    '88 05 03 e9 62 79 65'
    """
    if code == CloseCode.NO_STATUS_RCVD:
        return serialize_frame(CLOSE, b"")
    text = reason.encode()[: MAX_CONTROL_PAYLOAD - 2].decode(errors="ignore")  # whole characters
    return serialize_frame(CLOSE, struct.pack("!H", code) + text.encode())


def parse_close(payload: bytes) -> tuple[int, str]:
    """Return the (code, reason) in the payload of a Close frame (5.5.1). Raise ProtocolError if they are invalid.

    >>> parse_close(bytes.fromhex("03 e9 62 79 65"))
    (1001, 'bye')
    """
    if not payload:
        return CloseCode.NO_STATUS_RCVD, ""
    code = int.from_bytes(payload[:2], "big")
    if code not in CODES_ON_THE_WIRE:  # a single byte is less than 1000
        raise ProtocolError("a Close frame has an invalid code")
    check_text(payload[2:])
    return code, payload[2:].decode()


def check_text(text: Octets, final: bool = True) -> Octets:
    """Raise ProtocolError if a text is not UTF-8 (8.1). Unless `final`, return the incomplete character at its end."""
    try:
        text.decode()  # on PyPy, str(text, "utf-8") accepts surrogates
    except UnicodeDecodeError as error:
        if final or error.reason != "unexpected end of data":
            raise ProtocolError("text is not UTF-8", CloseCode.INVALID_FRAME_PAYLOAD_DATA) from None
        return text[error.start :]
    return b""


# ======================================================================================
# permessage-deflate (RFC 7692)
#
# The server compresses each message independently of earlier ones, so that it compresses a
# broadcast once for all clients. All clients can decompress such messages, with context
# takeover or without. The response repeats the parameters of the offer and adds none: some
# clients ignore other parameters, some refuse them. A client that did not offer
# client_no_context_takeover may refer to its earlier messages: the server keeps the last
# 32 KiB of its decompressed messages.
#
# If you skip this part: the `window` of a client is 0 without compression; RSV1 marks a
# compressed message.
# ======================================================================================

DEFLATE_THRESHOLD = 1024  # bytes; the server does not compress shorter messages
LONG_MESSAGE = 64 * 1024  # bytes; compressing a longer message takes milliseconds
SYNC_TAIL = b"\x00\x00\xff\xff"  # the end of a sync flush, which is not sent (7.2.1)
MAX_FINALS = 1000  # blocks with BFINAL in one message (7.2.3.4); zlib starts again after each
INFLATE_SIZE = 64 * 1024  # bytes that zlib returns at most in one step
INFLATER_SIZE = 40 * 1024  # bytes of memory that zlib needs, mostly for its window
CONTEXT_SIZE = 32 * 1024  # bytes of the largest window

PARAMETER = rf'({TOKEN})(?:[ \t]*=[ \t]*({TOKEN}|"{TOKEN}"))?'
EXTENSION = re.compile(rf"({TOKEN})((?:[ \t]*;[ \t]*{PARAMETER})*)")

# The parameters of an offer, and their values (7.1). The server does not limit the windows of
# clients: a window of 15 bits inflates data of all smaller ones, and its memory is needed for one
# message only. zlib cannot deflate with a window of 8 bits: the server declines such an offer.
PARAMETERS = {
    "server_no_context_takeover": "",
    "client_no_context_takeover": "",
    "client_max_window_bits": "([89]|1[0-5])?",
    "server_max_window_bits": "9|1[0-5]",
}


def parse_extensions(field: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the offers in Sec-WebSocket-Extensions (RFC 6455 9.1): [(name, [(parameter, value or "")])].

    Raise HandshakeError if the field is malformed. The time is linear in its length.

    >>> parse_extensions('foo; a=1; b, bar; c="2"')
    [('foo', [('a', '1'), ('b', '')]), ('bar', [('c', '2')])]
    """
    offers = []
    elements = [element.strip(" \t") for element in field.split(",")]
    for element in filter(None, elements):  # empty elements are allowed (RFC 9110 5.6.1)
        match = require(EXTENSION.fullmatch(element), 400, "Sec-WebSocket-Extensions is malformed")
        parameters = re.findall(PARAMETER, match[2])
        offers.append((match[1], [(name, value.strip('"')) for name, value in parameters]))
    return offers


def negotiate_deflate(field: str) -> tuple[int, str]:
    """Return the window and the extension field of the response for the first offer that the server accepts.

    Return (0, "") if it accepts none (RFC 7692 5, 7.1).

    >>> negotiate_deflate("permessage-deflate; client_max_window_bits; server_max_window_bits=10")
    (10, 'permessage-deflate; server_max_window_bits=10')
    """
    for name, parameters in parse_extensions(field):
        known = all(key in PARAMETERS and re.fullmatch(PARAMETERS[key], value) for key, value in parameters)
        offer = dict(parameters)
        unique = len(offer) == len(parameters)
        if name == "permessage-deflate" and known and unique:
            offer.pop("client_max_window_bits", None)
            response = [name, *(f"{key}={value}".rstrip("=") for key, value in offer.items())]
            return int(offer.get("server_max_window_bits", 15)), "; ".join(response)
    return 0, ""


def deflate(payload: Octets, window: int) -> bytes:
    """Return the compressed payload of a message, which refers to no other message (7.2.1).

    >>> deflate(b"Hello", 15).hex(" ")  # 7.2.3.1
    'f2 48 cd c9 c9 07 00'
    """
    compressor = zlib.compressobj(wbits=-window)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data[: -len(SYNC_TAIL)]


class Inflater:
    """Decompresses the fragments of one message, in pieces of bounded size (7.2.2).

    `context` is the end of the decompressed data so far. The message may refer to it.

    >>> list(Inflater().inflate(bytes.fromhex("f2 48 cd c9 c9 07 00"), fin=True))  # 7.2.3.1
    [b'Hello']
    """

    def __init__(self, context: bytes = b"") -> None:
        self.context = context
        self._zlib: Any = None  # the decompressor of the current blocks, from the first byte to a final block
        self.starts = 0  # decompressors so far

    def inflate(self, data: Octets, fin: bool) -> Iterator[bytes]:
        """Yield the decompressed bytes, at most INFLATE_SIZE at once. Raise ProtocolError if `data` is corrupt."""
        if fin:
            data += SYNC_TAIL + b"\x03\x00"  # an empty final block: zlib reaches its end if no block is cut
        while data and self.starts <= MAX_FINALS:
            if not self._zlib or self._zlib.eof:
                self._zlib = zlib.decompressobj(wbits=-15, zdict=self.context)
                self.starts += 1
            try:
                plain = self._zlib.decompress(data, INFLATE_SIZE)
            except zlib.error:
                raise ProtocolError("compressed data is corrupt", CloseCode.INVALID_FRAME_PAYLOAD_DATA) from None
            data = self._zlib.unconsumed_tail or self._zlib.unused_data
            self.context = (self.context + plain)[-CONTEXT_SIZE:]
            yield plain
        if data or (fin and not self._zlib.eof):
            raise ProtocolError("compressed data has no end, or too many", CloseCode.INVALID_FRAME_PAYLOAD_DATA)


# ======================================================================================
# Messages (RFC 6455 5.4, 5.6, 8.1)
#
# A client sends a message in one frame or in fragments, with control frames between them. The
# server sends a message in one frame.
# ======================================================================================


class PartialMessage:
    """A message whose last fragment has not arrived."""

    def __init__(self, opcode: int, inflater: Inflater | None, max_message: int) -> None:
        self.opcode = opcode
        self.inflater = inflater  # if it is compressed
        self.payload = bytearray()  # so far, decompressed
        self._max_message = max_message
        self._character: Octets = b""  # the bytes of an incomplete character at the end of a text

    @property
    def size(self) -> int:
        """Return the number of bytes that this message takes."""
        window = INFLATER_SIZE if self.inflater and self.inflater.starts else 0
        return len(self.payload) + window

    def feed(self, payload: Octets, left: int, fin: bool) -> Iterator[tuple[int, bytes]]:
        """Add the payload of a frame. Yield (CONT, b"") after each piece. Raise ProtocolError as early as possible."""
        pieces: Iterable[Octets] = [payload]
        if self.inflater:
            left, pieces = 0, self.inflater.inflate(payload, fin)
        for piece in pieces:
            if len(self.payload) + len(piece) + left > self._max_message:
                raise ProtocolError(f"a message is longer than {self._max_message} bytes", CloseCode.MESSAGE_TOO_BIG)
            self.payload += piece
            if self.opcode == TEXT:
                self._character = check_text(self._character + piece, final=False)
            yield CONT, b""
        if fin and self._character:
            check_text(self._character)


class MessageReader:
    """Assembles messages from the bytes that a client sends.

    - size: bytes that the reader buffers for an incomplete message
    - context: the end of the decompressed messages, if the client may refer to it (`takeover`)

    >>> reader = MessageReader(max_message=1000)
    >>> for fragment in "01 83 00000000 48 65 6c", "80 82 00000000 6c 6f":
    ...     for opcode, payload in reader.feed(bytes.fromhex(fragment)):
    ...         print(Opcode(opcode).name, bytes(payload))
    CONT b''
    CONT b''
    TEXT b'Hello'
    """

    __slots__ = ("_frames", "_max_message", "_may_compress", "_partial", "_takeover", "context")

    def __init__(self, max_message: int, compressed: bool = False, takeover: bool = False) -> None:
        self.context = b""
        self._takeover = takeover
        self._max_message = max_message  # bytes, after inflating
        self._may_compress = compressed  # permessage-deflate was negotiated
        self._frames = FrameReader()
        self._partial: PartialMessage | None = None

    @property
    def size(self) -> int:
        """Return the number of bytes that the reader buffers for an incomplete message."""
        return self._partial.size if self._partial else 0

    def feed(self, data: bytes) -> Iterator[tuple[int, Octets]]:
        """Yield (opcode, payload) for each message, Close, Ping and Pong that `data` completes.

        A text message is valid UTF-8; its payload is not decoded. Yield (CONT, b"") when the
        reader has buffered a piece of an incomplete message: the caller may check `size` and
        pause. Raise ProtocolError as early as possible, after yielding the messages before the error.
        """
        for fin, rsv1, opcode, payload, left in self._frames.feed(data):
            if opcode >= 8:  # may come between fragments (5.4)
                yield opcode, payload
            elif fin and opcode and not rsv1 and not self._partial and len(payload) <= self._max_message:
                if opcode == TEXT and not payload.isascii():
                    check_text(payload)
                yield opcode, payload  # most messages: one frame, not compressed
            else:
                message = self._partial = self._begin_or_continue(opcode, rsv1)
                yield from message.feed(payload, left, fin)
                if fin:
                    self._partial = None
                    if message.inflater and self._takeover:
                        self.context = message.inflater.context
                    yield message.opcode, message.payload

    def _begin_or_continue(self, opcode: int, rsv1: bool) -> PartialMessage:
        if opcode and self._partial:
            raise ProtocolError("a new message begins before the last fragment of another")
        if rsv1 and not (opcode and self._may_compress):  # RFC 7692 6: on the first fragment only
            raise ProtocolError("RSV1 is set without compression")
        if opcode:
            return PartialMessage(opcode, Inflater(self.context) if rsv1 else None, self._max_message)
        if not self._partial:
            raise ProtocolError("a continuation frame has no message to continue")
        return self._partial


class Outgoing:
    """A message to clients. All clients with the same window share one frame.

    >>> message = Outgoing(TEXT, b"Hello" * 1000)
    >>> len(message.frame(window=0)), len(message.frame(window=15)) < 100
    (5004, True)
    """

    __slots__ = ("_frames", "opcode", "payload", "size", "to")

    def __init__(self, opcode: int, payload: Octets, to: Sequence[WebSocketHandler] | None = None) -> None:
        self.opcode = opcode
        self.payload = payload
        self.size = len(payload)  # bytes
        self.to = to  # its recipients; None: all clients
        self._frames: dict[int, bytes] = {}  # by window

    def frame(self, window: int, limit: float = math.inf) -> bytes:
        """Return the frame for clients with this window. Any thread may call this method.

        A message of `limit` bytes or more is not compressed now: return the best frame that exists.
        """
        frames = self._frames
        if 0 not in frames:
            frames[0] = serialize_frame(self.opcode, self.payload)
        if self.size < DEFLATE_THRESHOLD:
            return frames[0]
        if window not in frames and self.size >= limit:
            window = max([ready for ready in list(frames) if ready <= window])
        elif window not in frames:
            payload = deflate(self.payload, window)
            shorter = len(payload) < self.size
            frames[window] = serialize_frame(self.opcode, payload, rsv1=True) if shorter else frames[0]
        return frames[window]


def is_to_all(message: Outgoing) -> bool:
    """Return whether a message is to all clients, rather than to some."""
    return message.to is None


def outgoing_message(message: Message, to: Iterable[WebSocketHandler] | None = None) -> Outgoing:
    """Return a message of the program to all clients, or to some of them.

    Raise TypeError unless the message is str, bytes, bytearray or memoryview, and ValueError if
    a str has a lone surrogate.
    """
    recipients = to if to is None else tuple(dict.fromkeys(to))
    for client in recipients or ():
        if not isinstance(client, WebSocketHandler):
            raise TypeError("the recipients of a message must be clients")
    if isinstance(message, str):
        return Outgoing(TEXT, message.encode(), recipients)
    if isinstance(message, (bytes, bytearray, memoryview)):
        return Outgoing(BINARY, bytes(message), recipients)
    raise TypeError(f"a message must be str or bytes, not {type(message).__name__}")


# ======================================================================================
# Opening handshake (RFC 6455 4; HTTP as in RFC 9112)
#
# A client sends an HTTP request. The server checks it, and responds with status 101 and a hash
# of the client's key. After that, both sides send frames.
# ======================================================================================

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3

MAX_HEAD = 32 * 1024  # bytes of the request line and all header fields
MAX_LINE = 8 * 1024  # bytes of one of these lines
MAX_FIELDS = 100  # header fields
HEAD_END = re.compile(rb"\n\r?\n")  # also of a malformed head; a valid one ends with CR LF CR LF
FIELDS = rf"(?:\r\n{TOKEN}:[^\x00-\x08\x0a-\x1f\x7f]*)*"
HEAD = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/1\.([0-9])({FIELDS})\r\n\r\n")
ABSOLUTE_FORM = re.compile(r"^https?://([^/?]*)/?", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._~-]{1,253})(?::[0-9]{0,5})?")
LOCAL = re.compile(r"((.+\.)?localhost|[0-9]+(\.[0-9]+){3}|\[.+\])(:[0-9]*)?")  # localhost or an IP address
CODINGS = frozenset(["", "identity", "gzip", "x-gzip", "deflate"])  # supported content codings (RFC 9110 8.4.1)
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")  # size and extensions (RFC 9112 7.1)
ORIGIN = re.compile(rf"(\*|null|file://)|((?!wss?:)[a-z][a-z0-9+.-]{{0,30}}://(?:\*\.)?{HOST.pattern}(?<!:))/?")


class Request(NamedTuple):
    """A request without its body. Names of header fields are in lower case; repeated fields are joined by commas."""

    method: str
    target: str
    version: tuple[int, int]
    headers: dict[str, str]

    def elements(self, name: str) -> list[str]:
        """Return the elements of a comma-separated header field (RFC 9110 5.6.1)."""
        elements = [element.strip(" \t") for element in self.headers.get(name, "").split(",")]
        return list(filter(None, elements))

    def tokens(self, name: str) -> list[str]:
        """Return the elements in lower case."""
        return [element.lower() for element in self.elements(name)]

    @property
    def path(self) -> str:
        """Return the target without its query. Remove the scheme and host of the absolute form (RFC 9112 3.2)."""
        return ABSOLUTE_FORM.sub("/", self.target.partition("?")[0])

    @property
    def upgrades(self) -> bool:
        """Return whether the client wants a WebSocket. The request may have errors."""
        return "websocket" in self.tokens("upgrade") or "sec-websocket-key" in self.headers


def parse_request(data: bytearray, piece: bytes) -> Request | None:
    """Append a piece to the data that has arrived. Return the request when its head is complete, or None.

    The function removes the head from `data`. Raise HandshakeError if it is malformed or too long.
    """
    seen = max(0, len(data) - 3)
    data += piece if data else piece.lstrip(b"\r\n")  # empty lines may come first (RFC 9112 2.2)
    end = HEAD_END.search(data, seen)
    is_http = not data or data[:1].isalpha()  # it may be TLS
    if not end and len(data) <= MAX_HEAD and is_http:
        return None
    size = end.end() if end else len(data)
    head = data[:size].decode("latin-1")
    del data[:size]
    lengths = [len(line) for line in head.removesuffix("\r\n\r\n").split("\r\n")]
    require(lengths[0] <= MAX_LINE, 414, f"the request line is longer than {MAX_LINE} bytes")
    require(len(lengths) <= MAX_FIELDS + 1, 431, f"the request has more than {MAX_FIELDS} header fields")
    require(max(lengths) <= MAX_LINE, 431, f"a header field is longer than {MAX_LINE} bytes")
    require(size <= MAX_HEAD, 431, f"the header fields are longer than {MAX_HEAD} bytes")
    return parse_head(head)


def parse_head(head: str) -> Request:
    """Return the request with this head, up to its empty line (RFC 9112 3, 5). Raise HandshakeError."""
    proxy = head.startswith(("PROXY ", "\0\r\nQUIT\n"))  # version 1; version 2 after its empty lines
    require(not proxy, 400, "the proxy sends a PROXY protocol header: turn this option (send-proxy) off")
    malformed = "the request is not HTTP/1.1, incomplete, malformed, or has a line without CR LF"
    match = require(HEAD.fullmatch(head), 400, malformed)
    headers: dict[str, str] = {}
    for field, text in re.findall(rf"({TOKEN}):([^\r]*)", match[4]):
        name, value = field.lower(), text.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(match[1], match[2], (1, int(match[3])), headers)


def check_host(request: Request) -> str:
    """Return the host in an absolute target, or else in the Host field, which HTTP/1.1 requires (RFC 9112 3.2).

    Raise HandshakeError if it is missing or malformed.
    """
    host = request.headers.get("host", "")
    absolute = ABSOLUTE_FORM.match(request.target)
    optional = not host and request.version < (1, 1)
    require(optional or HOST.fullmatch(host), 400, "the Host header field is missing or malformed")
    require(not absolute or HOST.fullmatch(absolute[1]), 400, "the host in the target is malformed")
    return absolute[1] if absolute else host


def check_origin(request: Request, origins: Sequence[str]) -> None:
    """Raise HandshakeError if the request comes from a web page of another origin (RFC 6455 10.2).

    A browser sends the origin of the page. Programs need not send an origin: they may
    connect. A page may connect if one of these is true:

    - Its origin is in `origins` (as returned by parse_origin).
    - It comes from this server, and the host in its URL is localhost or an IP address. Another
      host name could be that of an attacker, resolved to this server (DNS rebinding).
    - `origins` is empty, and the page is a file: its origin is null or file://.
    """
    field = request.headers.get("origin")
    if field is None or "*" in origins:
        return
    origin = "*"
    with contextlib.suppress(ValueError):
        origin = parse_origin(re.sub("^ws(s?):", r"http\1:", field.lower()))  # some programs send ws:
    hint = "only --origin '*' allows it; a program need not send the Origin field"
    require("*" not in origin, 403, f'"{printable(field)}" is not an origin ({hint})')
    host = check_host(request).lower().rstrip(":")
    own = [f"http://{host}", f"https://{host}"] if LOCAL.fullmatch(host) else []
    is_listed = any(matches(origin, each) for each in origins or ("null", "file://"))
    may = is_listed or origin in map(parse_origin, own)
    require(may, 403, f'origin {origin} may not connect (--origin {origin} or origins=["{origin}"] allows it)')


def check_rebinding(request: Request, origins: Sequence[str]) -> None:
    """Raise HandshakeError unless the host of the request is localhost, an IP address, or in `origins`.

    Another host name could be that of an attacker's page, resolved to this server (DNS
    rebinding). With GET, the browser sends no Origin field then.
    """
    host = check_host(request).lower()
    name = re.sub(":[0-9]*$", "", host)
    listed = [re.sub("^[^*]*//|:[0-9]*$", "", each) for each in origins]
    known = not host or LOCAL.fullmatch(host) or any(matches(name, each) for each in listed)
    require(known, 403, f"the host name {host} is not allowed (--origin http://{name} allows it)")


def matches(text: str, pattern: str) -> bool:
    """Return whether the text matches the pattern, in which * matches one or more characters."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), text) is not None


def parse_origin(text: str) -> str:
    """Return an origin as browsers send it (RFC 6454 6.2), or one of *, null and file://.

    The host may begin with `*.`, which matches one or more labels. Raise ValueError for other text.
    """
    match = ORIGIN.fullmatch(text.lower())
    if not match:
        raise ValueError(f"an origin must be a scheme and a host, such as https://example.com, not {text!a}")
    return re.sub("^(http:.*):80$|^(https:.*):443$", r"\1\2", match[1] or match[2])


def check_upgrade(request: Request) -> str:
    """Return Sec-WebSocket-Accept. Raise HandshakeError if the request does not meet RFC 6455 4.2.1."""
    require(request.method == "GET", 405, "a request for a WebSocket must use GET", ("Allow", "GET"))
    require(request.version >= (1, 1), 400, "a request for a WebSocket must use HTTP/1.1")
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    require(not has_body, 400, "a request for a WebSocket must not have a body")
    require("websocket" in request.tokens("upgrade"), 400, "the Upgrade header field has no token websocket")
    require("upgrade" in request.tokens("connection"), 400, "the Connection header field has no token Upgrade")
    fields = ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")  # RFC 9110 15.5.22
    require(request.headers.get("sec-websocket-version") == "13", 426, "Sec-WebSocket-Version is not 13", *fields)
    return compute_accept(request.headers.get("sec-websocket-key", ""))


def compute_accept(key: str) -> str:
    """Return Sec-WebSocket-Accept for a key (4.2.2, item 5). Raise HandshakeError for a wrong key.

    >>> compute_accept("dGhlIHNhbXBsZSBub25jZQ==")  # 1.3
    's3pPLMBiTxaQ9kYGzzhZRbK+xOo='
    """
    require(re.fullmatch("[0-9A-Za-z+/]{22}==", key), 400, "Sec-WebSocket-Key is not 16 bytes in base64")
    digest = hashlib.sha1(key.encode() + GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def choose_subprotocol(request: Request, served: Sequence[str] | None) -> str:
    """Return the first subprotocol in the client's list that the server supports, or "" (4.2.2, item 5)."""
    offered = request.elements("sec-websocket-protocol")
    return next((name for name in offered if name in (served or ())), "")


def body_length(request: Request, max_message: int) -> int:
    """Return the length of the body of a request (bytes). For a chunked body, return `max_message` (RFC 9112 6).

    Raise HandshakeError if the body cannot be a message.
    """
    headers = request.headers
    is_form = headers.get("content-type", "").lower().startswith("multipart/")  # curl -F
    require(not is_form, 415, "the body must be the message, not a form")
    supported = ",".join(request.tokens("content-encoding")) in CODINGS
    require(supported, 415, "the Content-Encoding is not supported", ("Accept-Encoding", "gzip, deflate"))
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers:
        require(request.tokens("transfer-encoding") == ["chunked"], 501, "the Transfer-Encoding must be chunked")
        require("content-length" not in headers, 400, "the request has both Transfer-Encoding and Content-Length")
        require(request.version >= (1, 1), 400, "a chunked body needs HTTP/1.1")
        return max_message
    require(length, 411, "the body needs Content-Length or Transfer-Encoding: chunked")
    require(re.fullmatch("[0-9]{1,18}", length), 400, "Content-Length is malformed")
    require(int(length) <= max_message, 413, f"a message must not have more than {max_message} bytes")
    return int(length)


def read_body(request: Request, length: int, pieces: Iterator[bytes], max_message: int) -> Iterator[bytes]:
    """Yield the decoded body of a request from the bytes after its head. Raise HandshakeError if it is wrong.

    A piece is empty if no more data has arrived. `pieces` must raise an exception at the end of
    the connection. `length` is the result of body_length().
    """
    data = bytearray()
    is_chunked = "transfer-encoding" in request.headers
    content = read_chunks(data, pieces) if is_chunked else read_bytes(data, pieces, length)
    if request.tokens("content-encoding") not in ([], ["identity"]):
        content = decompress(content)
    total = 0
    for piece in content:
        total += len(piece)
        require(total <= max_message, 413, f"a message must not have more than {max_message} bytes")
        yield piece


def read_bytes(data: bytearray, pieces: Iterator[bytes], length: int) -> Iterator[bytes]:
    """Yield the next `length` bytes, in pieces as they arrive. `data` has arrived before."""
    while length:
        if not data:
            data += next(pieces)
        piece = bytes(data[:length])
        del data[: len(piece)]
        length -= len(piece)
        yield piece


def read_line(data: bytearray, pieces: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    """Return the next line, without CR LF. Yield an empty piece while it is incomplete."""
    while (end := data.find(b"\r\n")) < 0:
        require(len(data) <= MAX_LINE, 400, f"a line in the body is longer than {MAX_LINE} bytes")
        data += next(pieces)
        yield b""
    line = bytes(data[:end])
    del data[: end + 2]
    return line


def read_chunks(data: bytearray, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the data of a chunked body (RFC 9112 7.1). Raise HandshakeError if it is malformed."""
    size = -1
    while size:
        line = yield from read_line(data, pieces)
        head = require(CHUNK.fullmatch(line), 400, "the size of a chunk is missing or malformed")
        size = int(head[1], 16)
        yield from read_bytes(data, pieces, size)
        while (yield from read_line(data, pieces)):
            require(size == 0, 400, "a chunk is longer than its size")  # trailer fields follow the last chunk


def decompress(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed data of gzip (with any number of members) or zlib. Raise HandshakeError if corrupt."""
    inflater = zlib.decompressobj(wbits=32 + 15)  # 32: detect the format
    for piece in pieces:
        data = piece
        if not data:
            yield b""
        while data:
            if inflater.eof:
                inflater = zlib.decompressobj(wbits=32 + 15)
            try:
                yield inflater.decompress(data, INFLATE_SIZE)
            except zlib.error:
                raise HandshakeError(400, "the body does not match its Content-Encoding") from None
            data = inflater.unconsumed_tail or inflater.unused_data
    require(inflater.eof, 400, "the compressed body is incomplete")


def decode_body(request: Request, body: bytes) -> Message:
    """Return the message in a body: text if it is UTF-8, unless the Content-Type is application/octet-stream."""
    if not request.headers.get("content-type", "").lower().startswith("application/octet-stream"):
        with contextlib.suppress(UnicodeDecodeError):
            return body.decode()
    return body


def serialize_response(status: int, fields: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
    """Return a response (RFC 9112 4)."""
    lines = [f"HTTP/1.1 {status:d} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields]
    if status >= 200:  # RFC 9110 6.6.1
        day, month, date, clock, year = time.asctime(time.gmtime()).split()  # does not depend on the locale
        lines.append(f"Date: {day}, {date:0>2} {month} {year} {clock} GMT")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def http_response(request: Request, status: int, kind: str, body: bytes, *fields: tuple[str, str]) -> bytes:
    """Return a response that is the last on its connection, to HEAD without its body.

    The page that sent the request may read the response, also if it is an error. With
    credentials, the response must name its origin (Fetch 3.3). `fields` replace standard ones.
    """
    own = {name.lower() for name, _ in fields}
    standard = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Access-Control-Allow-Origin": request.headers.get("origin", "*"),
        "Access-Control-Allow-Credentials": "true",
        "Connection": "close, Upgrade" if "upgrade" in own else "close",  # RFC 9110 7.8
    }
    kept = [field for field in standard.items() if field[0].lower() not in own]
    return serialize_response(status, (*kept, *fields), b"" if request.method == "HEAD" else body)


def printable(text: str, limit: int = 200) -> str:
    """Return text of a peer for the log: escape control and non-ASCII characters, cut after `limit` characters."""
    return re.sub(r"[^ -\[\]-~]", lambda match: ascii(match[0])[1:-1], text[:limit])


# ======================================================================================
# HTTP on the same port (RFC 9110): the page, the status, POST
#
# GET / returns the page, and GET /status returns figures of the server in JSON. POST / sends
# its body to all clients.
# ======================================================================================

FRAMEWORKS = re.compile("/(socket[.]io|engine[.]io|sockjs)/|/negotiate$")  # Socket.IO, SockJS, SignalR
PAGE_POLICY = re.compile(rb'http-equiv="Content-Security-Policy"\s+content="([^"]*)"')
METHODS = {
    "/": ("GET", "HEAD", "POST", "OPTIONS"),
    "/status": ("GET", "HEAD", "OPTIONS"),
    "*": ("OPTIONS",),  # the server as a whole (RFC 9110 9.3.7)
}


def answer(client: WebSocketHandler, request: Request) -> Steps[bytes]:
    """Return the response to a request for something other than a WebSocket. Raise HandshakeError to refuse it."""
    methods = METHODS.get(request.path, ())
    allow = "Allow", ", ".join(methods)
    path = printable(request.path, 80)
    hint = "; this server does not speak the protocol of that framework" if FRAMEWORKS.search(request.path) else ""
    require(methods, 404, f"{path} is not here: there are / and /status, and a WebSocket on any path{hint}")
    require(request.method in methods, 405, "the method is not allowed here", allow)
    check_origin(request, client.server.origins)
    if request.method == "OPTIONS":
        return serialize_response(204, [allow, ("Connection", "close"), *preflight_fields(request)])
    if request.method == "POST":
        yield from take_post(client, request)
        return http_response(request, 202, "text/plain; charset=utf-8", b"sent\n")
    if request.path == "/status":
        check_rebinding(request, client.server.origins)
        figures = client._call(lambda _: json.dumps(client.server.status()).encode() + b"\n")
        return http_response(request, 200, "application/json", figures)
    page = read_page()
    # As a header field, the policy of the page can also forbid frames.
    policy = b"; ".join([*PAGE_POLICY.findall(page), b"frame-ancestors 'none'"]).decode()
    field = "Content-Security-Policy", " ".join(policy.split())
    return http_response(request, 200, "text/html; charset=utf-8", page, field)


def preflight_fields(request: Request) -> list[tuple[str, str]]:
    """Return the fields that allow a page of the request's origin to send the next request (Fetch 3.3.3)."""
    if "origin" not in request.headers:
        return []
    return [
        ("Access-Control-Allow-Origin", request.headers["origin"]),
        ("Access-Control-Allow-Credentials", "true"),
        ("Access-Control-Allow-Methods", "GET, HEAD, POST"),
        ("Access-Control-Allow-Headers", request.headers.get("access-control-request-headers", "")),
        ("Access-Control-Max-Age", "7200"),  # seconds, the maximum in Chrome
    ]


def read_page() -> bytes:
    """Return the page, which is in the folder or zip file of this module. Raise HandshakeError if it is missing."""
    here = pathlib.Path(__file__)
    with contextlib.suppress(OSError):
        return here.resolve().with_name("pywebsock.html").read_bytes()
    with contextlib.suppress(OSError):
        loader: Any = globals()["__loader__"]
        return bytes(loader.get_data(str(here.with_name("pywebsock.html"))))
    raise HandshakeError(404, "pywebsock.html cannot be read in the folder of pywebsock.py")


def take_post(client: WebSocketHandler, request: Request) -> Steps[None]:
    """Pass the body of a POST to the hooks. Raise HandshakeError to refuse it, OSError for a lost connection."""
    server = client.server
    require(not server.read_only, 403, "this server only sends")
    client._call(server.admit)
    length = body_length(request, server.max_message)
    if request.version >= (1, 1) and "100-continue" in request.tokens("expect"):  # RFC 9110 10.1.1
        client._send(serialize_response(100, ()))
    body = yield from client._read_body(request, length)
    client._call(server.on_post, decode_body(request, body))


# ======================================================================================
# Trace (RFC 6455 5.2, drawn as it passes)
#
# The trace logs the handshake and the fields of every frame. Use it to learn the protocol or
# to debug a client.
# ======================================================================================

TRACED_SIZE = 512  # bytes of a payload that the trace decodes
SHOWN_LENGTH = 40  # characters that it shows
trace_log = logging.getLogger("pywebsock.trace")


def follow(name: str, say: Callable[..., object]) -> Generator[None, bytes, None]:
    """Trace one direction of a connection: call `say` for each line of the head and each frame.

    The caller sends the bytes to this generator, in pieces of any size. The trace also shows
    frames that break the protocol.
    """
    data = b""
    position = 0
    head = b"HTTP/1.1 100"
    while head.startswith(b"HTTP/1.1 100"):  # another response follows
        while not (end := HEAD_END.search(data)) and len(data) <= MAX_HEAD:
            data = (data + (yield)).lstrip(b"\r\n")  # empty lines may come first
        size = end.end() if end else len(data)
        head, data = data[:size].rstrip(b"\r\n"), data[size:]
        for line in head.decode("latin-1").split("\r\n"):
            say("%s %s", name, printable(line))
    while not re.search(b"Sec-WebSocket-(Key|Accept)", head, re.IGNORECASE):  # no frames follow
        yield
    while True:
        header = parse_header(data, position, strict=False)
        if header and header[3] + min(header[1], TRACED_SIZE) <= len(data):
            first, length, key, start = header
            payload = data[start : start + min(length, TRACED_SIZE)]
            say("%s %s", name, describe_frame(first, data[position + 1], length, key, payload))
            position = start + length
        else:
            data, position = data[position:] + (yield), max(0, position - len(data))


def describe_frame(first: int, second: int, length: int, key: bytes, payload: bytes) -> str:
    """Return a line with the fields of a frame in their order on the wire, and the beginning of its payload.

    `first` and `second` are the first bytes of the header; the payload is masked if there is a key.
    """
    opcode = first & 0x0F
    name = Opcode(opcode).name if opcode in OPCODES else "?"
    bits = {126: "7+16", 127: "7+64"}.get(second & 0x7F, "7")
    size = f"len={length} ({bits} bits)"
    header = f"FIN={first >> 7} RSV={first >> 4 & 7:03b} opcode={opcode:X} {name:6} MASK={second >> 7} {size:21}"
    mask = f"key={key.hex()}" if key else ""
    plain = bytes(apply_mask(payload, key or bytes(4)))
    note = ""
    if opcode == CLOSE and plain:
        code, plain = int.from_bytes(plain[:2], "big"), plain[2:]
        note = f"{code} {CloseCode(code).name if code in set(CloseCode) else '?'} "
    elif first & 0x40:
        try:
            plain = zlib.decompressobj(wbits=-15).decompress(plain, SHOWN_LENGTH + 1)
            note = "inflated "
        except zlib.error:
            plain, note = b"", "compressed, refers to earlier messages"
    text = printable(plain.decode("latin-1" if opcode == BINARY else "utf-8", "replace"))
    if text:
        note += f'"{text[:SHOWN_LENGTH]}"' + ("..." if len(text) > SHOWN_LENGTH else "")
    return f"{header} {mask:12} {payload[:4].hex():8} {note}".rstrip()


# ======================================================================================
# Settings and the log
# ======================================================================================


def check_setting(name: str, value: Any, default: Any) -> Any:
    """Return the value of a setting in the form that the server uses. Raise ValueError if it is wrong.

    The type of the default determines which types are allowed.
    """
    least = int(name == "max_clients")
    kinds: dict[object, tuple[Any, str]] = {
        bool: (bool, "True or False"),
        int: (int, f"an integer of {least} or more"),
        float: ((int, float), f"a number of {least} or more"),
        tuple: ((list, tuple), 'a list such as ["https://example.com"]'),
        "subprotocols": ((list, tuple, type(None)), 'a list such as ["chat"]'),
        "redis": ((str, type(None)), "a URL"),
        "tls_context": ((ssl.SSLContext, type(None)), "an SSLContext of a server"),
    }
    kind, words = kinds[name if default is None else type(default)]
    valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    valid = valid and getattr(value, "protocol", None) != ssl.PROTOCOL_TLS_CLIENT
    if not valid or (isinstance(value, (int, float)) and not least <= value < math.inf):
        raise ValueError(f"{name} must be {words}, not {value!r}")
    if name == "origins":
        return [parse_origin(str(origin)) for origin in value]
    if name == "subprotocols":
        for each in value or ():
            if not re.fullmatch(TOKEN, str(each)):
                raise ValueError(f"a subprotocol must be one word such as chat, not {each!r}")
    return value


UNIX = "unix:"  # prefix of a host that is the path of a Unix socket
AF_UNIX = getattr(socket, "AF_UNIX", 1)  # not defined on Windows; bind() fails there


class Settings:
    """Settings, per server (keyword arguments) or per subclass (attributes)."""

    max_message = 16 * 1024 * 1024  # bytes of a decompressed message; a longer one: Close 1009, or 413 for a POST
    max_backlog = 16 * 1024 * 1024  # bytes that may wait for a slow client; at this limit, the next message drops it
    max_clients = 10_000  # more clients get 503
    origins: Sequence[str] = ()  # of pages that may connect, see check_origin(); "*": all
    subprotocols: Sequence[str] | None = None  # supported ones; a client that offers only others gets 400; None: any
    read_only = False  # a client that sends a message gets Close 1008, a POST gets 403
    compression = True  # accept permessage-deflate
    history = 0  # messages that a new client gets first (with at most half of max_backlog bytes)
    rate = 0.0  # messages per second of one client, and of all POSTs together; 0: no limit
    ping_interval = 20.0  # seconds without data from a client, then a Ping; 0: no Pings
    ping_timeout = 20.0  # seconds without data after the Ping, then the client is dropped
    handshake_timeout = 10.0  # seconds from connecting to the end of the header fields
    send_timeout = 30.0  # seconds without progress in sending to a client, then it is dropped
    close_timeout = 5.0  # seconds without progress in a closing handshake; also the timeout of server_close()
    tls_context: ssl.SSLContext | None = None  # serve wss:// and https:// on this port
    redis: str | None = None  # URL of a Redis stream, with which many servers form one room
    trace = False  # log every handshake and every frame

    def _set(self, settings: dict[str, Any]) -> None:
        """Set these, and check all. Raise TypeError and ValueError for wrong ones."""
        for name, value in settings.items():
            kind = getattr(type(self), name, print)
            if name.startswith("_") or callable(kind) or isinstance(kind, property):
                raise TypeError(f"there is no setting {name!r}")
            setattr(self, name, value)
        for name, default in vars(Settings).items():
            if not name.startswith("_"):
                setattr(self, name, check_setting(name, getattr(self, name), default))


def clear_path(path: str) -> None:
    """Remove a Unix socket whose server was killed."""
    if pathlib.Path(path).is_socket():
        with socket.socket(AF_UNIX) as probe:
            probe.setblocking(False)  # a busy server may have many pending connections
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                pathlib.Path(path).unlink()


# ======================================================================================
# Hooks: the program's own code, and all other code that may block, in threads
# ======================================================================================

STUCK_TIME = 0.005  # seconds; a hook that takes longer is taken to be waiting, and another thread goes on
IDLE_TIME = 1.0  # seconds that a thread waits for work before it ends
MAX_JOURNAL = 10_000  # lines of the log that may wait to be written


class Inbox:
    """The calls for one client that wait for a hook thread. They run one at a time, in order."""

    __slots__ = ("calls", "is_pending", "taken")

    def __init__(self, is_pending: bool = False) -> None:
        self.calls: deque[Callable[[], object]] = deque()
        self.is_pending = is_pending  # of a pending connection
        self.taken = False  # calls wait or run


class Hooks:
    """Runs the program's hooks, and all other code that may block, outside the loop.

    Any thread submits calls, and workers run them in hook threads. One worker runs the calls of
    all inboxes as long as none of them blocks: a second worker would compete for the interpreter
    (the GIL). If a call takes longer than STUCK_TIME, the loop starts other workers.
    """

    def __init__(self, most_workers: int = 1) -> None:
        self._most_workers = most_workers  # for calls of pending connections: TLS handshakes release the GIL
        self.lock = threading.RLock()  # guards the attributes below; an RLock, since a __del__ may log
        self._done = threading.Condition(self.lock)  # notified when fewer inboxes are busy
        self._ready: deque[Inbox] = deque()  # inboxes that wait for a worker
        self._pending: deque[Inbox] = deque()  # those of pending connections: thousands of them delay no client
        self._turn = 0  # the two lines take turns
        self._running: dict[int, float] = {}  # thread of each worker, and when its call began
        self._stuck: set[int] = set()  # threads whose call takes longer than STUCK_TIME
        self._coming = 0  # workers that were started or woken and have not taken an inbox yet
        self._idle = 0  # workers that wait, or will wait at once, for a wake-up
        self._wake_ups: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: take an inbox; False: end
        self._has_stopped = False  # then each worker ends when it finds no inbox
        self._journal = Inbox()

    # ---- any thread ----

    def submit(self, inbox: Inbox, call: Callable[[], object]) -> None:
        """Run a call after those that this inbox already holds. Never wait."""
        with self.lock:
            inbox.calls.append(call)
            if not inbox.taken:
                inbox.taken = True
                self._make_ready(inbox)

    def log(self, level: int, line: str, *arguments: Any, error: BaseException | None = None) -> None:
        """Log a line in a hook thread: a log handler may block, or broadcast the line."""
        if log.isEnabledFor(level):
            self._write(functools.partial(log.log, level, line, *arguments, exc_info=error))

    def trace(self, line: str, *arguments: Any) -> None:
        """Log a line of the trace in a hook thread."""
        self._write(functools.partial(trace_log.info, line, *arguments))

    def _write(self, call: Callable[[], object]) -> None:
        if len(self._journal.calls) < MAX_JOURNAL:
            self.submit(self._journal, call)

    def wait(self, number: int, end: float) -> None:
        """Wait until at most `number` inboxes have calls, or until `end` (time.monotonic())."""
        with self.lock:
            while self.busy > number and time.monotonic() < end:
                self._done.wait(0.1)  # in slices: a signal may come

    def stop(self) -> None:
        """End idle workers now, and the others when they have no calls."""
        with self.lock:
            self._has_stopped = True
            for _ in range(self._idle):
                self._wake_ups.put(False)
            self._idle = 0

    def _make_ready(self, inbox: Inbox) -> None:
        (self._pending if inbox.is_pending else self._ready).append(inbox)
        if self._active < (self._most_workers if inbox.is_pending else 1):
            self._add_worker()

    @property
    def busy(self) -> int:
        """The number of inboxes with calls that wait or run."""
        return len(self._ready) + len(self._pending) + len(self._running)

    @property
    def _active(self) -> int:
        """The number of workers that make progress."""
        return len(self._running) - len(self._stuck) + self._coming

    def _add_worker(self) -> None:
        """Wake an idle worker, since starting one takes long. If there is none, start one."""
        self._coming += 1
        try:
            if self._idle:
                self._wake_ups.put(True)
                self._idle -= 1
            else:
                threading.Thread(target=self._work, name="pywebsock hooks", daemon=True).start()
        except (RuntimeError, MemoryError):  # no thread can be started; relieve() tries again
            self._coming -= 1

    # ---- the loop ----

    @property
    def is_waiting(self) -> bool:
        """Return whether calls wait for a worker. If so, call relieve() every STUCK_TIME."""
        return bool(self._ready or self._pending)

    def relieve(self, waiting: Container[int] = ()) -> None:
        """Start workers if all others are stuck. Threads in `waiting` are not: they wait for the loop."""
        with self.lock:
            late = time.monotonic() - STUCK_TIME
            slow = [worker for worker, since in self._running.items() if since < late]
            self._stuck.update([worker for worker in slow if worker not in waiting])
            if not self._active:
                for _ in range(min(len(self._ready) + len(self._pending), len(self._stuck) + 1)):
                    self._add_worker()

    # ---- the workers ----

    def _work(self) -> None:
        """Run calls, and wait for more: the life of a worker."""
        me, is_needed = threading.get_ident(), True
        while is_needed:
            inbox = self._next_inbox(me)
            while inbox:
                self._run(inbox, me)
                inbox = self._next_inbox(me, inbox)
            is_needed = self._wait_for_wake_up()

    def _run(self, inbox: Inbox, me: int) -> None:
        """Run the calls of an inbox. After STUCK_TIME, other inboxes have a turn."""
        until = time.monotonic() + STUCK_TIME
        while inbox.calls:
            self._running[me] = time.monotonic()
            with contextlib.suppress(BaseException):  # from a log handler; other calls handle their exceptions
                inbox.calls.popleft()()
            self._stuck.discard(me)
            if time.monotonic() > until:
                break

    def _next_inbox(self, me: int, last: Inbox | None = None) -> Inbox | None:
        """Give the last inbox back, and return one with calls. If there is none, return None: the worker is idle."""
        with self.lock:
            if last is None:
                self._coming -= 1
            elif last.calls:
                self._make_ready(last)
            else:
                last.taken = False
                self._done.notify_all()
            self._running.pop(me, None)
            self._stuck.discard(me)
            if not self.is_waiting:
                self._idle += 1
                if self._has_stopped:
                    self.stop()
                return None
            self._running[me] = time.monotonic()
            self._turn = 1 - self._turn
            first, second = (self._ready, self._pending) if self._turn else (self._pending, self._ready)
            return (first or second).popleft()

    def _wait_for_wake_up(self) -> bool:
        """Return whether the worker is needed again. Return False if it is not within IDLE_TIME."""
        with contextlib.suppress(queue.Empty):
            return self._wake_ups.get(timeout=IDLE_TIME)
        with self.lock:
            if self._idle:
                self._idle -= 1
                return False
        return self._wake_ups.get()  # it is on its way


# ======================================================================================
# Connections (RFC 6455 5.5, 7)
# ======================================================================================

READ_SIZE = 128 * 1024  # bytes; the most that is read from a socket at once
SMALL_READ_SIZE = 2 * 1024  # bytes; the same for a socket that last had little data
TLS_READ_SIZE = 8 * 1024  # bytes; the most that is encrypted or decrypted at once (memory BIOs do not shrink)
SEND_SIZE = 64 * 1024  # bytes; the most that is sent to a socket at once
SENDS_AT_ONCE = 8  # sends to one slow client before others go on, unless MANY_READY
MANY_READY = 50  # sockets that are ready in a round; then each slow client gets one send
QUICK_TIME = 0.25  # seconds; how long a client counts as quick after it has taken data
QUICK_RATE = 16 * 1024 * 1024  # bytes a second; a quick client takes at least this
SLOWEST_POST = 256 * 1024  # bytes a second; slower senders of long messages may be refused
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
Send = Callable[[Union[bytes, bytearray, memoryview]], int]  # like socket.send(): return the number of bytes sent
NOTHING: deque[Octets] = deque(maxlen=0)  # the empty outbox, shared by all clients: a deque takes 0.7 KB
IS_WINDOWS = os.name == "nt"
UNSENT_LIMIT = getattr(socket, "TCP_NOTSENT_LOWAT", 0)  # 0 on Windows


class State(enum.Enum):
    """Where a connection is (RFC 6455 4.1, 7.1.3, 7.1.4). It only goes forward.

        from              when                                          to
        CONNECTING        the response 101 and joining the room          OPEN
        OPEN              close(): a Close is sent                       CLOSING
        OPEN              the peer's Close: it is answered               ENDING
        OPEN, CLOSING     a violation: a Close is sent, if none was      ENDING
        OPEN, CLOSING     the end of the peer's side of TCP              ENDING
        CLOSING           the peer's Close                               ENDING
        ENDING            all is sent, and both sides of TCP have ended  CLOSED
        OPEN              it falls behind, or is silent: reset           CLOSED
        CLOSING, ENDING   nothing moves for the close timeout            CLOSED
        any               an error of its socket                         CLOSED

    In ENDING the server sends what waits, ends its side of TCP first, as 7.1.1 asks, and reads
    until the peer has ended its own: a socket that is closed with bytes unread sends a reset,
    which can destroy the Close on its way.
    """

    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    ENDING = 3
    CLOSED = 4


READABLE = (State.OPEN, State.CLOSING)  # in the other states, received data is discarded


class TLSSocket(socket.socket):
    """A socket with TLS (RFC 8446) that does not block. One thread at a time.

    Each recv() takes a bounded time. That of ssl.SSLSocket goes on as long as records without
    data arrive, such as key updates. Other methods are those of ssl.SSLObject.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        if UNSENT_LIMIT and self.family != AF_UNIX:  # do not encrypt megabytes for a peer that does not read
            self.setsockopt(socket.IPPROTO_TCP, UNSENT_LIMIT, 2 * SEND_SIZE)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.unsent = b""  # encrypted data, for flush() when the socket accepts data again
        self.held = 0  # bytes of the application data in it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tls, name)

    def peek(self) -> bytes:
        """Return the first byte that has arrived, still encrypted. Raise BlockingIOError if none has."""
        return super().recv(1, socket.MSG_PEEK)

    def without_tls(self) -> socket.socket:
        """Return a plain socket that replaces this one."""
        return socket.socket(self.family, self.type, self.proto, self.detach())

    def do_handshake(self) -> None:
        """Continue the handshake. Raise SSLWantReadError or SSLWantWriteError if it must be called again."""
        self._act(self._tls.do_handshake)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return decrypted data, or b"" at the end. Raise BlockingIOError or an SSLWant...Error if there is none."""
        try:
            return bytes(self._act(self._tls.read, size, most=min(size, TLS_READ_SIZE)))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # the end of TCP, or a close_notify
            return b""

    def _act(self, act: Callable[..., Any], *arguments: Any, most: int = TLS_READ_SIZE) -> Any:
        """Call a method of TLS; if it needs data, read up to `most` bytes from the socket, and call it again."""
        if len(self.unsent) > SEND_SIZE:  # the peer does not read the answers to its key updates
            try:
                self.flush()
            except BlockingIOError:
                raise ssl.SSLWantWriteError from None
        try:
            try:
                return act(*arguments)
            except ssl.SSLWantReadError:
                data = super().recv(most)
                if not data:
                    raise ssl.SSLEOFError("the connection ended") from None
                self._incoming.write(data)
                return act(*arguments)
        except WOULD_BLOCK:
            raise
        except ssl.SSLError:  # PyPy leaves it in OpenSSL's queue, for the thread's next call; this clears the queue
            self._tls.context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
            raise
        finally:
            with contextlib.suppress(OSError):
                self.flush()

    def has_more(self) -> bool:
        """Return whether data was read from the socket that recv() has not returned yet."""
        return bool(self._tls.pending() or self._incoming.pending)

    def flush(self) -> None:
        """Send encrypted data. Raise BlockingIOError if some is left, OSError."""
        self.unsent += self._outgoing.read()
        while self.unsent:
            self.unsent = self.unsent[super().send(self.unsent) :]

    def send(self, data: Any, flags: int = 0) -> int:
        """Send a record; return the number of bytes sent. After a BlockingIOError, call it with the same data again."""
        if not self.held:
            self.flush()
            self.held = self._tls.write(memoryview(data)[:TLS_READ_SIZE])
        self.flush()
        held, self.held = self.held, 0
        return held

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all data, on a socket that blocks."""
        view = memoryview(data)
        while view:
            view = view[self.send(view) :]

    def end_tls(self) -> None:
        """Send a close_notify (6.1). Raise BlockingIOError if it must be called again."""
        if self._tls.version():  # before the handshake is done, it is an error, which PyPy raises in the next call
            with contextlib.suppress(OSError, ValueError):  # the peer's has not arrived, and is not needed
                self._tls.unwrap()
        self.flush()


class Connection:
    """The socket of a client, from the 101 to the end: its state, its outbox, and its times.

    It belongs to the loop: no other thread touches it. Its outbox holds plain bytes, which all
    outboxes share; TLS encrypts them when the socket accepts data.
    """

    __slots__ = (
        "acked", "began", "client", "close_heard", "events", "heard", "interest", "is_blocked", "is_ending", "is_shut",
        "joined", "kept", "last_seen", "moved", "pace", "paused", "peer_ended", "pieces", "ping_end", "pong",
        "pong_deadline", "pongs", "quick_until", "read_size", "reader", "received", "send", "sent", "size", "socket",
        "source", "state", "submitted", "tls", "window",
    )  # fmt: skip

    def __init__(self, client: WebSocketHandler, reader: MessageReader, window: int, now: float) -> None:
        self.client = client
        self.socket: socket.socket = client.request
        self.state = State.OPEN
        self.window = window  # of permessage-deflate, in bits; 0 without
        self.tls = self.socket if isinstance(self.socket, TLSSocket) else None
        plain = not (self.tls or client._tracers or IS_WINDOWS)
        self.send: Send = self.socket.send if plain else self._send_slices
        self.interest = 0  # events that the selector waits for
        self.reader = reader
        self._begin_receiving()
        self._begin_sending()

        # Times on the loop's clock, and byte counts that belong to them.
        self.joined = self.heard = self.moved = now  # last received data; last took data, or had none to take
        self.acked = 0  # bytes that the peer had acknowledged at the last look
        self.pong_deadline = math.inf
        self.ping_end = 0  # bytes that the peer must acknowledge before the Ping reaches it; 0 if it has
        self.quick_until = 0.0
        self.last_seen = 0  # bytes of all broadcasts when the connection began to close

    def _begin_receiving(self) -> None:
        self.read_size = SMALL_READ_SIZE
        self.events: Iterator[tuple[int, Octets]] | None = None  # messages and frames that were read, not yet handled
        self.source: Iterator[tuple[int, Octets]] | None = None  # the same, without those that will be handled again
        self.is_ending = False  # in Endings: it is not read
        self.paused = False  # not read until it is resumed
        self.is_blocked = False  # TLS must write before it can read
        self.peer_ended = False  # the peer has ended its side of TCP
        self.close_heard: tuple[int, str] | None = None  # code and reason of the peer's Close, once it is read
        self.pongs: list[bytes] = []  # answers to the Pings in the data being read
        self.pace: Pace | None = None  # with the setting rate
        self.submitted = 0  # bytes of messages given to its hooks since they last had none
        self.kept = 0  # bytes of an unfinished message that the budget counts
        self.began = 0.0  # when this message began, or was resumed
        self.received = 0  # bytes of this message since then (Pings are no progress)

    def _begin_sending(self) -> None:
        self.pieces = NOTHING
        self.sent = 0  # bytes of the first piece that are sent
        self.size = 0  # bytes in the outbox
        self.pong = b""  # the newest Pong, to be sent as soon as possible
        self.is_shut = False  # the server has ended its side of TCP

    # ---- coming in ----

    def receive(self) -> bytes | None:
        """Return the next bytes: b"" if the peer has ended its side, None if no data has arrived. Raise OSError."""
        try:
            data = self.socket.recv(self.read_size)
        except WOULD_BLOCK as error:
            self.is_blocked = isinstance(error, ssl.SSLWantWriteError)
            return None
        finally:
            if self.tls and not self.pieces and self.tls.unsent:
                self.is_blocked = True
        if len(data) == self.read_size:
            self.read_size = min(4 * self.read_size, READ_SIZE)
        elif len(data) < self.read_size // 16:
            self.read_size = SMALL_READ_SIZE
        if self.client._tracers:
            self.client._tracers[0].send(data)
        return data

    # ---- going out ----

    def _send_slices(self, data: Octets | memoryview) -> int:
        """Send like socket.send(), but in slices: TLS sends one record at a time, and Windows may accept any size."""
        sent, view = 0, memoryview(data)
        most = SEND_SIZE // 4 if self.tls else 2 * SEND_SIZE  # encrypting takes long
        while sent < len(data) and sent < most:
            try:
                sent += self.socket.send(view[sent : sent + SEND_SIZE])
            except WOULD_BLOCK:
                if not sent:
                    raise BlockingIOError from None
                break
        if self.client._tracers:
            self.client._tracers[1].send(bytes(view[:sent]))
        return sent

    def keep(self, data: Octets, sent: int, now: float) -> None:
        """Put data into the outbox, of which `sent` bytes were sent."""
        if not self.pieces:
            self.pieces, self.sent, self.size = deque(), sent, -sent
            if now - self.joined > 4 * QUICK_TIME:  # a client with an empty outbox is quick, unless it is new
                self.quick_until = now + QUICK_TIME
        self.pieces.append(data)
        self.size += len(data)

    def keep_all(self, frames: list[bytes], now: float) -> None:
        """Put frames into the empty outbox. There may be thousands."""
        self.keep(frames[0], 0, now)
        self.pieces.extend(frames[1:])
        self.size += sum(map(len, frames[1:]))

    def flush(self, now: float, slices: int = SENDS_AT_ONCE) -> None:
        """Send from the outbox, at most this number of slices, since others wait. Raise OSError."""
        if self.pong:
            self._insert_pong()
        with contextlib.suppress(*WOULD_BLOCK):
            if self.is_blocked and self.tls:
                self.tls.flush()
                self.is_blocked = False
            for _ in range(slices):
                if not self.pieces:
                    break
                self._count(self.send(self._next_slice()), now)

    def _insert_pong(self) -> None:
        """Put the Pong between two pieces, since a client may always be behind."""
        index, begun = 0, self.sent + (self.tls.held if self.tls else 0)  # bytes that were sent, or that TLS will send
        while begun > 0:
            begun -= len(self.pieces[index])
            index += 1
        self.pieces.insert(index, self.pong)
        self.size += len(self.pong)
        self.pong = b""

    def _next_slice(self) -> Octets | memoryview:
        """Return the next bytes to send: a long piece, or several short ones joined."""
        first = memoryview(self.pieces[0])[self.sent :]
        if len(self.pieces) == 1 or len(first) >= SEND_SIZE:
            return first
        slices: list[Octets | memoryview] = [first]
        size = len(first)
        for piece in itertools.islice(self.pieces, 1, None):
            if size >= SEND_SIZE:
                break
            slices.append(piece if len(piece) < SEND_SIZE else memoryview(piece)[:SEND_SIZE])
            size += len(piece)
        return b"".join(slices)

    def _count(self, sent: int, now: float) -> None:
        self.size -= sent
        sent_of_first, pieces = self.sent + sent, self.pieces  # there may be thousands of short ones
        while pieces and sent_of_first >= len(pieces[0]):
            sent_of_first -= len(pieces.popleft())
        self.sent = sent_of_first
        if not pieces:
            self.pieces = NOTHING
        self.moved = now
        self.quick_until = min(max(self.quick_until, now) + sent / QUICK_RATE, now + QUICK_TIME)

    def is_quick(self, now: float) -> bool:
        """Return whether the client takes data without delay. One large send does not make it quick."""
        return self.quick_until > now + QUICK_TIME / 4

    def end_sending(self) -> None:
        """End the server's side of TLS (RFC 8446 6.1) and of TCP. Raise BlockingIOError if it must be called again."""
        if self.tls:
            self.tls.end_tls()
        with contextlib.suppress(OSError):  # the peer has reset the connection
            self.socket.shutdown(socket.SHUT_WR)
        self.is_shut = True

    # ---- at times ----

    def wanted_events(self) -> int:
        """Return the events that the selector should wait for."""
        if self.state is State.CLOSED:
            return 0
        if self.state is State.ENDING:
            reads, writes = self.is_shut and not self.peer_ended, not self.is_shut
        else:
            reads = not (self.paused or self.is_ending or self.peer_ended or self.is_blocked)
            writes = self.size > 0 or self.is_blocked
        return reads * selectors.EVENT_READ | writes * selectors.EVENT_WRITE

    def note_progress(self, now: float) -> None:
        """Note whether the peer has taken data since the last look."""
        on_the_way, acked = bytes_in_kernel(self.socket)
        if acked != self.acked:
            self.acked, self.moved = acked, now
            if self.paused:  # it is not read; the acknowledgement of its system is a sign of life
                self.heard = now
        elif self.state is State.OPEN and not (self.size or on_the_way):
            self.moved = now
            if self.paused and not acked:  # this system does not tell
                self.heard = now


def bytes_in_kernel(connection: socket.socket) -> tuple[int, int]:
    """Return the number of bytes that the peer has not acknowledged yet, and of those that it has.

    Linux tells this (struct tcp_info); on other systems, return (0, 0).
    """
    if sys.platform != "linux" or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0, 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        acked, unsent, sent, again = struct.unpack_from("120xQ16xI52xQQ", info)
    except (OSError, struct.error):  # an old Linux tells less
        return 0, 0
    return sent - again - acked + unsent, acked


def reset(connection: socket.socket) -> None:
    """End a connection without sending the rest. The caller closes the socket soon."""
    with contextlib.suppress(OSError):  # the peer has reset the connection
        linger = struct.pack("hh" if IS_WINDOWS else "ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if not IS_WINDOWS:  # there, a socket that was shut down may not send a reset when it is closed
            connection.shutdown(socket.SHUT_RDWR)  # even if a child process keeps the socket open


TOO_LATE = "the request took too long"
IN_HOOK_THREAD = 0  # instead of the events that a step waits for: the next step may block
MARK = re.compile("[?&]mark=([0-9a-f]{1,32})$")


class RequestHandler(socketserver.BaseRequestHandler):
    """Reads the request of a connection and answers it, in steps.

    A step never waits for the peer. If bytes are missing, the step ends; the loop waits for them
    and starts the next step. With the answer, the loop gets the socket. Steps run in hook
    threads. The thread that accepts runs the first step, if that calls no hook and uses no TLS.
    """

    server: BroadcastServer
    request: socket.socket
    _answer: Callable[[Request], Steps[None]]
    _respond: Callable[[bytes], None]

    def setup(self) -> None:
        """Called by socketserver, before handle()."""
        host, port = self.client_address[0].removeprefix("::ffff:"), self.client_address[1]  # IPv4 on an IPv6 socket
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}" if port else host
        self.method = self.target = ""
        self.headers: dict[str, str] = {}
        self.deadline = self.server._loop.now + self.server.handshake_timeout  # on the loop's clock
        self.verdict = ""  # set by the loop: the reason why the handler must not wait any more
        self._is_silent = True  # no data has arrived
        self._rest = b""  # data after the head of the request
        self._kept = 0  # bytes of the body that the budget counts
        self._is_closing = False  # close() was called: no more hooks except on_close
        self._inbox: Inbox | None = Inbox(is_pending=True)  # its steps and hooks
        self._tracers: tuple[Generator[None, bytes, None], ...] = ()  # with trace: of received and of sent data
        if self.server.trace:
            names = f"{self.address} in ", f"{self.address} out"
            self._tracers = tuple(follow(name, self.server._hooks.trace) for name in names)
            for tracer in self._tracers:
                next(tracer)  # run it until it waits for data

    def handle(self) -> None:
        """Called by socketserver: start the first step."""
        self._steps = self._serve()
        self.request.setblocking(False)
        try:
            self.server._room.add_pending(self, time.monotonic())
            start = self.go_on if self.server._slow_handshakes else self._step
            start()
        except BaseException:  # for example out of memory, or Ctrl-C
            self.server._room.remove(self)
            raise

    @property
    def address(self) -> str:
        """The peer's address, for people and the log. `admit` may set it, for example to what a proxy says."""
        return self._address

    @address.setter
    def address(self, address: str) -> None:
        self._address = printable(address, 100)  # it may come from a header field

    # ---- steps ----

    def go_on(self) -> None:
        """Let a hook thread run the next step."""
        if self._inbox:
            self.server._hooks.submit(self._inbox, self._step)

    def _step(self) -> None:
        server = self.server
        server._room.take_turn(self)
        server._local.client = self
        try:
            events = next(self._steps, None)
            if events == IN_HOOK_THREAD:
                self.go_on()
            elif events and not server._queue.put(functools.partial(server._loop.lobby.wait, self, events)):
                self._end()  # the loop has ended
        except Exception:
            server.handle_error(self.request, self.address)
            self._end()
        except BaseException:  # Ctrl-C
            self._end()
            raise
        finally:
            server._local.client = None

    def _serve(self) -> Steps[None]:
        """Read the request and answer it: all steps."""
        try:
            if self.request.family != AF_UNIX:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if isinstance(self.request, TLSSocket):
                yield from self._shake_tls_hands(self.request)
            request = yield from self._read_request()
            if not request.upgrades:
                yield IN_HOOK_THREAD
            yield from self._answer(request)
        except HandshakeError as error:
            self._refuse(error)
        except OSError as error:
            level = logging.DEBUG if self._is_silent else logging.INFO
            line = "%s gone before the response: %s"
            self.server._hooks.log(level, line, self.address, printable(str(error)))
            self._end()
        finally:
            self.server._budget.give_back(self._kept)

    def _end(self) -> None:
        """Close the connection without an answer."""
        if self.server._room.remove(self):
            if isinstance(self.request, TLSSocket):
                with contextlib.suppress(OSError):  # it need not reach the peer
                    self.request.end_tls()
            self.server.shutdown_request(self.request)

    # ---- receiving ----

    def _wait(self, error: OSError) -> Steps[None]:
        """Wait until the socket is ready again. Raise HandshakeError at the deadline, OSError to give up."""
        yield selectors.EVENT_WRITE if isinstance(error, ssl.SSLWantWriteError) else selectors.EVENT_READ
        if self.verdict == TOO_LATE and self._is_silent:  # for example a spare connection of a browser
            raise ConnectionAbortedError("it was silent")
        if self.verdict == TOO_LATE:
            raise HandshakeError(408, TOO_LATE)
        if self.verdict:
            raise ConnectionAbortedError(self.verdict)

    def _shake_tls_hands(self, connection: TLSSocket) -> Steps[None]:
        """Do the handshake of TLS (RFC 8446 2). Raise HandshakeError if the client speaks plain HTTP."""
        while True:
            try:
                if self._is_silent:
                    start = connection.peek()
                    self._is_silent = not start
                    if start.isalpha():
                        self.request = connection.without_tls()
                        raise HandshakeError(400, "this port speaks TLS: the address begins with https:// or wss://")
                connection.do_handshake()
                return
            except WOULD_BLOCK as error:
                try:
                    yield from self._wait(error)
                except HandshakeError:  # the answer would need TLS
                    raise TimeoutError(TOO_LATE) from None

    def _read_request(self) -> Steps[Request]:
        """Return the request, without its body."""
        data, request = bytearray(), None
        while not request:
            piece = self._receive()
            if self._blocked:
                yield from self._wait(self._blocked)
            else:
                request = parse_request(data, piece)
        self._rest = bytes(data)
        self.method, self.headers = request.method, request.headers
        self.target = ABSOLUTE_FORM.sub("/", MARK.sub("", request.target))  # only the page and join() use the mark
        return request

    def _receive(self, size: int = SMALL_READ_SIZE) -> bytes:
        """Return the data that has arrived, or b"" if none has. Raise OSError at the end of the connection."""
        self._blocked: OSError | None = None
        try:
            data = self.request.recv(size)
        except WOULD_BLOCK as error:
            self._blocked = error
            return b""
        if not data:
            raise ConnectionError("the connection ended")
        self._is_silent = False
        if self._tracers:
            self._tracers[0].send(data)
        return data

    def _read_body(self, request: Request, length: int) -> Steps[bytes]:
        """Return the body of a POST when its message may be broadcast. Raise HandshakeError, OSError."""
        server, later = self.server, ("Retry-After", "1")
        require(not server._link or not server._link.away, 503, "Redis is away", later)
        self.deadline = max(self.deadline, server._loop.now + server.handshake_timeout) + length / SLOWEST_POST
        arriving = itertools.chain([self._rest], iter(functools.partial(self._receive, READ_SIZE), None))
        self._rest = b""
        body = bytearray()
        turn_end = time.monotonic() + STUCK_TIME / 2
        for piece in read_body(request, length, arriving, server.max_message):
            body += piece
            has_room = server._budget.take(len(body) - self._kept, server._budget.reserve)
            require(has_room, 503, "too many messages are unfinished", later)
            self._kept = len(body)
            require(server._loop.now <= self.deadline, 408, TOO_LATE)  # endless trailers leave nothing to wait for
            if self._blocked or time.monotonic() > turn_end:  # millions of small chunks take long: others have a turn
                yield from self._wait(self._blocked or ssl.SSLWantWriteError())
                turn_end = time.monotonic() + STUCK_TIME / 2
        paced = server._post_pace.wait(server.handshake_timeout)
        require(paced, 429, f"there are more than {server.rate:g} posts a second", later)
        require(server._wait_for_space(server.handshake_timeout), 503, "too much waits to be sent", later)
        return bytes(body)

    # ---- answering ----

    def _refuse(self, error: HandshakeError) -> None:
        """Answer a request with an error."""
        server = self.server
        server._hooks.log(logging.WARNING, "%s refused: %d, %s", self.address, error.status, printable(str(error)))
        server._refused += 1
        text = f"{error.status.value} {error.status.phrase}: {error}\n"
        body = text.encode(errors="replace")  # the message may come from a hook
        request = Request(self.method, self.target, (1, 1), self.headers)
        self._respond(http_response(request, error.status, "text/plain; charset=utf-8", body, *error.fields))


class WebSocketHandler(RequestHandler):
    """One connection. After its opening handshake it is a client.

    For hooks and other threads:

    - send(message), close(code, reason)
    - method, target: of the request: GET for a WebSocket, or POST; the target with its query
    - headers: the request's header fields, names in lower case, repeated ones joined by commas
    - address: the peer's address and port, for people; `admit` may set it, for example from a proxy's header
    - subprotocol: the one chosen from those that the client offers, or ""; `admit` may set it
    - data: for the program's own use; None at first
    """

    def setup(self) -> None:
        """Called by socketserver, before handle()."""
        super().setup()
        self.subprotocol = ""
        self.data: Any = None
        self._early = b""  # a Close that was queued before it joined; the room's lock guards this and _connection
        self._connection: Connection | None = None  # after it has joined

    # ---- for hooks and other threads ----

    def send(self, message: Message) -> None:
        """Send text (str) or binary (bytes) to this client alone, in order with all else. Any thread.

        If the client has gone or is closing, the message is discarded. Raise TypeError unless the
        message is str or bytes.
        """
        self.server._put(outgoing_message(message, (self,)))

    def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Begin the closing handshake, after all data that was sent before (7.1.2). Any thread.

        After that, on_close is the only hook that is called for this client. The reason is cut to
        123 bytes. Raise ValueError for a code that must not be sent (7.4).
        """
        if code not in CODES_ON_THE_WIRE:
            raise ValueError(f"{code} is not a close code that may be sent")
        frame = serialize_close(code, reason)
        self._is_closing = True
        self.server._room.close(self, frame)

    # ---- in its steps ----

    def _answer(self, request: Request) -> Steps[None]:
        """Open a WebSocket, or answer in HTTP. Raise HandshakeError, OSError."""
        check_host(request)
        if request.upgrades:
            self._open(request)
        else:
            response = yield from answer(self, request)
            self._respond(response)

    def _respond(self, response: bytes) -> None:
        """Let the loop send a response and end the connection."""
        connection = Connection(self, MessageReader(0), 0, self.server._loop.now)
        connection.state, connection.last_seen = State.ENDING, self.server._room.bytes
        if not self.server._room.dismiss(connection, response):  # for example, a hook has stopped the server
            with contextlib.suppress(OSError):
                self.request.settimeout(self.server.close_timeout or None)
                self.request.sendall(response)
            self._end()

    def _send(self, data: bytes) -> None:
        """Send a few bytes before the response. Raise OSError."""
        self.request.send(data)
        if self._tracers:
            self._tracers[1].send(data)

    def _call(self, hook: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a hook for a request. Raise HandshakeError: the hook's, 403 after close(), or 500."""
        require(not self._is_closing, 403, "not admitted")
        try:
            result = hook(self, *arguments)
        except HandshakeError:
            raise
        except BaseException as error:
            self.server._hooks.log(logging.ERROR, "%s: an error in a hook", self.address, error=error)
            raise HandshakeError(500, "internal error") from None
        require(not self._is_closing, 403, "not admitted")
        return result

    def _open(self, request: Request) -> None:
        """Complete the opening handshake and join the room. Raise HandshakeError, OSError."""
        server, room = self.server, self.server._room
        response, window, takeover = self._check(request)
        mark = MARK.search(request.target)
        reader = MessageReader(server.max_message, bool(window), takeover)
        connection = Connection(self, reader, window, server._loop.now)
        if self._rest:  # the client did not wait for the 101
            connection.events = connection.source = reader.feed(self._rest)
            self._rest = b""
        if self._inbox and server._overrides("on_open"):  # until it returns, messages wait in the inbox
            self._inbox.is_pending = False
        else:
            self._inbox = None
        room.join(connection, response, mark[1] if mark else "")
        if log.isEnabledFor(logging.DEBUG):
            line, count = "%s joined %s: %s", plural(len(room), "client")
            server._hooks.log(logging.DEBUG, line, self.address, printable(self.target), count)
        if self._inbox and not self._is_closing:
            self._run_hook(server.on_open)

    def _check(self, request: Request) -> tuple[bytes, int, bool]:
        """Return the response to an opening handshake (4.2), the window, and whether the client takes over its context.

        Raise HandshakeError.
        """
        accept = check_upgrade(request)
        check_origin(request, self.server.origins)
        fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]
        window, extension = 0, ""
        if self.server.compression:
            window, extension = negotiate_deflate(request.headers.get("sec-websocket-extensions", ""))
        if extension:
            fields.append(("Sec-WebSocket-Extensions", extension))
        self.subprotocol = choose_subprotocol(request, self.server.subprotocols)
        if self.server._overrides("admit"):  # else this may be the main thread, where Ctrl-C is no error of a hook
            self._call(self.server.admit)
        fields += self._answer_subprotocol(request)
        return serialize_response(101, fields), window, "client_no_context_takeover" not in extension

    def _answer_subprotocol(self, request: Request) -> list[tuple[str, str]]:
        """Return the header field that names the chosen subprotocol, if any. Raise HandshakeError."""
        if self.subprotocol:
            # It may come from a hook.
            require(re.fullmatch(TOKEN, self.subprotocol), 500, f"{self.subprotocol!a} is no subprotocol")
            return [("Sec-WebSocket-Protocol", self.subprotocol)]
        offered = printable(", ".join(request.elements("sec-websocket-protocol")))
        require(not offered or self.server.subprotocols is None, 400, f"the subprotocol {offered} is not served")
        if offered:
            line = "%s offers the subprotocol %s, none is chosen: browsers close now"
            self.server._hooks.log(logging.WARNING, line, self.address, offered)
        return []

    def _run_hook(self, hook: Callable[..., object], *arguments: Any) -> None:
        """Call a hook in a hook thread. An exception ends this client only."""
        server = self.server
        server._local.client = self
        try:
            hook(self, *arguments)
        except BaseException as error:
            server._hooks.log(logging.ERROR, "%s: an error in a hook", self.address, error=error)
            self._is_closing = True
            sender, refusal = server._loop.sender, (CloseCode.INTERNAL_ERROR, "internal error")
            server._queue.put(functools.partial(sender.guard, sender.refuse, self._connection, *refusal))
        finally:
            server._local.client = None

    def _take_message(self, opcode: int, payload: Octets) -> None:
        """Call on_message, in a hook thread."""
        if not self._is_closing:
            message = payload.decode() if opcode == TEXT else bytes(payload)
            self._run_hook(self.server.on_message, message)

    # ---- in the loop ----

    def _submit(self, call: Callable[[], object]) -> None:
        """Let a hook thread run a call, after those that were submitted before."""
        self._inbox = self._inbox or Inbox()
        self.server._hooks.submit(self._inbox, call)

    def _has_left(self, code: int, reason: str) -> None:
        """Log that the client has left, and call on_close."""
        hooks = self.server._hooks
        if reason:  # the log limits lines with the same text, so let the text differ
            hooks.log(logging.INFO, f"%s left: {code:d} %s", self.address, printable(reason))
        else:
            hooks.log(logging.INFO, f"%s left: {code:d}", self.address)
        if self.server._overrides("on_close"):
            self._submit(functools.partial(self._run_hook, self.server.on_close, code, reason))


# ======================================================================================
# Room: the clients and the queue, for all threads
# ======================================================================================

QUEUE_SIZE = 4 * 1024 * 1024  # bytes; if more is queued, senders wait
RUN_SIZE = 1024 * 1024  # bytes of messages that are sent together
RUN_LENGTH = 4000  # operations; if more are queued, they are carried out before the loop reads on
MESSAGE_COST = 250  # bytes that the objects of a message take
RECIPIENT_COST = 2048  # bytes that each recipient in `to` counts, so that 2,000 sends fill the queue
KNOWN_COST = 128  # bytes that it counts if it gets another queued message, too: both are one send
MOST_WAITING = 50  # handlers that may wait for a thread before the server accepts more connections
GIVEN_UP = -1.0  # instead of the time of a pending connection
MOST_SELECTED = 500  # clients if the system has only select(), which takes 512 sockets on Windows
SPARE_SELECTED = 10  # further sockets of select(), for pending connections
TOO_MANY_SELECTED = f"there are {MOST_SELECTED} clients already, the most that this system allows (select)"
Sends = dict[WebSocketHandler, Send]  # each client, and the function that sends to it
Delivery = tuple[int, Sequence[Outgoing], Sends]  # the window, messages, and the clients that get them


def uses_select() -> bool:
    """Return whether the system has only select(), which takes few sockets."""
    return issubclass(selectors.DefaultSelector, selectors.SelectSelector)


class Queue:
    """Operations for the loop, in one order: messages, Pongs and calls.

    Any thread puts operations in. The loop takes them out, and never waits.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards the attributes below; an RLock, since a __del__ may broadcast anywhere
        self._space = threading.Condition(self._lock)  # notified when senders may go on
        self._operations: list[Any] = []
        self._size = 0  # bytes of the operations
        self._recipients: set[WebSocketHandler] = set()  # of queued messages to some clients
        self.held = False  # senders wait for a quick client that is behind
        self.waiting: set[int] = set()  # threads in wait_for_space()
        self._is_asleep = False  # the loop waits in select() until a byte wakes it
        self.has_ended = False  # the loop has ended
        self._alarm: socket.socket | None = None
        self._ring: socket.socket | None = None  # a byte sent here wakes the loop
        self.loop_thread = 0  # the thread that never waits in wait_for_space()
        self.quiet_thread = 0  # the thread whose operations do not wake the loop: it does that later
        self.locks: tuple[Any, ...] = ()  # locks that the loop takes, too: RLocks, which know their owner

    # ---- any thread ----

    def put(self, operation: Any, size: int = MESSAGE_COST) -> bool:
        """Queue an operation, without waiting. Return False if the loop has ended."""
        with self._lock:
            if self.has_ended:
                return False
            self._operations.append(operation)
            self._size += size
            wake = self._is_asleep and threading.get_ident() != self.quiet_thread
            self._is_asleep = self._is_asleep and not wake
        if wake:
            self.wake()
        return True

    def put_message(self, message: Outgoing) -> None:
        """Queue a message. Wait while the queue is full."""
        with self._lock:
            cost = self._recipient_cost(message.to) if message.to else 0
            self.put(message, message.size + MESSAGE_COST + min(cost, QUEUE_SIZE // 2))
        if self.is_full:
            self.wait_for_space()

    def _recipient_cost(self, to: Sequence[WebSocketHandler]) -> int:
        """Return what the recipients of a message count (bytes). The caller has the lock."""
        known = len(self._recipients.intersection(to))
        self._recipients.update(to)
        return KNOWN_COST * known + RECIPIENT_COST * (len(to) - known)

    def may_wait(self) -> bool:
        """Return whether this thread may wait for the loop: not the loop itself, nor a __del__ within a lock."""
        return threading.get_ident() != self.loop_thread and not any(lock._is_owned() for lock in self.locks)

    def wait_for_space(self, timeout: float | None = None) -> bool:
        """Wait while senders must wait. Return False after `timeout` (seconds)."""
        if not self.may_wait():
            return True
        me = threading.get_ident()
        with self._lock:
            self.waiting.add(me)
            try:
                return self._space.wait_for(lambda: not self.is_full, timeout)
            finally:
                self.waiting.discard(me)

    @property
    def is_full(self) -> bool:
        """Return whether senders must wait: too much is queued, or a quick client is behind."""
        return (self._size > QUEUE_SIZE or self.held) and bool(self.loop_thread) and not self.has_ended

    def wake(self) -> None:
        """Wake the loop."""
        with contextlib.suppress(OSError, MemoryError):  # the alarm is full of bytes, or closed
            if self._ring:
                self._ring.send(b"!")

    # ---- the loop ----

    def open(self, selector: selectors.BaseSelector) -> None:
        """Create the alarm, and let the selector wait for it."""
        self._alarm, self._ring = socket.socketpair()
        self._alarm.setblocking(False)
        self._ring.setblocking(False)
        selector.register(self._alarm, selectors.EVENT_READ, self._hear_alarm)

    def put_own(self, operation: Any) -> None:
        """Queue an operation of the loop itself for this round."""
        self._operations.append(operation)

    def __len__(self) -> int:
        return len(self._operations)

    def fall_asleep(self) -> bool:
        """Return whether nothing is queued. If so, the next operation wakes the loop."""
        with self._lock:
            self._is_asleep = not self._operations
            return self._is_asleep

    def _hear_alarm(self) -> None:
        """Read the bytes that woke the loop."""
        with contextlib.suppress(OSError):  # there are none, or the queue has ended
            if self._alarm:
                self._alarm.recv(4096)

    def take(self) -> list[Any]:
        """Return all operations, and empty the queue."""
        if not self._operations:
            return []
        with self._lock:
            operations, self._operations = self._operations, []
            if self._recipients:
                self._recipients = set()
            was_full, self._size = self._size > QUEUE_SIZE, 0
            if was_full:
                self._space.notify_all()
        return operations

    def hold(self, held: bool) -> None:
        """Let senders wait for a quick client, or let them go on."""
        if held != self.held:
            with self._lock:
                self.held = held
                self._space.notify_all()

    def end(self) -> None:
        """Refuse further operations, and let senders go on."""
        with self._lock:
            self.has_ended = True
            self._operations.clear()
            self._space.notify_all()
        for end in (self._alarm, self._ring):
            if end:
                end.close()


class Registry:
    """All connections: pending ones, and those that the loop owns. Any thread.

    One lock guards all of it. Code that holds it is short and never waits.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # an RLock, since a __del__ may broadcast anywhere
        self.pending: dict[RequestHandler, float] = {}  # before their answer, oldest first; when each was accepted
        self.waiting: set[RequestHandler] = set()  # handlers that wait for a hook thread or for the loop
        self.connections: set[Connection] = set()  # after their answer: those that the loop owns
        self.answered: dict[Connection, float] = {}  # those that get a response only, oldest first; since when
        self._is_closing = False  # clients that join now get 1001
        self._fewer = threading.Condition(self.lock)  # notified when a connection has ended, or few handlers wait

    @property
    def size(self) -> int:
        """The number of connections, including pending ones."""
        return len(self.pending) + len(self.connections)

    def add_pending(self, handler: RequestHandler, now: float) -> None:
        """Add a connection that was accepted."""
        with self.lock:
            self.pending[handler] = now
            self.waiting.add(handler)
            if self._is_closing:
                handler.verdict = "the server is stopping"

    def take_turn(self, handler: RequestHandler) -> None:
        """A hook thread begins with a handler, or the loop has taken its connection."""
        with self.lock:
            self.waiting.discard(handler)
            if len(self.waiting) == MOST_WAITING:
                self._fewer.notify_all()

    def wait_for_turn(self, timeout: float) -> None:
        """Wait until few handlers wait for a hook thread or for the loop, or until `timeout` (seconds)."""
        with self.lock:
            self._fewer.wait_for(lambda: len(self.waiting) <= MOST_WAITING, timeout)

    def remove(self, handler: RequestHandler) -> bool:
        """Remove a pending connection. Return whether it was still pending."""
        with self.lock:
            self._fewer.notify_all()
            self.waiting.discard(handler)
            return self.pending.pop(handler, None) is not None

    def forget(self, connection: Connection) -> None:
        """Remove a connection that has ended."""
        with self.lock:
            self._fewer.notify_all()
            self.connections.discard(connection)
            self.answered.pop(connection, None)

    def wait_for(self, number: int, end: float, own: WebSocketHandler | None = None) -> None:
        """Wait until there are at most `number` connections without that of `own`, or until `end` (monotonic)."""
        with self.lock:
            while self.size - self._has(own) > number and time.monotonic() < end:
                self._fewer.wait(0.1)  # in slices: a signal may come

    def _has(self, client: WebSocketHandler | None) -> bool:
        return client is not None and (client in self.pending or client._connection in self.connections)


class Room(Registry):
    """The shared set of clients, and the history, under the same lock. Any thread."""

    def __init__(self, queue: Queue, max_clients: int, history: int, history_size: int) -> None:
        super().__init__()
        self._queue = queue
        self._max_clients = max_clients
        self.most_selected = MOST_SELECTED if uses_select() else sys.maxsize
        self._sends: dict[int, Sends] = {}  # the client set, by window; see Sends
        self.adopt: Callable[[Connection, Callable[[], list[bytes]]], None]  # these four are set by the loop
        self.close_connections: Callable[[list[Connection], bytes], None]
        self.give_up: Callable[[RequestHandler, str], None]
        self.drop: Callable[[Connection, str], None]

        self._history: deque[Outgoing] = deque()
        self._history_length = history  # messages
        self._history_limit = history_size  # bytes of payload
        self._history_size = 0
        self.messages = self.bytes = 0  # broadcast so far; bytes of payload
        self._preparing = threading.Lock()  # so that only one thread compresses the history

    # ---- the set of clients ----

    @property
    def clients(self) -> set[WebSocketHandler]:
        """A copy of the set of clients."""
        with self.lock:
            return set().union(*self._sends.values())

    def __len__(self) -> int:
        return sum(map(len, self._sends.values()))

    def join(self, connection: Connection, response: bytes, mark: str) -> None:
        """CONNECTING to OPEN: put the client into the set. Raise HandshakeError.

        The queue determines the client's first message: at the place of this operation, the loop
        sends the response, the history, and the mark with which the page finds the end of the
        history.
        """
        client, window = connection.client, connection.window
        frames, number = self._prepare_history(window)
        end = [serialize_frame(TEXT, mark.encode())] if mark else []

        def first() -> list[bytes]:
            return [response, *self._complete_history(window, frames, number), *end]

        adopt = functools.partial(self.adopt, connection, first)
        with self.lock:
            require(len(self) < self._max_clients, 503, f"there are {self._max_clients} clients already")
            require(len(self) < self.most_selected, 503, TOO_MANY_SELECTED)
            require(self._queue.put(adopt), 503, "the server is stopping")
            self._sends.setdefault(window, {})[client] = discard
            client._connection = connection
            del self.pending[client]
            self.connections.add(connection)
            self.waiting.add(client)
            early = client._early or (serialize_close(CloseCode.GOING_AWAY) if self._is_closing else b"")
            if early:
                self._queue.put(functools.partial(self.close_connections, [connection], early))

    def dismiss(self, connection: Connection, response: bytes) -> bool:
        """CONNECTING to ENDING: let the loop send a response. Return False if the loop has ended."""
        with self.lock:
            self.waiting.add(connection.client)
            if not self._queue.put(functools.partial(self.adopt, connection, lambda: [response])):
                return False
            del self.pending[connection.client]
            self.connections.add(connection)
            self.answered[connection] = time.monotonic()
            return True

    def _prepare_history(self, window: int) -> tuple[list[bytes], int]:
        """Return the frames of the history for a new client, and how many messages were broadcast before."""
        with self.lock:
            messages, number = list(self._history), self.messages
        with self._preparing:
            return [message.frame(window, LONG_MESSAGE) for message in messages], number

    def _complete_history(self, window: int, frames: list[bytes], number: int) -> list[bytes]:
        """Return the frames of the history, of which these were prepared. Runs in the loop."""
        with self.lock:
            length = len(self._history)
            newer = min(self.messages - number, length)
            messages = list(itertools.islice(self._history, length - newer, None))
        prepared = frames[max(0, len(frames) + newer - length) :]
        return prepared + [message.frame(window, DEFLATE_THRESHOLD) for message in messages]

    def set_send(self, connection: Connection, send: Send) -> None:
        """Set the function that sends to a client, if the client is still in the set."""
        with self.lock:
            sends = self._sends.get(connection.window, {})
            if connection.client in sends:
                sends[connection.client] = send

    def leave(self, connection: Connection) -> bool:
        """Remove a client from the set. Return whether it was there."""
        with self.lock:
            sends = self._sends.get(connection.window, {})
            found = sends.pop(connection.client, None) is not None
            if not sends:
                self._sends.pop(connection.window, None)
            return found

    def close(self, client: WebSocketHandler, frame: bytes) -> None:
        """Queue a Close for a client. If it has not joined yet, it gets the Close when it does."""
        with self.lock:
            if not client._connection:
                client._early = client._early or frame
                return
            self._queue.put(functools.partial(self.close_connections, [client._connection], frame))

    def close_all(self) -> None:
        """Queue a Close with 1001 for all clients, including those that join later, and end pending connections."""
        with self.lock:
            self._is_closing = True
            frame = serialize_close(CloseCode.GOING_AWAY)
            self._queue.put(functools.partial(self.close_connections, list(self.connections), frame))
            for handler in self.pending:
                self._queue.put(functools.partial(self.give_up, handler, "the server is stopping"))

    # ---- messages ----

    def recipients(self, messages: Sequence[Outgoing]) -> list[Delivery]:
        """Return the clients that get these messages, which are all to all clients, or all to some of them.

        Add messages to all clients to the history.
        """
        if messages[0].to is not None:
            return self._some(messages)
        with self.lock:
            self.messages += len(messages)
            self.bytes += sum([message.size for message in messages])
            if self._history_length:
                self._remember(messages)
            return [(window, messages, sends.copy()) for window, sends in self._sends.items()]

    def _some(self, messages: Sequence[Outgoing]) -> list[Delivery]:
        """Return the recipients of messages to some clients. Put those together that get the same messages."""
        chosen: dict[WebSocketHandler, list[Outgoing]] = defaultdict(list)
        for message in messages:
            for client in message.to or ():
                chosen[client].append(message)
        groups: dict[tuple[int, tuple[Outgoing, ...]], Sends] = defaultdict(dict)
        with self.lock:
            for client, its in chosen.items():
                window = client._connection.window if client._connection else 0
                send = self._sends.get(window, {}).get(client)
                if send:
                    groups[window, tuple(its)][client] = send
        return [(window, its, sends) for (window, its), sends in groups.items()]

    def _remember(self, messages: Sequence[Outgoing]) -> None:
        """Add messages to the history, and drop the oldest above its limits."""
        self._history.extend(messages)
        self._history_size += sum([message.size + MESSAGE_COST for message in messages])
        while len(self._history) > self._history_length or self._history_size > self._history_limit:
            self._history_size -= self._history.popleft().size + MESSAGE_COST

    @property
    def compresses(self) -> bool:
        """Return whether any client has compression."""
        return any(self._sends.copy())

    def compress(self, message: Outgoing) -> None:
        """Compress a message for all present clients, outside the loop."""
        if message.size >= DEFLATE_THRESHOLD:
            for window in list(self._sends):
                message.frame(window)


def send_nothing(data: Octets | memoryview) -> int:
    """Stand in for send() of a client with data in its outbox."""
    return 0


def discard(data: Octets | memoryview) -> int:
    """Stand in for send() of a client that is closing: it gets no more messages."""
    return len(data)


# ======================================================================================
# Loop: the thread that owns the sockets of all clients
# ======================================================================================


HOLD_TIME = 0.05  # seconds between two checks of the quick clients that senders wait for


class Budget:
    """The number of bytes that unfinished messages and bodies of POSTs may take together. Any thread."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.reserve = size // 8  # bytes that only short messages may take
        self.lock = threading.RLock()

    def take(self, size: int, spare: int = 0, force: bool = False) -> bool:
        """Take bytes from the budget. Return False, and take none, if fewer than `spare` would be left."""
        with self.lock:
            if size > self.left - spare and not force:
                return False
            self.left -= size
            return True

    def give_back(self, size: int) -> None:
        """Return bytes to the budget."""
        with self.lock:
            self.left += size


class Unfinished:
    """Divides the budget among connections with unfinished messages. Runs in the loop.

    If the budget is used up, connections that need more are paused, and resumed one at a time.
    The *first* of them may exceed the budget, so that there is always progress. While others
    wait, connections end that send less than SLOWEST_POST.
    """

    GRACE = 2.0  # seconds over which the rate of a sender is measured

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._first: Connection | None = None  # may exceed the budget
        self._holders: set[Connection] = set()  # connections that have taken from the budget
        self.waiting: set[Connection] = set()  # paused until the budget has room

    def grow(self, connection: Connection, now: float) -> bool:
        """Take the growth of a message from the budget. Return False if the connection must wait."""
        size = connection.reader.size - connection.kept
        is_first = self._first in (None, connection)
        if not self._budget.take(size, spare=self._spare(connection)):
            if not is_first:
                self.waiting.add(connection)
                return False
            self._first = connection
            self._budget.take(size, force=True)
        if not connection.kept:
            self._holders.add(connection)
            connection.began, connection.received = now, 0
        connection.kept += size
        connection.received += size
        return True

    def _spare(self, connection: Connection) -> int:
        """Return the number of bytes that this connection must leave: the reserve, unless its message is short."""
        return 0 if connection.reader.size <= INFLATER_SIZE + INFLATE_SIZE else self._budget.reserve

    def release(self, connection: Connection) -> None:
        """Give back to the budget: the message is complete, or its connection ends."""
        self._budget.give_back(connection.kept)
        self.waiting.discard(connection)
        connection.kept = 0
        self._holders.discard(connection)
        if self._first is connection:
            self._first = None

    def take_ready(self) -> list[Connection]:
        """Return waiting connections that may go on, short messages first: all that have room, or one."""
        left = self._budget.left
        ready: list[Connection] = []
        for connection in sorted(self.waiting, key=lambda each: each.reader.size):
            size = connection.reader.size - connection.kept
            if size > left - self._spare(connection) and (self._first or ready):
                break
            left -= size
            self.waiting.remove(connection)
            if connection.paused and connection.state in READABLE:
                ready.append(connection)
        return ready

    def slow_ones(self, now: float) -> list[Connection]:
        """Return connections that send too slowly while others wait."""
        if not self.waiting:
            return []
        slow = []
        for connection in self._holders:
            if connection.paused or now - connection.began < self.GRACE:
                continue
            if connection.received < self.GRACE * SLOWEST_POST:
                slow.append(connection)
            else:
                connection.began, connection.received = now, 0
        return slow


class Gate:
    """Decides whether a client may send a message now. Runs in the loop.

    A connection that may not is paused until to_resume() returns it.
    """

    def __init__(self, server: BroadcastServer) -> None:
        self._server, self._queue = server, server._queue
        self.has_limits = bool(server.read_only or server.rate or server._link)
        self.unfinished = Unfinished(server._budget)
        self._held_back: list[Connection] = []  # paused until senders may go on, and the link to Redis has room
        self._alarms: list[tuple[float, int, Connection]] = []  # a heap: paused by the rate, until when
        self._count = itertools.count()

    def lets_through(self, connection: Connection, now: float, is_complete: bool = True) -> bool:
        """Return whether a client may send a message, or more of it, now. Raise ProtocolError if it never may."""
        server = self._server
        if server.read_only:
            raise ProtocolError("this server only sends", CloseCode.POLICY_VIOLATION)
        if self._queue.held or (server._link and server._link.is_full):
            self._held_back.append(connection)
            return False
        if server.rate:
            connection.pace = connection.pace or Pace()
            wait = connection.pace.wait_time(server.rate, now)
            if wait:
                heapq.heappush(self._alarms, (now + wait, next(self._count), connection))
                return False
            if is_complete:
                connection.pace.take(server.rate, now)
        return True

    def look(self, slow: Iterable[Connection], now: float) -> None:
        """Let senders wait if a quick client is far behind."""
        limit = self._server.max_backlog // 2
        behind = [connection for connection in slow if connection.size > limit]
        self._queue.hold(any(connection.is_quick(now) for connection in behind))

    def wait_time(self, now: float) -> float:
        """Return the number of seconds until a connection may have to be resumed, or infinity."""
        wait = HOLD_TIME if self._held_back or self.unfinished.waiting or self._queue.held else math.inf
        return min(wait, self._alarms[0][0] - now) if self._alarms else wait

    def to_resume(self, now: float) -> list[Connection]:
        """Return the connections that may go on."""
        connections = self.unfinished.take_ready()
        while self._alarms and self._alarms[0][0] <= now:
            connections.append(heapq.heappop(self._alarms)[2])
        link = self._server._link
        if self._held_back and not self._queue.held and not (link and link.is_full):
            connections += self._held_back
            self._held_back = []
        return connections


class Sender:
    """Sends to connections and ends them; it makes every change of their State. Runs in the loop."""

    def __init__(self, server: BroadcastServer) -> None:
        self._server, self._room, self._hooks = server, server._room, server._hooks
        self.now = 0.0  # seconds on the loop's clock
        self.selector: selectors.BaseSelector  # of all clients
        self.slow: set[Connection] = set()  # connections with data in their outbox
        self.slices = SENDS_AT_ONCE  # sends to one slow client before others go on
        self.dropped = 0  # clients dropped so far, for the status
        self.gate = Gate(server)

    def guard(self, act: Callable[..., object], connection: Connection | None, *arguments: Any) -> None:
        """Call `act` for a connection. An exception ends this connection only."""
        if connection and connection.state is not State.CLOSED:
            try:
                act(connection, *arguments)
            except Exception as error:
                self.fail_to_send(connection, error)

    # ---- sending ----

    def adopt(self, connection: Connection, first: Callable[[], list[bytes]]) -> None:
        """Take a connection over from its handler, and send the first data."""
        self._room.take_turn(connection.client)
        connection.keep_all(first(), self.now)
        self.slow.add(connection)
        self.flush(connection)
        if connection.pieces:
            self._room.set_send(connection, send_nothing)

    def write(self, connection: Connection, data: bytes) -> None:
        """Send to one client, after its outbox."""
        sent = 0
        if not connection.pieces:
            with contextlib.suppress(*WOULD_BLOCK):
                sent = connection.send(data)
        if sent < len(data):
            self.keep(connection, data, sent)

    def keep(self, connection: Connection, data: Octets, sent: int) -> None:
        """Put data that the socket did not accept into the outbox. Drop a client that is too far behind."""
        if connection.pieces:
            is_behind = connection.size >= self._server.max_backlog and not connection.is_quick(self.now)
            if is_behind and connection.state is State.OPEN:
                self.drop(connection, f"it was {connection.size} bytes behind")
                return
        else:
            connection.moved = self.now
        connection.keep(data, sent, self.now)
        if connection not in self.slow:
            self.slow.add(connection)
            if connection.state is State.OPEN:
                self._room.set_send(connection, send_nothing)
            self.watch(connection)

    def pong(self, connection: Connection, frames: list[bytes]) -> None:
        """Answer Pings. If the outbox has data, only the newest one is answered (5.5.3)."""
        if connection.pongs is frames:
            connection.pongs = []
        if connection.state is not State.OPEN:
            return
        if connection.pieces:
            connection.pong = frames[-1]
        else:
            self.write(connection, b"".join(frames))

    def flush(self, connection: Connection) -> None:
        """Send from the outbox: the socket accepts data again."""
        if connection.state is State.CLOSED:
            return
        connection.flush(self.now, self.slices)
        if not connection.pieces:
            self.slow.discard(connection)
            if connection.state is State.OPEN:
                self._room.set_send(connection, connection.send)
            elif connection.state is State.ENDING:
                self._finish(connection)
        self.watch(connection)

    def watch(self, connection: Connection) -> None:
        """Tell the selector which events this connection waits for."""
        events = connection.wanted_events()
        if events == connection.interest:
            return
        if not events:
            self.selector.unregister(connection.socket)
        else:
            change = self.selector.modify if connection.interest else self.selector.register
            change(connection.socket, events, connection)
        connection.interest = events

    # ---- ending ----

    def close(self, connection: Connection, frame: bytes) -> None:
        """OPEN to CLOSING: send a Close, and wait for the peer's."""
        if connection.state is not State.OPEN:
            return
        self._enter(connection, State.CLOSING)
        connection.client._is_closing = True
        self._room.set_send(connection, discard)
        self.write(connection, frame)

    def end(self, connection: Connection, code: int, reason: str, frame: bytes = b"") -> None:
        """OPEN or CLOSING to ENDING: send the Close `frame` unless one was sent, and end the connection."""
        if connection.state not in READABLE:
            return
        was_open = connection.state is State.OPEN
        self._enter(connection, State.ENDING)
        self.stop_reading(connection)
        self._leave(connection, code, reason)
        if frame and was_open:
            self.write(connection, frame)
        self.flush(connection)

    def _enter(self, connection: Connection, state: State) -> None:
        connection.state, connection.moved = state, self.now
        connection.pong, connection.last_seen = b"", self._room.bytes

    def _finish(self, connection: Connection) -> None:
        """If all is sent, end the server's side of TCP. If the peer has ended its side too: CLOSED."""
        if not connection.is_shut and not connection.pieces:
            with contextlib.suppress(BlockingIOError):
                connection.end_sending()
                connection.moved = self.now
        if connection.is_shut and connection.peer_ended:
            self._forget(connection)

    def peer_has_ended(self, connection: Connection) -> None:
        """The peer has ended its side of TCP (half-closed), perhaps without a Close. It may still read."""
        connection.peer_ended = True
        if connection.state is State.ENDING:
            self._finish(connection)
            self.watch(connection)
        else:
            self.end(connection, CloseCode.ABNORMAL_CLOSURE, "")

    def drop(self, connection: Connection, why: str) -> None:
        """To CLOSED, because of a limit. Reset the connection.

        Do not reset it if it is closing and the system has all its data: a slow peer may still
        read that.
        """
        if connection.state is State.OPEN:
            self.dropped += 1
        if connection.state is State.OPEN or connection.size:
            reset(connection.socket)
        connection.client._is_closing = True  # its hooks get no more messages
        self._leave(connection, CloseCode.ABNORMAL_CLOSURE, why)
        self._forget(connection)

    def fail_to_send(self, connection: Connection, error: Exception) -> None:
        """Send nothing more to a peer that has gone, but read what it has sent before. Otherwise end the connection.

        With a rate, reading could take minutes: end the connection.
        """
        is_gone = isinstance(error, ConnectionError) and connection.send is not discard
        if is_gone and connection.state is State.OPEN and not (connection.tls or self._server.rate):
            connection.send, connection.pieces, connection.size, connection.pong = discard, NOTHING, 0, b""
            self.flush(connection)
        else:
            self.fail(connection, error)

    def fail(self, connection: Connection, error: BaseException) -> None:
        """End a connection because of an exception. This is the whole policy of close codes for errors."""
        try:
            if isinstance(error, ProtocolError):
                self.refuse(connection, error.code, str(error))
            elif isinstance(error, MemoryError):
                self.refuse(connection, CloseCode.MESSAGE_TOO_BIG, "out of memory")
            elif isinstance(error, OSError):  # the socket failed
                raise error
            else:
                self._hooks.log(logging.ERROR, "%s: an error", connection.client.address, error=error)
                self.refuse(connection, CloseCode.INTERNAL_ERROR, "internal error")
        except Exception as last:
            self._leave(connection, CloseCode.ABNORMAL_CLOSURE, str(last))
            self._forget(connection)

    def refuse(self, connection: Connection, code: int, reason: str) -> None:
        """Send a Close with the reason, and end the connection."""
        self.end(connection, code, reason, serialize_close(code, reason))

    def stop_reading(self, connection: Connection) -> None:
        """Discard received data and an unfinished message."""
        connection.events = connection.source = None
        connection.reader = MessageReader(0)
        self.gate.unfinished.release(connection)

    def _leave(self, connection: Connection, code: int, reason: str) -> None:
        """Remove the client from the set, and tell its handler, once."""
        if self._room.leave(connection):
            connection.client._has_left(*(connection.close_heard or (code, reason)))

    def _forget(self, connection: Connection) -> None:
        """To CLOSED: close the socket, and release everything."""
        if connection.state is State.CLOSED:
            return
        connection.state = State.CLOSED
        self.stop_reading(connection)
        with contextlib.suppress(Exception):  # for example out of memory: close the socket anyway
            self.watch(connection)
        self.slow.discard(connection)
        connection.pieces, connection.size = NOTHING, 0
        connection.socket.close()
        self._room.forget(connection)


SLICE_TIME = 0.002  # seconds for the data of one connection in a round
LEAST_SLICE_TIME = 0.0001  # seconds; the same if many connections have data
ROUND_TIME = 0.01  # seconds of reading before the messages are sent
MAX_SUBMITTED = 64 * 1024  # bytes of messages that wait for one client's hooks
MAX_PONGS = 32  # Pongs that are sent together; of more, only the newest (5.5.3)


class Endings:
    """Connections that are about to end: a few per round, since thousands may end at once. Runs in the loop."""

    def __init__(self, sender: Sender) -> None:
        self._sender, self._room = sender, sender._room
        self.waiting: deque[tuple[Connection, Callable[..., object], tuple[Any, ...]]] = deque()

    def add(self, connection: Connection, act: Callable[..., object], *arguments: Any) -> None:
        """End a connection soon by calling `act`. It is not read any more."""
        if not connection.is_ending:
            connection.is_ending = True
            self._sender.guard(self._sender.watch, connection)
            self.waiting.append((connection, act, arguments))

    def add_failed(self, clients: Iterable[WebSocketHandler], error: Exception) -> None:
        """End clients that a message could not be sent to."""
        for client in clients:
            if client._connection:
                self._room.set_send(client._connection, discard)
                self.add(client._connection, self._sender.fail_to_send, error)

    def carry_out(self) -> None:
        """End connections until ROUND_TIME is over."""
        until = time.monotonic() + ROUND_TIME
        while self.waiting and time.monotonic() < until:
            connection, act, arguments = self.waiting.popleft()
            connection.is_ending = False
            self._sender.guard(act, connection, *arguments)


class Receiver:
    """Reads connections, and acts on the messages and control frames that they send. Runs in the loop.

    A connection whose message must wait is paused: it is not read, so TCP slows its peer down. It
    is resumed when the rate, its hooks, the budget, and the queue allow it.
    """

    def __init__(self, server: BroadcastServer, sender: Sender) -> None:
        self._server, self._room, self._queue, self._hooks = server, server._room, server._queue, server._hooks
        self._sender, self.gate = sender, sender.gate
        self._is_direct = not server._overrides("on_message") and not server._overrides("broadcast")
        self.read_size, self.slice_time = 0, SLICE_TIME  # bytes read since messages went out; seconds per connection
        self.endings = Endings(sender)
        self.later: dict[Connection, None] = {}  # connections to continue with at the end of the round, in order

    # ---- operations ----

    def adopt(self, connection: Connection, first: Callable[[], list[bytes]]) -> None:
        """Take a connection over from its handler: a client has joined, or gets a response."""
        self._sender.guard(self._sender.adopt, connection, first)
        has_data = connection.events or (connection.tls and connection.tls.has_more())
        if has_data and not connection.paused:  # it did not wait for the 101
            self.line_up(connection)

    def close(self, connections: list[Connection], frame: bytes) -> None:
        """Send a Close, and read on until the peer's Close. Its messages are discarded."""
        for connection in connections:
            self._sender.guard(self._sender.close, connection, frame)
            self.resume(connection)

    def resume(self, connection: Connection) -> None:
        """Read a paused connection again."""
        if connection.paused and connection.state is not State.CLOSED:
            connection.paused = False
            connection.received = 0
            connection.heard = connection.began = self._sender.now
            self._sender.guard(self._sender.watch, connection)
            self.line_up(connection)

    def _resume_after_hooks(self, connection: Connection) -> None:
        connection.submitted = 0
        if not connection.reader.size:  # its message is compressed
            self.gate.unfinished.release(connection)
        self.resume(connection)

    def _pause(self, connection: Connection, *events: tuple[int, Octets]) -> None:
        """Stop reading a connection. Its next events will be `events`, before the others."""
        connection.paused = True
        if events and connection.source:
            connection.events = itertools.chain(events, connection.source)  # a chain of chains would take stack
        self._sender.watch(connection)

    # ---- reading ----

    def read(self, connection: Connection) -> None:
        """Read a connection once and act on the data, unless it is read later."""
        if not (connection in self.later or connection.is_ending):
            self._try(self._read, connection)

    def _try(self, act: Callable[[Connection], object], connection: Connection) -> None:
        try:
            act(connection)
        except Exception as error:  # end the connection after the messages that came before
            self._in_order(connection, self._sender.fail, error)

    def _read(self, connection: Connection) -> None:
        until = time.monotonic() + self.slice_time
        data = connection.receive()
        if data is None or connection.is_blocked:
            self._sender.watch(connection)
            if data is None:
                if time.monotonic() > until:  # TLS has read records without data
                    connection.read_size = SMALL_READ_SIZE
                    self.line_up(connection)
                return
        connection.heard = self._sender.now
        if not data:
            self._in_order(connection, self._sender.peer_has_ended)
        elif connection.state in READABLE:
            self.read_size += len(data)
            connection.events = connection.source = connection.reader.feed(data)
            self._take(connection)

    def line_up(self, connection: Connection) -> None:
        """Continue with a connection at the end of the round."""
        self.later[connection] = None

    def go_on(self) -> None:
        """Continue with connections whose data took too long, until ROUND_TIME is over."""
        until = time.monotonic() + ROUND_TIME
        self.slice_time = SLICE_TIME
        for connection in list(self.later):
            del self.later[connection]
            if connection.events and not connection.paused:
                self._try(self._take, connection)
            elif connection.interest & selectors.EVENT_READ and not connection.is_ending:
                self._try(self._read, connection)
            if self.has_much or time.monotonic() > until:
                return

    @property
    def has_much(self) -> bool:
        """Return whether messages must be sent before the loop reads on."""
        return self.read_size > RUN_SIZE or len(self._queue) > RUN_LENGTH

    def _take(self, connection: Connection) -> None:
        """Act on each message and control frame that was read, until the slice is over."""
        until = time.monotonic() + self.slice_time
        client, queue = connection.client, self._queue
        is_free = self._is_direct and not (self.gate.has_limits or queue.held or client._inbox or client._is_closing)
        for opcode, payload in connection.events or ():
            if is_free and 0 < opcode < 8 and len(payload) < LONG_MESSAGE and not connection.kept:
                if connection.pongs:
                    connection.pongs = []  # answers to later Pings come after this message
                queue.put_own(Outgoing(opcode, payload))  # nearly all messages
            elif not self._take_one(connection, opcode, payload):
                return
            if time.monotonic() > until:
                self.line_up(connection)
                return
        connection.events = None
        if connection.tls and connection.tls.has_more():
            self.line_up(connection)

    def _take_one(self, connection: Connection, opcode: int, payload: Octets) -> bool:
        """Act on a message or control frame. Return whether to continue with the next one."""
        if opcode == PING:
            if not connection.pongs:
                self._queue.put_own((connection, connection.pongs))
            connection.pongs.append(serialize_frame(PONG, payload))
            if len(connection.pongs) > MAX_PONGS:
                del connection.pongs[:-1]
        elif opcode == CLOSE:
            connection.events = None
            code, reason = connection.close_heard = parse_close(bytes(payload))
            self._in_order(connection, self._sender.end, code, reason, serialize_close(code))  # the same code (5.5.1)
            return False
        elif opcode == CONT:
            now = self._sender.now
            may_grow = connection.client._is_closing or self.gate.lets_through(connection, now, is_complete=False)
            if not (may_grow and self.gate.unfinished.grow(connection, now)):
                self._pause(connection, (opcode, payload))
                return False
        elif opcode != PONG:
            if not connection.client._is_closing:
                return self._take_message(connection, opcode, payload)
            self.gate.unfinished.release(connection)
        return True

    def _take_message(self, connection: Connection, opcode: int, payload: Octets) -> bool:
        """Broadcast a message, or give it to the hooks. Return whether to continue with the next one."""
        connection.pongs = []  # answers to later Pings come after this message
        if not self.gate.lets_through(connection, self._sender.now):
            self._pause(connection, (opcode, payload))
            return False
        if connection.kept and not (self._is_direct and self._is_long(payload)):
            self.gate.unfinished.release(connection)  # a message that will be compressed counts until then
        client = connection.client
        is_behind = client._inbox and client._inbox.taken  # its hooks have earlier messages
        if self._is_direct and not is_behind and not self._is_long(payload):
            if self._server._link:
                self._server._link.put(bytes(payload), opcode)
            else:
                message = Outgoing(opcode, payload)
                if len(payload) >= LONG_MESSAGE:
                    message.frame(0)  # if this takes too much memory, only the sender's connection ends
                self._queue.put_own(message)
            return True
        client._submit(functools.partial(client._take_message, opcode, payload))
        connection.submitted += len(payload) + MESSAGE_COST
        if connection.submitted > MAX_SUBMITTED:  # until its hooks have handled them
            self._pause(connection)
            client._submit(functools.partial(self._queue.put, functools.partial(self._resume_after_hooks, connection)))
            return False
        return True

    def _is_long(self, payload: Octets) -> bool:
        """Return whether compressing a message takes too long for the loop."""
        return len(payload) >= LONG_MESSAGE and self._room.compresses

    def _in_order(self, connection: Connection, act: Callable[..., object], *arguments: Any) -> None:
        """End a connection by calling `act`, after its hooks have handled all its messages."""
        inbox = connection.client._inbox
        if inbox and inbox.taken and connection.state is State.OPEN:
            self._pause(connection)
            self._sender.stop_reading(connection)
            operation = functools.partial(self.endings.add, connection, act, *arguments)
            self._hooks.submit(inbox, functools.partial(self._queue.put, operation))
        else:
            self.endings.add(connection, act, *arguments)


CONTEXT = operator.attrgetter("reader.context")
OWN_COST = 16  # how often a byte of a message to some clients counts in a run, since fewer clients share the run


class Lobby:
    """Waits for the sockets of pending connections, so that their handlers need not. Runs in the loop."""

    def __init__(self) -> None:
        self.selector: selectors.BaseSelector
        self._waiting: set[RequestHandler] = set()

    def wait(self, handler: RequestHandler, events: int) -> None:
        """Start the next step of a handler when its socket is ready."""
        if not handler.verdict:
            try:
                self.selector.register(handler.request, events, functools.partial(self.go_on, handler))
                self._waiting.add(handler)
                return
            except Exception as error:  # for example, the system can watch no more sockets
                handler.verdict = str(error) or "out of memory"
        handler.go_on()

    def go_on(self, handler: RequestHandler, verdict: str = "") -> None:
        """Start the next step of a waiting handler. After a verdict, it does not wait again."""
        handler.verdict = handler.verdict or verdict
        if handler in self._waiting:
            self._waiting.remove(handler)
            self.selector.unregister(handler.request)
            handler.go_on()

    def late_ones(self, now: float) -> list[RequestHandler]:
        """Return the waiting handlers whose deadline has passed."""
        return [handler for handler in self._waiting if now > handler.deadline]


LOOKS_AT_ONCE = 400  # connections and handlers that are checked in one round


class Deadlines:
    """Enforces the deadlines of connections and handlers. Runs in the loop."""

    def __init__(self, server: BroadcastServer, sender: Sender, lobby: Lobby) -> None:
        self._server, self._sender, self._lobby = server, sender, lobby
        timeouts = "handshake_timeout", "ping_interval", "ping_timeout", "send_timeout", "close_timeout"
        quarters = [getattr(server, timeout) / 4 for timeout in timeouts]
        self.interval = min([1.0, *filter(None, quarters)])  # seconds between two checks of all
        self.next_look = 0.0
        self._to_look_at: list[Connection] = []  # not checked yet

    def look(self) -> None:
        """Check some connections and handlers."""
        late = self._lobby.late_ones(self._sender.now)
        for handler in late[:LOOKS_AT_ONCE]:
            self._lobby.go_on(handler, TOO_LATE)
        connections = self._to_look_at or list(self._server._room.connections)
        for connection in connections[:LOOKS_AT_ONCE]:
            self._sender.guard(self._look_at, connection)
        self._to_look_at = connections[LOOKS_AT_ONCE:]
        if not self._to_look_at and len(late) <= LOOKS_AT_ONCE:
            self.postpone()

    def postpone(self) -> None:
        """Check all again after the interval."""
        self.next_look = self._sender.now + self.interval

    def _look_at(self, connection: Connection) -> None:
        """Check all deadlines of a connection."""
        settings, now, sender = self._server, self._sender.now, self._sender
        connection.note_progress(now)
        still = now - connection.moved  # seconds without progress
        if connection.state is State.OPEN:
            if still > settings.send_timeout:
                sender.drop(connection, f"it took nothing for {settings.send_timeout:g} s")
            elif settings.ping_interval:
                self._keep_alive(connection)
        elif still > settings.close_timeout:
            sender.drop(connection, "it did not end the connection in time")
        elif connection.size and settings._room.bytes - connection.last_seen > settings.max_backlog:
            # No other outbox shares its bytes any more.
            sender.drop(connection, f"it was {connection.size} bytes behind")

    def _keep_alive(self, connection: Connection) -> None:
        """Ping a silent client, and drop it if it does not answer (5.5.2)."""
        now, timeout = self._sender.now, self._server.ping_timeout
        silence = now - connection.heard
        if silence <= self._server.ping_interval:
            connection.pong_deadline = math.inf
        elif connection.pong_deadline == math.inf:
            if not connection.pieces:
                on_the_way, acked = bytes_in_kernel(connection.socket)
                connection.ping_end = acked + on_the_way if on_the_way > 0 else 0
                self._sender.write(connection, serialize_frame(PING, b""))
                connection.pong_deadline = now + timeout
        elif connection.ping_end and connection.moved == now:  # the Ping has not reached the peer; other bytes have
            connection.pong_deadline = now + timeout
            if connection.acked >= connection.ping_end:
                connection.ping_end = 0
        elif now > connection.pong_deadline:
            self._sender.drop(connection, f"it was silent for {silence:.0f} s")


class Loop:
    """The thread that owns the sockets of all clients.

    It works in rounds. Wait until sockets are ready. Read each ready socket once. Carry out the
    queue: one send for each client. Continue with connections whose data took too long. Check
    deadlines. Apart from the selector, nothing in it waits, and it calls no code of the program.

    Its clock stops while the process is stopped (SIGSTOP, a suspended laptop), so that clients
    are not dropped for a silence that the server could not hear.
    """

    def __init__(self, server: BroadcastServer) -> None:
        self._thread: threading.Thread | None = None
        self._server, self._room, self._queue, self._hooks = server, server._room, server._queue, server._hooks
        self.sender = Sender(server)
        self.receiver = Receiver(server, self.sender)
        self.lobby = Lobby()
        self._room.adopt, self._room.close_connections = self.receiver.adopt, self.receiver.close
        self._room.give_up, self._room.drop = self.lobby.go_on, self.sender.drop
        self.deadlines = Deadlines(server, self.sender, self.lobby)
        self._before = time.monotonic()
        self._patience = math.inf  # seconds until something that waits, but not for a socket, must be looked at

    @property
    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self.sender.now

    def start(self) -> None:
        """Start the thread. Create the selector here, since a program may fork after the constructor. Raise OSError."""
        self.sender.selector = self.lobby.selector = selectors.DefaultSelector()
        self._queue.open(self.sender.selector)
        self._thread = threading.Thread(target=self.run, name="pywebsock loop", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Do rounds until stop(). Runs in the thread of the loop."""
        self._queue.loop_thread = threading.get_ident()
        while not self._queue.has_ended:
            try:
                self._do_round()
            except Exception as error:  # for example out of memory; the next round may succeed
                self._hooks.log(logging.ERROR, "an error in the loop", error=error)
                time.sleep(self.deadlines.interval / 10)
        self.sender.selector.close()

    def stop(self) -> None:
        """End the thread. Any thread but the loop's."""
        if self._thread and self._thread.is_alive():  # not if it could not be started, or after a fork
            self._queue.put(self._end)
            self._thread.join()
        else:
            self._queue.end()

    def _end(self) -> None:
        self._queue.end()  # also after an error, since stop() waits for it
        with self._room.lock:  # a client that joins now is in the set, or is refused
            connections = list(self._room.connections)
        for connection in connections:
            self.sender.guard(self.sender.drop, connection, "the server has stopped")

    # ---- a round ----

    def _do_round(self) -> None:
        sender, receiver = self.sender, self.receiver
        ready = self._wait()
        until = self._before + ROUND_TIME
        receiver.slice_time = SLICE_TIME if len(ready) < 6 else max(LEAST_SLICE_TIME, ROUND_TIME / len(ready))
        sender.slices = SENDS_AT_ONCE if len(ready) < MANY_READY else 1
        for key, events in ready:
            connection = key.data
            if receiver.has_much or time.monotonic() > until:
                self._carry_out()
                until = time.monotonic() + ROUND_TIME
            if type(connection) is not Connection:  # the alarm, or a handler's socket
                self._call(connection)
                continue
            if events & selectors.EVENT_WRITE:
                sender.guard(sender.flush, connection)
            if events & selectors.EVENT_READ:
                receiver.read(connection)
        self._carry_out()
        if receiver.later:
            receiver.go_on()
            self._carry_out()
        if receiver.endings.waiting:
            receiver.endings.carry_out()
        self._patience = self._find_patience()
        if sender.slow or self._patience < math.inf or self.deadlines.next_look <= sender.now:
            self._look_around()
            self._patience = self._find_patience()

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events of sockets, for an operation, or for the next deadline. Return the events."""
        timeout = min(self._patience, self.deadlines.next_look - self.sender.now)
        if self.receiver.later or self.receiver.endings.waiting or not self._queue.fall_asleep():
            timeout = 0
        else:
            timeout = min(self.deadlines.interval, max(0.001, timeout))
        ready = self.sender.selector.select(timeout)
        self._advance_clock()
        return ready

    def _advance_clock(self) -> None:
        now = time.monotonic()
        passed, self._before = now - self._before, now
        self.sender.now += min(passed, self.deadlines.interval)
        if passed > 3 * self.deadlines.interval:  # the process was stopped: first read what has arrived
            self.deadlines.postpone()

    def _carry_out(self) -> None:
        """Carry out the queue."""
        self.receiver.read_size = 0
        run: list[Outgoing] = []
        pongs: list[tuple[Connection, list[bytes]]] = []  # sent after the run, so that Pings do not split it
        size = 0
        for operation in self._queue.take():
            if type(operation) is Outgoing:
                run.append(operation)
                size += operation.size if operation.to is None else OWN_COST * operation.size
                if size < RUN_SIZE:
                    continue
            elif type(operation) is tuple:
                pongs.append(operation)
                if run:
                    continue
            self._send(run, pongs)
            run, pongs, size = [], [], 0
            if callable(operation):
                self._call(operation)
        self._send(run, pongs)

    def _send(self, run: list[Outgoing], pongs: list[tuple[Connection, list[bytes]]]) -> None:
        try:
            if run:
                self._deliver(run)
        except Exception as error:  # go on with the next operations
            self._hooks.log(logging.ERROR, "a broadcast failed", error=error)
        for connection, frames in pongs:
            try:
                self.sender.pong(connection, frames)
            except Exception as error:  # thousands may fail at once
                self.receiver.endings.add(connection, self.sender.fail_to_send, error)

    def _deliver(self, run: list[Outgoing]) -> None:
        """Send messages to their recipients, with one send for each client."""
        for _, group in itertools.groupby(run, is_to_all) if len(run) > 1 else [(True, run)]:
            for window, messages, sends in self._room.recipients(list(group)):
                try:
                    data = b"".join([message.frame(window, LONG_MESSAGE) for message in messages])
                except MemoryError as error:  # a client must not miss messages without notice
                    self.receiver.endings.add_failed(sends, error)
                else:
                    self._fan_out(data, sends)

    def _fan_out(self, data: bytes, sends: Sends) -> None:
        """Send the same bytes to many clients. The server spends most of its time in this loop."""
        size = len(data)
        for client, send in sends.items():
            try:
                sent = send(data)
            except WOULD_BLOCK:
                sent = 0
            except (OSError, MemoryError) as error:
                self.receiver.endings.add_failed([client], error)
                continue
            if sent < size:
                self.sender.guard(self.sender.keep, client._connection, data, sent)

    def _call(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except Exception as error:  # go on with the next operations
            self._hooks.log(logging.ERROR, "an operation failed", error=error)

    # ---- what is due ----

    def _find_patience(self) -> float:
        hooks_patience = STUCK_TIME if self._hooks.is_waiting else math.inf
        return min(hooks_patience, self.sender.gate.wait_time(self.sender.now))

    def _look_around(self) -> None:
        if self._hooks.is_waiting:
            self._hooks.relieve(self._queue.waiting)
        sender, now = self.sender, self.now
        sender.gate.look(sender.slow, now)
        for connection in sender.gate.unfinished.slow_ones(now):
            sender.guard(sender.refuse, connection, CloseCode.MESSAGE_TOO_BIG, "too many messages are unfinished")
        for connection in sender.gate.to_resume(now):
            self.receiver.resume(connection)
        if self.deadlines.next_look <= self.now:
            self.deadlines.look()


# ======================================================================================
# Server
# ======================================================================================

KEPT_SIZE = 32 * 1024 * 1024  # bytes of freed memory that malloc keeps
TRIM_TIME = 10.0  # seconds between two calls of malloc_trim()
SPARE_DESCRIPTORS = 32  # file descriptors that are left to the program
SPARE_CONNECTIONS = 100  # pending connections, in addition to a tenth of max_clients
EXCLUSIVE_USE = getattr(socket, "SO_EXCLUSIVEADDRUSE", 0)  # only on Windows
ACCEPTED_AT_ONCE = 16  # connections; waking the loop for each one takes longer than accepting it
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Pace:
    """A token bucket for messages, with a burst of one second."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = 0.0  # when the next message would come at an even pace

    def wait_time(self, rate: float, now: float) -> float:
        """Return the number of seconds until the next message may come."""
        return max(0.0, self._due - now - max(0.0, 1 - 1 / rate))

    def take(self, rate: float, now: float) -> None:
        """Count a message."""
        self._due = max(self._due, now) + 1 / rate


class PostPace:
    """The token bucket of all POSTs together. Any thread."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._pace, self._lock = Pace(), threading.Lock()

    def wait(self, timeout: float) -> bool:
        """Wait until the rate allows one more POST. Return False if that takes longer than `timeout` (seconds).

        Return False, too, if it takes longer than a second and than one message: each POST that
        waits takes a thread.
        """
        if not self._rate:
            return True
        with self._lock:
            now = time.monotonic()
            wait = self._pace.wait_time(self._rate, now)
            if wait > min(timeout, max(1.0, 1 / self._rate)):
                return False
            self._pace.take(self._rate, now)
        time.sleep(wait)
        return True


class LimitedServer(socketserver.ThreadingTCPServer):
    """Accepts connections while descriptors are left. Runs in the thread of serve_forever()."""

    allow_reuse_address = os.name == "posix"  # on Windows it means something else
    request_queue_size = 4096  # connections that wait to be accepted; after a restart, all clients come at once
    tls_context: ssl.SSLContext | None

    _hooks: Hooks
    _queue: Queue
    _room: Room
    _most_connections: int
    _begin: Callable[[], None]  # starts the threads
    _accepted = 0  # connections, in this round of serve_forever()
    _path = ""  # path of the Unix socket
    _inode = 0  # of the Unix socket
    _is_stopping = False  # shutdown() was called

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept connections until shutdown(), which takes up to `poll_interval` (seconds)."""
        self._begin()
        self._is_stopping = False
        while not self._is_stopping:
            try:
                super().serve_forever(poll_interval)
                return
            except MemoryError:  # in the selector; the next round may succeed
                self._wait_for_fewer("out of memory")
            except OSError:  # after server_close(); Windows cannot even select a closed socket
                if self.fileno() >= 0:
                    raise
                return

    def handle_request(self) -> None:
        """Wait for a connection and accept it, or call handle_timeout() after `timeout` (seconds; None: never)."""
        with selectors.DefaultSelector() as selector:  # socketserver would take the timeout of the socket, which is 0
            selector.register(self, selectors.EVENT_READ)
            ready = selector.select(self.timeout)
        if ready:
            self._handle_request_noblock()
        else:
            self.handle_timeout()

    def service_actions(self) -> None:
        """Called by serve_forever() in each round: end it after server_close()."""
        if self.fileno() < 0:
            raise OSError("the socket is closed")

    def shutdown(self) -> None:
        """Let serve_forever() return, and wait for that. Call it in another thread."""
        self._is_stopping = True
        super().shutdown()

    def server_bind(self) -> None:
        """Called by the constructor: bind. With an IPv6 host, bind for IPv4 too."""
        if self.address_family == AF_UNIX:
            path = str(self.server_address[0]).removeprefix(UNIX)
            if not path:
                raise ValueError("the host unix: needs a path")
            clear_path(path)
            self.socket.bind(path)
            self._path, self._inode = path, os.stat(path).st_ino
            return
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if EXCLUSIVE_USE:  # otherwise a second program may bind the same port
            self.socket.setsockopt(socket.SOL_SOCKET, EXCLUSIVE_USE, 1)
        super().server_bind()

    def server_activate(self) -> None:
        """Called by the constructor: listen. After a fork, another process may be faster to accept a connection."""
        super().server_activate()
        self.socket.setblocking(False)

    def _handle_request_noblock(self) -> None:
        """Called for each round: accept a few of the connections that wait, and then wake the loop once."""
        self._queue.quiet_thread = threading.get_ident()
        try:
            before, self._accepted = -1, 0
            while before < self._accepted < ACCEPTED_AT_ONCE:
                before = self._accepted
                super()._handle_request_noblock()  # type: ignore[misc]
                if self._room.size >= self._most_connections:
                    break  # do not end an old connection if no new one waits
        finally:
            self._queue.quiet_thread = 0
            self._queue.wake()  # perhaps a hook that blocks holds up the handlers: the loop finds out

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. If there are too many, end the oldest pending one, or let the new one wait."""
        if self._room.size >= self._most_connections:
            self._give_up_oldest()
            self._wait_for_fewer("too many connections")
            raise OSError("not now")
        try:
            self._room.wait_for_turn(0.5)
            request, address = super().get_request()
            if self.tls_context:
                request = TLSSocket(request, self.tls_context)
            return request, address if isinstance(address, tuple) else ("unix", 0)
        except (OSError, MemoryError, ValueError) as error:
            if getattr(error, "errno", errno.ENOMEM) in SHORTAGES:
                self._wait_for_fewer(str(error) or "out of memory")
            raise OSError("not now") from None

    def _give_up_oldest(self) -> None:
        """End the oldest connection that is no client, if it is older than a second: first those with a response."""
        room = self._room
        with room.lock:
            late = time.monotonic() - 1
            connection = next(iter(room.answered), None)
            if connection and room.answered[connection] < late:
                del room.answered[connection]
                self._queue.put(functools.partial(room.drop, connection, "given up"))
                return
            oldest = next((handler for handler, since in room.pending.items() if since != GIVEN_UP), None)
            if oldest and room.pending[oldest] < late:
                room.pending[oldest] = GIVEN_UP
                self._queue.put(functools.partial(room.give_up, oldest, "given up"))

    def _wait_for_fewer(self, shortage: str) -> None:
        """Wait until there are fewer connections, but at most half a second."""
        self._queue.wake()  # operations of this thread may end a connection
        self._hooks.log(logging.WARNING, "cannot accept for now: %s", shortage)
        self._room.wait_for(self._room.size - 1, time.monotonic() + 0.5)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's handler. It runs here or in hook threads, and the loop waits for its socket."""
        self._begin()
        self._accepted += 1
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception in a handler, which is an error in this module."""
        error = sys.exc_info()[1]
        if isinstance(error, MemoryError):
            self._hooks.log(logging.WARNING, "%s lost: out of memory", client_address)
        else:
            self._hooks.log(logging.ERROR, "%s: unexpected error", client_address, error=error)


class BroadcastServer(Settings, LimitedServer):
    """Broadcasts each message of a client to all clients, in one order for all.

    Methods for the caller, in addition to those of socketserver:

    - broadcast(message, to=None): to all clients, or to some
    - clients: a copy of the set of them
    - status(): a dict of figures
    - serve_forever(), shutdown(), server_close() as in socketserver; server_close() also
      sends what is queued and closes every client with 1001

    Hooks that may be overridden. Each may block, and then delays only its own client:

    - admit(client), on_open(client), on_message(client, message), on_post(client, message),
      on_close(client, code, reason)

    Settings are the attributes of the class Settings; keyword arguments set them for one server.
    """

    def __init__(
        self,
        server_address: tuple[str, int],
        RequestHandlerClass: Callable[..., socketserver.BaseRequestHandler] = WebSocketHandler,
        bind_and_activate: bool = True,
        **settings: Any,
    ) -> None:
        """Listen on a host (a name or an address) and a port (0 for any free one), or on the host "unix:PATH".

        Raise TypeError or ValueError for wrong settings, OSError if the address is not available
        or Redis refuses.
        """
        self._set(settings)
        self._prepare()
        if server_address[0].startswith(UNIX):
            self.address_family = AF_UNIX
        elif ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def _prepare(self) -> None:
        self._started = time.monotonic()
        self._refused = 0  # requests refused so far, for the status
        self._local = threading.local()  # .client: the one whose step or hook this thread runs
        own_handshake = self._overrides("admit") or self._overrides("on_open")
        self._slow_handshakes = own_handshake or bool(self.tls_context)  # they need a hook thread
        self._post_pace = PostPace(self.rate)
        self._budget = Budget(max(64 * 1024 * 1024, 8 * self.max_message))
        self._hooks = Hooks(most_workers=os.cpu_count() or 1 if self.tls_context else 1)
        self._queue = Queue()
        self._room = Room(self._queue, self.max_clients, self.history, self.max_backlog // 2)
        self._link = None if self.redis is None else RedisLink(self)
        self._queue.locks = self._room.lock, self._hooks.lock, self._budget.lock
        if self._link:
            self._queue.locks += (self._link.changed,)
        self._loop = Loop(self)
        self._start_lock = threading.Lock()
        self._has_begun = False
        most = self.max_clients + self.max_clients // 10 + SPARE_CONNECTIONS
        most = min(most, self._room.most_selected + SPARE_SELECTED)
        self._most_connections = max(1, min(most, raise_file_limit() - SPARE_DESCRIPTORS))

    # ---- hooks ----

    def admit(self, client: WebSocketHandler) -> None:
        """Decide whether a client may open a WebSocket, or POST. To refuse, raise HandshakeError(401, "why").

        It is called before the 101, and before the body of a POST is read: client.method is "GET"
        or "POST". See also client.target, client.headers and client.address. close() refuses with
        403.
        """

    def on_open(self, client: WebSocketHandler) -> None:
        """Called when a client has joined. Its messages wait until this returns.

        An exception in this or in on_message closes the client with 1011.
        """

    def on_message(self, client: WebSocketHandler, message: Message) -> None:
        """Called when a client has sent text (str) or binary (bytes). By default, broadcast it.

        All hooks run in hook threads, for each client one at a time and in order.
        """
        self.broadcast(message)

    def on_post(self, client: WebSocketHandler, message: Message) -> None:
        """Called when a program has sent a message with POST. By default, broadcast it.

        `client` is the connection of the POST; send() does not reach it. HandshakeError and
        close() refuse the message.
        """
        self.broadcast(message)

    def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
        """Called when a client has left. 1006: without a Close; 1005: a Close without a code (RFC 6455 7.1.5)."""

    # ---- for any thread ----

    def broadcast(self, message: Message, to: Iterable[WebSocketHandler] | None = None) -> None:
        """Send text (str) or binary (bytes) to all clients, or to some, in the one order. Any thread.

        Wait while too much is queued, but never for a slow client. Raise TypeError unless the
        message is str or bytes.
        """
        outgoing = outgoing_message(message, to)
        if not self._link or to is not None:
            self._put(outgoing)
            return
        self._link.put(bytes(outgoing.payload), outgoing.opcode)
        client = getattr(self._local, "client", None)
        if not client or client._connection:  # a POST has already waited
            self._wait_for_space()

    @property
    def clients(self) -> set[WebSocketHandler]:
        """A copy of the set of clients: from before on_open until before on_close. Any thread."""
        return self._room.clients

    def status(self) -> dict[str, Any]:
        """Return the figures for GET /status. Any thread."""
        sender, room = self._loop.sender, self._room
        with room.lock:
            connections, clients = room.connections.copy(), len(room)
        return {
            "clients": clients,
            "messages": self._room.messages,
            "bytes": self._room.bytes,
            "uptime": round(time.monotonic() - self._started, 3),
            "connections": self._room.size,
            "refused": self._refused,
            "dropped": sender.dropped,
            "read_only": self.read_only,  # then the page has no composer
            "slow": len(sender.slow),
            "waiting": sum([connection.size for connection in sender.slow.copy()]),  # bytes
            "contexts": sum(map(len, map(CONTEXT, connections))),  # bytes; map() is fast
            "version": __version__,
        }

    # ---- hooks and messages ----

    def _overrides(self, name: str) -> bool:
        """Return whether the program overrides a method."""
        return getattr(getattr(self, name), "__func__", None) is not getattr(BroadcastServer, name)

    def _put(self, message: Outgoing) -> None:
        if threading.get_ident() != self._queue.loop_thread:
            self._room.compress(message)
        self._queue.put_message(message)

    def _wait_for_space(self, timeout: float | None = None) -> bool:
        """Wait while too much is queued, here or for Redis. Return False after `timeout` (seconds)."""
        if self._link and self._queue.may_wait() and not self._link.wait_for_room(timeout):
            return False
        return self._queue.wait_for_space(timeout)

    def _take_from_link(self, messages: Iterable[tuple[int, bytes]]) -> None:
        """Broadcast messages from the stream. Called in a thread of the link, and in its constructor."""
        for opcode, payload in messages:
            self._put(Outgoing(opcode, payload))

    # ---- starting and stopping ----

    def _begin(self) -> None:
        """Start the threads, once. Not in the constructor, since a program may fork after it."""
        with self._start_lock:  # serve_forever() and handle_request() may run in two threads
            if not self._has_begun:
                self._has_begun = True
                self._loop.start()
                if self._link:
                    self._link.start()

    def server_close(self) -> None:
        """Send all queued data, close every client with 1001, and wait, at most for the close timeout.

        In a hook, it does not wait for the client of that hook. A client that is stuck in a hook is
        reset after the close timeout. As in socketserver, call shutdown() first; otherwise,
        serve_forever() may end later than this.
        """
        with contextlib.suppress(OSError):
            if self._path and os.stat(self._path).st_ino == self._inode:  # it may be another server's
                os.unlink(self._path)
        self._path = ""  # another server may bind it before this is called again
        super().server_close()  # accept no more connections
        end = time.monotonic() + self.close_timeout
        if self._link:
            self._link.stop(self.close_timeout / 2)
        client = getattr(self._local, "client", None)
        own = int(client is not None)
        self._room.close_all()
        self._room.wait_for(0, end, client)
        self._hooks.wait(own, end)
        self._loop.stop()
        self._hooks.wait(own, time.monotonic() + 0.5)
        self._hooks.stop()


MACOS_FILES = 10_240  # OPEN_MAX: macOS has a hard limit of "unlimited", to which it does not raise the other


def raise_file_limit() -> int:
    """Raise the limit of open files to the hard limit. Return it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return sys.maxsize
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in (max(limit, MACOS_FILES), most):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else files


def tune_malloc() -> None:
    """Let malloc keep KEPT_SIZE of freed memory (Linux), as it does anyway after a message of 16 MiB.

    Otherwise it returns the memory of each message of 1 MiB to the system. Then every copy of the
    next message has a page fault for each 4 KiB, and takes a quarter longer.
    """
    call_libc("mallopt", -8, 2)  # M_ARENA_MAX; the default is eight per processor, and each arena keeps KEPT_SIZE
    call_libc("mallopt", -1, KEPT_SIZE)  # M_TRIM_THRESHOLD
    call_libc("mallopt", -3, KEPT_SIZE)  # M_MMAP_THRESHOLD


def call_libc(name: str, *arguments: int) -> None:
    """Call a function of the C library, if this system has it."""
    with contextlib.suppress(Exception):
        import ctypes  # may be missing

        getattr(ctypes.CDLL(None), name)(*arguments)


def plural(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ======================================================================================
# Many machines (Redis streams; its protocol, RESP2)
#
# With --redis, any number of servers form one room. A server writes the messages that it
# broadcasts to a stream in Redis, and sends its clients the messages that it reads from the
# stream. All servers read the same messages in the same order. You can skip this part: a
# server without --redis does not use it.
# ======================================================================================

# ---- commands and replies ----

REPLY_LINE = re.compile(rb"[+-][^\r\n]*\r\n|:[+-]?[0-9]{1,19}\r\n|[$*](-1|[0-9]{1,9})\r\n")
NOT_REDIS = "this server is not Redis"
ANSWER_TIME = 10.0  # seconds until Redis must answer


class RedisError(OSError):
    """Redis replied with an error, or with bytes that are not RESP2."""


class RedisAddress:
    """The parts of redis://[user:password@]host[:port][/db][?stream=name], or rediss:// for TLS."""

    def __init__(self, url: str) -> None:
        """Raise ValueError if the URL is malformed."""
        parts = urllib.parse.urlsplit(url)
        query = urllib.parse.parse_qs(parts.query, strict_parsing=bool(parts.query))
        self.stream = query.pop("stream", ["pywebsock"])[-1]
        path = re.fullmatch("/?([0-9]{0,9})", parts.path)
        if parts.scheme not in ("redis", "rediss") or not path or query or parts.fragment:
            raise ValueError("a Redis URL is redis://[user:password@]host[:port][/db][?stream=name]")
        self.has_tls = parts.scheme == "rediss"
        self.host, self.port = parts.hostname or "localhost", parts.port or 6379
        user, password = [urllib.parse.unquote(text or "") for text in (parts.username, parts.password)]
        self.login = ("AUTH", user or "default", password) if user or password else ()
        self.database = int(path[1] or 0)
        try:
            self.host.encode("idna")
        except UnicodeError:
            raise ValueError(f"{self.host!a} is not a host name") from None


def serialize_command(*words: str | bytes | int) -> bytes:
    """Return a command as an array of bulk strings."""
    data = bytearray(b"*%d\r\n" % len(words))
    for word in words:
        bulk = word if isinstance(word, bytes) else str(word).encode(errors="surrogateescape")
        data += b"$%d\r\n%b\r\n" % (len(bulk), bulk)
    return bytes(data)


def parse_reply(file: BinaryIO) -> Any:
    """Read a reply and return it: bytes, int, None, or a list of these.

    Raise RedisError if it is an error or not RESP2, and OSError if the connection ends.
    """
    line = file.readline(MAX_LINE)
    is_cut = len(line) < MAX_LINE and not line.endswith(b"\n")
    if is_cut and line[:1] in b"+-:$*":  # or empty
        raise ConnectionError("Redis closed the connection")
    if not REPLY_LINE.fullmatch(line):
        raise RedisError(NOT_REDIS)
    kind, text = line[:1], line[1:-2]
    if kind == b"+":
        return text
    if kind == b"-":
        raise RedisError(text.decode(errors="replace"))
    number = int(text)
    if kind == b":":
        return number
    if number < 0:
        return None
    if kind == b"*":
        return [parse_reply(file) for _ in range(number)]
    bulk = file.read(number + 2)
    if len(bulk) < number + 2:
        raise ConnectionError("Redis closed the connection")
    if bulk[number:] != b"\r\n":
        raise RedisError(NOT_REDIS)
    return bulk[:number]


class RedisConnection:
    """A connection to Redis, for use in one thread. Its methods raise OSError if it fails."""

    def __init__(self, address: RedisAddress) -> None:
        self.socket = socket.create_connection((address.host, address.port), ANSWER_TIME)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.has_tls:
            context = ssl.create_default_context()
            self.socket = context.wrap_socket(self.socket, server_hostname=address.host)
        self._replies = self.socket.makefile("rb")
        try:
            greeting = self.call("HELLO", 2, *address.login)
            if not isinstance(greeting, list) or b"server" not in greeting:
                raise RedisError(NOT_REDIS)
            if b"sentinel" in greeting:
                raise RedisError("this is a Sentinel, which has no streams: use the address of its Redis")
            if address.database:
                self.call("SELECT", address.database)
        except BaseException:
            self.close()
            raise

    def call(self, *words: str | bytes | int) -> Any:
        """Send a command and return the reply. Raise RedisError if it is an error."""
        data = memoryview(serialize_command(*words))
        with contextlib.suppress(ConnectionError):  # Redis may close the connection after an error reply
            while data:  # the timeout applies to each send
                data = data[self.socket.send(data) :]
        return parse_reply(self._replies)

    def close(self) -> None:
        """Close the connection."""
        self._replies.close()
        self.socket.close()


# ---- the link ----
#
# An entry of the stream has one or more messages. A field is a message: its value is the
# payload, and its name is server:number:kind.
#
# - server: that wrote the message, a random name
# - number: of the message, counted from 1 by its server; 0: wait or go
# - kind: text, binary, wait or go
#
# A field with another name is a text that another program has added.
#
# Exactly once. A server keeps each message in its outbox until it reads the message from the
# stream. If an entry does not come back, the server writes it again: the connection may have
# been cut, or Redis may have lost the entry. Readers skip numbers that they have seen. (If
# Redis loses an entry that only some servers have read, the other servers do not get it.)
#
# Order. A server writes several messages as one entry, which Redis accepts or refuses as a
# whole. It writes the next entry when this entry has come back. If Redis refuses it (READONLY,
# for example), the server tries again, with a new connection. If Redis has no memory for it
# (OOM), or a message is too long (ERR), the longest message of the entry is lost before that.
#
# Lost data. A server reads only entries whose id is higher than the ids that it has read. New
# entries have higher ids even if Redis has lost the stream, since ids begin with the time. If
# all ids are lower (of another Redis, whose clock is behind), it reads the last seconds again.
#
# Limits. The stream keeps about STREAM_LENGTH entries and about STREAM_SIZE bytes. After
# writing, a server removes the oldest quarter of a larger stream.
#
# Slow servers. The other servers could remove entries that a slow server has not read. While
# a server is behind, it adds an entry "wait" after each reading, and at the end an entry
# "go". Until then, each other server writes at most one entry per WAIT_TIME. A "wait" also
# expires after WAIT_TIME, because its server may have ended.

FIELD_NAME = re.compile(b"([0-9a-f]{16}):([0-9]{1,18}):(text|binary|wait|go)")
READ_COUNT = 16  # entries in one reading
STREAM_LENGTH = 10_000  # entries
STREAM_SIZE = 128 * 1024 * 1024  # bytes; more if eight of the longest messages need more
LINKED_COST = 4096  # bytes that a message counts in addition to its payload
LISTEN_TIME = 2.0  # seconds for which a reading waits for new entries
OVERLAP = 10_000  # milliseconds before the newest entry that are read again, if its id is lower
BACK_TIME = 2.0  # seconds until a written entry must come back
WAIT_TIME = 1.0  # seconds until a "wait" expires
RETRY_TIME = 0.2  # seconds between an error and a new connection
REFUSALS = ("OOM ", "ERR ")
TEMPORARY_ERRORS = ("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "MISCONF", "NOREPLICAS")
LinkMessage = tuple[int, bytes]  # opcode, payload


def total_cost(messages: Iterable[LinkMessage]) -> int:
    """Return the cost of messages (bytes). An empty message costs LINKED_COST."""
    return sum([len(payload) + LINKED_COST for _, payload in messages])


class RedisReader:
    """Reads the stream. One thread calls its methods; the attributes are for all threads."""

    def __init__(self, server: BroadcastServer, key: str) -> None:
        self._server, self._key = server, key
        self.name = os.urandom(8).hex().encode()  # of this server
        self.seen = {self.name: 0}  # number of the last message read, by server
        self.last = b""  # id of the last entry read; empty before the history is read
        self.behind = True  # the stream has more entries to read
        self.hold_until = 0.0  # time at which the last "wait" expires (time.monotonic)

    def read(self, redis: RedisConnection) -> list[LinkMessage]:
        """Return the history (first call) or the next messages. Wait for them, up to LISTEN_TIME. Raise OSError.

        Tell the other servers whether this one is behind.
        """
        if not self.last:
            return self._read_history(redis)
        was_behind = self.behind
        block = 1 if was_behind else int(LISTEN_TIME * 1000)
        reply = redis.call("XREAD", "COUNT", READ_COUNT, "BLOCK", block, "STREAMS", self._key, self.last)
        entries = reply[0][1] if reply else []
        if not entries and not redis.call("XREVRANGE", self._key, "+", self.last, "COUNT", 1):
            for newest, _ in redis.call("XREVRANGE", self._key, "+", "-", "COUNT", 1):
                self.last = b"%d-0" % max(0, int(newest.partition(b"-")[0]) - OVERLAP)
        messages = self._accept(entries)
        is_long = len(entries) == READ_COUNT or total_cost(messages) > 2 * RUN_SIZE
        self.behind = is_long and bool(messages)
        if self.behind or was_behind:
            kind = b"wait" if self.behind else b"go"
            with contextlib.suppress(OSError):  # the messages are returned even after an error
                redis.call("XADD", self._key, "*", self.name + b":0:" + kind, "")
        return messages

    def _read_history(self, redis: RedisConnection) -> list[LinkMessage]:
        """Read entries, beginning with the newest, until they have enough messages or bytes."""
        entries: list[Any] = []
        count = size = 0
        newest = redis.call("XREVRANGE", self._key, "+", "-", "COUNT", READ_COUNT)
        last = newest[0][0] if newest else b"0-0"
        while newest and count < self._server.history and size < self._server.max_backlog // 2:
            entry, words = newest.pop(0)
            entries.insert(0, (entry, words))
            count += len([name for name in words[::2] if b":0:" not in name])
            size += sum(map(len, words))
            newest = newest or redis.call("XREVRANGE", self._key, b"(" + entry, "-", "COUNT", READ_COUNT)
        messages = self._accept(entries)
        self.last = last
        self.behind = False
        return messages

    def _accept(self, entries: Iterable[Any]) -> list[LinkMessage]:
        """Return the messages of entries that are new, and set what else the entries say."""
        messages: list[LinkMessage] = []
        for entry, words in entries:
            self.last = entry
            for name, payload in zip(words[::2], words[1::2]):
                match = FIELD_NAME.fullmatch(name)
                server, number, kind = match.groups() if match else (b"", b"", b"text")
                if kind in (b"wait", b"go"):
                    self.hold_until = time.monotonic() + WAIT_TIME if kind == b"wait" else 0.0
                elif server and not self._is_new(server, int(number)):
                    continue
                elif kind == b"binary":
                    messages.append((BINARY, payload))
                else:  # another program may have added it
                    messages.append((TEXT, payload.decode(errors="replace").encode()))
        return messages

    def _is_new(self, server: bytes, number: int) -> bool:
        """Return whether a message was not read before. Log how many are missing before it."""
        seen = self.seen.get(server, number - 1)
        self.seen[server] = max(seen, number)
        if number > seen + 1:
            line = "missed %d messages that Redis no longer has"
            self._server._hooks.log(logging.WARNING, line, number - seen - 1)
        return number > seen


class RedisLink:
    """Connects a server to the stream: its messages come back in the order of all servers.

    One thread reads from the stream, another thread writes to it. They do not wait for senders.
    """

    def __init__(self, server: BroadcastServer) -> None:
        """Deliver the history, that is, the newest messages of the stream, if Redis can be reached.

        Raise ValueError if the URL is malformed, and RedisError if Redis replies with an error
        that will not pass.
        """
        self._server, self._hooks = server, server._hooks
        self._address = RedisAddress(str(server.redis))
        self._key = self._address.stream
        self._reader = RedisReader(server, self._key)
        # Shared, guarded by this condition. No thread waits for Redis or the server while it has the lock.
        self.changed = threading.Condition()
        self._outbox: list[LinkMessage] = []  # messages that have not come back
        self._cost = 0  # of the outbox (bytes)
        self._back = 0  # number of the last message that has come back
        self._failures: dict[object, int] = {self._read: 0, self._write: 0}  # in a row, by step
        self._stopped = False
        try:
            with contextlib.closing(RedisConnection(self._address)) as redis:
                self._trim(redis)
                self._read(redis)
        except OSError as error:
            why = printable(str(error))
            lasts = isinstance(error, (RedisError, ssl.SSLError, socket.gaierror))
            if lasts and error.errno != socket.EAI_AGAIN and not why.startswith(TEMPORARY_ERRORS):
                raise RedisError(f"Redis at {self._address.host}:{self._address.port}: {why}") from None

    # ---- for the server: any thread ----

    @property
    def away(self) -> bool:
        """Return whether Redis does not answer, or does not accept messages at the moment."""
        return max(self._failures.values()) > 1  # not if one connection was lost

    @property
    def is_full(self) -> bool:
        """Return whether senders should wait."""
        return self._cost > QUEUE_SIZE

    def start(self) -> None:
        """Start the threads."""
        for step in (self._read, self._write):
            threading.Thread(target=self._repeat, args=(step,), name="pywebsock link", daemon=True).start()

    def put(self, payload: bytes, opcode: int) -> None:
        """Put a message into the outbox without waiting. Senders call wait_for_room() first."""
        with self.changed:
            if not self._stopped:
                self._outbox.append((opcode, payload))
                self._cost += total_cost([(opcode, payload)])
                self.changed.notify_all()

    def wait_for_room(self, timeout: float | None = None) -> bool:
        """Wait until the outbox is not full, at most `timeout` seconds. Return whether the sender may put a message."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.is_full, timeout)

    def stop(self, timeout: float = 0.0) -> None:
        """Wait until the messages in the outbox have come back, or for `timeout` seconds. Then stop the link."""
        with self.changed:
            last = self._back + len(self._outbox)
            self.changed.wait_for(lambda: self._back >= last, timeout)
            missing = last - self._back
            self._stopped = True
            self._remove(self._back + len(self._outbox))
        if missing > 0:
            log.warning("%d messages have not come back from Redis", missing)

    # ---- both threads ----

    def _repeat(self, step: Callable[[RedisConnection], None]) -> None:
        """Repeat a step. After an error, use a new connection."""
        while not self._stopped:
            try:
                with contextlib.closing(RedisConnection(self._address)) as redis:
                    while not self._stopped:
                        step(redis)
                        self._report(step)
            except Exception as error:
                self._report(step, str(error) or type(error).__name__)
                time.sleep(RETRY_TIME)

    def _report(self, step: object, error: str = "") -> None:
        """Count the failures of a step. Log a line when Redis goes away and when it is back."""
        with self.changed:
            was_away = self.away
            self._failures[step] = self._failures[step] + 1 if error else 0
            is_away = self.away
        if is_away and not was_away:
            self._hooks.log(logging.WARNING, "Redis is away, senders wait: %s", printable(error))
        if was_away and not is_away:
            self._hooks.log(logging.WARNING, "Redis is back")

    def _remove(self, last: int) -> None:
        """Remove the messages up to this number from the outbox."""
        with self.changed:
            count = last - self._back
            self._cost -= total_cost(self._outbox[:count])
            del self._outbox[:count]
            self._back = last
            self.changed.notify_all()

    # ---- the thread that reads ----

    def _read(self, redis: RedisConnection) -> None:
        """Deliver the history, or the next messages."""
        self._server._take_from_link(self._reader.read(redis))
        self._remove(self._reader.seen[self._reader.name])

    # ---- the thread that writes ----

    def _write(self, redis: RedisConnection) -> None:
        """Write the next messages as one entry, and wait until they are back."""
        with self.changed:
            self.changed.wait_for(self._may_write, WAIT_TIME)
            count = max(1, RUN_SIZE * len(self._outbox) // (self._cost or 1))
            batch = [] if self._reader.behind else self._outbox[:count]
            last = self._back + len(batch)
        if not batch:
            redis.call("XLEN", self._key)  # use the connection, or a router may forget it
            return
        try:
            self._add(redis, batch, last)
        except RedisError as error:
            if str(error).startswith(REFUSALS):
                self._give_up_longest(redis, batch, str(error))
            raise
        self._trim(redis)
        with self.changed:
            self.changed.wait_for(lambda: self._back >= last, BACK_TIME)

    def _may_write(self) -> bool:
        """Return whether there are messages, and no server is behind."""
        is_held = time.monotonic() < self._reader.hold_until
        return bool(self._outbox) and not self._reader.behind and not is_held

    def _add(self, redis: RedisConnection, batch: Sequence[LinkMessage], last: int) -> None:
        """Write messages as one entry. `last` is the number of the last one."""
        words: list[bytes] = []
        for number, (opcode, payload) in enumerate(batch, last + 1 - len(batch)):
            kind = b"text" if opcode == TEXT else b"binary"
            words += b"%b:%d:%b" % (self._reader.name, number, kind), payload
        redis.call("XADD", self._key, "MAXLEN", "~", STREAM_LENGTH, "*", *words)

    def _give_up_longest(self, redis: RedisConnection, batch: Sequence[LinkMessage], error: str) -> None:
        """Remove the longest message of an entry that Redis has refused. The others are written again."""
        longest = max(batch, key=lambda message: len(message[1]))
        with self.changed:
            self._outbox.remove(longest)
            self._cost -= total_cost([longest])
        self._hooks.log(logging.WARNING, "Redis refuses a message, which is lost: %s", printable(error))
        if error.startswith("OOM "):  # it may be the stream that fills the memory
            redis.call("XTRIM", self._key, "MAXLEN", redis.call("XLEN", self._key) * 3 // 4)

    def _trim(self, redis: RedisConnection) -> None:
        """Remove the oldest quarter of the stream, and repeat this while it has too many bytes."""
        length = redis.call("XLEN", self._key)  # before the size: two servers then remove the same quarter
        most = max(STREAM_SIZE, 8 * self._server.max_message)
        while length > 4 and (redis.call("MEMORY", "USAGE", self._key, "SAMPLES", 0) or 0) > most:
            length = length * 3 // 4
            redis.call("XTRIM", self._key, "MAXLEN", length)


# ======================================================================================
# Command line
#
# The command creates a server from its options, and adds signals, systemd, standard input and
# a log on standard error.
# ======================================================================================


@functools.lru_cache(maxsize=1)
def ask_passphrase() -> str:
    """Ask for the passphrase of the key on the terminal, and return it. Raise OSError without a terminal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # do not read standard input
            return getpass.getpass("Passphrase of the key: ")
    except (getpass.GetPassWarning, EOFError):
        raise OSError("the key has a passphrase, and there is no terminal to ask for it") from None


def load_certificate(cert: str, key: str | None, may_ask: bool = True) -> ssl.SSLContext:
    """Return a server context with the certificate and key in these files (PEM). Raise OSError."""
    is_known = ask_passphrase.cache_info().currsize > 0
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for TLS 1.2; those of TLS 1.3 are all secure
    try:
        context.load_cert_chain(cert, key, ask_passphrase if may_ask or is_known else "")
    except OSError as error:
        files = " and ".join(filter(None, (cert, key)))
        raise OSError(f"cannot load certificate and key in PEM from {files}: {error.strerror or error}") from None
    return context


HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows
OTHER_SIGNALS = [each for each in signal.Signals if each.name in ("SIGTERM", "SIGHUP", "SIGBREAK")]  # of this system


class Program(BroadcastServer):
    """The server of the command line. serve_forever() handles signals between two connections."""

    files: tuple[str, str | None]  # of the certificate and the private key (PEM), if there is a TLS context
    signals: list[int]  # received, and not handled yet
    inherited = False  # systemd has bound the socket
    next_trim = 0.0  # time.monotonic() at which malloc_trim() is called

    def server_bind(self) -> None:
        """Bind the socket, or use the socket that systemd has bound (sd_listen_fds(3)). The constructor calls it."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            super().server_bind()
            return
        if os.environ.get("LISTEN_FDS") != "1":
            raise OSError(f"systemd passes {os.environ.get('LISTEN_FDS')} sockets: the unit must have one ListenStream")
        self.socket.close()
        self.socket = socket.socket(fileno=3)
        address: Any = self.socket.getsockname()
        self.server_address = (UNIX + os.fsdecode(address), 0) if self.socket.family == AF_UNIX else address
        self.inherited = True

    def catch_signals(self) -> None:
        """Install the signal handlers, if this is the main thread."""
        with contextlib.suppress(ValueError):  # in other threads, Python refuses handlers
            for number in (signal.SIGINT, *OTHER_SIGNALS):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(number, self.stop)

    def stop(self, number: int, frame: object) -> None:
        """Note a signal for service_actions(). A second Ctrl-C ends the program at once."""
        if number == signal.SIGINT and number in self.signals:
            os._exit(130)
        self.signals.append(number)

    def service_actions(self) -> None:
        """Act on signals: SIGHUP renews the certificate, others stop the program. serve_forever() calls it often.

        At times, let malloc return freed memory between blocks in use (Linux). After a rush, that
        can be hundreds of MB.
        """
        if time.monotonic() > self.next_trim:
            call_libc("malloc_trim", 0)
            self.next_trim = time.monotonic() + TRIM_TIME
        while self.tls_context and HANGUP in self.signals:
            self.signals.remove(HANGUP)
            self.renew()
        if self.signals:
            for number in OTHER_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # also while Python ends
            log.info("stopping")
            notify("STOPPING=1")
            raise KeyboardInterrupt

    def renew(self) -> None:
        """Load the certificate again, for new connections, and ask for no passphrase. Keep the old one on an error."""
        try:
            self.tls_context = load_certificate(*self.files, may_ask=False)
            log.info("the certificate is loaded again")
        except OSError as error:
            log.error("keeping the old certificate: %s", printable(str(error)))


def parse_size(text: str) -> int:
    """Return the value of a number with an optional suffix: K (1024), M (1024 K) or G (1024 M)."""
    match = re.fullmatch("([0-9]{1,12})([KMG]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1000 or 16M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


EXAMPLES = """examples:
  tail -f log | pywebsock --stdin --read-only --history 100
  pywebsock --host :: --port 443 --cert cert.pem --key key.pem --origin https://example.com
"""


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Options with the name of a setting are checked by the server."""
    about = "Send each message of a WebSocket client to all clients. Open http://localhost:4545/ in several tabs."
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("pywebsock", description=about, epilog=EXAMPLES, formatter_class=kind)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address such as 0.0.0.0, :: or unix:PATH (default: %(default)s)")
    add("--port", default=4545, type=int, help="port to listen on; 0: any free port (default: %(default)s)")
    origin = "allow pages of this origin to connect; *: of any origin; repeatable"
    add("--origin", dest="origins", metavar="ORIGIN", action="append", default=[], help=origin)
    add("--cert", metavar="FILE", help="certificate chain in PEM: serve wss:// and https://")
    add("--key", metavar="FILE", help="private key in PEM, if it is not in the file of the certificate")
    add("--subprotocol", dest="subprotocols", metavar="NAME", action="append", help="support it; repeatable")
    add("--redis", metavar="URL", help="form one room with all servers on this Redis")
    add("--no-compression", action="store_false", dest="compression", help="do not use permessage-deflate")
    add("--stdin", action="store_true", help="broadcast each line of standard input")
    add("--read-only", action="store_true", help="clients can receive messages, but not send them")
    add_limits(parser)
    add = parser.add_argument_group("logging").add_mutually_exclusive_group().add_argument
    add("--quiet", action="store_true", help="log only warnings and errors")
    add("--verbose", action="store_true", help="also log each client that joins")
    add("--trace", action="store_true", help="log every handshake and the fields of every frame")
    return parser


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that are limits."""
    group = parser.add_argument_group("limits (sizes in bytes, or such as 64K, 16M, 1G)")
    add = functools.partial(group.add_argument, type=parse_size)
    add("--max-message", metavar="SIZE", default="16M", help="maximum size of a message (default: %(default)s)")
    add("--max-backlog", metavar="SIZE", default="16M", help="maximum size of a client's queue (default: %(default)s)")
    add("--max-clients", metavar="N", default=10_000, help="maximum number of clients (default: %(default)s)")
    ping = "seconds without data until a Ping, and then until a drop (default: %(default)g)"
    add("--ping", dest="ping_interval", type=float, metavar="SECONDS", default=20.0, help=ping)
    add("--history", metavar="N", default=0, help="number of messages that a new client gets first (default: 0)")
    add("--rate", type=float, metavar="N", default=0.0, help="messages per second of one client (default: no limit)")


def create_server(options: argparse.Namespace) -> Program:
    """Return a listening server. Raise OSError, or ValueError or OverflowError if an option is wrong."""
    if options.stdin and not sys.stdin:  # another file may get its descriptor
        raise OSError("standard input is closed")
    options.ping_timeout = options.ping_interval
    if options.cert is not None:
        options.tls_context = load_certificate(options.cert, options.key)
    settings = {name: value for name, value in vars(options).items() if hasattr(BroadcastServer, name)}
    server = Program((options.host, options.port), **settings)
    server.files, server.signals = (options.cert, options.key), []
    return server


def network_address(bound: str) -> str | None:
    """Return the IP address at which other devices reach a server bound to `bound`, or None if they cannot."""
    address = ipaddress.ip_address(bound)
    if not address.is_unspecified:
        return None if address.is_loopback else bound
    remote = (socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")
    for family, host in remote[: address.version // 3]:  # 0.0.0.0 is IPv4 only
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing; the kernel chooses a local address
            return str(probe.getsockname()[0])
    return None


def locations(server: BroadcastServer, host: str) -> str:
    """Return the first lines of output: the URLs of the server on this device and on the network."""
    bound, port = str(server.server_address[0]), server.server_address[1]
    if bound.startswith(UNIX):
        return f"pywebsock: listening on {printable(bound)}"
    name = "localhost" if bound in ("127.0.0.1", "::1", "0.0.0.0", "::") else printable(host)
    if IS_WINDOWS and name == "localhost" and ":" not in bound and not server.tls_context:
        name = "127.0.0.1"  # for localhost, some clients there try IPv6 for two seconds first
    s = "s" if server.tls_context else ""
    names = dict.fromkeys([name, network_address(bound) or name])
    lines = []
    for label, each in zip(("listening on", "on the network:"), names):
        where = f"[{each}]:{port}/" if ":" in each else f"{each}:{port}/"
        lines.append(f"pywebsock: {label} http{s}://{where} (ws{s}://{where})")
    return "\n".join(lines)


def announce(text: str) -> None:
    """Print the first lines of output. Log a warning if standard output is closed."""
    try:
        print(text, flush=True)
    except OSError as error:
        log.warning("standard output: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail when it ends


def notify(state: str) -> None:
    """Send the state to systemd, if systemd has started the program (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), re.sub("^@", "\0", path))  # @: the abstract namespace


def split_lines(stream: TextIO, size: int) -> Iterator[str]:
    """Yield each line of a text. Split lines of more than `size` bytes in UTF-8 between two characters."""
    rest = ""  # of the current line
    cut = False  # a part of it was yielded or skipped
    for part in iter(functools.partial(stream.readline, size + 2), ""):
        rest += part
        ended = part.endswith("\n")
        if ended:
            rest = rest.rstrip("\r\n")
        while len(rest.encode()) > size:
            piece = rest.encode()[:size].decode(errors="ignore")
            if piece:
                yield piece
            rest = rest[len(piece) or 1 :]  # skip a character that is longer than `size`
            cut = True
        if ended:
            if rest or not cut:
                yield rest
            rest, cut = "", False
    if rest:
        yield rest


def broadcast_lines(server: BroadcastServer) -> None:
    """Broadcast each line of standard input. This is the target of a thread."""
    # Do not use sys.stdin: a thread must not hold its lock when the program ends.
    try:
        if not IS_WINDOWS:
            os.set_blocking(0, True)  # another program may have changed it
        with open(0, encoding="utf-8", errors="replace", newline="\n", closefd=False) as stdin:
            for line in split_lines(stdin, server.max_message):
                server.broadcast(line)
        log.info("standard input has ended")
    except OSError as error:
        log.warning("standard input: %s", error.strerror)


class FloodFilter:
    """Logs up to MOST_LINES lines of one kind per LINES_TIME, so that a client cannot fill the disk.

    Lines of one kind have the same format string. The first line of a period has the number
    of lines that were left out in the period before it.
    """

    MOST_LINES = 20
    LINES_TIME = 10.0  # seconds

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, int]] = {}  # end of the period, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a line."""
        now, kind = time.monotonic(), str(record.msg)
        end, lines = self._kinds.get(kind, (0.0, 0))
        if now >= end:
            left_out, end, lines = lines - self.MOST_LINES, now + self.LINES_TIME, 0
            if left_out > 0:
                record.msg = f"{kind} ({left_out} more like this were left out)"
        self._kinds[kind] = (end, lines + 1)
        return lines < self.MOST_LINES


class PatientStream:
    """A text stream for logs. It leaves out text that a full pipe does not accept: the server must not stop."""

    PATIENCE = 1.0  # seconds
    PIECE = 1000  # characters: a pipe that accepts data accepts 4096 bytes

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a text. Leave out the part that cannot be written within PATIENCE."""
        for i in range(0, len(text), self.PIECE):
            # Windows cannot select a file; a stream may have no descriptor.
            with contextlib.suppress(OSError, ValueError, TypeError):
                if not select.select([], [self._stream], [], self.PATIENCE)[1]:
                    return
            self._stream.write(text[i : i + self.PIECE])
            self._stream.flush()


def start_logging(options: argparse.Namespace) -> None:
    """Log to standard error. The level depends on --quiet and --verbose."""
    stream = PatientStream(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.addFilter(FloodFilter())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
    log.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO)
    trace_log.addHandler(logging.StreamHandler(stream))
    trace_log.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until a signal stops it. Return the exit status."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.key is not None and options.cert is None:
        parser.error("--key requires --cert")
    start_logging(options)
    tune_malloc()
    try:
        server = create_server(options)
        server.catch_signals()
        announce(locations(server, str(server.server_address[0]) if server.inherited else options.host))
        notify("READY=1")
    except OSError as error:
        place = options.host if options.host.startswith(UNIX) else f"{options.host} port {options.port}"
        where = f"{place}: " if error.strerror else ""  # an error of the system does not name the address
        parser.exit(1, f"pywebsock: {where}{error.strerror or error}\n")
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    with server, contextlib.suppress(KeyboardInterrupt):
        if options.stdin:
            threading.Thread(target=broadcast_lines, args=(server,), name="stdin", daemon=True).start()
        server.serve_forever(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
