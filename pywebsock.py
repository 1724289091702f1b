#!/usr/bin/env python3
"""A WebSocket broadcast server in one file: what one client sends, all clients get.

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

What to read.  In the first hour, the protocol: the parts up to the opening handshake know no
sockets and no threads, take bytes, and give values or raise.  In the second, a client's life
and the engine: Turn, State and WebSocketHandler, Room.  The rest can be left out: HTTP, the
trace and TLS until they are wanted, housekeeping and server until something is to be changed,
many machines by whoever has one.

    vocabulary            opcodes, status codes                RFC 6455 5.2, 7.4
    errors                what the pure parts raise
    base framing          masking, frames out, frames in       RFC 6455 5
    permessage-deflate    offers, inflating, deflating         RFC 7692
    messages              fragments, UTF-8, what to broadcast  RFC 6455 5.4, 5.6, 8.1
    opening handshake     requests, checks, origins, answers   RFC 6455 4, RFC 9112
    HTTP                  the page, the status, POST           RFC 9110
    trace                 what passes, drawn as in 5.2
    settings, log         what can be set, and what is said
    transports            TLS that looks like a socket         RFC 8446
    Outbox                what one socket has yet to take
    Turn                  one order for all operations
    connections           State, WebSocketHandler              RFC 6455 5.5, 7
    Room                  the clients that get broadcasts
    housekeeping          deadlines, slow clients, limits
    server                BroadcastServer
    many machines         servers that share a Redis stream    (RESP2)
    command line          main()

Threads.  One accepts (it runs serve_forever), one for each connection reads it and runs its
hooks, one, the *housekeeper*, minds slow clients and deadlines; with --redis, two more
keep the link.  Any other may call broadcast(), send() and close().

The turn.  Whatever changes what clients see is an *operation*: a broadcast, a client joining,
closing or leaving.  Operations are carried out one at a time, in one order, by whichever
thread has the *turn*; the class Turn says how, and why nothing is left behind.  Outbox and
Room belong to the turn: they are touched in it alone, so they have no locks.  Three rules
hold everywhere:

- A connection's own thread only reads from its socket.  What sends on it, shuts it down or
  closes it is an operation (but for the TLS handshake, in which nobody else sends yet).
- In the turn nothing waits, and no hook is called.
- Locks are taken in the order: exit (of thousands, one leaves at a time), turn, then
  one of the others (the tally of the turn, the two of a TLS, the seats, the budget, the pace,
  the news of the connections and of the link), held alone, for a few instructions.

Glossary.  Client: a connection after its opening handshake.  Stranger: one before it.  Room:
the clients that get broadcasts.  Line: those of them with the same window.  Window: the LZ77
window of deflate, 9 to 15 bits, or 0 without compression.  Slow: with something in its
outbox.  Holder: the thread that has the turn.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import enum
import errno
import functools
import hashlib
import http
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pathlib
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
import zlib
from _thread import start_new_thread
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Callable, NamedTuple, Union

__all__ = ["BroadcastServer", "CloseCode", "HandshakeError", "Message", "Opcode", "ProtocolError", "WebSocketHandler"]
__version__ = "1.0.0"

log = logging.getLogger("pywebsock")
Message = Union[str, bytes]  # text or binary (RFC 6455 5.6)
Octets = Union[bytes, bytearray]


# ======================================================================================
# Vocabulary (RFC 6455 5.2, 7.4)
# ======================================================================================


class Opcode(enum.IntEnum):
    """What a frame is (RFC 6455 5.2, 11.8). From 8 on: control frames."""

    CONT = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """Why a connection ends (RFC 6455 7.4.1, names of the IANA registry)."""

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


# 7.4: those of the registry that may stand in a frame, 3000-3999 registered, 4000-4999 private.
CODES_ON_THE_WIRE = frozenset(CloseCode) - {1005, 1006, 1015} | frozenset(range(3000, 5000))

TEXT, BINARY, CONT, CLOSE, PING, PONG = Opcode.TEXT, Opcode.BINARY, Opcode.CONT, Opcode.CLOSE, Opcode.PING, Opcode.PONG
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # a word in a header field (RFC 9110 5.6.2)


# ======================================================================================
# Errors
# ======================================================================================


class HandshakeError(Exception):
    """The request is refused: carries the HTTP status, and more header fields for the response.

    A hook may raise it: HandshakeError(401, "no token", ("WWW-Authenticate", "Bearer")). The
    peer and the log see the message. Raises ValueError for what is no status from 300 on, or
    no header field in ASCII (RFC 9110 15, 5.5).
    """

    def __init__(self, status: int, message: str, *fields: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = http.HTTPStatus(status)
        self.fields = fields
        if status < 300 or not all(re.fullmatch(f"{TOKEN}: [ -~]*", f"{name}: {value}") for name, value in fields):
            raise ValueError(f"a refusal has a status from 300 on and fields in ASCII, not {status} and {fields}")


class ProtocolError(Exception):
    """The connection must fail (RFC 6455 7.1.7): carries the close code."""

    def __init__(self, code: CloseCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def demand(good: object, status: int, message: str, *fields: tuple[str, str]) -> None:
    """Refuse a request in which something is not good: raises HandshakeError."""
    if not good:
        raise HandshakeError(status, message, *fields)


# ======================================================================================
# Base framing (RFC 6455 5)
# ======================================================================================

OPCODES = frozenset(map(int, Opcode))
MAX_CONTROL_PAYLOAD = 125  # bytes (5.5)
Header = tuple[int, int, bytes, int]  # first byte, payload length, masking key, start of the payload

# A table for each byte of a masking key: XOR_WITH[k][b] == k ^ b.
XOR_WITH = [bytes(byte ^ key for byte in range(256)) for key in range(256)]


def apply_mask(payload: Octets, key: bytes) -> Octets:
    """Mask or unmask (5.3): byte i XOR byte i mod 4 of the key."""
    length = len(payload)
    if length < 512:  # the whole payload as one integer: fastest for short ones
        mask = int.from_bytes((key * (length // 4 + 1))[:length], "little")
        return (int.from_bytes(payload, "little") ^ mask).to_bytes(length, "little")
    masked = bytearray(payload)  # each fourth byte through one table: fastest for long ones
    for i in range(4):
        masked[i::4] = masked[i::4].translate(XOR_WITH[key[i]])
    return masked


def serialize_frame(opcode: int, payload: bytes, rsv1: bool = False) -> bytes:
    """A frame from the server: final, unmasked, shortest length encoding (5.1, 5.2)."""
    length = len(payload)
    first = 0x80 | rsv1 << 6 | opcode
    if length < 126:
        return bytes((first, length)) + payload
    if length < 1 << 16:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


def parse_frames(pieces: Iterable[bytes]) -> Iterator[tuple[bool, bool, int, Octets, int]]:
    """Cut the bytes that a client sends, as they arrive, into frames, checked and unmasked (5.2).

    Yields (fin, rsv1, opcode, payload, left). A data frame is not waited for: what has
    arrived of its payload is given like a fragment, without fin; what arrives later follows
    as continuations. `left` is the number of bytes that its header still promises. Control
    frames come whole. Raises ProtocolError, after everything that was good before.
    """
    data = payload = key = b""
    first = length = left = 0
    for piece in pieces:
        data += piece
        position = 0
        if left:  # a payload goes on, as behind a header of a continuation, with the key turned
            turn = (length - left) % 4
            header: Header | None = (first & 0x80, left, key[turn:] + key[:turn], 0)
        else:
            header = parse_header(data, 0)
        while header:
            first, length, key, start = header
            payload = data[start : start + length]
            left = length - len(payload)
            if left and first & 0x08:  # control frames are short: wait for the whole
                left = 0
                break
            position = start + length - left
            yield first >= 0x80 and not left, first & 0x40 != 0, first & 0x0F, apply_mask(payload, key), left
            header = parse_header(data, position) if position < len(data) else None
        data, payload = data[position:], b""
        del piece  # a client that is silent now must not hold the memory of what it sent


def parse_header(data: bytes, position: int, strict: bool = True) -> Header | None:
    """The frame header at `position` (5.2); None where more bytes are needed.

    Raises ProtocolError, if `strict`, as soon as the bytes show what no client may send.
    """
    if len(data) < position + 2:
        return None
    first, second = data[position], data[position + 1]
    if strict:
        if first & 0x3F not in OPCODES:  # 5.2: no extension here gives the others a meaning
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"RSV2, RSV3 or opcode {first & 0x0F} is reserved")
        if second < 0x80:  # 5.1
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a frame is not masked")
        if first & 0x08 and (first < 0x80 or second > 0x80 + MAX_CONTROL_PAYLOAD):  # 5.5
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a control frame is fragmented or too long")
    length, key = second & 0x7F, position + 2
    if length > 125:  # it follows, in 16 or 64 bits
        least, key = (126, key + 2) if length == 126 else (1 << 16, key + 8)
        length = int.from_bytes(data[position + 2 : key], "big")
        if strict and key <= len(data) and not least <= length < 1 << 63:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a length is not encoded in the fewest bytes, or negative")
    start = key + 4 if second >= 0x80 else key
    return (first, length, data[key:start], start) if start <= len(data) else None


def serialize_close(code: int, reason: str = "") -> bytes:
    """A Close frame; the code 1005 stands for none, a long reason is cut (5.5.1, 7.4.1)."""
    if code == CloseCode.NO_STATUS_RCVD:
        return serialize_frame(CLOSE, b"")
    text = reason.encode()[: MAX_CONTROL_PAYLOAD - 2].decode(errors="ignore")  # never half a character
    return serialize_frame(CLOSE, struct.pack("!H", code) + text.encode())


def parse_close(payload: bytes) -> tuple[int, str]:
    """The (code, reason) of a Close frame's payload (5.5.1). Raises ProtocolError."""
    if not payload:
        return CloseCode.NO_STATUS_RCVD, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or code not in CODES_ON_THE_WIRE:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a Close frame has no valid code")
    return code, decode_text(payload[2:])


def decode_text(payload: Octets) -> str:
    """UTF-8 (8.1). Raises ProtocolError."""
    try:
        return payload.decode()  # on PyPy, str(payload, "utf-8") lets surrogates through
    except UnicodeDecodeError:
        raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "text is not UTF-8") from None


# ======================================================================================
# permessage-deflate (RFC 7692)
#
# The answer to every offer has server_no_context_takeover and client_no_context_takeover:
# each message is compressed by itself. So a broadcast is compressed once for everybody,
# and no connection keeps a window of 32 KiB. A reader who skips this part needs to know
# only that a client's `window` is 0 without compression, and that rsv1 marks a
# compressed message.
# ======================================================================================

DEFLATE_THRESHOLD = 1024  # bytes; shorter messages win little and are sent plain
SYNC_TAIL = b"\x00\x00\xff\xff"  # ends what a sync flush gives; left out on the wire (7.2.1)
MAX_FINALS = 1000  # blocks with BFINAL in one message; they may stand anywhere (7.2.1), zlib ends at each
INFLATE_SIZE = 64 * 1024  # bytes
INFLATING = threading.Lock()  # one thread at a time: hundreds would leave no processor for others
INFLATER_SIZE = 40 * 1024  # bytes that zlib takes, for its window above all

PARAMETER = rf'({TOKEN})(?:[ \t]*=[ \t]*({TOKEN}|"{TOKEN}"))?'
EXTENSION = re.compile(rf"({TOKEN})((?:[ \t]*;[ \t]*{PARAMETER})*)")

# The parameters that an offer may have, and their values (7.1).  A client may announce that its own
# window can be limited.  There is no need to: a window of 15 bits inflates all smaller ones, and costs
# its memory for one message.  zlib has no raw deflate with a window of 8 bits: such an offer is declined.
PARAMETERS = {
    "server_no_context_takeover": "",
    "client_no_context_takeover": "",
    "client_max_window_bits": "([89]|1[0-5])?",
    "server_max_window_bits": "9|1[0-5]",
}


def parse_extensions(field: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The offers in Sec-WebSocket-Extensions (RFC 6455 9.1): [(name, [(parameter, value or "")])].

    In linear time. Raises HandshakeError.
    """
    offers = []
    for text in field.split(","):
        match = EXTENSION.fullmatch(text.strip(" \t"))
        if match:
            parameters = re.findall(PARAMETER, match[2])
            offers.append((match[1], [(name, value.strip('"')) for name, value in parameters]))
        elif text.strip(" \t"):  # a list may have empty elements (RFC 9110 5.6.1)
            raise HandshakeError(400, "Sec-WebSocket-Extensions is malformed")
    return offers


def negotiate_deflate(field: str) -> tuple[int, str]:
    """The first acceptable offer's (window, extension to answer); (0, "") where there is none (RFC 7692 5, 7.1)."""
    for name, parameters in parse_extensions(field):
        known = all(key in PARAMETERS and re.fullmatch(PARAMETERS[key], value) for key, value in parameters)
        asked = dict(parameters)
        if name == "permessage-deflate" and known and len(asked) == len(parameters):  # each at most once
            window = asked.get("server_max_window_bits", "")
            limit = f"; server_max_window_bits={window}" if window else ""
            return int(window or 15), f"{name}; server_no_context_takeover; client_no_context_takeover{limit}"
    return 0, ""


def deflate(payload: bytes, window: int) -> bytes:
    """Compress one message, by itself (7.2.1)."""
    compressor = zlib.compressobj(wbits=-window)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[: -len(SYNC_TAIL)]


class Inflater:
    """Decompresses one message as its fragments come, in pieces of bounded size (7.2.2)."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=-15)
        self._finals = 0

    def inflate(self, data: Octets, fin: bool) -> Iterator[bytes]:
        """Yield the plain bytes that `data` gives, at most INFLATE_SIZE at once. Raises ProtocolError."""
        if fin:
            data += SYNC_TAIL + b"\x03\x00"  # an empty final block: zlib takes it for one if all before it is whole
        while data and self._finals <= MAX_FINALS:
            if self._zlib.eof:
                self._zlib, self._finals = zlib.decompressobj(wbits=-15), self._finals + 1
            try:
                with INFLATING:
                    plain = self._zlib.decompress(data, INFLATE_SIZE)
            except zlib.error:
                raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "compressed data is corrupt") from None
            data = self._zlib.unconsumed_tail or self._zlib.unused_data
            yield plain
        if data or (fin and not self._zlib.eof):
            raise ProtocolError(
                CloseCode.INVALID_FRAME_PAYLOAD_DATA, "compressed data ends within a block or too often"
            )


# ======================================================================================
# Messages (RFC 6455 5.4, 5.6, 8.1)
# ======================================================================================


class MessageReader:
    """Puts fragments together and gives whole messages and control frames.

    - frames: how many have come, or pieces of them; whoever counts them sets it to 0
    - size: bytes kept for a message that is not finished

    `keep` is called with each new `size`, which grows by at most INFLATE_SIZE or a piece at once,
    and may raise ProtocolError.
    """

    def __init__(self, max_message: int, compressed: bool = False, keep: Callable[[int], object] = bool) -> None:
        self.frames = 0
        self.size = 0
        self._max_message = max_message  # bytes, after inflating
        self._may_compress = compressed  # permessage-deflate was negotiated
        self._keep = keep
        self._opcode = 0  # of the message whose fragments are coming; 0 between messages
        self._pieces: list[bytearray] = []  # of its payload: one buffer that grows would be copied nine times
        self._length = 0  # bytes in them
        self._inflater: Inflater | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")()  # finds wrong bytes as they come

    def read(self, pieces: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
        """Yield (opcode, payload) for every text (str), binary, Close, Ping and Pong (bytes) in what arrives.

        Each as soon as it is complete: the next piece is asked for after that. Raises
        ProtocolError as soon as the bytes allow, after everything that was good before.
        """
        for fin, rsv1, opcode, payload, left in parse_frames(pieces):
            self.frames += 1
            if opcode >= 8:  # 5.4: control frames may stand between fragments
                if rsv1:
                    raise ProtocolError(CloseCode.PROTOCOL_ERROR, "RSV1 is set on a control frame")
                yield opcode, payload
            elif fin and opcode and not rsv1 and not self._opcode and len(payload) <= self._max_message:
                yield opcode, decode_text(payload) if opcode == TEXT else bytes(payload)  # nearly all messages
            else:
                self._begin_or_continue(opcode, rsv1)
                self._append(fin, payload, left)
                if fin:
                    yield self._opcode, self._finish()
                    self._count()  # only now: until it is handed on, a message is kept
            del payload  # as in parse_frames()

    def _begin_or_continue(self, opcode: int, rsv1: bool) -> None:
        if opcode and self._opcode:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a new message begins within a fragmented one")
        if not opcode and not self._opcode:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "there is no message to continue")
        if rsv1 and not (opcode and self._may_compress):  # RFC 7692 6: on the first fragment only
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "RSV1 is set without compression")
        if opcode:
            self._opcode = opcode
            self._inflater = Inflater() if rsv1 else None
            self._count()

    def _append(self, fin: bool, payload: Octets, left: int) -> None:
        pieces: Iterable[Octets] = (payload,)
        if self._inflater:  # what counts is its output; but nobody needs that much for it
            self._check_size(len(payload) + left - self._max_message // 8 - 64)
            pieces, left = self._inflater.inflate(payload, fin), 0
        for plain in pieces:
            self._check_size(self._length + len(plain) + left)
            if self._opcode == TEXT:
                self._check_utf8(plain)
            if self._pieces and len(self._pieces[-1]) < INFLATE_SIZE // 2:  # a million fragments are no million pieces
                self._pieces[-1] += plain
            else:
                self._pieces.append(bytearray(plain))
            self._length += len(plain)
            self._count()

    def _check_size(self, size: int) -> None:
        if size > self._max_message:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, f"a message is longer than {self._max_message} bytes")

    def _check_utf8(self, payload: Octets) -> None:
        if payload.isascii() and not self._utf8.getstate()[0]:
            return  # it is the decoder's answer, too, but ten times faster
        try:
            self._utf8.decode(payload)
            rest, _ = self._utf8.getstate()
            if rest[:1] == b"\xed" and rest[1:] >= b"\xa0":  # a surrogate: Python waits for its third byte
                rest.decode()
        except UnicodeDecodeError:
            raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "text is not UTF-8") from None

    def _finish(self) -> Message:
        text, payload = self._opcode == TEXT, b"".join(self._pieces)
        self._opcode, self._length, self._inflater = 0, 0, None
        self._pieces.clear()
        self._utf8.reset()
        return decode_text(payload) if text else payload

    def _count(self) -> None:
        size = self._length + (INFLATER_SIZE if self._inflater else 0)
        if size != self.size:
            self.size = size
            self._keep(size)


class Budget:
    """Bytes that all connections together may keep of what is not finished: no sum over strangers is unbounded."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._kept: dict[object, int] = {}  # by connection
        self._lock = threading.Lock()

    def keep(self, connection: object, size: int) -> None:
        """A connection keeps so many bytes now, in the end none. Any thread. Raises ProtocolError for too many."""
        with self._lock:
            change = size - self._kept.get(connection, 0)
            if change > max(0, self._left):
                raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, "too many messages are unfinished")
            self._left -= change
            self._kept[connection] = size
            if not size:
                del self._kept[connection]


class Outgoing:
    """A message on its way to clients: a frame for each window in use, made once and shared by all."""

    __slots__ = ("_frames", "opcode", "payload", "size", "to")

    def __init__(
        self, message: Message, to: Iterable[WebSocketHandler] | None = None, opcode: Opcode = Opcode.BINARY
    ) -> None:
        """The opcode is that of bytes.

        Raises TypeError for anything but str and what is like bytes, ValueError for half a character in a str.
        """
        self.to = to if to is None else tuple(to)  # the clients that get it; None for all
        for client in self.to or ():
            if not isinstance(client, WebSocketHandler):
                raise TypeError("a message goes to clients")
        if isinstance(message, str):
            self.opcode, self.payload = TEXT, message.encode()
        elif isinstance(message, (bytes, bytearray, memoryview)):
            self.opcode, self.payload = opcode, bytes(message)
        else:
            raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
        self.size = len(self.payload)  # bytes
        self._frames: dict[int, bytes] = {}  # by window

    def frame(self, window: int) -> bytes:
        """The frame for clients with this window (any thread: a race costs only time)."""
        if window not in self._frames:
            compress = window and self.size >= DEFLATE_THRESHOLD
            payload = deflate(self.payload, window) if compress else self.payload
            if len(payload) < self.size:
                self._frames[window] = serialize_frame(self.opcode, payload, rsv1=True)
            else:
                self._frames[window] = self.frame(0) if window else serialize_frame(self.opcode, payload)
        return self._frames[window]


# ======================================================================================
# Opening handshake (RFC 6455 4; HTTP as in RFC 9112)
# ======================================================================================

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3

MAX_HEAD, MAX_LINE, MAX_FIELDS = 32 * 1024, 8 * 1024, 100  # bytes of a head, bytes of a line in it, header fields
HEAD_END = re.compile(rb"\n\r?\n")  # of any head; a good one ends in CR LF CR LF
FIELDS = rf"(?:\r\n{TOKEN}:[^\x00-\x08\x0a-\x1f\x7f]*)*"
HEAD = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/1\.([0-9])({FIELDS})\r\n\r\n")
ABSOLUTE_FORM = re.compile(r"^https?://([^/?]*)", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~-]+)(?::[0-9]{0,5})?")
ADDRESS = re.compile(r"(localhost|[0-9]+(\.[0-9]+){3}|\[.+\])(:[0-9]*)?")  # localhost or an IP address
ORIGIN = re.compile(rf"(\*|null|file://)|((?!wss?:)[a-z][a-z0-9+.-]*://{HOST.pattern}(?<!:))/?")


class Request(NamedTuple):
    """The head of a request; header field names are in lower case, repeated fields joined by commas."""

    method: str
    target: str
    version: tuple[int, int]
    headers: dict[str, str]

    def tokens(self, name: str) -> list[str]:
        """The comma-separated tokens of a header field, in lower case."""
        return [token.strip(" \t").lower() for token in self.headers.get(name, "").split(",")]

    @property
    def path(self) -> str:
        """The target without its query, or without what precedes the path in absolute form (RFC 9112 3.2)."""
        return ABSOLUTE_FORM.sub("", self.target.partition("?")[0], 1) or "/"

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket, however badly."""
        return "websocket" in self.tokens("upgrade") or "sec-websocket-key" in self.headers


def parse_request(pieces: Iterable[bytes]) -> tuple[Request, bytes]:
    """The request whose head arrives in these pieces, and what has arrived after the head. Raises HandshakeError."""
    data, end = bytearray(), None
    for piece in pieces:
        seen = max(0, len(data) - 3)
        data += piece if data else piece.lstrip(b"\r\n")  # empty lines may come first (RFC 9112 2.2)
        end = HEAD_END.search(data, seen)
        if end or len(data) > MAX_HEAD or (data and not data[:1].isalpha()):  # TLS on a plain port, say
            break
    size = end.end() if end else len(data)
    head = data[:size].decode("latin-1")
    lengths = [len(line) for line in head.removesuffix("\r\n\r\n").split("\r\n")]
    demand(lengths[0] <= MAX_LINE, 414, f"the request line is longer than {MAX_LINE} bytes")
    demand(len(lengths) <= MAX_FIELDS + 1, 431, f"there are more than {MAX_FIELDS} header fields")
    demand(max(lengths) <= MAX_LINE, 431, f"a header field is longer than {MAX_LINE} bytes")
    demand(size <= MAX_HEAD, 431, f"the head is longer than {MAX_HEAD} bytes")
    return parse_head(head), bytes(data[size:])


def parse_head(head: str) -> Request:
    """The request with this head, which ends in an empty line (RFC 9112 3, 5). Raises HandshakeError."""
    match = HEAD.fullmatch(head)
    if not match:
        raise HandshakeError(400, "that is not HTTP/1.1, incomplete, malformed, or its lines do not end in CR LF")
    headers: dict[str, str] = {}
    for line in match[4].split("\r\n")[1:]:
        name, _, value = line.partition(":")
        before = f"{headers[name.lower()]}, " if name.lower() in headers else ""
        headers[name.lower()] = before + value.strip(" \t")
    return Request(match[1], match[2], (1, int(match[3])), headers)


def check_host(request: Request) -> str:
    """The host that is asked: the Host field, which HTTP/1.1 demands, or in absolute form that of the target.

    RFC 9112 3.2. Raises HandshakeError.
    """
    host, absolute = request.headers.get("host", ""), ABSOLUTE_FORM.match(request.target)
    may_lack = not host and request.version < (1, 1)
    demand(may_lack or HOST.fullmatch(host), 400, "the Host header field is missing or malformed")
    demand(not absolute or HOST.fullmatch(absolute[1]), 400, "the host in the target is malformed")
    return absolute[1] if absolute else host


def check_origin(request: Request, origins: Sequence[str]) -> None:
    """Keep other people's web pages out (RFC 6455 10.2). Raises HandshakeError.

    A browser says which page asks. Programs say nothing and may enter; so may a page that
    came from this very server by the name of localhost or an address (any other name
    could have been made to point here: DNS rebinding), and what is listed in `origins`,
    as parse_origin() gives it. With nothing listed, so may a page opened from disk, which
    calls itself null or file://.
    """
    origin, allowed = request.headers.get("origin", "").lower(), origins or ("null", "file://")
    if "origin" not in request.headers or "*" in allowed or origin in allowed:
        return
    host = check_host(request).lower()
    if origin in (f"http://{host}", f"https://{host}") and ADDRESS.fullmatch(host):
        return
    name = printable(request.headers["origin"])
    raise HandshakeError(403, f'origin {name} may not connect (--origin {name} or origins=["{name}"] allows it)')


def parse_origin(text: str) -> str:
    """An origin as browsers write it (RFC 6454 6.2), or one of the words *, null and file://. Raises ValueError."""
    match = ORIGIN.fullmatch(text.lower())
    if not match:
        raise ValueError(f"an origin is a scheme and a host, such as https://example.com, not {text!a}")
    return re.sub("^(http:.*):80$|^(https:.*):443$", r"\1\2", match[1] or match[2])


def check_upgrade(request: Request) -> str:
    """Sec-WebSocket-Accept for a request that meets RFC 6455 4.2.1. Raises HandshakeError."""
    demand(request.method == "GET", 405, "a WebSocket is opened with GET", ("Allow", "GET"))
    demand(request.version >= (1, 1), 400, "a WebSocket is opened with HTTP/1.1")
    body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    demand(not body, 400, "a request for a WebSocket has no body")  # whose bytes would be taken for frames
    demand("websocket" in request.tokens("upgrade"), 400, "the Upgrade header field does not say websocket")
    demand("upgrade" in request.tokens("connection"), 400, "the Connection header field does not say Upgrade")
    fields = ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")  # RFC 9110 15.5.22
    demand(request.headers.get("sec-websocket-version") == "13", 426, "the WebSocket version is not 13", *fields)
    return compute_accept(request.headers.get("sec-websocket-key", ""))


def compute_accept(key: str) -> str:
    """Sec-WebSocket-Accept, proof that the server has understood the handshake (4.2.2). Raises HandshakeError."""
    demand(re.fullmatch("[0-9A-Za-z+/]{22}==", key), 400, "Sec-WebSocket-Key is not 16 bytes in base64")
    return base64.b64encode(hashlib.sha1(key.encode() + GUID, usedforsecurity=False).digest()).decode()


def body_length(request: Request, max_message: int) -> int:
    """The number of bytes of a request's body, which is to be one message (RFC 9112 6). Raises HandshakeError."""
    field, kind = request.headers.get("content-length", ""), request.headers.get("content-type", "").lower()
    demand(not kind.startswith("multipart/"), 415, "the body is the message: send no form")  # curl -F
    demand(field and "transfer-encoding" not in request.headers, 411, "the body needs a Content-Length")
    demand(re.fullmatch("[0-9]{1,18}", field), 400, "Content-Length is malformed")
    demand(int(field) <= max_message, 413, f"a message has at most {max_message} bytes")
    return int(field)


def decode_body(request: Request, body: bytes) -> Message:
    """The message in the body of a request: text where it is UTF-8 and does not say that it is binary."""
    if not request.headers.get("content-type", "").lower().startswith("application/octet-stream"):
        with contextlib.suppress(UnicodeDecodeError):
            return body.decode()
    return body


def serialize_response(status: int, fields: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
    """A response; all but 101 end the connection (RFC 9112 4)."""
    lines = [f"{name}: {value}\r\n" for name, value in fields]
    return f"HTTP/1.1 {status:d} {http.HTTPStatus(status).phrase}\r\n{''.join(lines)}\r\n".encode("latin-1") + body


def http_response(status: int, kind: str, body: bytes, *fields: tuple[str, str], head: bool = False) -> bytes:
    """A response to an ordinary request, with its body's length; to HEAD, without the body."""
    standard = (
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Access-Control-Allow-Origin", "*"),  # to a page that may not connect it only says why
        ("Connection", "close, Upgrade" if "Upgrade" in dict(fields) else "close"),  # RFC 9110 7.8
    )
    return serialize_response(status, (*standard, *fields), b"" if head else body)


def printable(text: str, limit: int = 200) -> str:
    """Text from the network, made safe for a log: control and non-ASCII characters escaped, cut."""
    return re.sub(r"[^ -\[\]-~]", lambda match: ascii(match[0])[1:-1], text[:limit])


# ======================================================================================
# HTTP on the same port (RFC 9110): the page, the status, POST
# ======================================================================================

METHODS = {"/": ("GET", "HEAD", "POST"), "/status": ("GET", "HEAD")}


def answer(client: WebSocketHandler, request: Request) -> bytes:
    """The response to a request that asks for no WebSocket; in the connection's thread. Raises HandshakeError."""
    server, allowed = client.server, METHODS.get(request.path, ())
    demand(allowed, 404, "there are / and /status, and a WebSocket on any path")
    demand(request.method in allowed, 405, "that method has no meaning here", ("Allow", ", ".join(allowed)))
    check_host(request)
    # A browser does not tell a page why its WebSocket was refused; this does.  Where page and server have the
    # same origin, the browser sends no Origin with GET: so the page says it in the query.
    said = re.search("[?&]origin=([^&]*)", request.target) if request.method == "GET" else None
    origin = {"origin": urllib.parse.unquote(said[1])} if said else {}
    check_origin(request._replace(headers={**origin, **request.headers}), server.origins)
    if request.method == "POST":
        take_post(client, request)
        return http_response(202, "text/plain; charset=utf-8", b"sent\n")
    head = request.method == "HEAD"
    if request.path == "/status":
        figures = client._call(lambda _: json.dumps(server.status()).encode() + b"\n")
        return http_response(200, "application/json", figures, head=head)
    page = pathlib.Path(__file__).with_name("pywebsock.html")
    demand(os.access(page, os.R_OK), 404, "pywebsock.html does not lie beside pywebsock.py")
    text = page.read_bytes()
    return http_response(200, "text/html; charset=utf-8", text, *page_policy(text), head=head)


def page_policy(page: bytes) -> list[tuple[str, str]]:
    """The Content-Security-Policy of a page as a header field: a meta element applies only to what follows it."""
    policy = re.search(rb'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page)
    return [("Content-Security-Policy", " ".join(policy[1].decode().split()))] if policy else []


def take_post(client: WebSocketHandler, request: Request) -> None:
    """Hand the body of a POST to the hooks, as a message. Raises HandshakeError, OSError."""
    server = client.server
    demand(not server.read_only, 403, "this server only sends")
    client._call(server.admit)
    length = body_length(request, server.max_message)
    if request.version >= (1, 1) and "100-continue" in request.tokens("expect"):  # RFC 9110 10.1.1
        server._perform(server._room.write, client, [serialize_response(100, ())])
    try:
        client._call(server.on_post, decode_body(request, client._read_body(length)))
    except ProtocolError as error:
        raise HandshakeError(503, str(error), ("Retry-After", "1")) from None


# ======================================================================================
# Trace (RFC 6455 5.2, drawn as it passes)
# ======================================================================================

LOOK_AT, SHOW = 512, 40  # bytes of a payload that are looked at, and characters that are shown of them
trace_log = logging.getLogger("pywebsock.trace")


class Traced:
    """The recv, send and shutdown of a socket, or of TLS; what passes is logged."""

    def __init__(self, transport: Any, name: str) -> None:
        self._transport, self.shutdown = transport, transport.shutdown
        self._received, self._sent = follow(f"{name} in "), follow(f"{name} out")
        for way in (self._received, self._sent):
            next(way)  # up to where it waits for bytes

    def recv(self, size: int) -> bytes:
        """As a socket's."""
        data = bytes(self._transport.recv(size))
        self._received.send(data)
        return data

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """As a socket's."""
        sent = int(self._transport.send(data, flags))
        self._sent.send(bytes(data[:sent]))
        return sent


def follow(name: str) -> Generator[None, bytes, None]:
    """Log what passes one way: a head line by line, each frame taken apart. Its bytes are sent to this, in any pieces.

    It only looks, and shows what breaks the protocol as it is.
    """
    data, position = b"", 0
    while b"\r\n\r\n" not in data and len(data) <= MAX_HEAD:
        data += yield
    head, _, data = data.partition(b"\r\n\r\n")
    for line in head.decode("latin-1").split("\r\n"):
        trace_log.info("%s %s", name, printable(line))
    while not re.search(b"Sec-WebSocket-(Key|Accept)", head, re.IGNORECASE):  # a body of HTTP
        yield
    while True:
        header = parse_header(data, position, strict=False)
        if header and header[3] + min(header[1], LOOK_AT) <= len(data):
            first, length, key, start = header
            payload = data[start : start + min(length, LOOK_AT)]
            trace_log.info("%s %s", name, describe_frame(first, data[position + 1], length, key, payload))
            position = start + length
        else:
            data, position = data[position:] + (yield), max(0, position - len(data))


def describe_frame(first: int, second: int, length: int, key: bytes, payload: bytes) -> str:
    """The fields of a frame in their order on the wire, and the beginning of its payload, given as it came: masked."""
    opcode, bits = first & 0x0F, {126: "7+16", 127: "7+64"}.get(second & 0x7F, "7")
    name, size = Opcode(opcode).name if opcode in OPCODES else "?", f"len={length} ({bits} bits)"
    start = f"FIN={first >> 7} RSV={first >> 4 & 7:03b} opcode={opcode:X} {name:6} MASK={second >> 7} {size:21}"
    mask = f"key={key.hex()}" if key else ""
    plain, what = bytes(apply_mask(payload, key or bytes(4))), ""
    if opcode == CLOSE and plain:
        code, plain = int.from_bytes(plain[:2], "big"), plain[2:]
        what = f"{code} {CloseCode(code).name if code in set(CloseCode) else '?'} "
    elif first & 0x40:
        with contextlib.suppress(zlib.error):
            plain, what = zlib.decompressobj(wbits=-15).decompress(plain, SHOW + 1), "inflated "
    text = printable(plain.decode("latin-1" if opcode == BINARY else "utf-8", "replace"))
    if text:
        what += f'"{text[:SHOW]}"' + ("..." if len(text) > SHOW else "")
    return f"{start} {mask:12} {payload[:4].hex():8} {what}".rstrip()


# ======================================================================================
# Settings and the log
# ======================================================================================


def check_setting(name: str, value: Any, default: Any) -> Any:
    """The value of a setting as the server uses it, which is of the kind of its default. Raises ValueError."""
    least = int(name == "max_clients")
    kinds: dict[object, tuple[Any, str]] = {
        bool: (bool, "True or False"),
        int: (int, f"a whole number from {least} on"),
        float: ((int, float), f"a number from {least} on"),
        tuple: ((list, tuple), 'a list such as ["https://example.com"]'),
        "redis": ((str, type(None)), "of the type str"),
        "tls_context": ((ssl.SSLContext, type(None)), "an SSLContext for servers"),
    }
    kind, words = kinds[name if default is None else type(default)]
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    good = good and getattr(value, "protocol", None) != ssl.PROTOCOL_TLS_CLIENT
    if not good or (isinstance(value, (int, float)) and not least <= value < math.inf):
        raise ValueError(f"{name} must be {words}, not {value!r}")
    return [parse_origin(str(origin)) for origin in value] if name == "origins" else value


def network_address(bound: str) -> str | None:
    """The IP address by which other devices reach a server that is bound to one; None where they cannot."""
    address = ipaddress.ip_address(bound)
    if not address.is_unspecified:
        return None if address.is_loopback else bound
    ways = (socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")
    for family, far in ways[: address.version // 3]:  # 0.0.0.0 is for IPv4 alone
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # it sends nothing, but finds out which way it would go
            return str(probe.getsockname()[0])
    return None


class Settings:
    """What keyword arguments set for one server, and a subclass for all of its own."""

    max_message = 16 * 1024 * 1024  # bytes of a message, after inflating; above it: Close 1009
    max_backlog = 16 * 1024 * 1024  # bytes that may wait for a slow client; above it: dropped
    max_clients = 10_000  # above it: 503
    origins: Sequence[str] = ()  # see check_origin(); "*" for any
    read_only = False  # clients may not send: Close 1008, and 403 for a POST
    compression = True  # permessage-deflate, where a client offers it
    history = 0  # messages that a new client gets first, with at most half of max_backlog
    rate = 0.0  # messages a second that a client may send, and all POSTs together; 0: any number
    ping_interval = 20.0  # seconds of silence before a Ping; 0: never
    ping_timeout = 20.0  # seconds of silence after it: dropped
    handshake_timeout = 10.0  # seconds from connecting to the end of a request's head
    send_timeout = 30.0  # seconds for which what waits for a client may not move
    close_timeout = 5.0  # seconds for a closing handshake, in which nothing moves; and for server_close()
    tls_context: ssl.SSLContext | None = None  # wss:// and https:// on this port
    redis: str | None = None  # URL of a Redis, whose stream makes many servers one room
    trace = False  # log every handshake and every frame


MOST_LINES, LINES_TIME = 20, 10.0  # from one place of this module in so many seconds
log_lines: dict[int, list[float]] = {}  # by their place: [end of the time, lines in it]


def is_no_flood(record: logging.LogRecord) -> bool:
    """Whether to log a line: a stranger cannot fill the disk. The first one of a new time says what was left out."""
    now, place = time.monotonic(), log_lines.setdefault(record.lineno, [0.0, 0])
    if now >= place[0]:
        if place[1] > MOST_LINES:
            record.msg = f"{record.msg} ({place[1] - MOST_LINES:.0f} more like this were left out)"
        place[:] = now + LINES_TIME, 0
    place[1] += 1
    return place[1] <= MOST_LINES


log.addFilter(is_no_flood)


# ======================================================================================
# Transports (RFC 8446): a socket, or what stands before it and has its recv, send, shutdown
# ======================================================================================

# With this flag a send does not wait, although the socket's recv does. Windows lacks it.
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class Waiting:
    """For where DONT_WAIT is missing: the socket never waits, so whoever reads from it waits in select()."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self.send, self.shutdown = connection, connection.send, connection.shutdown

    def recv(self, size: int) -> bytes:
        """As that of a socket that waits."""
        while True:
            select.select([self._socket], [], [])
            with contextlib.suppress(BlockingIOError):  # what was ready may not be there
                return self._socket.recv(size)


class TLS:
    """TLS (RFC 8446) in front of a socket. Nothing else knows of it.

    One thread reads while another sends, and OpenSSL wants one at a time: what touches its
    object has the lock, which nobody keeps while waiting. Whoever is next holds the door: so a
    peer that keeps the reader busy (with KeyUpdates, say) does not keep the sender out.
    """

    PIECE = 128 * 1024  # bytes encrypted at once: all that a slow client has of its own
    PIECES = 8  # sent at once, before others have the turn

    def __init__(self, connection: Any, context: ssl.SSLContext) -> None:
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._door, self._lock = threading.RLock(), threading.RLock()  # as that of Turn: a __del__ may send
        self._established = False  # the TLS handshake is over
        self._ended = False  # the peer has said that nothing more comes
        self._records = b""  # that the socket has yet to take

    def recv(self, size: int) -> bytes:
        """Wait for bytes; none at the end, that of TLS or that of TCP. Raises OSError, of which ssl.SSLError is one."""
        plain = b""
        while not plain and not self._ended:
            records = self._socket.recv(size)
            if not records:
                break
            established = self._established
            try:
                plain = self._decrypt(records, size)
            finally:
                if not established:  # nobody else sends yet; where it failed, an alert says why
                    self._socket.send(self._outgoing.read())
        return plain

    def _decrypt(self, records: bytes, size: int) -> bytes:
        pieces = []
        with self._door:  # who sends goes first
            pass
        with self._lock:
            self._incoming.write(records)
            try:
                if not self._established:
                    self._object.do_handshake()
                    self._established = True
                while piece := self._object.read(size):
                    pieces.append(piece)
                self._ended = True  # a close_notify: read() gives b"" from now on, again and again
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._ended = True
        return b"".join(pieces)

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """Encrypt piece after piece and send its records. How many bytes are done with; BlockingIOError for none.

        The last byte of a piece is done with when the socket has taken all of its records: so
        whoever sends comes again, as with a socket that is full.
        """
        done, plain = 0, memoryview(data) if len(data) > self.PIECE else data
        with self._door, self._lock:
            while True:
                if self._records:
                    try:
                        self._records = self._records[self._socket.send(self._records, flags) :]
                    except BlockingIOError:
                        if not done:
                            raise
                    if self._records:
                        return done
                    done += 1
                piece = plain[done : done + self.PIECE]
                if not piece or done > self.PIECE * self.PIECES:
                    return done
                self._object.write(piece)
                self._records = self._outgoing.read()
                done += len(piece) - 1

    def shutdown(self, how: int) -> None:
        """Say that nothing more is sent: a close_notify (6.1), then the end of TCP.

        Raises OSError: BlockingIOError where the socket is full, to be called again.
        """
        with self._door, self._lock:
            with contextlib.suppress(ssl.SSLError):  # the peer's own close_notify has not come; nobody waits for it
                self._object.unwrap()
            self._records += self._outgoing.read()  # none at the second call
            self._records = self._records[self._socket.send(self._records, DONT_WAIT) :]
            if self._records:
                raise BlockingIOError
        self._socket.shutdown(how)


# ======================================================================================
# Outbox: what one connection's socket has yet to take
# ======================================================================================

SEND_SIZE = 64 * 1024  # bytes of many pieces given to a socket at once
SENDS_AT_ONCE = 8  # to one slow client, before others have the turn
QUICK_TIME = 0.25  # seconds in which a quick client takes QUICK_SIZE
QUICK_SIZE = 4 * 1024 * 1024  # bytes
NOTHING: deque[bytes] = deque(maxlen=0)  # for all who have nothing waiting: a deque takes 0.7 KB


class Outbox:
    """The way out to one connection. What waits in it are plain bytes, shared with other outboxes.

    Owned by the turn. It calls the connection's transport, and raises the OSError of that.
    `now` is the housekeeper's time, which stands while the process does.
    """

    def __init__(self, transport: Any, limit: int) -> None:
        self._transport = transport
        self._limit = limit  # bytes
        self._pieces = NOTHING
        self._sent = 0  # bytes of the first one that are sent
        self._pong = b""  # the newest, while others wait
        self._ending = False  # nothing will follow
        self.size = 0  # bytes that wait
        self.moved = 0.0  # when the socket last took some, or they began to wait

        # A client is quick while it takes QUICK_SIZE in QUICK_TIME, and for QUICK_TIME after that: what it
        # has taken lasts until `_lasts`, at that pace. One that has just joined has shown nothing yet;
        # later, who has nothing waiting has taken all there was.
        self._joined = self._behind_since = time.monotonic()
        self._lasts = 0.0

    def write(self, pieces: Iterable[bytes], now: float) -> None:
        """Send what the socket takes at once; the rest waits."""
        empty = not self._pieces
        self.keep(pieces, now)
        if empty:
            self.flush(now)

    def keep(self, pieces: Iterable[bytes], now: float, sent: int = 0) -> None:
        """Let wait what follows the first `sent` bytes: the socket took no more."""
        if not self._pieces:
            self._pieces, self._sent, self.size, self.moved = deque(), sent, -sent, now
            self._behind_since = time.monotonic()
            if self._behind_since > self._joined + 4 * QUICK_TIME:
                self._lasts = self._behind_since + 1.25 * QUICK_TIME
        elif self.is_too_far_behind():
            raise ConnectionAbortedError(f"it was {self.size} bytes behind")
        for piece in pieces:
            self._pieces.append(piece)
            self.size += len(piece)

    def flush(self, now: float) -> None:
        """Send what the socket takes now; of much only a part, since others wait for the turn."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(SENDS_AT_ONCE):
                if self._pieces:
                    self._count(self._transport.send(self._next_piece(), DONT_WAIT), now)
            if self._pong and not self._pieces:
                pong, self._pong = self._pong, b""
                self.write([pong], now)
            if self._ending and not self._pieces:
                self.size = 1  # the end may have to wait, too: that of TLS
                self._transport.shutdown(socket.SHUT_WR)
                self.size = 0

    def _next_piece(self) -> bytes | memoryview:
        """Something to send: many short pieces as one."""
        pieces = [memoryview(self._pieces[0])[self._sent :]]
        size = len(pieces[0])
        for piece in itertools.islice(self._pieces, 1, None):
            if size > SEND_SIZE:
                break
            pieces.append(memoryview(piece))
            size += len(piece)
        return b"".join(pieces) if len(pieces) > 1 else pieces[0]

    def _count(self, sent: int, now: float) -> None:
        self._sent += sent
        self.size -= sent
        while self._pieces and self._sent >= len(self._pieces[0]):
            self._sent -= len(self._pieces.popleft())
        self.moved, clock = now, time.monotonic()
        lasts = max(self._lasts, clock) + sent / QUICK_SIZE * QUICK_TIME
        self._lasts = min(lasts, clock + 1.25 * QUICK_TIME)

    def _is_quick(self) -> bool:
        return time.monotonic() + QUICK_TIME / 4 < self._lasts  # one large send does not make it quick

    def is_too_far_behind(self) -> bool:
        """Whether it is to be dropped; not before it had a moment to take what it got."""
        late = time.monotonic() > self._behind_since + QUICK_TIME
        return late and self.size > self._limit and not self._is_quick()

    def is_quick_but_behind(self) -> bool:
        """Whether senders should wait for it, a moment at most at a time."""
        return self.size > self._limit // 2 and self._is_quick()

    def write_pongs(self, frames: Sequence[bytes], now: float) -> None:
        """Answer Pings; if that must wait, the newest alone (RFC 6455 5.5.3): these bytes are shared with nobody."""
        if self._pieces:
            self._pong = frames[-1]
        else:
            self.write([b"".join(frames)], now)

    def end(self, now: float) -> None:
        """Nothing will follow: end the own side as soon as all is sent."""
        self._ending, self._pong = True, b""
        self.flush(now)

    def clear(self) -> None:
        """Forget what waits."""
        self._pieces, self.size = NOTHING, 0


# ======================================================================================
# Turn: one order for all operations, carried out by whoever is free to
# ======================================================================================

QUEUE_SIZE = 4 * 1024 * 1024  # bytes queued, above which senders wait
RUN_SIZE = 1024 * 1024  # bytes of messages delivered at once
MESSAGE_COST = 250  # bytes that the objects of a queued operation take
TURN_TIME = 0.004  # seconds after which the holder hands on: nobody reads its own client meanwhile
CROWD = 1000  # operations
give_way = getattr(os, "sched_yield", bool)  # leave the processor to other threads; Windows cannot
MOMENT = 0.005  # seconds within which what was put is carried out
MOMENTS = 200  # looks of the successor that find nothing before it sleeps


class Turn:
    """Carries out operations one at a time, in the order in which they were put. It knows no sockets, no clients.

    An operation is something to call, or else a message. Messages that stand in a row are
    given to `deliver` together: the more there are, the less each one costs.

    Whoever has put an operation calls run(). That *tries* to take the lock, the turn. With it,
    a thread carries out all that is queued, its own and everybody else's; without it, the
    thread goes back to what it was doing. (The pattern is known as flat combining. A thread
    that does nothing else would need two thread switches a message, and has half the speed.)

    Nothing is left behind. A put, P, comes before a try, T, which either gets the lock, and
    its thread finds P; or another thread, H, has the lock at T. H looks at the queue once
    more after it has released the lock, so after T, so after P: it finds P. Where H does not
    look again, it has made a promise: the successor takes the next turn, and looks again.
    This needs `append`, `acquire` and `release` to be seen by all threads in one order. The
    interpreter's lock sees to that; without one (free-threaded builds), the deque's own lock.

    Nobody starves. H stops after TURN_TIME and promises the rest to the successor, the one
    thread that waits for the lock; while that is promised, nobody else takes it.

    The holder never waits: operations do not block, and what it says in a log that is itself
    broadcast is only put into the queue.
    """

    def __init__(self, deliver: Callable[[list[Any]], bool], wake: Callable[[], None]) -> None:
        self._deliver = deliver  # carries out messages; whether senders should wait a moment
        self._wake = wake  # the successor, to call take_over()
        self._lock = threading.Lock()  # whoever has it holds the turn
        self._queue: deque[tuple[Any, int]] = deque()  # operations, with the bytes that each counts for
        self._holder = 0  # the thread that has the lock
        self._before = 0  # the thread that had it before
        self._successor = 0  # the thread that waits for it
        self.promised = False  # the successor is to have it next
        self._retired = False  # there is no successor any more
        self._looks = 0  # that the successor has yet to make; 0 while it sleeps
        self._errors: deque[Exception] = deque()  # of operations, to be logged by whoever held the turn

        # Guards the next three, for a few instructions; an RLock, since among them the garbage
        # collector may run, and a __del__ that broadcasts.
        self._tally = threading.RLock()
        self._size = 0  # bytes in the queue
        self.held = False  # senders wait for a client that is behind
        self._space = threading.Condition(self._tally)  # notified when the next one becomes true
        self.has_space = True  # senders may go on

    # ---- any thread ----

    def put(self, operation: Any, size: int = 0) -> None:
        """Queue an operation that counts for so many bytes. Whoever does that calls run() or soon()."""
        size += MESSAGE_COST
        with self._tally:
            self._queue.append((operation, size))
            self._size += size
            if self._size > QUEUE_SIZE:
                self.has_space = False

    @property
    def is_crowded(self) -> bool:
        """Whether so much is queued that who puts more should wait for the turn."""
        return len(self._queue) > CROWD

    def run(self, wait: bool = False) -> None:
        """Carry out what is queued, where no other thread is at it.

        Or wait a moment for the turn, to be no burden meanwhile: at each call of the system the holder
        gives up the interpreter, and gets it back only when all have had it who want it. That is for a
        client that sends a flood of tiny frames, and for thousands who come and go.
        """
        while wait or (self._queue and not self.promised):
            if not self._lock.acquire(wait, 10 * TURN_TIME if wait else -1):  # not for ever: a __del__ may call this
                return
            wait = False
            try:
                self._carry_out()
            finally:
                self._lock.release()
        with contextlib.suppress(IndexError):  # another thread was faster
            while self._errors:  # not in the turn: who reads the log may wait for it
                log.error("an operation failed", exc_info=self._errors.popleft())

    def soon(self) -> None:
        """Let what was put wait for more to come; the successor sees to it in a moment if nobody else does."""
        if not self._looks:
            self._looks = MOMENTS
            self._wake()

    def wait_for_space(self, timeout: float | None = None) -> bool:
        """Wait while too much is queued, or a client is behind; whether that has an end."""
        if self.has_space or self.is_mine:
            return True
        with self._space:
            return self._space.wait_for(lambda: self.has_space, timeout)

    @property
    def is_mine(self) -> bool:
        """Whether this thread is the holder or the successor, for whom others wait."""
        return threading.get_ident() in (self._holder, self._successor)

    # ---- the holder ----

    def _carry_out(self, seconds: float = TURN_TIME) -> None:
        """Carry out what is queued, for some time."""
        self._holder = threading.get_ident()
        until = time.monotonic() + seconds
        try:
            while self._queue:
                self._carry_out_next()
                if time.monotonic() > until:
                    break
        finally:  # also where Ctrl-C has struck the main thread in here
            if self._queue and not self._retired:
                self.promised = True
                self._wake()
                if self._retired:  # meanwhile
                    self.promised = False
            self._holder = 0

    def _carry_out_next(self) -> None:
        """Carry out the next operation; where that is a message, with those right behind it."""
        operation, size = self._queue.popleft()
        held = self.held
        try:
            if callable(operation):
                operation()
                return
            run = [operation]
            if self._holder != self._before:  # where several talk, who can put something does so first: they hear
                give_way()  # each other a fourth faster, and the slowest hundredth seven times
                self._before = self._holder
            while self._queue and size < RUN_SIZE and not callable(self._queue[0][0]):
                operation, more = self._queue.popleft()
                run.append(operation)
                size += more
            held = self._deliver(run)
        except Exception as error:  # the rest of the queue is not to blame
            self._errors.append(error)
        finally:
            self._settle(size, held)

    def _settle(self, size: int, held: bool) -> None:
        """Take so many bytes off the tally, and tell the senders what they may do."""
        if held and not self.held:
            self._wake()  # the successor looks after the one who is behind
        with self._tally:
            self._size -= size
            self.held = held and not self._retired
            if self.held:
                self.has_space = False
            elif self._size <= QUEUE_SIZE // 2 and not self.has_space:
                self.has_space = True
                self._space.notify_all()

    # ---- the successor ----

    def take_over(self, work: Callable[[], bool]) -> None:
        """Wait for the turn, do a piece of work of its own in it, and carry out what is queued.

        The work says whether senders should wait a moment longer.
        """
        self.promised, self._successor = True, threading.get_ident()
        try:
            with self._lock:
                self.promised, self._holder = False, self._successor
                try:
                    self._settle(0, work())
                finally:
                    self._carry_out(10 * TURN_TIME)
        finally:
            self.run()

    def look(self) -> bool:
        """Carry out what has waited for a moment. Whether to come again after the next one."""
        if self._looks:
            self._looks -= 1
            if self._queue:  # after the count: whoever puts now sees a 0, or is seen
                self._looks = MOMENTS
                self.run()
        return self._looks > 0

    def retire(self) -> None:
        """There is no successor from now on, and senders wait no more."""
        self._retired, self.promised = True, False
        self._settle(0, False)
        self.run()


# ======================================================================================
# Connections (RFC 6455 5.5, 7)
# ======================================================================================

READ_SIZE = 66 * 1024  # bytes asked of a socket at once where much comes: a message of 64 KiB comes whole
LITTLE = 2 * 1024  # bytes asked for where little came: each thread waits with the memory for what it asks
SLOWEST_POST = 256 * 1024  # bytes a second
MANY_FRAMES = 500  # in what was read at once: who sends as many waits for the turn, and is read in small pieces
FLOOD_SIZE = 8 * 1024  # bytes of such a piece
TOO_LATE = "the request took too long"


class State(enum.Enum):
    """Where a connection is (RFC 6455 4.1, 7.1.3, 7.1.4). It only ever goes forward, and in the turn.

    How a connection ends, from OPEN (an ordinary HTTP request goes the same way from
    CONNECTING, with a response in the place of the Close frame):

        who begins              CLOSING: the server sends    waits for        who ends TCP first
        the peer, with Close    a Close with the same code                    the server
        the server              a Close                      the peer's Close the server
        a violation, an error   a Close that says which                       the server
        the peer, without       nothing                                       the peer
        a peer that is stuck    (CLOSED at once: its connection is reset)     the server

    After that the connection's thread reads until the peer ends TCP, too, for at most a
    close_timeout in which the peer takes nothing: a socket closed with bytes unread sends a
    reset, which can destroy the Close on its way (7.1.1).  Last, in CLOSED, the socket is closed.

    Three things stand beside it.  `_unheard` is true from the moment that anybody wants to close,
    before the turn comes to it: no message reaches a hook any more.  `_early` is the Close of one
    that was closed before it was OPEN, and is sent right after its 101.  `_lost` says, in
    words for the log and on_close, why a connection was cut off; then nothing more is read.
    """

    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class WebSocketHandler(socketserver.BaseRequestHandler):
    """One connection, and the thread that reads it. After its opening handshake it is a client.

    For hooks and for every other thread:

    - send(message), close(code, reason)
    - method, target: of the request: GET for a WebSocket, or POST; the target with its query
    - headers: the request's header fields, names in lower case, repeated ones joined by commas
    - address: the peer's address and port, for people
    - data: whatever the program likes to keep here; None at first
    """

    server: BroadcastServer
    request: socket.socket

    def setup(self) -> None:
        """Called by socketserver in the new thread, like handle() and finish()."""
        server = self.server
        host, port = self.client_address[0].removeprefix("::ffff:"), self.client_address[1]  # IPv4 on an IPv6 socket
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.method = self.target = ""
        self.headers: dict[str, str] = {}
        self.data: Any = None

        # Written by this thread; _unheard by any.
        self._window = 0  # of permessage-deflate, in bits; 0 without
        self._unheard = False  # the server has begun to close, or is about to: nothing more reaches on_message
        self._rest = b""  # what has come behind the head of the request
        self._pongs: list[bytes] = []  # for the Pings in what is being read
        self._pace = Pace()
        self._quiet_since = math.inf  # when it began to wait for bytes; inf while it does not
        self._deadline = server._room.now + server.handshake_timeout  # of CONNECTING; of a Pong; of CLOSING

        # Owned by the turn.
        self._state = State.CONNECTING
        self._transport = server._transport(self.request, self.address)  # the socket, or what stands before it
        self._outbox = Outbox(self._transport, server.max_backlog)
        self._early = b""  # a Close that was asked for before it joined
        self._last_seen = 0  # bytes of all broadcasts when it began to close: nothing newer waits for it
        self._lost = ""  # why it was given up
        server._connections.handlers[self.request] = server._local.client = self

    # ---- for hooks and other threads ----

    def send(self, message: Message) -> None:
        """Send text (str) or binary (bytes) to this client alone, in order with all else. Any thread.

        Never fails: where the client is gone or closing, the message is gone too.
        Raises TypeError for anything but str and bytes.
        """
        self.server.broadcast(message, (self,))

    def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Begin the closing handshake, after all that was sent before (7.1.2). Any thread.

        From now on nothing of this client reaches a hook but on_close. A reason is cut to 123
        bytes. Raises ValueError for a code that may not be sent (7.4).
        """
        if code not in CODES_ON_THE_WIRE:
            raise ValueError(f"{code} is not a close code that may be sent")
        frame = serialize_close(code, reason)
        self._unheard = True
        self.server._perform(self.server._room.close, self, frame)

    # ---- in its own thread: from its first byte to its last ----

    def handle(self) -> None:
        """Serve the connection."""
        head = False  # whether the response has no body
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request, self._rest = parse_request(iter(self._read_in_time, None))
            self.method, self.headers, head = request.method, request.headers, request.method == "HEAD"
            self.target = MARK.sub("", request.target)  # which is between the page and join()
            if request.upgrades:
                self._serve_websocket(request)
            else:
                self._end(answer(self, request))
        except HandshakeError as error:
            self._refuse(error, head)
        except OSError as error:
            log.info("%s gone before its handshake: %s", self.address, printable(str(error)))
            if not self._lost:
                self._end(b"")
        finally:
            self.server._budget.keep(self, 0)
        while not self._lost and self._read(READ_SIZE):
            pass  # until the peer ends TCP, too
        waits = self._outbox.size > 0 or self._state is not State.CLOSING
        if waits and not self._lost and self.server._housekeeper.is_alive():
            wait_for_end(self.request)  # it has only ended its own side, and reads on

    def _read_in_time(self, size: int = LITTLE) -> bytes:
        """The next bytes of a request. Raises HandshakeError at the deadline, OSError at the end."""
        data: bytes = self._read(size)
        if not data and self._lost == TOO_LATE:
            raise HandshakeError(408, TOO_LATE)
        if not data:
            raise ConnectionError(self._lost or "the connection ended")
        return data

    def _read(self, size: int = LITTLE) -> Any:
        """Wait for the next bytes; none at the end of the connection, whatever ended it."""
        self._quiet_since = self.server._room.now
        try:
            return self._transport.recv(size)
        except OSError as error:  # of which ssl.SSLError is one
            self._lost = self._lost or str(error)
            return b""
        finally:
            self._quiet_since = math.inf

    def _read_body(self, length: int) -> bytes:
        """The body of a POST, when it may be passed on. Raises HandshakeError, ProtocolError, OSError."""
        server = self.server
        demand(not server._link or not server._link.away, 503, "Redis is away", ("Retry-After", "1"))
        since = max(self._deadline, server._room.now + server.handshake_timeout)  # a hook may have taken its time
        self._deadline = since + length / SLOWEST_POST
        pieces, self._rest = bytearray(self._rest), b""
        while len(pieces) < length:
            pieces += self._read_in_time(READ_SIZE)
            server._budget.keep(self, len(pieces))
        paced = not server.rate or server._post_pace.wait(server.rate, server.handshake_timeout)
        demand(paced, 429, f"there are more than {server.rate:g} posts a second", ("Retry-After", "1"))
        space = server._wait_for_space(server.handshake_timeout)
        demand(space, 503, "too much waits to be sent", ("Retry-After", "1"))
        return bytes(memoryview(pieces)[:length])

    def _end(self, last: bytes) -> None:
        """Say the last word, and end the own side when it is sent."""
        self.server._perform(self.server._room.close, self, last, True)

    def _refuse(self, error: HandshakeError, head: bool) -> None:
        """Answer a request that cannot be served."""
        log.warning("%s refused: %d, %s", self.address, error.status, printable(str(error)))
        self.server._refused += 1
        body = f"{error.status.value} {error.status.phrase}: {error}\n".encode(errors="replace")  # of a hook
        self._end(http_response(error.status, "text/plain; charset=utf-8", body, *error.fields, head=head))

    def _call(self, hook: Callable[..., Any], *arguments: Any) -> Any:
        """What a hook for a request returns. Raises HandshakeError: that of the hook, 403 after a close(), or 500."""
        demand(not self._unheard, 403, "not admitted")
        try:
            result = hook(self, *arguments)
        except HandshakeError:
            raise
        except BaseException:
            log.exception("%s: an error in a hook", self.address)
            raise HandshakeError(500, "internal error") from None
        demand(not self._unheard, 403, "not admitted")
        return result

    # ---- in its own thread: as a client ----

    def _serve_websocket(self, request: Request) -> None:
        """Shake hands, join, converse, leave. Raises HandshakeError."""
        server, response = self.server, self._check(request)
        mark = MARK.search(request.target)
        server._take_seat(self)
        try:
            server._room.compress_history(self._window)
            server._perform(server._room.join, self, response, mark[1] if mark else "")
            log.debug("%s joined: %s", self.address, plural(len(server._clients), "client"))
            code, reason, last = self._be_client()
        finally:
            server._free_seat(self)
        reason = self._lost or reason
        self._answer_pings()
        if last:  # who is just gone is left out by the first send that fails
            server._perform(server._room.part, self)
        # Of 5000 that leave at once, each gives up the interpreter at each call of the system, and would be behind
        # 4999 others before it goes on: so would be a message. One at a time, an echo takes half as long.
        with server._exit:
            ends = not self._lost or bool(last or server.tls_context)  # in TLS, an alert may have to be sent
            server._perform(server._room.close, self, last, ends)
        log.info("%s left: %s", self.address, f"{code} {printable(reason)}".rstrip())
        try:
            server.on_close(self, code, reason)
        except BaseException:
            log.exception("%s: an error in on_close", self.address)
        server._turn.run()

    def _check(self, request: Request) -> bytes:
        """The response to an opening handshake (4.2). Raises HandshakeError."""
        accept = check_upgrade(request)
        check_host(request)
        check_origin(request, self.server.origins)
        fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]
        if self.server.compression:
            self._window, extension = negotiate_deflate(request.headers.get("sec-websocket-extensions", ""))
            if extension:
                fields.append(("Sec-WebSocket-Extensions", extension))
        self._call(self.server.admit)
        return serialize_response(101, fields)

    def _be_client(self) -> tuple[int, str, bytes]:
        """Code and reason for on_close, and the Close to send: the whole policy of who is told what."""
        try:
            self.server.on_open(self)
            self.server._turn.run()
            payload = self._converse()
            if payload is None:
                return CloseCode.ABNORMAL_CLOSURE, "", b""
            code, reason = parse_close(payload)
            return code, reason, serialize_close(code)  # 5.5.1: the same code
        except ProtocolError as error:
            code, reason = error.code, str(error)
        except MemoryError:
            code, reason = CloseCode.MESSAGE_TOO_BIG, "out of memory"
        except BaseException:
            log.exception("%s: an error in a hook", self.address)
            code, reason = CloseCode.INTERNAL_ERROR, "internal error"
        return code, reason, serialize_close(code, reason)

    def _converse(self) -> bytes | None:
        """Read and hand on messages until the peer's Close: its payload, or None where the connection just ends."""
        keep = functools.partial(self.server._budget.keep, self)
        reader = MessageReader(self.server.max_message, bool(self._window), keep)
        for opcode, payload in reader.read(self._pieces(reader)):
            if opcode == CLOSE:
                return bytes(payload)
            if opcode == PING:
                self._pongs.append(serialize_frame(PONG, payload))
            elif opcode != PONG and not self._unheard:  # nothing counts after the server's Close (5.5.1)
                self._hand_on(payload)
            del payload  # a client that is silent now must not hold its memory
        return None

    def _pieces(self, reader: MessageReader) -> Iterator[bytes]:
        """The bytes that this client sends, as they come. What has come is handled before more is waited for."""
        data, self._rest = self._rest or self._read(), b""
        while data:
            reader.frames = 0
            yield data
            much = len(data) >= LITTLE
            del data
            self._answer_pings()
            flood = reader.frames > MANY_FRAMES
            self.server._turn.run(wait=flood)
            data = self._read(FLOOD_SIZE if flood else READ_SIZE if much else LITTLE)

    def _hand_on(self, message: Message) -> None:
        self._answer_pings()
        if self.server.read_only:
            raise ProtocolError(CloseCode.POLICY_VIOLATION, "this server only sends")
        if self.server.rate:
            self.server._turn.run()  # what it has sent so far need not wait
            self._pace.wait(self.server.rate)
        if not self._unheard:  # it may have been closed meanwhile
            self.server.on_message(self, message)

    def _answer_pings(self) -> None:
        """Queue the Pongs for consecutive Pings as one (5.5.2): a flood of them costs little."""
        if self._pongs:
            pongs, self._pongs = self._pongs, []
            size = sum([len(frame) + MESSAGE_COST for frame in pongs])
            self.server._turn.put(functools.partial(self.server._room.pong, self, pongs), size)
            self.server._turn.soon()  # a hook may follow, and take its time


# ======================================================================================
# Room: the clients that get broadcasts
# ======================================================================================


TO = operator.attrgetter("to")


class Room:
    """The clients that get broadcasts, and every operation on a connection.

    All of it runs in the turn: so there are no locks here, nothing waits, and no hook is
    called. Sockets are sent on, shut down and closed here alone.
    """

    def __init__(self, server: BroadcastServer) -> None:
        self._history_length, self._history_limit = server.history, server.max_backlog // 2  # messages, bytes
        self._close_timeout = server.close_timeout
        self.now = 0.0  # seconds on the housekeeper's clock, which stands while the process does
        self.selector = selectors.DefaultSelector()  # of the slow clients; the housekeeper waits in it
        self._alarm, self._ring = socket.socketpair()  # wakes it
        self._alarm.setblocking(False)
        self._ring.setblocking(False)
        self.selector.register(self._alarm, selectors.EVENT_READ)
        self.slow: set[WebSocketHandler] = set()  # connections that have something in their outbox
        self.messages = self.bytes = self.dropped = 0  # for the status; payload bytes of broadcasts
        self.closing = False  # whoever joins now gets 1001

        # By window, the clients, each with what sends to it: its own send, or nothing while it is slow.
        self._lines: dict[int, dict[WebSocketHandler, Callable[[bytes, int], int]]] = {}
        self._history: deque[Outgoing] = deque()
        self._history_size = 0  # bytes of payload

    # ---- for any thread: these change nothing ----

    def wake(self) -> None:
        """Wake the housekeeper."""
        with contextlib.suppress(OSError):  # it has been told often enough, or has ended
            self._ring.send(b"!")

    def wait_for_slow(self, seconds: float) -> list[WebSocketHandler]:
        """For the housekeeper: wait until slow clients can be sent more, or something else is to be done."""
        ready = [key.data for key, _ in self.selector.select(seconds)]
        if None in ready:
            self._alarm.recv(4096)
        return [client for client in ready if client]

    def compress(self, message: Outgoing) -> None:
        """Compress a message for all who are here, so that it need not be done in the turn."""
        for window in list(self._lines):
            message.frame(window)

    def compress_history(self, window: int) -> None:
        """The same for somebody who is about to join."""
        for message in self._history.copy():
            message.frame(window)

    # ---- messages ----

    def deliver(self, run: list[Outgoing]) -> bool:
        """Send messages to those whom they are for; whether senders should wait for somebody a moment."""
        for to, group in itertools.groupby(run, TO) if len(run) > 1 else [(run[0].to, run)]:
            messages = list(group)
            for window, line in self._lines_to(to).items():
                self._fan_out(b"".join([message.frame(window) for message in messages]), line)
            if to is None:
                self.messages += len(messages)
                self.bytes += sum([message.size for message in messages])
                self._remember(messages)
        return self.should_wait()

    def _lines_to(self, to: tuple[WebSocketHandler, ...] | None) -> Any:
        """A copy of the lines of all clients, or of some."""
        if to is None:
            return self._lines.copy()
        lines: dict[int, Any] = {}
        for client in to:
            send = self._lines.get(client._window, {}).get(client)
            if send:
                lines.setdefault(client._window, {})[client] = send
        return lines

    def _fan_out(self, data: bytes, line: dict[WebSocketHandler, Callable[[bytes, int], int]]) -> None:
        """Send the same bytes to many: one send for each. This loop is where the time goes."""
        size, rest, broken = len(data), [], []
        for client, send in line.items():
            try:
                sent = send(data, DONT_WAIT)
            except BlockingIOError:
                sent = 0
            except (OSError, MemoryError) as error:
                broken.append((client, error))
                continue
            if sent < size:
                rest.append((client, sent))
        for client, sent in rest:
            self._try(client, client._outbox.keep, [data], self.now, sent)
        for client, why in broken:
            self._fail(client, why)

    def _remember(self, messages: list[Outgoing]) -> None:
        """Keep the last messages for those who join, but no more than they can be given."""
        if self._history_length:
            self._history.extend(messages)
            self._history_size += sum([message.size for message in messages])
            while len(self._history) > self._history_length or self._history_size > self._history_limit:
                self._history_size -= self._history.popleft().size

    def should_wait(self) -> bool:
        """Whether somebody quick is behind."""
        return bool(self.slow) and any(client._outbox.is_quick_but_behind() for client in self.slow)

    # ---- one connection: what can be done with its outbox ----

    def write(self, client: WebSocketHandler, pieces: Iterable[bytes]) -> None:
        """Send bytes to one connection."""
        self._try(client, client._outbox.write, pieces, self.now)

    def pong(self, client: WebSocketHandler, frames: Sequence[bytes]) -> None:
        """Answer Pings."""
        if client._state is State.OPEN:
            self._try(client, client._outbox.write_pongs, frames, self.now)

    def flush(self, client: WebSocketHandler) -> None:
        """Send what waits, since the socket takes more."""
        if client in self.slow:
            self._try(client, client._outbox.flush, self.now)

    def _try(self, client: WebSocketHandler, act: Callable[..., None], *arguments: Any) -> None:
        """The one place where trouble with an outbox becomes a drop, and what is left in it a watch."""
        try:
            act(*arguments)
            self._watch(client, client._outbox.size > 0)
        except (OSError, MemoryError) as error:
            self._fail(client, error)

    def _fail(self, client: WebSocketHandler, error: Exception) -> None:
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):  # its own thread gets to know by itself
            client._lost = client._lost or str(error)
            self.forget(client)
        else:
            self.drop(client, str(error) or "out of memory")

    def _watch(self, client: WebSocketHandler, slow: bool) -> None:
        """Let the housekeeper look after a connection that has something in its outbox, or no longer."""
        if slow == (client in self.slow):
            return
        line = self._lines.get(client._window, {})
        if client in line:
            line[client] = send_nothing if slow else client._transport.send
        if slow:
            self.selector.register(client.request, selectors.EVENT_WRITE, client)
            self.slow.add(client)
            if not DONT_WAIT:
                self.wake()  # epoll and kqueue take a change while they wait, Windows does not
        else:
            self.slow.remove(client)
            self.selector.unregister(client.request)

    # ---- one connection: its states, in their order ----

    def join(self, client: WebSocketHandler, response: bytes, mark: str) -> None:
        """CONNECTING to OPEN. The response and the joining are one: so a client misses nothing after its 101.

        A page that wants to know where the history ends gives a mark, and gets it there.
        """
        if client._state is not State.CONNECTING:
            return
        client._state, client._deadline = State.OPEN, math.inf
        self._lines.setdefault(client._window, {})[client] = client._transport.send
        end = [serialize_frame(TEXT, mark.encode())] if mark else []
        self.write(client, [response, *[message.frame(client._window) for message in self._history], *end])
        if self.closing:
            self.close(client, serialize_close(CloseCode.GOING_AWAY))
        if client._early:
            self.close(client, client._early)

    def part(self, client: WebSocketHandler) -> None:
        """Send it no more messages."""
        line = self._lines.get(client._window, {})
        if line.pop(client, None) and not line:
            del self._lines[client._window]

    def close(self, client: WebSocketHandler, last: bytes, ends: bool = False) -> None:
        """To CLOSING: send the last bytes, a Close or a response; where nothing is awaited, end the own side."""
        if client._state is State.CONNECTING and not ends:
            client._early = last
        elif client._state in (State.CONNECTING, State.OPEN):
            self.part(client)
            client._unheard, client._state = True, State.CLOSING
            client._deadline, client._last_seen = self.now + self._close_timeout, self.bytes
            if last:
                self.write(client, [last])
        if ends and client._state is State.CLOSING:
            self._try(client, client._outbox.end, self.now)

    def drop(self, client: WebSocketHandler, why: str) -> None:
        """To CLOSED: give a connection up. Its thread wakes up.

        It is reset, unless the system has all of its last word: a slow peer may still read that.
        """
        if client._state is State.OPEN:
            self.dropped += 1
        end = shut if client._state is State.CLOSING and not client._outbox.size else reset
        client._lost = client._lost or why
        self.forget(client)
        end(client.request)

    def forget(self, client: WebSocketHandler) -> None:
        """To CLOSED: nothing is sent to it any more."""
        self.part(client)
        self._watch(client, slow=False)
        client._outbox.clear()
        client._unheard, client._state = True, State.CLOSED

    def stop(self) -> None:
        """Nobody waits for slow clients any more: those that are left are stuck in a hook."""
        self.slow.clear()
        for thing in (self.selector, self._alarm, self._ring):
            thing.close()


def send_nothing(data: bytes, flags: int) -> int:
    """In the place of a socket's send() where others wait in the outbox."""
    return 0


def shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Shut a socket down in a direction; a thread that waits to read from it wakes up."""
    with contextlib.suppress(OSError):  # its peer was faster
        connection.shutdown(how)


def wait_for_end(connection: socket.socket) -> None:
    """Wait until both sides of a connection have ended, however that comes about."""
    if hasattr(select, "poll"):  # Windows lacks it
        poll = select.poll()
        poll.register(connection, 0)  # for POLLHUP alone
        poll.poll()


def reset(connection: socket.socket) -> None:
    """End a connection without sending what is left."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii" if os.name != "nt" else "hh", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    shut(connection)


# ======================================================================================
# Housekeeping
# ======================================================================================

SPARE_DESCRIPTORS = 32  # of files, for the program itself
SPARE_CONNECTIONS = 100  # besides a tenth of max_clients: those that are no clients
SWITCH_INTERVAL = sys.getswitchinterval()  # seconds: that of the program, without a crowd
KEPT_SIZE = 32 * 1024 * 1024  # bytes that malloc keeps when they are freed
LOOKS_AT_ONCE = 500  # after connections, whose threads may all wake up then: so that others can work as well


class Connections:
    """Those that are accepted and not closed, clients or not. Threads add, the turn removes."""

    def __init__(self, max_clients: int) -> None:
        tune_process()
        most = max_clients + max_clients // 10 + SPARE_CONNECTIONS
        self.most = max(1, min(most, raise_file_limit() - SPARE_DESCRIPTORS))
        self.handlers: dict[socket.socket, WebSocketHandler | None] = {}  # None until its thread has begun
        self.strangers: dict[socket.socket, float] = {}  # those that are no clients, oldest first, and since when
        self._fewer = threading.Condition()  # notified when one has gone; has an RLock, as Turn

    def add(self, request: socket.socket, now: float) -> None:
        """One has been accepted."""
        self.handlers[request], self.strangers[request] = None, now
        if len(self.handlers) % 16 == 0:
            self.adapt_switch_interval()

    def remove(self, request: socket.socket) -> WebSocketHandler | None:
        """One is about to be closed."""
        self.strangers.pop(request, None)
        handler = self.handlers.pop(request, None)
        with self._fewer:
            self._fewer.notify_all()
        return handler

    def adapt_switch_interval(self) -> None:
        """Of thousands of threads that wake up at once, each asks for the interpreter after this interval.

        With 5 ms and a proxy that loses 5000 clients, the interpreter did nothing else for 20 s.
        The price: a hook that computes without a pause keeps all others waiting for as long.
        """
        sys.setswitchinterval(max(SWITCH_INTERVAL, len(self.handlers) / 10_000))

    @property
    def are_too_many(self) -> bool:
        """Whether one has to go before another is accepted."""
        return len(self.handlers) >= self.most

    def oldest_stranger(self, now: float) -> list[socket.socket]:
        """The oldest that is no client, if it had time to become one."""
        return [stranger for stranger, since in list(self.strangers.copy().items())[:1] if now - since > 1]

    def wait_for_fewer(self, number: int, shortage: str) -> bool:
        """Wait a moment until there are fewer than so many, and one more can be accepted."""
        log.warning("cannot accept for now: %s", shortage)
        return self.wait_for(number - 1, time.monotonic() + 0.5)

    def wait_for(self, number: int, end: float) -> bool:
        """Wait until there are no more than so many, or until some time on the clock."""
        while len(self.handlers) > number and time.monotonic() < end:
            with self._fewer:
                self._fewer.wait_for(lambda: len(self.handlers) <= number, 0.1)  # in slices: a signal may come
        return len(self.handlers) <= number


@functools.cache  # once for a process: each further time takes the kernel 30 ms
def tune_process() -> None:
    """Two settings of Linux that Python has no words for. They are for speed alone.

    Let threads wait for each other in 4096 places of the kernel instead of 16 (futex buckets). So few
    has a process from Linux 6.16 on, with two processors. To wake a thread, the kernel goes through all
    that wait in its place: where these were the thousands that wait for the interpreter, each wake-up
    took a fifth of a millisecond, and 9,900 that were cut off had left after ten seconds instead of one.

    Let malloc keep KEPT_SIZE of what is freed, as it does by itself after a message of 16 MiB. Where it
    gives the memory of each message of 1 MiB back, the next one has a page fault for every 4 KiB of each
    of its five copies, and takes a quarter longer.
    """
    with contextlib.suppress(Exception):  # on other systems there is nothing to do
        import ctypes  # it may not be allowed to load

        libc = ctypes.CDLL(None)
        libc.prctl(78, 1, 4096, 0, 0)  # PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS
        libc.mallopt(-1, KEPT_SIZE)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, KEPT_SIZE)  # M_MMAP_THRESHOLD


def raise_file_limit() -> int:
    """Let the process have as many open files as it may: one for each connection. How many."""
    try:
        import resource  # not on Windows
    except ImportError:
        return sys.maxsize
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else files


class Housekeeper(threading.Thread):
    """The thread that flushes slow clients, pings silent ones, minds every deadline, and succeeds in the turn.

    Its clock advances while it looks on, and stands while the process does (SIGSTOP, a
    suspended laptop): so nobody is dropped for a silence that nobody could hear.
    """

    def __init__(self, settings: BroadcastServer, room: Room, turn: Turn, connections: Connections) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._settings = settings
        self._room, self._turn, self._connections = room, turn, connections
        timeouts = "ping_interval", "ping_timeout", "send_timeout", "close_timeout", "handshake_timeout"
        set_to = [float(getattr(settings, timeout)) for timeout in timeouts]
        self._interval = min(1.0, *[timeout / 4 for timeout in set_to if timeout > 0])  # seconds between two rounds
        self._unseen: list[WebSocketHandler | None] = []  # by this round
        self._next_look = 0.0
        self._before = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> None:
        """What the thread does."""
        while not self._ended.is_set():
            try:
                pause = min(self._interval, self._next_look - self._room.now)
                pause = MOMENT if self._turn.look() else 10 * MOMENT if self._turn.held else max(pause, MOMENT)
                ready = self._room.wait_for_slow(pause)
                self._advance_clock()
                if ready or self._turn.promised or self._turn.held or self._room.now >= self._next_look:
                    self._turn.take_over(functools.partial(self._work, ready))
            except Exception:
                with contextlib.suppress(Exception):
                    log.exception("an error in housekeeping")
                self._ended.wait(self._interval)

    def stop(self) -> None:
        """End the thread. Nobody succeeds in the turn any more."""
        self._ended.set()
        if self.is_alive():
            self._room.wake()
            self.join()
        self._turn.retire()
        self._room.stop()

    def _advance_clock(self) -> None:
        now = time.monotonic()
        passed, self._before = now - self._before, now
        self._room.now += min(passed, self._interval)
        if passed > 3 * self._interval:  # the process stood: first its threads hear what has come meanwhile
            self._next_look = self._room.now + self._interval

    def _work(self, ready: Iterable[WebSocketHandler]) -> bool:
        """In the turn: send more to those who can take it, and look after some connections, in rounds."""
        until = time.monotonic() + 2 * TURN_TIME
        for client in ready:
            self._room.flush(client)
            if time.monotonic() > until:
                break  # the others will still be ready
        now = self._room.now
        if now >= self._next_look:
            self._connections.adapt_switch_interval()
            handlers = self._unseen or list(self._connections.handlers.copy().values())
            for handler in filter(None, handlers[:LOOKS_AT_ONCE]):
                self._look_after(handler, now)
            self._unseen = handlers[LOOKS_AT_ONCE:]
            self._next_look = now + (10 * MOMENT if self._unseen else self._interval)
        return self._room.should_wait()

    def _look_after(self, client: WebSocketHandler, now: float) -> None:
        """Every deadline of a connection."""
        outbox, state, settings = client._outbox, client._state, self._settings
        if state is State.OPEN and outbox.is_too_far_behind():
            self._room.drop(client, f"it was {outbox.size} bytes behind")
        elif state is State.OPEN and outbox.size and now - outbox.moved > settings.send_timeout:
            self._room.drop(client, f"it took nothing for {settings.send_timeout:g} s")
        elif state is State.OPEN and settings.ping_interval:
            self._keep_alive(client, now)
        elif state is State.CLOSING and outbox.size and self._room.bytes - client._last_seen > settings.max_backlog:
            self._room.drop(client, f"it was {outbox.size} bytes behind")  # which no other client shares any more
        elif state is State.CLOSING and outbox.size and now - outbox.moved <= settings.close_timeout:
            pass  # it still takes what it is to get
        elif now > client._deadline and (state is State.CLOSING or client._lost == TOO_LATE):
            self._room.drop(client, "it did not end the connection in time")
        elif now > client._deadline and state is State.CONNECTING and client._quiet_since <= now:
            client._lost, client._deadline = TOO_LATE, now + settings.close_timeout
            client._early = serialize_close(CloseCode.POLICY_VIOLATION, TOO_LATE)  # if its request has come this moment
            shut(client.request, socket.SHUT_RD)  # its thread wakes up and says so

    def _keep_alive(self, client: WebSocketHandler, now: float) -> None:
        """Ping a client that has been silent, drop it where it stays so (5.5.2). What moves is a sign of life."""
        outbox = client._outbox
        silence = now - max(client._quiet_since, outbox.moved if outbox.size else 0.0)
        if silence <= self._settings.ping_interval:
            client._deadline = math.inf
        elif now > client._deadline:
            self._room.drop(client, f"it was silent for {silence:.0f} s")
        elif client._deadline == math.inf and not outbox.size:
            client._deadline = now + self._settings.ping_timeout
            self._room.write(client, [serialize_frame(PING, b"")])


# ======================================================================================
# Server
# ======================================================================================

MARK = re.compile("[?&]mark=([0-9a-f]{1,32})$")


class Pace:
    """So many messages a second, of which a second's worth may come at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due = 0.0  # when the next one would come at an even pace

    def wait(self, rate: float, most: float = math.inf) -> bool:
        """Wait until the next message may come; not at all where that takes too many seconds."""
        with self._lock:
            now = time.monotonic()
            wait = max(0.0, self._due - now - max(0.0, 1 - 1 / rate))
            if wait > most:
                return False
            self._due = max(self._due, now) + 1 / rate
        time.sleep(wait)
        return True


class BroadcastServer(Settings, socketserver.ThreadingTCPServer):
    """Sends each message that a client sends to all clients, in one order for all.

    Methods for the caller, besides those of socketserver:

    - broadcast(message, to=None): to all clients, or to some
    - clients: a copy of the set of them
    - status(): a dict of figures
    - serve_forever(), shutdown(), server_close() as in socketserver; server_close() also
      sends what is queued and closes every client with 1001

    Hooks that may be overridden; they run in the connection's own thread and may take their time:

    - admit(client), on_open(client), on_message(client, message), on_post(client, message),
      on_close(client, code, reason)

    Settings are the attributes of the class Settings; keyword arguments set them for one server.
    """

    # ---- of socketserver ----

    allow_reuse_address = os.name == "posix"  # on Windows it means something else
    daemon_threads = True
    request_queue_size = 4096  # connections that wait to be accepted: storms are normal

    def __init__(
        self,
        server_address: tuple[str, int],
        RequestHandlerClass: Callable[..., socketserver.BaseRequestHandler] = WebSocketHandler,
        bind_and_activate: bool = True,
        **settings: Any,
    ) -> None:
        """Listen on a host (a name or an address) and a port (0 for any free one).

        Raises TypeError and ValueError for wrong settings, OSError where the address cannot be
        had, or the Redis refuses.
        """
        for name, value in settings.items():
            kind = getattr(type(self), name, print)
            if name.startswith("_") or callable(kind) or isinstance(kind, property):
                raise TypeError(f"there is no setting {name!r}")
            setattr(self, name, value)
        for name, default in vars(Settings).items():
            if not name.startswith("_"):
                setattr(self, name, check_setting(name, getattr(self, name), default))
        self._prepare()
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(server_address, RequestHandlerClass, bind_and_activate)
        except BaseException:
            self._housekeeper.stop()
            raise

    def _prepare(self) -> None:
        self._started = time.monotonic()
        options = {"history": self.history, "history_size": self.max_backlog // 2, "max_message": self.max_message}
        self._link = RedisLink(self.redis, deliver=self._take_from_link, **options) if self.redis else None
        self._room = Room(self)
        self._turn = Turn(self._room.deliver, self._room.wake)
        self._connections = Connections(self.max_clients)
        self._housekeeper = Housekeeper(self, self._room, self._turn, self._connections)
        self._budget = Budget(max(64 * 1024 * 1024, 8 * self.max_message))
        self._post_pace = Pace()
        self._refused = 0  # requests, for the status
        self._local = threading.local()  # .client: whose thread this is
        self._exit = threading.Lock()  # where thousands leave at once, one at a time: see _serve_websocket()
        self._seats = threading.RLock()  # guards the next one; for the same reason as that of Turn an RLock
        self._clients: set[WebSocketHandler] = set()  # from before on_open to before on_close

    # ---- hooks ----

    def admit(self, client: WebSocketHandler) -> None:
        """Somebody wants to open a WebSocket, or to POST. Who may not: raise HandshakeError(401, "why").

        In the connection's own thread, like the other hooks; before the 101, and before the
        body of a POST is read: client.method says which, "GET" or "POST". There are client.target,
        client.headers and client.address, too. close() refuses as well, with 403.
        """

    def on_open(self, client: WebSocketHandler) -> None:
        """A client has joined. An exception in this or in on_message closes it with 1011."""

    def on_message(self, client: WebSocketHandler, message: Message) -> None:
        """A client has sent text (str) or binary (bytes). By default, all clients get it."""
        self.broadcast(message)

    def on_post(self, client: WebSocketHandler, message: Message) -> None:
        """A program has sent a message with POST; `client` is its connection, which send() does not reach.

        By default, all clients get the message. HandshakeError and close() refuse it.
        """
        self.broadcast(message)

    def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
        """A client has left: 1006 without a Close frame, 1005 without a code in it (RFC 6455 7.1.5)."""

    # ---- for any thread ----

    def broadcast(self, message: Message, to: Iterable[WebSocketHandler] | None = None) -> None:
        """Send text (str) or binary (bytes) to all clients, or to some, in the one order. Any thread.

        Waits while too much is queued, never for one slow client; in a hook, what is said in
        quick succession goes out together. Raises TypeError for anything but str and bytes.
        """
        outgoing, client = Outgoing(message, to), getattr(self._local, "client", None)
        if self._link and to is None:
            self._link.put(outgoing)
            if not client or client._state is not State.CONNECTING:  # a POST has waited before
                self._settle()
            return
        self._queue(outgoing)
        if client and self._turn.has_space:
            self._turn.soon()  # the connection's thread takes the turn when it has handled what it read
        else:
            self._settle()

    @property
    def clients(self) -> set[WebSocketHandler]:
        """A copy of the set of clients: from before on_open until before on_close. Any thread."""
        with self._seats:
            return self._clients.copy()

    def status(self) -> dict[str, Any]:
        """What GET /status answers. Any thread."""
        return {
            "clients": len(self._clients),
            "messages": self._room.messages,
            "bytes": self._room.bytes,
            "uptime": round(time.monotonic() - self._started, 3),
            "connections": len(self._connections.handlers),
            "refused": self._refused,
            "dropped": self._room.dropped,
            "read_only": self.read_only,  # the page then offers no composer
            "slow": len(self._room.slow),
            "waiting": sum([client._outbox.size for client in self._room.slow.copy()]),  # bytes
            "version": __version__,
            "address": self._url(network_address(str(self.server_address[0]))),  # for other devices
        }

    def _url(self, host: str | None) -> str | None:
        """Of the page, by a name or an address of this machine."""
        where = f"[{host}]" if host and ":" in host else host
        return f"http{'s' if self.tls_context else ''}://{where}:{self.server_address[1]}/" if host else None

    # ---- what connections and the link call, each in its own thread ----

    def _queue(self, message: Outgoing) -> None:
        if message.size >= DEFLATE_THRESHOLD:
            self._room.compress(message)
        self._turn.put(message, message.size)

    def _perform(self, operation: Callable[..., None], *arguments: Any) -> None:
        """Queue an operation of the room and see that it is carried out."""
        size = sum([len(argument) for argument in arguments if isinstance(argument, bytes)])
        self._turn.put(functools.partial(operation, *arguments), size)
        self._turn.run(wait=self._turn.is_crowded)

    def _settle(self) -> None:
        """See that what this thread has said is carried out, and wait while too much is queued."""
        self._turn.run()
        self._wait_for_space()

    def _wait_for_space(self, timeout: float | None = None) -> bool:
        """Hold a sender back while too much is on its way. Its socket is not read meanwhile: TCP makes it wait, too."""
        if self._link and not self._turn.is_mine and not self._link.wait_for_room(timeout):
            return False
        return self._turn.wait_for_space(timeout)

    def _take_from_link(self, messages: Iterable[Outgoing]) -> None:
        """Messages of all servers, in the order of the stream."""
        for message in messages:
            self._queue(message)
        self._turn.run()
        self._turn.wait_for_space()

    def _take_seat(self, client: WebSocketHandler) -> None:
        with self._seats:
            demand(len(self._clients) < self.max_clients, 503, f"there are {self.max_clients} clients already")
            self._clients.add(client)
        self._connections.strangers.pop(client.request, None)

    def _free_seat(self, client: WebSocketHandler) -> None:
        with self._seats:
            self._clients.discard(client)

    def _transport(self, request: socket.socket, address: str) -> Any:
        """What a connection reads from and writes to."""
        transport: Any = request if DONT_WAIT else Waiting(request)
        if self.tls_context:
            transport = TLS(transport, self.tls_context)
        return Traced(transport, address) if self.trace else transport

    # ---- connections, as socketserver has it ----

    def server_activate(self) -> None:
        """Called by the constructor: listen."""
        self._housekeeper.start()
        if self._link:
            self._link.start()
        super().server_activate()

    def server_bind(self) -> None:
        """Called by the constructor: bind; with an IPv6 host, for IPv4 too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Where there are too many connections, an old one that is no client goes, or the next one waits."""
        connections = self._connections
        try:
            if connections.are_too_many:
                self._perform(self._reset, *connections.oldest_stranger(self._room.now))
            if connections.are_too_many and not connections.wait_for_fewer(connections.most, "too many connections"):
                raise BlockingIOError
            return super().get_request()
        except (OSError, MemoryError) as error:
            if getattr(error, "errno", errno.ENOMEM) in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                connections.wait_for_fewer(len(connections.handlers), str(error) or "out of memory")
            raise OSError("not now") from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. (With `threading.Thread` a connection takes half as long again.)"""
        self._connections.add(request, self._room.now)
        try:
            start_new_thread(self.process_request_thread, (request, client_address))
        except RuntimeError as error:  # there can be no more threads
            self._connections.wait_for_fewer(len(self._connections.handlers), str(error))
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Called by socketserver when a connection's thread has done: close it, in the turn like all else."""
        with self._exit:
            self._perform(self._leave, request)

    def _leave(self, request: socket.socket) -> None:
        """Operation: nobody sends to it any more, so its file descriptor may go."""
        client = self._connections.remove(request)
        if client:
            self._room.forget(client)
        self.close_request(request)

    def _reset(self, *requests: socket.socket) -> None:
        """Operation: give connections up, where they have not ended; their threads wake up."""
        for request in requests:
            self._connections.strangers.pop(request, None)
            if request in self._connections.handlers:
                reset(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection's thread has failed: that is an error of this program."""
        if isinstance(sys.exc_info()[1], MemoryError):
            log.warning("%s lost: out of memory", client_address)
        else:
            log.exception("%s: unexpected error", client_address)

    def server_close(self) -> None:
        """Send what is queued, close every client with 1001, wait for at most the close timeout.

        In a hook it does not wait for the client whose hook it is; one that is stuck in a hook
        is reset after the close timeout, and its thread ends when the hook does. It does not end
        serve_forever(): as in socketserver, call shutdown() before.
        """
        super().server_close()  # nobody else is accepted
        end = time.monotonic() + self.close_timeout
        if self._link:
            self._link.stop(self.close_timeout / 2)
        self._perform(self._say_goodbye)
        client = getattr(self._local, "client", None)
        own = 1 if client else 0
        if not self._connections.wait_for(own, end):
            self._perform(self._reset, *self._connections.handlers.copy())
            self._connections.wait_for(own, time.monotonic() + 0.5)
        self._connections.adapt_switch_interval()
        self._housekeeper.stop()
        if client:
            client.request.settimeout(self.close_timeout)  # nobody else minds its deadline any more

    def _say_goodbye(self) -> None:
        """Operation: 1001 for everybody, and for those who are just joining."""
        self._room.closing = True
        for request, client in self._connections.handlers.copy().items():
            if client and client._state is State.OPEN:
                self._room.close(client, serialize_close(CloseCode.GOING_AWAY))
            elif not client or client._state is State.CONNECTING:
                shut(request, socket.SHUT_RD)  # whoever has not said what it wants will not be heard


def plural(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ======================================================================================
# Many machines (Redis streams; its protocol, RESP2)
#
# With --redis any number of servers are one room. What is broadcast goes to a stream in
# Redis and comes back from there, like that of all other servers, in the one order of the
# stream. Whoever reads about one server can stop here.
# ======================================================================================

# ---- what is said to Redis and what it answers: pure ----

REPLY_LINE = re.compile(rb"[+-][^\r\n]*\r\n|:[+-]?[0-9]{1,19}\r\n|[$*](-1|[0-9]{1,9})\r\n")
MAX_DEPTH = 5  # arrays in arrays
FIELD_NAME = re.compile(b"([0-9a-f]{16}):([0-9]{1,18}):(text|binary|wait|go)")
NOT_REDIS, CUT = "what answers is not Redis", "Redis closed the connection"


class RedisError(OSError):
    """What Redis answers instead, or that it is no Redis at all."""


class RedisAddress(NamedTuple):
    """redis://[user:password@]host[:port][/db][?stream=name], or rediss:// for TLS."""

    tls: bool
    host: str
    port: int
    user: str
    password: str
    database: int
    stream: str


class Field(NamedTuple):
    """A message in an entry of the stream, which has a field for each. Its name is server:number:kind."""

    server: bytes  # that has written it; empty for anybody else, whose first field is text
    number: int  # of the message; of one server, it only goes up
    kind: bytes  # text, binary, wait, go
    payload: bytes


def parse_redis_url(url: str) -> RedisAddress:
    """Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    query = urllib.parse.parse_qs(parts.query, strict_parsing=bool(parts.query))
    path = re.fullmatch("/?([0-9]{0,9})", parts.path)
    if parts.scheme not in ("redis", "rediss") or not path or parts.fragment or not set(query) <= {"stream"}:
        raise ValueError("a Redis URL is redis://[user:password@]host[:port][/db][?stream=name]")
    host, stream = parts.hostname or "localhost", query.get("stream", ["pywebsock"])[-1]
    host.encode("idna")  # what connecting would say later
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    return RedisAddress(parts.scheme == "rediss", host, parts.port or 6379, user, password, int(path[1] or 0), stream)


def serialize_command(*words: str | bytes | int) -> bytes:
    """A command is an array of bulk strings."""
    items = [word if isinstance(word, bytes) else str(word).encode(errors="surrogateescape") for word in words]
    return b"*%d\r\n" % len(items) + b"".join([b"$%d\r\n%b\r\n" % (len(item), item) for item in items])


def parse_reply(file: BinaryIO, depth: int = 0) -> Any:
    """The next reply: bytes, int, None, a RedisError, or a list of them. Raises OSError."""
    line = file.readline(MAX_LINE)
    kind, text = line[:1], line[1:-2]
    if depth > MAX_DEPTH or not REPLY_LINE.fullmatch(line):
        cut = kind in b"+-:$*" and len(line) < MAX_LINE and not line.endswith(b"\n")
        raise ConnectionError(CUT) if cut else RedisError(NOT_REDIS)
    if kind in b"+-":
        return text if kind == b"+" else RedisError(text.decode(errors="replace"))
    number = int(text)
    if kind == b":":
        return number
    if number < 0:
        return None
    if kind == b"*":
        return [parse_reply(file, depth + 1) for _ in range(number)]
    bulk = file.read(number + 2)
    if len(bulk) < number + 2 or not bulk.endswith(b"\r\n"):
        raise ConnectionError(CUT) if len(bulk) < number + 2 else RedisError(NOT_REDIS)
    return bulk[:-2]


def parse_entry(entry: bytes, words: Sequence[bytes]) -> list[Field]:
    """The fields of an entry, from its id and their names and payloads in turns."""
    fields = []
    for name, payload in zip(words[::2], words[1::2]):
        match = FIELD_NAME.fullmatch(name)
        server, number, kind = match.groups() if match else (b"", parse_id(entry), b"text")
        fields.append(Field(server, int(number), kind, payload))
    return fields


def parse_id(entry: bytes) -> int:
    """An entry's id, milliseconds and a number within each (1700000000000-0), as one number that can be compared."""
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds) << 64 | int(number)


# ---- the link ----
#
# A server numbers its messages, and keeps each one until it has come back. Where it does
# not come back, since a connection was cut or Redis has lost it, it is written once more;
# every server passes over the numbers that it has seen. So nothing is lost and nothing
# comes twice, other than what Redis loses when some have read it and others have not.
#
# Messages that are written together are one entry. All of them are there or none is, and
# that keeps their order. An answer such as OOM refuses the entry. Then its messages are
# written one by one, and what is refused alone is lost, alone. An answer such as READONLY
# is about Redis itself: that is as good as away, and nothing is lost.
#
# A new entry has a higher id than all that were read. If not, Redis has lost the end of
# the stream and its clock has gone back. Other servers would not read such an entry. So
# it is written again, with an id that is higher than any of them can have read.
#
# The stream keeps about STREAM_LENGTH entries (XADD MAXLEN). After each writing a server
# asks how many bytes they have (MEMORY USAGE). Above STREAM_SIZE, the oldest quarter goes.
#
# A server that cannot keep up with the others would lose what they trim. Whenever it reads
# and there is more to read, it adds a "wait" for them, and in the end a "go".

STREAM_LENGTH = 10_000  # entries that Redis keeps, about: how far a server may fall behind
STREAM_SIZE = 128 * 1024 * 1024  # bytes that it keeps at most, about; at least eight of the longest messages
LINKED_COST = 4096  # bytes that a message counts for on its way, besides its payload
ANSWER_TIME = 10.0  # seconds for an answer of Redis
LISTEN_TIME = 2.0  # seconds that one reading waits for news
LOOK_TIME = 0.5  # seconds after which a server looks whether what it wrote is still there
WAIT_TIME = 1.0  # seconds that a "wait" holds without a "go"
MEND_TIME = 60_000  # milliseconds by which a lost end is passed: some servers may have read more of it than others
REFUSALS = ("OOM ", "ERR ")  # there is no memory for an entry, or it is too long for this Redis
PASSING = ("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "MISCONF", "NOREPLICAS")
Deliver = Callable[["list[Outgoing]"], object]


def total_cost(messages: Iterable[Field | Outgoing]) -> int:
    """What messages count for, in bytes: an empty one costs something, too."""
    return sum([len(message.payload) + LINKED_COST for message in messages])


def warn(*line: Any) -> None:
    """Log something, in a thread of its own: a logging.Handler may broadcast, and so wait for the thread that warns."""
    with contextlib.suppress(RuntimeError, MemoryError):  # there can be no more threads
        threading.Thread(target=log.warning, args=line, daemon=True).start()


class RedisConnection:
    """A connection that has said who it is; for one thread. Raises OSError everywhere, of which RedisError is one."""

    def __init__(self, address: RedisAddress) -> None:
        self.socket = socket.create_connection((address.host, address.port), ANSWER_TIME)
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls:
                self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=address.host)
            self._replies = self.socket.makefile("rb")
            login = ("AUTH", address.user or "default", address.password)
            greeting = self.call("HELLO", 2, *(login if address.user or address.password else ()))
            if not isinstance(greeting, list) or b"server" not in greeting:
                raise RedisError(NOT_REDIS)
            if address.database:
                self.call("SELECT", address.database)
        except BaseException:
            getattr(self, "_replies", self.socket).close()  # or the descriptor would stay open
            self.socket.close()
            raise

    def call(self, *words: str | bytes | int) -> Any:
        """The reply to a command. Raises RedisError where it is one."""
        data = memoryview(serialize_command(*words))
        with contextlib.suppress(ConnectionError):  # what Redis said before it closed the connection can be read
            while data:  # the time is for each piece: a long message may take its time
                data = data[self.socket.send(data) :]
        reply = parse_reply(self._replies)
        if isinstance(reply, RedisError):
            raise reply
        return reply

    def close(self) -> None:
        """End it."""
        self._replies.close()
        self.socket.close()


class RedisStream:
    """The stream as a server reads it: each message once. All is owned by the thread that reads.

    The thread that writes looks at these:

    - last: the id of the last entry read; empty, as long as it is not known where to begin
    - behind: whether there is more to read at once
    - hold_until: the time up to which nobody should write, since another server is behind (time.monotonic)
    """

    def __init__(self, key: str, name: bytes, history: int, history_size: int) -> None:
        """The name is that of this server."""
        self.last, self.behind, self.hold_until = b"", False, 0.0
        self.seen: dict[bytes, int] = {}  # the number of the last message read of each server
        self._key, self._name, self._history, self._history_size = key, name, history, history_size
        self._count = 8  # entries to ask for

    def read(self, connection: RedisConnection) -> list[Outgoing]:
        """What was added, or at first the history; nothing where nothing comes in LISTEN_TIME. Raises OSError."""
        last, behind, missed, messages = self.last, self.behind, 0, []
        for server, number, kind, payload in self._go_on(connection) if last else self._begin(connection):
            seen = self.seen.get(server, 0)
            if kind in (b"wait", b"go"):
                self.hold_until = time.monotonic() + WAIT_TIME if kind == b"wait" else 0.0
            elif number > seen:
                messages.append(Outgoing(payload.decode(errors="replace") if kind == b"text" else payload))
                self.seen[server] = number
                missed += number - seen - 1 if seen and server else 0
        with contextlib.suppress(OSError):  # what was read is not lost for it; the next reading will tell
            if self.behind or behind:
                kind = b"wait" if self.behind else b"go"
                connection.call("XADD", self._key, "*", b"%b:0:%b" % (self._name, kind), b"")
            if missed and last and not connection.call("XREVRANGE", self._key, last, "-", "COUNT", 1):
                warn("missed %d messages that Redis has no longer", missed)  # which were not only refused
        return messages

    def _go_on(self, connection: RedisConnection) -> list[Field]:
        block = 1 if self.behind else int(LISTEN_TIME * 1000)
        reply = connection.call("XREAD", "COUNT", self._count, "BLOCK", block, "STREAMS", self._key, self.last)
        entries = reply[0][1] if reply else []
        fields = [field for entry in entries for field in parse_entry(*entry)]
        self.behind = len(entries) == self._count or total_cost(fields) > 2 * RUN_SIZE  # that may take its time
        if entries:
            fitting = RUN_SIZE * len(entries) // total_cost(fields)  # but the next ones may be larger:
            self.last, self._count = entries[-1][0], max(2, min(8 + len(entries), fitting))
        return fields

    def _begin(self, connection: RedisConnection) -> list[Field]:
        """Find the end, and the history: as many messages as are wanted, or only a little more bytes.

        It is read from the end, one entry at a time: never in one huge reply.
        """
        found: list[Field] = []
        entries = connection.call("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        last, size = entries[0][0] if entries else b"0-0", 0
        while entries and len(found) < self._history and size < self._history_size:
            entry, words = entries[0]
            found[:0] = [field for field in parse_entry(entry, words) if field.kind in (b"text", b"binary")]
            size += sum(map(len, words))
            entries = connection.call("XREVRANGE", self._key, b"(" + entry, "-", "COUNT", 1)
        self.last = last
        return found[-self._history :]


class RedisLink:
    """A server's part in a room of many servers: what is put in comes back in the one order of the stream.

    One thread writes to the stream, one reads it. They wait neither for senders nor for the log.
    """

    def __init__(self, url: str, *, deliver: Deliver, history: int, max_message: int, history_size: int) -> None:
        """`deliver` gets what comes back, in a thread of the link, and may wait there while the server is busy.

        First comes the history: so many of the last messages, with about so many bytes at most.
        Raises ValueError for a wrong URL.
        """
        self._address, self._deliver = parse_redis_url(url), deliver
        self._name = os.urandom(8).hex().encode()  # of this server, in the names of its messages
        works = self._write, self._read
        self._threads = [threading.Thread(target=self._persist, args=(work,), daemon=True) for work in works]
        self._stream = RedisStream(self._address.stream, self._name, history, history_size)
        self._size = max(STREAM_SIZE, 8 * max_message)  # bytes that the stream may have
        self._alone = 0  # messages up to this number are written one by one (the writer's)
        self._refused = 0  # messages since Redis took one (the writer's)

        lock = threading.RLock()  # guards what follows; whoever has it waits for nothing else
        self._news = threading.Condition(lock)  # notified when that changes
        self._space = threading.Condition(lock)  # notified when senders should look again
        self._outbox: dict[int, Outgoing] = {}  # messages that have not come back, by number
        self._cost = 0  # of these together
        self._numbers = itertools.count(1)  # for the next messages
        self._failing: set[object] = set()  # what failed at the last attempt over a new connection: reading, writing
        self.away = False  # Redis does not answer, or not as it should
        self._stopped = False

    # ---- for the server: any thread ----

    def start(self) -> None:
        """Begin. Raises RedisError where waiting would not help; a Redis that is not there yet is waited for."""
        try:
            with contextlib.closing(RedisConnection(self._address)) as connection:
                self._read(connection)
                self._shorten(connection)
        except OSError as error:
            final = isinstance(error, (RedisError, ssl.SSLError, socket.gaierror))
            if final and not str(error).startswith(PASSING):
                where = f"{self._address.host}:{self._address.port}"
                raise RedisError(f"Redis at {where}: {printable(str(error))}") from None
        for thread in self._threads:
            thread.start()

    def put(self, message: Outgoing) -> None:
        """Send a message on its way. Never waits: that is what wait_for_room() is for."""
        with self._news:
            if not self._stopped:
                self._outbox[next(self._numbers)] = message
                self._cost += total_cost([message])
                self._news.notify_all()

    def wait_for_room(self, timeout: float | None = None) -> bool:
        """Wait while too much is on its way; whether that has an end.

        A sender with a timeout (seconds) does not wait for a Redis that is away, nor put anything in.
        """
        if threading.get_ident() in [thread.ident for thread in self._threads]:
            return True  # it makes the room
        hurried = timeout is not None
        with self._space:
            self._space.wait_for(lambda: self._cost <= QUEUE_SIZE or (hurried and self.away), timeout)
            return self._cost <= QUEUE_SIZE and not (hurried and self.away)

    def stop(self, seconds: float) -> None:
        """Wait until what was put in has come back, for so long at most, and end. The threads follow in LISTEN_TIME."""
        with self._news:
            last = max(self._outbox, default=0)
            self._news.wait_for(lambda: min(self._outbox, default=math.inf) > last, seconds)
            missing = sum([number <= last for number in self._outbox])
            self._stopped = True
            self._forget(list(self._outbox))
        if missing:
            log.warning("Redis did not bring back %d messages", missing)

    # ---- its threads ----

    def _persist(self, work: Callable[[RedisConnection], None]) -> None:
        """Do a piece of work again and again; where it fails, over a new connection, the second time after a while."""
        delay = 0.0
        while not self._stopped:
            try:
                with contextlib.closing(RedisConnection(self._address)) as connection:
                    while not self._stopped:
                        work(connection)
                        self._report(work)
                        delay = 0.0
            except Exception as error:
                if delay or isinstance(error, socket.timeout):  # a connection that is cut once is not worth a line
                    self._report(work, error)
            time.sleep(delay)
            delay = min(2 * delay, 2.0) or 0.05

    def _report(self, work: object, error: Exception | None = None) -> None:
        """Say once that Redis is away, and once that it is back."""
        with self._news:
            (self._failing.add if error else self._failing.discard)(work)
            if self.away != bool(self._failing):
                self.away = bool(self._failing)
                self._space.notify_all()
                why = printable(str(error) or type(error).__name__)
                warn("Redis is %s", f"away, senders wait: {why}" if error else "back")

    def _forget(self, numbers: Iterable[int]) -> None:
        """Messages have come back, or never will."""
        with self._news:
            self._cost -= total_cost([self._outbox.pop(number) for number in numbers if number in self._outbox])
            self._news.notify_all()
            if self._cost <= QUEUE_SIZE // 2:
                self._space.notify_all()

    # ---- the reader ----

    def _read(self, connection: RedisConnection) -> None:
        """Deliver what has been added to the stream."""
        self._deliver(self._stream.read(connection))
        with self._news:
            last = self._stream.seen.get(self._name, 0)
            self._forget([number for number in self._outbox if number <= last])

    # ---- the writer ----

    def _write(self, connection: RedisConnection) -> None:
        """Write messages as one entry, of the cost RUN_SIZE or of one message, and wait until they are back."""
        with self._news:
            if not self._news.wait_for(self._may_write, WAIT_TIME):
                return
            alone = min(self._outbox) <= self._alone
            count = 1 if alone else max(1, RUN_SIZE * len(self._outbox) // self._cost)
            batch = dict(itertools.islice(self._outbox.items(), count))
        fields: list[bytes] = []
        for number, message in batch.items():
            kind = b"text" if message.opcode == TEXT else b"binary"
            fields += b"%b:%d:%b" % (self._name, number, kind), message.payload
        add, last = ("XADD", self._address.stream, "MAXLEN", "~", STREAM_LENGTH), parse_id(self._stream.last)
        try:
            entry = connection.call(*add, "*", *fields)
        except RedisError as error:
            self._refuse(connection, batch, error)
            return
        if parse_id(entry) <= last:  # where nobody looks any more
            warn("Redis has lost the end of the stream")
            entry = connection.call(*add, b"%d-0" % ((last >> 64) + MEND_TIME), *fields)
        if self._refused:
            warn("Redis accepts messages again, %d are lost", self._refused)
            self._refused = 0
        self._shorten(connection)
        for _ in range(int(2 * LISTEN_TIME / LOOK_TIME)):  # what does not come back is lost, and written again
            with self._news:
                back = self._news.wait_for(lambda: number not in self._outbox, LOOK_TIME)
            if back or not connection.call("XRANGE", self._address.stream, entry, entry, "COUNT", 1):
                break

    def _may_write(self) -> bool:
        """Whether there is something to write that all servers can read before it is trimmed."""
        stream = self._stream
        return bool(self._outbox and stream.last and not stream.behind and time.monotonic() >= stream.hold_until)

    def _refuse(self, connection: RedisConnection, batch: dict[int, Outgoing], error: RedisError) -> None:
        """Redis refuses an entry. Which message it means, each of them alone will show. Raises any other error."""
        if not str(error).startswith(REFUSALS):
            raise error
        if len(batch) > 1:
            self._alone = max(batch)
        else:
            self._forget(batch)
            if not self._refused:
                warn("Redis refuses messages, which are lost: %s", printable(str(error)))
            self._refused += 1
        if str(error).startswith("OOM "):  # it may be this very stream that fills the memory
            self._shorten(connection, always=True)

    def _shorten(self, connection: RedisConnection, always: bool = False) -> None:
        """Trim the stream to three quarters of its entries while it has too many bytes, or at least once.

        The length is asked for first: servers that do so at the same time come to the same quarters.
        """
        length = connection.call("XLEN", self._address.stream)
        if always or (connection.call("MEMORY", "USAGE", self._address.stream, "SAMPLES", 0) or 0) > self._size:
            connection.call("XTRIM", self._address.stream, "MAXLEN", 1 + length * 3 // 4)
            if length > 4:
                self._shorten(connection)


# ======================================================================================
# Command line
# ======================================================================================


OTHER_SIGNALS = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP


class Program(BroadcastServer):
    """The server of the command line: a signal ends it between two connections, not in the middle of something."""

    signals: tuple[int, ...] = ()  # that have come

    def catch_signals(self) -> None:
        """From now on signals end the program in good order. The main thread."""
        for number in (signal.SIGINT, *OTHER_SIGNALS):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.stop)

    def stop(self, number: int, frame: object) -> None:
        """A signal has come. After the first one only a second Ctrl-C changes anything: it stops at once."""
        if number == signal.SIGINT and number in self.signals:
            os._exit(130)
        self.signals = (*self.signals, number)

    def service_actions(self) -> None:
        """Called by serve_forever() all the time."""
        if self.signals:
            for number in OTHER_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # to the very end, where Python handles nothing any more
            log.info("stopping")
            raise KeyboardInterrupt


def parse_size(text: str) -> int:
    """A whole number from 0 on, with K, M or G for 1024 times more."""
    match = re.fullmatch("([0-9]{1,12})([KMG]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1000 or 16M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


EXAMPLES = """examples:
  tail -f log | pywebsock --stdin --read-only --history 100
  pywebsock --host :: --cert cert.pem --key key.pem --origin https://example.com
"""


def argument_parser() -> argparse.ArgumentParser:
    """The options, most of which have the names of settings: BroadcastServer checks those."""
    about = "What one WebSocket client sends, all clients get. Open http://localhost:4545/ in several tabs."
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("pywebsock", description=about, epilog=EXAMPLES, formatter_class=kind)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on: 0.0.0.0 for all, :: for IPv6 too (%(default)s)")
    add("--port", default=4545, type=int, help="port to listen on, 0 for any free one (%(default)s)")
    origin = "let pages of this origin connect, * for any; repeatable"
    add("--origin", dest="origins", metavar="ORIGIN", action="append", default=[], help=origin)
    add("--cert", metavar="FILE", help="certificate chain in PEM: serve wss:// and https://")
    add("--key", metavar="FILE", help="its private key, where it is not in the same file")
    add("--redis", metavar="URL", help="be one room with all servers on this Redis")
    add("--no-compression", action="store_false", dest="compression", help="do not use permessage-deflate")
    add("--stdin", action="store_true", help="broadcast each line of standard input")
    add("--read-only", action="store_true", help="clients may only listen")
    group = parser.add_argument_group("limits (sizes in bytes, or such as 64K, 16M)")
    add = functools.partial(group.add_argument, type=parse_size)
    add("--max-message", metavar="SIZE", default="16M", help="longest message (%(default)s)")
    add("--max-backlog", metavar="SIZE", default="16M", help="what may wait for a client (%(default)s)")
    add("--max-clients", metavar="N", default=10_000, help="clients at once (%(default)s)")
    ping = "seconds of silence before a ping, and after it (%(default)g)"
    add("--ping", dest="ping_interval", type=float, metavar="S", default=20.0, help=ping)
    add("--history", metavar="N", default=0, help="messages that a new client gets first (0)")
    add("--rate", type=float, metavar="N", default=0.0, help="messages a second that a client may send (any)")
    add = parser.add_argument_group("logging").add_mutually_exclusive_group().add_argument
    add("--quiet", action="store_true", help="log only what needs attention")
    add("--verbose", action="store_true", help="log every client that joins, too")
    add("--trace", action="store_true", help="show every handshake and every frame, taken apart")
    return parser


def create_server(options: argparse.Namespace) -> Program:
    """A listening server. Raises OSError; ValueError and OverflowError for settings."""
    if options.stdin and not sys.stdin:  # its descriptor may soon be another's
        raise OSError("standard input is closed")
    options.ping_timeout = options.ping_interval
    if options.cert is not None:
        options.tls_context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(options.cert, options.key)
        except OSError as error:  # which does not say where
            files = " and ".join(filter(None, (options.cert, options.key)))
            raise OSError(f"no certificate and key in PEM in {files}: {error.strerror}") from None
    settings = {name: value for name, value in vars(options).items() if hasattr(BroadcastServer, name)}
    return Program((options.host, options.port), **settings)


def locations(server: BroadcastServer, host: str) -> str:
    """The first lines of output: where to point a browser, and that of another device."""
    bound = str(server.server_address[0])
    name = "localhost" if bound in ("127.0.0.1", "::1", "0.0.0.0", "::") else host
    urls = dict.fromkeys([server._url(name), server._url(network_address(bound))])
    lines = [f"{url} ({url.replace('http', 'ws', 1)})" for url in urls if url]
    return "\n".join(map("pywebsock: {}{}".format, ("listening on ", "on the network: "), lines))


def broadcast_lines(server: BroadcastServer) -> None:
    """Broadcast each line of standard input, in a thread of its own; one over the message limit in pieces."""
    # Not sys.stdin: that has a lock which a thread must not hold when the program ends.
    try:
        with open(0, encoding="utf-8", errors="replace", newline="\n", closefd=False) as stdin:
            for line in iter(functools.partial(stdin.readline, server.max_message + 1), ""):
                server.broadcast(line.rstrip("\r\n"))
        log.info("standard input has ended")
    except OSError as error:
        log.warning("standard input: %s", error.strerror)


def start_logging(options: argparse.Namespace) -> None:
    """Log to standard error: one line for each client that left or was refused, and what went wrong."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # a third of a line's price
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO)
    trace_log.addHandler(logging.StreamHandler())
    trace_log.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until a signal; the exit status."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.key is not None and options.cert is None:
        parser.error("--key needs --cert")
    start_logging(options)
    threading.stack_size(256 * 1024)  # for all threads: those of 10,000 clients take 2.5 GB of address space
    try:
        server = create_server(options)
        server.catch_signals()
        print(locations(server, options.host), flush=True)
    except OSError as error:  # one of the system comes from the address, and does not say so
        where = f"{options.host} port {options.port}: " if error.strerror else ""
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
