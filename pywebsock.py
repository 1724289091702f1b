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

The parts, bottom-up; the first seven know no sockets, take bytes and give values or raise:

    vocabulary            opcodes, status codes, limits        RFC 6455 5.2, 7.4
    errors                what the pure parts raise
    base framing          masking, frames out, frames in       RFC 6455 5
    permessage-deflate    offers, inflating, deflating         RFC 7692
    messages              fragments, UTF-8, what to broadcast  RFC 6455 5.4, 5.6, 8.1
    opening handshake     requests, checks, origins, answers   RFC 6455 4, RFC 9112
    TLS                   plaintext to records and back        RFC 8446
    connections           WebSocketHandler: a thread a client  RFC 6455 5.5, 7
    server                BroadcastServer: one order, fan-out
    many machines         servers that share a Redis stream    (RESP2)
    command line          main()

The engine.  Whatever changes what clients see is an *operation*: a broadcast, a frame to
one client, a client joining or leaving.  Operations go through one queue.  Whoever holds
the one lock that matters, the *turn*, carries them out: its own and everybody else's.  A
thread that has queued something tries to take the turn and, where it fails, goes back to
its client, since the holder will see what it queued.  All consecutive broadcasts found in
the queue become one buffer, and each client gets one send() for all of them.

Threads.  One accepts (it runs serve_forever), one reads each client (its handler, which
also runs the hooks for that client), one, the *housekeeper*, looks after slow clients,
silent clients and timeouts; with --redis, two more keep the link.  Others may call
broadcast(), send() and close().

Locks, and the rules that everything below relies on:

  R1  Only the holder of the turn touches the client set, sends on the socket of a client
      that has joined, and changes its backlog.  Before it has joined and after it has
      left, the client's socket belongs to its own thread alone, which also closes it.
  R2  The holder never waits: its sends do not block, and no hook runs in the turn.
  R3  Only the housekeeper waits for the turn, and a handler whose client floods it with
      frames; all others just try.  What is left in the queue when the turn is given back
      is seen by the last holder, which looks once more, or promised to the housekeeper.
  R4  The entrance guards the queue and its tally, for a few instructions at a time.
  R5  A TLS object has a lock of its own (OpenSSL wants one thread at a time); it is held
      for work in memory, never while waiting.
  R6  Locks are taken in the order: turn, TLS or entrance; never the other way round.  Those
      of the connections (`_fewer`) and of the link (`_news`) are held alone.

Glossary.  client: a WebSocketHandler after its opening handshake.  Room: the clients that
get broadcasts.  Backlog: what a client's socket did not take yet.  Run: consecutive
broadcasts sent as one.  Window: the LZ77 window of deflate, 9 to 15 bits, or 0 for plain.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import codecs
import enum
import errno
import functools
import hashlib
import http
import ipaddress
import itertools
import json
import logging
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

READ_SIZE = 256 * 1024  # bytes asked of a socket at once
RUN_SIZE = 1024 * 1024  # bytes of consecutive broadcasts sent as one
QUEUE_SIZE = 4 * 1024 * 1024  # bytes queued, above which senders wait
OVERHEAD = 250  # bytes that the objects of a queued message take
MANY_FRAMES = 500  # read at once: whoever sends as many waits for the turn
FLUSHES = 16  # sends to one slow client before others have their turn
TURN_TIME = 0.02  # seconds after which a holder hands the turn on
PATIENCE = 0.25  # seconds in which a quick reader takes a quarter of its backlog limit


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
            raise ValueError(f"{status} {fields} cannot refuse a request")


class ProtocolError(Exception):
    """The connection must fail (RFC 6455 7.1.7): carries the close code."""

    def __init__(self, code: CloseCode, message: str) -> None:
        super().__init__(message)
        self.code = code


# ======================================================================================
# Base framing (RFC 6455 5)
# ======================================================================================

OPCODES = frozenset(map(int, Opcode))
MAX_CONTROL_PAYLOAD = 125  # bytes (5.5)

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
    data, position = b"", 0
    fin, length, key, left = False, 0, b"", 0  # of the frame that is arriving
    for piece in pieces:
        data, position = data[position:] + piece, 0
        if left:
            turn = (length - left) % 4  # where its payload goes on in the key
            position = min(left, len(data))
            left -= position
            yield fin and not left, False, CONT, apply_mask(data[:position], key[turn:] + key[:turn]), left
        while position < len(data) and (header := parse_header(data, position)):
            first, length, key, start = header
            fin, rsv1, opcode = first >= 0x80, first & 0x40 != 0, first & 0x0F
            if start + length <= len(data):
                position = start + length
                yield fin, rsv1, opcode, apply_mask(data[start:position], key), 0
            elif opcode >= 8:  # control frames are short: wait for the whole
                break
            else:
                position = len(data)
                left = start + length - position
                yield False, rsv1, opcode, apply_mask(data[start:], key), left
        data, position = data[position:], 0
        del piece  # a client that is silent now must not hold the memory of what it sent


def parse_header(data: bytes, position: int) -> tuple[int, int, bytes, int] | None:
    """The frame header at `position` (5.2): (first byte, payload length, masking key, start of payload).

    None where more bytes are needed. Raises ProtocolError.
    """
    if len(data) - position < 2:
        return None
    first, second = data[position], data[position + 1]
    length, start = second & 0x7F, position + 6
    if first & 0x30:  # 5.2: no extension here gives them a meaning
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "RSV2 or RSV3 is set")
    if first & 0x0F not in OPCODES:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"opcode {first & 0x0F} is reserved")
    if second < 0x80:  # 5.1: a client masks every frame
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a frame is not masked")
    if first & 0x08 and (first < 0x80 or length > MAX_CONTROL_PAYLOAD):  # 5.5
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a control frame is fragmented or too long")
    if length == 126:  # 7+16 bits
        start += 2
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if start <= len(data) and length < 126:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a length is not encoded in the fewest bytes")
    elif length == 127:  # 7+64 bits, of which the first must be 0
        start += 8
        length = int.from_bytes(data[position + 2 : position + 10], "big")
        if start <= len(data) and not 1 << 16 <= length < 1 << 63:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a length is not encoded in the fewest bytes, or negative")
    if start > len(data):
        return None
    return first, length, data[start - 4 : start], start


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
FINAL_BLOCK = b"\x03\x00"  # an empty one: zlib takes it for the end only where all before it is whole
MAX_FINALS = 1000  # in one message
INFLATE_SIZE = 64 * 1024  # bytes
INFLATER_SIZE = 40 * 1024  # bytes that zlib takes, for its window above all

PARAMETER = re.compile(rf'[ \t]*({TOKEN})[ \t]*(?:=[ \t]*(?:({TOKEN})|"({TOKEN})")[ \t]*)?([;,]|\Z)')
NOTHING = re.compile(r"[ \t,]*")  # a list may have empty elements (RFC 9110 5.6.1)


def parse_extensions(field: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """The offers in Sec-WebSocket-Extensions (RFC 6455 9.1): [(name, [(parameter, value or None)])].

    In linear time: each match goes on where the last one ended. Raises HandshakeError.
    """
    offers: list[tuple[str, list[tuple[str, str | None]]]] = []
    position, separator = 0, ","
    while separator:
        if separator == ",":
            position = NOTHING.match(field, position).end()  # type: ignore[union-attr]
            if position == len(field):
                break
        match = PARAMETER.match(field, position)
        if not match or (separator == "," and "=" in match[0]):
            raise HandshakeError(400, "Sec-WebSocket-Extensions is malformed")
        if separator == ",":
            offers.append((match[1], []))
        else:
            offers[-1][1].append((match[1], match[2] or match[3]))
        position, separator = match.end(), match[4]
    return offers


def negotiate_deflate(field: str) -> tuple[int, str]:
    """The first acceptable offer's (window, extension to answer); (0, "") where there is none (RFC 7692 5, 7.1)."""
    for name, parameters in parse_extensions(field) if field else ():
        window = negotiate_window(parameters) if name == "permessage-deflate" else 0
        if window:
            limit = f"; server_max_window_bits={window}" if "server_max_window_bits" in dict(parameters) else ""
            return window, f"{name}; server_no_context_takeover; client_no_context_takeover{limit}"
    return 0, ""


def negotiate_window(parameters: Sequence[tuple[str, str | None]]) -> int:
    """The window for what the server sends, in bits; 0 declines the offer (RFC 7692 7.1)."""
    values = dict(parameters)
    if len(values) < len(parameters):  # 7.1: a parameter stands at most once
        return 0
    for name in ("server_no_context_takeover", "client_no_context_takeover"):
        if values.pop(name, None) is not None:  # they have no value
            return 0
    # A client may announce that its own window can be limited. There is no need to: a
    # window of 15 bits inflates all smaller ones, and costs its memory for one message.
    own = values.pop("client_max_window_bits", None)
    window = values.pop("server_max_window_bits", "15")
    if values or (own is not None and not re.fullmatch("[89]|1[0-5]", own)):
        return 0
    # zlib has no raw deflate with a window of 8 bits, which a decliner need not have.
    return int(window) if window and re.fullmatch("9|1[0-5]", window) else 0


def deflate(payload: bytes, window: int) -> bytes:
    """Compress one message, by itself (7.2.1)."""
    compressor = zlib.compressobj(wbits=-window)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[: -len(SYNC_TAIL)]


class Inflater:
    """Decompresses one message as its fragments come, in pieces of bounded size (7.2.2)."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=-15)
        self._finals = 0  # blocks with BFINAL before; they may stand anywhere (7.2.1), zlib ends at each

    def inflate(self, data: Octets, fin: bool) -> Iterator[bytes]:
        """Yield the plain bytes that `data` gives, at most INFLATE_SIZE at once. Raises ProtocolError."""
        if fin:
            data += SYNC_TAIL + FINAL_BLOCK
        while data:
            if self._zlib.eof:
                self._zlib, self._finals = zlib.decompressobj(wbits=-15), self._finals + 1
            if self._finals > MAX_FINALS:
                raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "compressed data ends too often")
            try:
                plain = self._zlib.decompress(data, INFLATE_SIZE)
            except zlib.error:
                raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "compressed data is corrupt") from None
            data = self._zlib.unconsumed_tail or self._zlib.unused_data
            yield plain
        if fin and not self._zlib.eof:
            raise ProtocolError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "compressed data ends within a block")


# ======================================================================================
# Messages (RFC 6455 5.4, 5.6, 8.1)
# ======================================================================================


class MessageReader:
    """Puts fragments together and gives whole messages and control frames.

    - frames: how many have come, or pieces of them; whoever counts them sets it to 0
    - size: bytes kept for a message that is not finished

    `charge` is called with every change of `size`, of at most INFLATE_SIZE or a piece at once,
    and may raise ProtocolError. At the end of a connection `size` is still charged.
    """

    def __init__(
        self, max_message: int, compressed: bool = False, charge: Callable[[int], object] = lambda change: None
    ) -> None:
        self.frames = 0
        self.size = 0
        self._max_message = max_message  # bytes, after inflating
        self._may_compress = compressed  # permessage-deflate was negotiated
        self._charge = charge
        self._opcode = 0  # of the message whose fragments are coming; 0 between messages
        self._payload = bytearray()  # one buffer: a list of a million empty fragments would not be small
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
                    self._count()
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
            self._check_size(len(self._payload) + len(plain) + left)
            if self._opcode == TEXT:
                self._check_utf8(plain)
            self._payload += plain
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
        text, payload = self._opcode == TEXT, self._payload
        self._opcode, self._payload, self._inflater = 0, bytearray(), None
        self._utf8.reset()
        return decode_text(payload) if text else bytes(payload)

    def _count(self) -> None:
        change = len(self._payload) + (INFLATER_SIZE if self._inflater else 0) - self.size
        if change:
            self.size += change
            self._charge(change)


class Outgoing:
    """A message on its way to clients: one frame without compression, and one for each window in use."""

    __slots__ = ("_deflated", "opcode", "plain", "size")

    def __init__(self, message: Message) -> None:
        """Raises TypeError for anything but str and what is like bytes, ValueError for half a character in a str."""
        if isinstance(message, str):
            self.opcode, payload = TEXT, message.encode()
        elif isinstance(message, (bytes, bytearray, memoryview)):
            self.opcode, payload = BINARY, bytes(message)
        else:
            raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
        self.size = len(payload)  # bytes
        self.plain = serialize_frame(self.opcode, payload)
        self._deflated: dict[int, bytes] = {}  # by window

    def payload(self) -> bytes:
        """The payload of the plain frame."""
        return self.plain[len(self.plain) - self.size :]

    def frame(self, window: int) -> bytes:
        """The frame for clients with this window, compressed at most once (any thread: a race costs only time)."""
        if not window or self.size < DEFLATE_THRESHOLD:
            return self.plain
        if window not in self._deflated:
            payload = deflate(self.payload(), window)
            shorter = len(payload) < self.size
            self._deflated[window] = serialize_frame(self.opcode, payload, rsv1=True) if shorter else self.plain
        return self._deflated[window]


# ======================================================================================
# Opening handshake (RFC 6455 4; HTTP as in RFC 9112)
# ======================================================================================

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3

MAX_HEAD, MAX_LINE, MAX_FIELDS = 32 * 1024, 8 * 1024, 100  # bytes of a head, bytes of a line in it, header fields
HEAD_END = re.compile(rb"\r?\n\r?\n")  # of any head; a good one ends in CR LF CR LF
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD_LINE = re.compile(rf"({TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
ABSOLUTE_FORM = re.compile(r"^https?://([^/?]*)", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~-]+)(?::[0-9]{0,5})?")
ORIGIN = re.compile(rf"(?!wss?:)[a-z][a-z0-9+.-]*://{HOST.pattern}(?<!:)")


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

    @property
    def expects_continue(self) -> bool:
        """Whether the body comes only after a response of 100 (RFC 9110 10.1.1)."""
        return self.version >= (1, 1) and "100-continue" in self.tokens("expect")


def parse_request(pieces: Iterable[bytes]) -> tuple[Request, bytes]:
    """The request whose head arrives in these pieces, and what has arrived after the head. Raises HandshakeError."""
    head, end = bytearray(), None
    for piece in pieces:
        seen = max(0, len(head) - 3)
        head += piece if head else piece.lstrip(b"\r\n")  # empty lines may come first (RFC 9112 2.2)
        if head and not head[:1].isalpha():
            raise HandshakeError(400, "that is not HTTP")  # TLS on a plain port, say
        end = HEAD_END.search(head, seen)
        if end or len(head) > MAX_HEAD:
            break
    size = end.end() if end else len(head)
    lines = head[: end.start() if end else size].decode("latin-1").split("\r\n")
    if len(lines[0]) > MAX_LINE:
        raise HandshakeError(414, f"the request line is longer than {MAX_LINE} bytes")
    if len(lines) > MAX_FIELDS + 1 or max(map(len, lines)) > MAX_LINE or size > MAX_HEAD:
        limits = f"{MAX_FIELDS} header fields, {MAX_HEAD} bytes of them, or {MAX_LINE} bytes in one"
        raise HandshakeError(431, f"there are more than {limits}")
    if not end or end[0] != b"\r\n\r\n":
        raise HandshakeError(400, "the request is incomplete, or a line does not end in CR LF")
    return parse_head(lines), bytes(head[size:])


def parse_head(lines: Sequence[str]) -> Request:
    """The request in these lines (RFC 9112 3, 5). Raises HandshakeError."""
    start = REQUEST_LINE.fullmatch(lines[0])
    if not start:
        raise HandshakeError(400, "the request line is malformed")
    if start[3] != "1":
        raise HandshakeError(505, "the protocol is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise HandshakeError(400, "a header field is malformed")
        name, value = match[1].lower(), match[2].strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(start[1], start[2], (1, int(start[4])), headers)


def check_host(request: Request) -> str:
    """The host that is asked: the Host field, which HTTP/1.1 demands, or in absolute form that of the target.

    RFC 9112 3.2. Raises HandshakeError.
    """
    host, absolute = request.headers.get("host", ""), ABSOLUTE_FORM.match(request.target)
    if not HOST.fullmatch(host) and (host or request.version >= (1, 1)):
        raise HandshakeError(400, "the Host header field is missing or malformed")
    if absolute and not HOST.fullmatch(absolute[1]):
        raise HandshakeError(400, "the host in the target is malformed")
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
    if origin in (f"http://{host}", f"https://{host}") and is_address(host):
        return
    name = printable(request.headers["origin"])
    raise HandshakeError(403, f'origin {name} may not connect (--origin {name} or origins=["{name}"] allows it)')


def parse_origin(text: str) -> str:
    """An origin as browsers write it (RFC 6454 6.2), or one of the words *, null and file://. Raises ValueError."""
    origin = text.lower()
    if origin in ("*", "null", "file://"):
        return origin
    origin = origin.removesuffix("/")
    if not ORIGIN.fullmatch(origin):
        raise ValueError(f"an origin is a scheme and a host, such as https://example.com, not {text!a}")
    return re.sub("^(http:.*):80$|^(https:.*):443$", r"\1\2", origin)


def is_address(host: str) -> bool:
    """Whether a Host is localhost or an IP address, with or without a port."""
    name = re.sub(":[0-9]*$", "", host).strip("[]")
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def check_upgrade(request: Request) -> str:
    """Sec-WebSocket-Accept for a request that meets RFC 6455 4.2.1. Raises HandshakeError."""
    if request.method != "GET":
        raise HandshakeError(405, "a WebSocket is opened with GET", ("Allow", "GET"))
    if request.version < (1, 1):
        raise HandshakeError(400, "a WebSocket is opened with HTTP/1.1")
    if "websocket" not in request.tokens("upgrade"):
        raise HandshakeError(400, "the Upgrade header field does not say websocket")
    if "upgrade" not in request.tokens("connection"):
        raise HandshakeError(400, "the Connection header field does not say Upgrade")
    if request.headers.get("sec-websocket-version") != "13":
        fields = ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")  # RFC 9110 15.5.22
        raise HandshakeError(426, "the WebSocket version is not 13", *fields)
    return compute_accept(request.headers.get("sec-websocket-key", ""))


def compute_accept(key: str) -> str:
    """Sec-WebSocket-Accept, proof that the server has understood the handshake (4.2.2). Raises HandshakeError."""
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16 or len(key) != 24:
        raise HandshakeError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    return base64.b64encode(hashlib.sha1(key.encode() + GUID, usedforsecurity=False).digest()).decode()


def body_length(request: Request, max_message: int) -> int:
    """The number of bytes of a request's body, which is to be one message (RFC 9112 6). Raises HandshakeError."""
    field = request.headers.get("content-length", "")
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise HandshakeError(415, "the body is the message: send no form")  # curl -F
    if "transfer-encoding" in request.headers or not field:
        raise HandshakeError(411, "the body needs a Content-Length")
    if not re.fullmatch("[0-9]{1,18}", field):
        raise HandshakeError(400, "Content-Length is malformed")
    if int(field) > max_message:
        raise HandshakeError(413, f"a message has at most {max_message} bytes")
    return int(field)


def decode_body(request: Request, body: bytes) -> Message:
    """The message in the body of a request: text where it is UTF-8 and does not say that it is binary."""
    if request.headers.get("content-type", "").lower().startswith("application/octet-stream"):
        return body
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


def serialize_response(status: int, fields: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
    """A response; all but 101 end the connection (RFC 9112 4)."""
    lines = [f"HTTP/1.1 {int(status)} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def http_response(status: int, kind: str, body: bytes, *fields: tuple[str, str], head: bool = False) -> bytes:
    """A response to an ordinary request, with its body's length; to HEAD, without the body."""
    standard = (
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Connection", "close, Upgrade" if "Upgrade" in dict(fields) else "close"),  # RFC 9110 7.8
    )
    return serialize_response(status, (*standard, *fields), b"" if head else body)


def printable(text: str, limit: int = 200) -> str:
    """Text from the network, made safe for a log: control and non-ASCII characters escaped, cut."""
    return re.sub(r"[^ -\[\]-~]", lambda match: ascii(match[0])[1:-1], text[:limit])


# ======================================================================================
# Trace (RFC 6455 5.2, drawn as it passes)
# ======================================================================================

LOOK_AT, SHOW = 512, 40  # bytes of a payload that are looked at, and characters that are shown of them
trace_log = logging.getLogger("pywebsock.trace")


class Trace:
    """Logs what passes on a connection: its opening handshake line by line, each frame taken apart.

    received(data) and sent(data) take the plain bytes of a direction, in whatever pieces.
    It only looks, and shows what breaks the protocol as it is.
    """

    def __init__(self, name: str) -> None:
        ways = self._follow(f"{name} in "), self._follow(f"{name} out")
        for way in ways:
            next(way)  # up to where it waits for bytes
        self.received, self.sent = ways[0].send, ways[1].send

    def _follow(self, name: str) -> Generator[None, bytes, None]:
        data, skip = b"", 0
        while b"\r\n\r\n" not in data and len(data) <= MAX_HEAD:
            data += yield
        head, _, data = data.partition(b"\r\n\r\n")
        for line in head.decode("latin-1").split("\r\n"):
            trace_log.info("%s %s", name, printable(line))
        while not re.search(b"Sec-WebSocket-(Key|Accept)", head, re.IGNORECASE):  # a body of HTTP
            data = yield
        while True:
            frame = describe_frame(data[skip : skip + 14 + LOOK_AT])
            if frame:
                trace_log.info("%s %s", name, frame[0])
                skip += frame[1]
            else:
                data, skip = data[skip:] + (yield), max(0, skip - len(data))


def describe_frame(data: bytes) -> tuple[str, int] | None:
    """A line about the frame at the beginning of `data`, and its length in bytes; None where more are needed."""
    if len(data) < 2:
        return None
    first, second, opcode = data[0], data[1], data[0] & 0x0F
    extended = {126: 2, 127: 8}.get(second & 0x7F, 0)
    start = 2 + extended + (4 if second & 0x80 else 0)
    length = int.from_bytes(data[2 : 2 + extended], "big") if extended else second & 0x7F
    payload, key = data[start : start + min(length, LOOK_AT)], data[2 + extended : start]
    if len(data) < start + min(length, LOOK_AT):
        return None
    name = Opcode(opcode).name if opcode in OPCODES else "?"
    size = f"len={length} ({f'7+{8 * extended}' if extended else 7} bits)"
    fields = f"FIN={first >> 7} RSV={first >> 4 & 7:03b} opcode={opcode:X} {name:6} MASK={second >> 7} {size:21}"
    mask = f"key={key.hex()}" if key else ""
    text = describe_payload(first, bytes(apply_mask(payload, key or bytes(4))))
    return f"{fields} {mask:12} {payload[:4].hex():8} {text}".rstrip(), start + length


def describe_payload(first: int, payload: bytes) -> str:
    """The beginning of a payload; with its close code, or inflated, where the frame's first byte says so."""
    what = ""
    if first & 0x0F == CLOSE and payload:
        code, payload = int.from_bytes(payload[:2], "big"), payload[2:]
        what = f"{code} {CloseCode(code).name if code in set(CloseCode) else '?'} "
    elif first & 0x40:
        try:
            what, payload = "inflated ", zlib.decompressobj(wbits=-15).decompress(payload, SHOW + 1)
        except zlib.error:
            what = "not deflate "
    text = payload.decode("latin-1" if first & 0x0F == BINARY else "utf-8", "replace")
    size = max(size for size in range(SHOW + 1) if len(printable(text, size)) <= SHOW)
    return what + (f'"{printable(text, size)}"' if text else "") + "..." * (len(text) > size)


# ======================================================================================
# Settings and the log
# ======================================================================================


def check_setting(name: str, value: Any, default: Any) -> Any:
    """The value of a setting as the server uses it, which is of the kind of its default. Raises ValueError."""
    good, kind, least = True, "", int(name == "max_clients")
    if isinstance(default, bool):
        good, kind = isinstance(value, bool), "True or False"
    elif isinstance(default, (int, float)):
        whole = isinstance(default, int)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        good, kind = number and least <= value < float("inf"), f"a {'whole ' * whole}number from {least} on"
    elif name == "origins":
        good, kind = isinstance(value, (list, tuple)), 'a list such as ["https://example.com"]'
    elif name in ("redis", "tls_context"):
        expected = str if name == "redis" else ssl.SSLContext
        good, kind = value is None or isinstance(value, expected), f"of the type {expected.__name__}"
    if not good:
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return [parse_origin(str(origin)) for origin in value] if name == "origins" else value


def network_address(bound: str) -> str | None:
    """The IP address by which other devices reach a server that is bound to one; None where they cannot."""
    address = ipaddress.ip_address(bound)
    if not address.is_unspecified:
        return None if address.is_loopback else bound
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))[: address.version // 3]:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))  # it sends nothing, but finds out which way it would go
                return str(probe.getsockname()[0])
        except OSError:
            pass  # there is no network, or none of this kind
    return None


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
# TLS (RFC 8446)
# ======================================================================================


class TLS:
    """Turns plaintext into TLS records and back, in memory. It knows no sockets: reading and
    writing stay what they are without TLS, and none of its callers ever waits with its lock (R5)."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()
        self.established = False

    def decrypt(self, records: bytes) -> bytes | None:
        """The plaintext that has become complete; None at the end. Raises ssl.SSLError.

        First comes the TLS handshake: while it is not `established`, there is only
        something to send, which encrypt(b"") gives.
        """
        plain = [b""]
        with self._lock:
            self._incoming.write(records)
            try:
                if not self.established:
                    self._object.do_handshake()
                    self.established = True
                while piece := self._object.read(READ_SIZE):
                    plain.append(piece)
                return b"".join(plain) or None  # their close_notify: read() gives b"", again and again
            except ssl.SSLWantReadError:
                return b"".join(plain)
            except ssl.SSLZeroReturnError:  # the same within the TLS handshake
                return None

    def encrypt(self, plain: bytes) -> bytes:
        """The records for some plaintext, and whatever else TLS has to say. Raises ssl.SSLError."""
        with self._lock:
            if plain:
                self._object.write(plain)
            return self._outgoing.read()

    def end(self) -> bytes:
        """The close_notify that must precede the end of the connection (6.1)."""
        with self._lock:
            try:
                self._object.unwrap()
            except ssl.SSLError:
                pass  # the peer's own close_notify has not come; nobody waits for it
            return self._outgoing.read()


# ======================================================================================
# Connections (RFC 6455 5.5, 7)
# ======================================================================================

# With this flag a send does not wait on a socket whose recv does. Windows lacks it: there
# the sockets of clients never wait, and their threads wait in select() before they read.
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class WebSocketHandler(socketserver.BaseRequestHandler):
    """One connection, and the thread that reads it; after the opening handshake, a client.

    For every hook and any other thread:

    - send(message), close(code, reason)
    - path: the request's target, with its query
    - headers: the request's header fields, names in lower case
    - address: the peer's address and port, for people
    """

    server: BroadcastServer
    request: socket.socket

    def setup(self) -> None:
        """Called by socketserver in the new thread, like handle()."""
        host, port = self.client_address[0].removeprefix("::ffff:"), self.client_address[1]  # IPv4 on an IPv6 socket
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.path = ""
        self.headers: dict[str, str] = {}
        self.window = 0  # of permessage-deflate, in bits; 0 without
        self._tls = TLS(self.server.tls_context) if self.server.tls_context else None
        self._deadline = time.monotonic() + self.server.handshake_timeout  # of what this thread does by itself
        self._pongs: list[bytes] = []  # for the Pings in what is being read
        self._due = 0.0  # when the next message may come, with a rate

        # What the holder of the turn keeps here (R1).
        self.backlog: deque[bytes] = deque()  # what the socket did not take; slow clients share these bytes
        self.backlog_size = 0  # bytes
        self.sent = 0  # bytes of backlog[0] that the socket took
        self.moved = 0.0  # when the socket last took bytes of the backlog
        self.quick_at = 0.0  # when it last took a quarter of the backlog limit, or the backlog began
        self.quick_bytes = 0  # taken since then
        self.pong: bytes | None = None  # the newest Pong, waiting for the backlog to be empty
        self.pinged = False  # a keepalive Ping awaits anything at all
        self.close_by = 0.0  # when to give up waiting for the peer's Close; 0 before the server has sent its own
        self.dropped = ""  # why the connection was given up, also by its own thread

        # Written by this thread, read by the housekeeper.
        self.quiet_since: float | None = None  # when this thread began to wait for bytes, if it does

    # ---- for hooks and other threads ----

    def send(self, message: Message) -> None:
        """Send text (str) or binary (bytes) to this client alone, in order with all else. Any thread.

        Never fails: where the client is gone or closing, the message is gone too.
        Raises TypeError for anything but str and bytes.
        """
        frame = Outgoing(message).frame(self.window)  # compressed here, not in the turn
        self.server.perform(functools.partial(self.server.send_to, self, frame), len(frame))

    def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Begin the closing handshake, after all that was sent before (7.1.2). Any thread.

        A reason is cut to 123 bytes. Raises ValueError for a code that may not be sent (7.4).
        """
        if code not in CODES_ON_THE_WIRE:
            raise ValueError(f"{code} is not a close code that may be sent")
        self.server.perform(functools.partial(self.server.close_client, self, serialize_close(code, reason)))

    # ---- in this client's own thread ----

    def handle(self) -> None:
        """Serve the connection from its first byte to its last."""
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request, rest = parse_request(iter(self._read_in_time, None))
            if request.upgrades:
                self._serve_websocket(request, rest)
            else:
                self._part(self._answer(request, rest))
        except HandshakeError as error:
            log.warning("%s refused: %d, %s", self.address, error.status, error)
            body = f"{error.status.value} {error.status.phrase}: {error}\n".encode()
            self._part(http_response(error.status, "text/plain; charset=utf-8", body, *error.fields))
        except OSError as error:  # of which ssl.SSLError is one
            log.info("%s gone before its handshake: %s", self.address, error)

    def _read_in_time(self) -> bytes:
        """Wait for bytes until the deadline. Raises HandshakeError then, OSError at the end of the connection."""
        try:
            self._limit_wait()
            data = self._receive()
        except socket.timeout:
            raise HandshakeError(408, "the request took too long") from None
        if not data:
            raise OSError("the connection ended")
        return data

    def _limit_wait(self) -> None:
        """Let this thread's next socket call wait until the deadline at most."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self.request.settimeout(left)

    def _receive(self) -> bytes:
        """Wait for bytes; none at the end of the connection. Raises OSError, of which ssl.SSLError is one."""
        while True:
            if self.request.gettimeout() == 0:  # without DONT_WAIT
                select.select([self.request], [], [])
            data = self.request.recv(READ_SIZE)
            if not self._tls or not data:
                return data
            established = self._tls.established
            plain = self._tls.decrypt(data)
            if not established:
                self.request.sendall(self._tls.encrypt(b""))
            if plain is None:
                return b""
            if plain:
                return plain

    # ---- as a client ----

    def _serve_websocket(self, request: Request, rest: bytes) -> None:
        accept = check_upgrade(request)
        check_host(request)
        check_origin(request, self.server.origins)
        fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]
        if self.server.compression:
            self.window, extension = negotiate_deflate(request.headers.get("sec-websocket-extensions", ""))
            if extension:
                fields.append(("Sec-WebSocket-Extensions", extension))
        if not self.server.seats.acquire(blocking=False):
            raise HandshakeError(503, f"there are {self.server.max_clients} clients already")
        try:
            self.path, self.headers = request.target, request.headers
            self.request.settimeout(None if DONT_WAIT else 0)
            self.server.join(self, serialize_response(101, fields))
            self._be_client(rest)
        finally:
            self.server.seats.release()

    def _be_client(self, rest: bytes) -> None:
        """The whole policy of ending: who says what to whom."""
        answer: bytes | None = None  # the Close to send; none where there was one, or nobody hears it
        code, reason = int(CloseCode.ABNORMAL_CLOSURE), ""
        try:
            self.server.on_open(self)
            payload = self._converse(rest)
            if payload is not None:
                code, reason = parse_close(payload)
                answer = serialize_close(code)  # 5.5.1: the same code
        except ProtocolError as error:
            code, reason = error.code, str(error)
            answer = serialize_close(code, reason)
        except MemoryError:
            code, reason = CloseCode.MESSAGE_TOO_BIG, "out of memory"
            answer = serialize_close(code, reason)
        except Exception:
            log.exception("%s: an error in a hook", self.address)
            code, reason = CloseCode.INTERNAL_ERROR, "internal error"
            answer = serialize_close(code, reason)
        self.server.leave(self)  # from here on the socket is this thread's alone (R1)
        log.info("%s left: %d %s", self.address, code, printable(self.dropped or reason))
        try:
            self.server.on_close(self, code, self.dropped or reason)
        except Exception:
            log.exception("%s: an error in on_close", self.address)
        if answer is not None and not self.dropped:
            self._part(b"" if self.close_by else answer)

    def _converse(self, data: bytes) -> bytes | None:
        """Read and hand on messages until the peer's Close: its payload, or None where the connection just ends."""
        reader = MessageReader(self.server.max_message, bool(self.window))
        try:
            for opcode, payload in reader.read(self._pieces(data, reader)):
                if opcode == CLOSE:
                    return bytes(payload)
                self._take(opcode, payload)
                if reader.frames > MANY_FRAMES:  # lest they all lie in the queue
                    reader.frames = 0
                    self.server.take_turn(wait=True)
                    self.server.hold_back()
                del payload  # a client that is silent now must not hold its memory
        finally:
            self._answer_pings()
        return None

    def _pieces(self, data: bytes, reader: MessageReader) -> Iterator[bytes]:
        """The bytes that this client sends, as they come: what has come is handled before more is waited for."""
        more = True
        while more:
            reader.frames = 0
            yield data
            data = b""
            self._answer_pings()
            self.server.take_turn(wait=reader.frames > MANY_FRAMES)
            self.server.hold_back()
            data = self._wait_for_bytes()
            more = bool(data)

    def _take(self, opcode: int, payload: Any) -> None:
        """Hand on one message, or note a Ping. Nothing counts after the server's Close (5.5.1) or the end."""
        if opcode == PING:
            self._pongs.append(serialize_frame(PONG, payload))
        elif opcode != PONG and not self.close_by and not self.dropped:
            self._answer_pings()
            if self.server.rate:
                self._keep_to_rate()
            self.server.on_message(self, payload)

    def _answer_pings(self) -> None:
        """Queue the Pongs for consecutive Pings as one (5.5.2): a flood of them costs little."""
        if self._pongs:
            pongs, self._pongs = self._pongs, []
            self.server.enqueue(functools.partial(self.server.pong, self, pongs), sum(map(sys.getsizeof, pongs)))

    def _wait_for_bytes(self) -> bytes:
        """The next bytes; none at the end of the connection, whatever ended it."""
        self.quiet_since = time.monotonic()
        try:
            return self._receive()
        except OSError as error:
            self.dropped = self.dropped or str(error)
            return b""
        finally:
            self.quiet_since = None

    def _keep_to_rate(self) -> None:
        """Wait until this client may send its next message. TCP makes it wait, too."""
        self.server.take_turn()  # what it has sent so far need not wait
        now = time.monotonic()
        self._due = max(self._due, now - 1) + 1 / self.server.rate  # a second's worth may come at once
        if self._due > now:
            time.sleep(self._due - now)

    def _send_in_time(self, data: bytes) -> None:
        self._limit_wait()
        self.request.sendall(data)

    def _part(self, last: bytes) -> None:
        """Send the rest and `last`, end the own side, then read until the peer ends its own (7.1.1).

        Closing with bytes unread would send a reset, which can destroy `last` on its way.
        """
        self._deadline = time.monotonic() + self.server.close_timeout
        try:
            if self._tls:
                last = self._tls.encrypt(last) + self._tls.end()
            self._send_in_time(b"".join(self.backlog)[self.sent :] + last)
            self.request.shutdown(socket.SHUT_WR)
            more = b"more"
            while more:
                self._limit_wait()
                more = self.request.recv(READ_SIZE)
        except (OSError, MemoryError):
            pass  # it is gone, or does not go in time

    # ---- in the turn (R1, R2) ----

    def write(self, data: bytes, sent: int = 0) -> None:
        """Send what the socket takes at once of what follows the first `sent` bytes; the rest goes to the backlog."""
        try:
            if self._tls:
                data = self._tls.encrypt(data)
            if not self.backlog and not sent:
                sent = self.request.send(data, DONT_WAIT)
        except BlockingIOError:
            pass
        except (OSError, MemoryError) as error:
            self.server.drop(self, str(error) or "out of memory")
            return
        if sent == len(data):
            return
        if not self.backlog:
            self.sent, self.backlog_size, self.quick_bytes = sent, -sent, 0
            self.moved = self.quick_at = time.monotonic()
            self.server.watch(self)
        elif self.backlog_size > self.server.max_backlog:
            self.server.drop(self, f"it was {self.backlog_size} bytes behind")
            return
        self.backlog.append(data)
        self.backlog_size += len(data)

    def flush(self) -> None:
        """Send what the socket takes of the backlog now; of a large one a part, since others wait for the turn."""
        now = time.monotonic()
        try:
            for _ in range(FLUSHES):
                if self.backlog:
                    self._count(self.request.send(self._next_piece(), DONT_WAIT), now)
        except BlockingIOError:
            pass
        except (OSError, MemoryError) as error:
            self.server.drop(self, str(error) or "out of memory")
            return
        if not self.backlog:
            self.server.unwatch(self)
            if self.pong:
                self.write(self.pong)
                self.pong = None

    def _next_piece(self) -> bytes | memoryview:
        """Something to send: many short entries of the backlog as one."""
        head = memoryview(self.backlog[0])[self.sent :]
        pieces, size = [head], len(head)
        for entry in itertools.islice(self.backlog, 1, None):
            if size > READ_SIZE:
                break
            pieces.append(memoryview(entry))
            size += len(entry)
        return b"".join(pieces) if len(pieces) > 1 else head

    def _count(self, sent: int, now: float) -> None:
        self.sent += sent
        self.backlog_size -= sent
        while self.backlog and self.sent >= len(self.backlog[0]):
            self.sent -= len(self.backlog.popleft())
        self.moved = now
        self.quick_bytes += sent
        if self.quick_bytes >= self.server.max_backlog // 4:
            self.quick_bytes, self.quick_at = 0, now

    def is_quick_but_behind(self, now: float) -> bool:
        """Whether the room should give it a moment: far behind, yet taking bytes fast.

        So a reader that takes a quarter of its limit in `PATIENCE` (16 MiB a second by
        default) sets the pace of whoever sends faster; a slower one holds up nobody.
        """
        return self.backlog_size > self.server.max_backlog // 2 and now - self.quick_at < PATIENCE

    # ---- HTTP ----

    def _answer(self, request: Request, body: bytes) -> bytes:
        """The response to a request that asks for no WebSocket. Raises HandshakeError."""
        check_host(request)
        allowed = {"/": ("GET", "HEAD", "POST"), "/status": ("GET", "HEAD")}.get(request.path)
        if not allowed:
            raise HandshakeError(404, "there are / and /status, and a WebSocket on any path")
        if request.method not in allowed:
            raise HandshakeError(405, "that method has no meaning here", ("Allow", ", ".join(allowed)))
        if request.method == "POST":
            check_origin(request, self.server.origins)
            self.server.broadcast(self._read_body(request, body))
            return http_response(202, "text/plain; charset=utf-8", b"sent\n")
        head = request.method == "HEAD"
        if request.path == "/status":
            return http_response(200, "application/json", self.server.status(), head=head)
        try:
            page = pathlib.Path(__file__).with_name("pywebsock.html").read_bytes()
        except OSError:
            raise HandshakeError(404, "pywebsock.html does not lie beside pywebsock.py") from None
        return http_response(200, "text/html; charset=utf-8", page, head=head)

    def _read_body(self, request: Request, body: bytes) -> Message:
        """The body of a POST."""
        length = body_length(request, self.server.max_message)
        if request.expects_continue:
            proceed = serialize_response(100, ())
            self._send_in_time(self._tls.encrypt(proceed) if self._tls else proceed)
        self._deadline += length / READ_SIZE  # a body of some size may take its time, but not for ever
        pieces = bytearray(body)
        while len(pieces) < length:
            pieces += self._read_in_time()
        return decode_body(request, bytes(pieces[:length]))


# ======================================================================================
# Server
# ======================================================================================


class BroadcastServer(socketserver.ThreadingTCPServer):
    """Sends each message that a client sends to all clients, in one order for all.

    Methods for the caller, besides those of socketserver:

    - __init__(server_address, RequestHandlerClass=WebSocketHandler, bind_and_activate=True, **settings)
    - broadcast(message)
    - serve_forever(), shutdown(), server_close() as in socketserver; server_close() also
      sends what is queued and closes every client with 1001

    Hooks that may be overridden; they run in the client's own thread and may take their time:

    - on_open(client), on_message(client, message), on_close(client, code, reason)

    Settings are the class attributes that follow; keyword arguments set them for one server.
    """

    # ---- settings: bytes, seconds, numbers ----

    max_message = 16 * 1024 * 1024  # bytes of a message, after inflating; above it: Close 1009
    max_backlog = 16 * 1024 * 1024  # bytes that may wait for a slow client; above it: dropped
    max_clients = 10_000  # above it: 503
    origins: Sequence[str] = ()  # see check_origin(); "*" for any
    compression = True  # permessage-deflate, where a client offers it
    history = 0  # messages that a new client gets first, with at most max_backlog bytes
    rate = 0.0  # messages a second that a client may send; 0: any number
    ping_interval = 20.0  # seconds of silence before a Ping; 0: never
    ping_timeout = 20.0  # seconds of silence after it: dropped
    handshake_timeout = 10.0  # seconds from connecting to the end of a request's head
    send_timeout = 30.0  # seconds for which a backlog may not move
    close_timeout = 5.0  # seconds for a closing handshake, and for server_close()
    tls_context: ssl.SSLContext | None = None  # wss:// and https:// on this port
    redis: str | None = None  # URL of a Redis, whose stream makes many servers one room

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
        for name, value in settings.items():
            if name.startswith("_") or callable(getattr(type(self), name, print)):
                raise TypeError(f"there is no setting {name!r}")
            known = hasattr(BroadcastServer, name)
            setattr(self, name, check_setting(name, value, getattr(BroadcastServer, name)) if known else value)
        self.started = time.time()
        self.seats = threading.Semaphore(self.max_clients)  # free ones
        self.link = RedisLink(self, self.redis) if self.redis else None  # to other servers
        self._prepare_engine()
        self._prepare_housekeeping()
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(server_address, RequestHandlerClass, bind_and_activate)
        except BaseException:
            self._end_housekeeping()
            raise

    def _prepare_engine(self) -> None:
        self._entrance = threading.Lock()  # R4: guards the next two
        self._queue: deque[tuple[Operation, int]] = deque()  # with the bytes that each counts for
        self._queued = 0  # bytes in the queue
        self._room = threading.Event()  # set while senders need not wait
        self._room.set()

        self._turn = threading.Lock()  # R1: guards all of these
        self.clients: set[WebSocketHandler] = set()  # the shared client set, which is the room
        self.messages = 0  # broadcasts carried out
        self.bytes = 0  # of their payloads
        self.windows: tuple[int, ...] = ()  # those in use; replaced, never changed: any thread may read it
        # For each of them its clients, with their sockets' send() where nothing is in the way: no backlog, no TLS.
        self._lines: dict[int, dict[WebSocketHandler, Callable[[bytes, int], int]]] = {}
        self._history: deque[Outgoing] = deque()  # the last messages
        self._history_size = 0  # bytes of their payloads
        self._parting: set[WebSocketHandler] = set()  # out of the room: the server's Close sent, theirs awaited
        self._slow: set[WebSocketHandler] = set()  # those with a backlog
        self._held = False  # the queue waits for a quick reader that is behind
        self._promised = False  # the housekeeper is to have the turn next
        self._goodbye = False  # whoever joins now gets 1001

    def _prepare_housekeeping(self) -> None:
        self._fewer = threading.Condition()  # guards the next one; notified when a connection has been closed
        self._connections: dict[socket.socket, bool] = {}  # accepted and not closed: whether it has joined
        self._short = False  # of file descriptors, say: the log knows it already
        self._selector = selectors.DefaultSelector()  # of the housekeeper: the slow clients, and its alarm
        self._alarm, self._ring = socket.socketpair()
        self._ended = False  # the housekeeper is to stop
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)

    # ---- hooks ----

    def on_open(self, client: WebSocketHandler) -> None:
        """A client has joined. In its own thread, like the other hooks; an exception closes it with 1011."""

    def on_message(self, client: WebSocketHandler, message: Message) -> None:
        """A client has sent text (str) or binary (bytes). By default, all clients get it."""
        self.accept(message)  # its thread takes the turn when it has handled all that it read

    def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
        """A client has left: 1006 without a Close frame, 1005 without a code in it (RFC 6455 7.1.5)."""

    # ---- for any thread ----

    def broadcast(self, message: Message) -> None:
        """Send text (str) or binary (bytes) to all clients. Any thread.

        Waits while too much is queued, never for one slow client. Raises TypeError for
        anything but str and bytes.
        """
        self.accept(message)
        self.take_turn()
        self.hold_back()

    def status(self) -> bytes:
        """What GET /status answers. Any thread."""
        figures = {
            "clients": len(self.clients),
            "messages": self.messages,
            "bytes": self.bytes,
            "uptime": round(time.time() - self.started, 3),
        }
        return json.dumps(figures).encode() + b"\n"

    # ---- the engine: operations from any thread ----

    def accept(self, message: Message) -> None:
        """Accept a message into the one order, in which all clients get it."""
        if self.link:
            self.link.put(Outgoing(message))
        else:
            self.enqueue(Outgoing(message))

    def hold_back(self) -> None:
        """Hold back a sender while too much is accepted. Its socket is not read meanwhile: TCP makes it wait too."""
        self.wait_for_room()
        if self.link:
            self.link.wait_for_room()

    def perform(self, operation: Operation, size: int = 0) -> None:
        """Queue an operation and see that it is carried out, here or by the holder of the turn."""
        self.enqueue(operation, size)
        self.take_turn()
        self.wait_for_room()

    def enqueue(self, operation: Operation, size: int = 0) -> None:
        """Queue an operation. Whoever does that takes the turn soon after."""
        if isinstance(operation, Outgoing):
            size = len(operation.plain) + OVERHEAD
            for window in self.windows if operation.size >= DEFLATE_THRESHOLD else ():
                operation.frame(window)  # compress here, not in the turn
        with self._entrance:
            self._queue.append((operation, size))
            self._queued += size
            if self._queued > QUEUE_SIZE:
                self._room.clear()

    def take_turn(self, wait: bool = False) -> None:
        """Carry out what is queued, unless another thread is at it or is about to (R3).

        A thread that has kept the interpreter busy waits until the holder has finished:
        each send of the holder lets others run, and parsing tiny frames would slow all of them.
        """
        if wait:
            with self._turn:
                self._carry_out()
        while self._queue and not self._promised and not self._held:
            if not self._turn.acquire(blocking=False):
                return
            try:
                self._carry_out()
            finally:
                self._turn.release()

    def wait_for_room(self) -> None:
        """Wait while too much is queued."""
        if self._queued > QUEUE_SIZE:
            self._room.wait()

    def join(self, client: WebSocketHandler, response: bytes) -> None:
        """Let a client in, with the response to its handshake. Its own thread."""
        with self._fewer:
            self._connections[client.request] = True
        for message in self._history.copy():
            message.frame(client.window)  # compress here, not in the turn
        self.perform(functools.partial(self._join, client, response))

    def leave(self, client: WebSocketHandler) -> None:
        """Take a client out, and wait until nobody else touches its socket. Its own thread."""
        left = threading.Event()
        self.perform(functools.partial(self._leave, client, left))
        left.wait()

    # ---- the engine: in the turn (R1, R2) ----

    def _carry_out(self) -> None:
        """Carry out what is queued; for so long, then hand on, lest this thread's own client starve."""
        until = time.monotonic() + TURN_TIME
        while self._queue and not self._held:
            try:
                self._carry_out_next()
            except MemoryError:  # the rest of the queue is not to blame
                log.warning("something was lost: out of memory")
            except Exception:
                log.exception("an operation failed")
            if time.monotonic() > until and not self._ended:
                self._promised = True
                self._wake_housekeeper()
                return

    def _carry_out_next(self) -> None:
        """Carry out the next operation; where that is a broadcast, with those behind it as one run."""
        operation, total = self._queue.popleft()
        try:
            if not isinstance(operation, Outgoing):
                operation()
                return
            run = [operation]
            while self._queue and total < RUN_SIZE:
                operation, size = self._queue[0]
                if not isinstance(operation, Outgoing):
                    break
                self._queue.popleft()
                run.append(operation)
                total += size
            self._fan_out(run)
        finally:
            with self._entrance:
                self._queued -= total
                if self._queued <= QUEUE_SIZE // 2 and not self._room.is_set():
                    self._room.set()

    def _fan_out(self, run: list[Outgoing]) -> None:
        """Send a run to every client: one buffer for each window, one send for each client."""
        for window in self.windows:
            data = b"".join([message.frame(window) for message in run])
            size, rest = len(data), []
            for client, send in self._lines[window].items():
                try:
                    sent = send(data, DONT_WAIT)
                except OSError:  # it is full, or broken: write() will see
                    sent = 0
                if sent < size:
                    rest.append((client, sent))
            for client, sent in rest:
                client.write(data, sent)
        self.messages += len(run)
        self.bytes += sum([message.size for message in run])
        if self.history:
            self._remember(run)
        if self._slow and self._someone_quick_is_behind():
            self._held = True
            self._wake_housekeeper()  # which looks again soon

    def _remember(self, run: list[Outgoing]) -> None:
        """Keep the last messages for those who join, but not more bytes than may wait for a client."""
        self._history.extend(run)
        self._history_size += sum([message.size for message in run])
        while len(self._history) > self.history or self._history_size > self.max_backlog:
            self._history_size -= self._history.popleft().size

    def send_to(self, client: WebSocketHandler, frame: bytes) -> None:
        """Operation: a message to one client."""
        if client in self.clients:
            client.write(frame)

    def pong(self, client: WebSocketHandler, frames: list[bytes]) -> None:
        """Operation: answer Pings; only the newest where they would have to wait (5.5.3)."""
        if client in self.clients:
            if client.backlog:
                client.pong = frames[-1]
            else:
                client.write(b"".join(frames))

    def _join(self, client: WebSocketHandler, response: bytes) -> None:
        """Operation: the response and the joining are one, so a client misses nothing after its 101."""
        self.clients.add(client)
        self._clear_line(client)
        client.write(response + b"".join([message.frame(client.window) for message in self._history]))
        log.debug("%s joined: %d clients", client.address, len(self.clients))
        if self._goodbye:
            self.close_client(client, serialize_close(CloseCode.GOING_AWAY))

    def close_client(self, client: WebSocketHandler, frame: bytes) -> None:
        """Operation: a client's last frame is a Close; its own thread waits for the answer (5.5.1)."""
        if client in self.clients:
            self._remove(client)
            self._parting.add(client)
            client.close_by = time.monotonic() + self.close_timeout
            client.pong = None
            client.write(frame)

    def _leave(self, client: WebSocketHandler, left: threading.Event) -> None:
        """Operation: give a client's socket and backlog back to its own thread."""
        try:
            self._remove(client)
            self.unwatch(client)
        finally:
            left.set()

    def drop(self, client: WebSocketHandler, why: str) -> None:
        """Give a client up: reset its connection, which makes its own thread leave."""
        client.dropped = why
        self._remove(client)
        self.unwatch(client)
        client.backlog.clear()
        reset(client.request)

    def _remove(self, client: WebSocketHandler) -> None:
        self._parting.discard(client)
        if client in self.clients:
            self.clients.remove(client)
            del self._lines[client.window][client]
            if not self._lines[client.window]:
                del self._lines[client.window]
                self.windows = tuple(self._lines)

    def _clear_line(self, client: WebSocketHandler) -> None:
        """Nothing is in the way to a client of the room, other than TLS."""
        self._lines.setdefault(client.window, {})[client] = send_nothing if self.tls_context else client.request.send
        self.windows = tuple(self._lines)

    def watch(self, client: WebSocketHandler) -> None:
        """A client has a backlog now: the housekeeper flushes it when the socket takes more."""
        self._slow.add(client)
        if client in self.clients:
            self._lines[client.window][client] = send_nothing
        self._selector.register(client.request, selectors.EVENT_WRITE, client)
        if not DONT_WAIT:
            self._wake_housekeeper()  # epoll and kqueue take a change while they wait, Windows does not

    def unwatch(self, client: WebSocketHandler) -> None:
        """A client has no backlog any more, or it is not the housekeeper's business."""
        if client in self._slow:
            self._slow.remove(client)
            if client in self.clients:
                self._clear_line(client)
            self._selector.unregister(client.request)

    def _someone_quick_is_behind(self) -> bool:
        now = time.monotonic()
        return any(client.is_quick_but_behind(now) for client in self._slow)

    # ---- the housekeeper ----

    def server_activate(self) -> None:
        """Called by the constructor: listen."""
        if self.link:
            self.link.start()
        super().server_activate()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._alarm.setblocking(False)
        self._ring.setblocking(False)
        self._housekeeper.start()

    def _keep_house(self) -> None:
        """The housekeeper's thread: flush slow clients, ping silent ones, drop dead ones, take over the queue."""
        limits = (self.ping_interval, self.ping_timeout, self.send_timeout, self.close_timeout)
        interval = min(1.0, *[limit / 4 for limit in limits if limit > 0])
        next_look = 0.0
        while not self._ended:
            ready = self._selector.select(PATIENCE / 5 if self._held else interval)
            if any(key.data is None for key, _ in ready):
                self._alarm.recv(4096)
            self._promised = True  # nobody else takes the turn meanwhile (R3)
            with self._turn:
                self._promised = False
                try:
                    for key, _ in ready:
                        if key.data in self._slow:
                            key.data.flush()
                    if time.monotonic() >= next_look:
                        next_look = time.monotonic() + interval
                        self._look_after_clients()
                except Exception:
                    log.exception("an error in housekeeping")
                self._held = self._someone_quick_is_behind()
                self._carry_out()
            self.take_turn()  # look once more (R3)

    def _look_after_clients(self) -> None:
        """Once in a while, in the turn: every timeout of a client."""
        now = time.monotonic()
        for client in [client for client in self._parting if now > client.close_by]:
            self.drop(client, "it did not answer the Close")
        for client in [client for client in self._slow if now - client.moved > self.send_timeout]:
            self.drop(client, f"it took nothing for {self.send_timeout:g} s")
        if self.ping_interval:
            for client in tuple(self.clients):
                self._keep_alive(client, now)

    def _keep_alive(self, client: WebSocketHandler, now: float) -> None:
        """Ping a client that has been silent, drop it where it stays so (5.5.2). A moving backlog is a sign of life."""
        since = client.quiet_since
        silence = now - max(since, client.moved) if since is not None else 0
        if silence > self.ping_interval + self.ping_timeout:
            self.drop(client, f"it was silent for {silence:.0f} s")
        elif silence <= self.ping_interval:
            client.pinged = False
        elif not client.pinged:
            client.pinged = True
            client.write(serialize_frame(PING, b""))

    def _wake_housekeeper(self) -> None:
        try:
            self._ring.send(b"!")
        except OSError:
            pass  # it has been told often enough, or has ended

    def _end_housekeeping(self) -> None:
        self._ended = True
        self._room.set()
        if self._housekeeper.is_alive():
            self._wake_housekeeper()
            self._housekeeper.join()
        with self._turn:  # for clients whose threads are still stuck in a hook
            self._slow.clear()
            self._held = self._promised = False
        for thing in (self._selector, self._alarm, self._ring):
            thing.close()

    # ---- connections, as socketserver has it ----

    def server_bind(self) -> None:
        """Called by the constructor: bind; with an IPv6 host, for IPv4 too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Out of file descriptors or memory, the next one waits until a connection ends."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._report_shortage(str(error.strerror))
                with self._fewer:
                    self._fewer.wait(0.5)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. (With `threading.Thread` a connection takes half as long again.)"""
        with self._fewer:
            self._connections[request] = False
        try:
            start_new_thread(self.process_request_thread, (request, client_address))
            self._short = False
        except RuntimeError as error:
            self._report_shortage(str(error))
            self.shutdown_request(request)

    def _report_shortage(self, of_what: str) -> None:
        """Log it once, until a connection has been accepted again."""
        if not self._short:
            log.warning("cannot accept for now: %s", of_what)
        self._short = True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; its thread has left the room."""
        with self._fewer:
            self._connections.pop(request, None)
            super().shutdown_request(request)
            self._fewer.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection's thread has failed: that is an error of this program."""
        if isinstance(sys.exc_info()[1], MemoryError):
            log.warning("%s lost: out of memory", client_address)
        else:
            log.exception("%s: unexpected error", client_address)

    def server_close(self) -> None:
        """Send what is queued, close every client with 1001, wait for at most the close timeout."""
        super().server_close()  # nobody else is accepted
        if self.link:
            self.link.stop(self.close_timeout / 2)
        self.perform(self._say_goodbye)
        with self._fewer:
            for request, joined in self._connections.items():
                if not joined:  # whoever has not said what it wants will not be heard
                    shut(request, socket.SHUT_RD)
            if not self._fewer.wait_for(lambda: not self._connections, self.close_timeout):
                for request in self._connections:
                    reset(request)
                self._fewer.wait_for(lambda: not self._connections, 1.0)
        self._end_housekeeping()

    def _say_goodbye(self) -> None:
        """Operation: 1001 for everybody, and for those who are just joining."""
        self._goodbye = True
        for client in tuple(self.clients):
            self.close_client(client, serialize_close(CloseCode.GOING_AWAY))


Operation = Union[Outgoing, Callable[[], None]]  # a broadcast, or what the holder of the turn calls


def send_nothing(data: bytes, flags: int) -> int:
    """In the place of a socket's send() where data may not go straight to the socket."""
    return 0


def shut(request: socket.socket, how: int) -> None:
    """Shut a socket down in a direction; one that waits to read from it wakes up. Any thread."""
    try:
        socket.socket.shutdown(request, how)  # past an SSLSocket's own, whose state is another thread's
    except OSError:
        pass  # its peer was faster


def reset(request: socket.socket) -> None:
    """End a connection without sending what is left: its thread wakes up and closes it."""
    try:
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii" if os.name != "nt" else "hh", 1, 0))
    except OSError:
        pass
    shut(request, socket.SHUT_RDWR)


# ======================================================================================
# Many machines (Redis streams; its protocol, RESP2)
#
# With a link to a stream in Redis any number of servers are one room. The seam is where a
# message is accepted into the order, BroadcastServer.accept(): without a link that is the
# queue; with one, the message goes to the stream and comes back from there, like those of
# all other servers, in the one order of the stream. Whoever reads about one server can
# stop here.
#
# An entry of the stream has one field, whose name is server:number:kind. Where a connection
# fails, nobody knows which entries arrived, so those without an answer are written once
# more, and every server passes over the numbers that it has seen. So nothing is lost and
# nothing comes twice, as long as Redis itself loses nothing. A number that is left out was
# trimmed or lost. A server that the others leave behind adds entries of the kinds "wait",
# lest they write what it cannot read before it is trimmed, and in the end "go".
# ======================================================================================

STREAM_LENGTH = 10_000  # entries that Redis keeps, about: how far a server may fall behind
IN_FLIGHT = 1000  # entries of this server that it may have yet to read; with more to write, senders wait
WRITE_MOST, READ_MOST = 100, 300  # entries at once
ANSWER_TIME = 10.0  # seconds for an answer of Redis
LISTEN_TIME = 2.0  # seconds that one reading waits for news
WAIT_TIME = 1.0  # seconds that a "wait" holds without a "go"
MAX_BULK, MAX_DEPTH = 512 * 1024 * 1024, 5  # bytes of a string, or replies in an array; arrays in arrays
REPLY_LINE = re.compile(rb"[+-][^\r\n]*\r\n|[:$*][+-]?[0-9]{1,19}\r\n")
ENTRY_NAME = re.compile(b"([0-9a-f]{16}):([0-9]{1,18}):(text|binary|wait|go)")
NOT_REDIS = "what answers is not Redis"


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
    if not REPLY_LINE.fullmatch(line):
        cut = kind in b"+-:$*" and len(line) < MAX_LINE and not line.endswith(b"\n")
        raise ConnectionError("Redis closed the connection") if cut else RedisError(NOT_REDIS)
    if kind in b"+-":
        return text if kind == b"+" else RedisError(text.decode(errors="replace"))
    number = int(text)
    if kind == b":":
        return number
    if number > MAX_BULK or depth > MAX_DEPTH:
        raise RedisError(NOT_REDIS)
    if number < 0:
        return None
    if kind == b"*":
        return [parse_reply(file, depth + 1) for _ in range(number)]
    bulk = file.read(number + 2)
    if not bulk.endswith(b"\r\n") or len(bulk) < number + 2:
        raise ConnectionError("Redis closed the connection") if len(bulk) < number + 2 else RedisError(NOT_REDIS)
    return bulk[:-2]


def parse_entries(reply: Any) -> list[tuple[bytes, bytes, bytes]]:
    """The reply to XREAD as (id, name, value) of each entry's first field. Raises RedisError."""
    try:
        return [(entry, fields[0], fields[1]) for _, entries in reply or () for entry, fields in entries]
    except (TypeError, ValueError, IndexError):
        raise RedisError(NOT_REDIS) from None


class RedisConnection:
    """A connection that has said who it is; for one thread. Raises OSError everywhere, of which RedisError is one."""

    def __init__(self, address: RedisAddress) -> None:
        self.placed = False  # for its reader: whether it knows where in the stream to go on
        self.socket = socket.create_connection((address.host, address.port), ANSWER_TIME)
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls:
                self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=address.host)
            credentials = (address.user, address.password) if address.user else (address.password,)
            if any(credentials):
                self.call(serialize_command("AUTH", *credentials))
            if address.database:
                self.call(serialize_command("SELECT", address.database))
        except BaseException:
            self.socket.close()
            raise

    def call(self, *commands: bytes) -> list[Any]:
        """Send commands in one go; their replies. Raises the first RedisError among them or in an EXEC's."""
        data = memoryview(b"".join(commands))
        try:
            while data:  # the time is for each piece: a long message may take its time
                data = data[self.socket.send(data) :]
            with self.socket.makefile("rb") as file:  # no reply comes before its command
                replies = [parse_reply(file) for _ in commands]
        except socket.timeout:
            raise RedisError(f"no answer within {ANSWER_TIME:g} s") from None
        for reply in replies:
            for part in reply if isinstance(reply, list) else [reply]:
                if isinstance(part, RedisError):
                    raise part
        return replies


class RedisLink:
    """A server's part in a room of many servers: two threads, one writes to the stream, one reads it."""

    def __init__(self, server: BroadcastServer, url: str) -> None:
        self._server = server
        self._address = parse_redis_url(url)
        self._name = os.urandom(8).hex().encode()  # of this server, in the names of its entries
        self._threads = [threading.Thread(target=self._persist, args=(work,)) for work in (self._write, self._read)]

        self._news = threading.Condition()  # guards these, and is notified when they change
        self._outbox: deque[bytes] = deque()  # XADD commands without an answer yet
        self._waiting = 0  # bytes in it
        self._number = 0  # of the last message put in
        self._failing: set[str] = set()  # the threads whose last attempt over a new connection failed
        self._connections: dict[str, RedisConnection] = {}  # the last one of each thread
        self._stopped = False

        # Written by the reader alone.
        self._last = b""  # id of the last entry read
        self._seen: dict[bytes, int] = {}  # the last number from each server
        self._count = 1  # entries to ask for: about RUN_SIZE bytes
        self._behind = False  # there were as many: more are waiting
        self._others_behind: dict[bytes, float] = {}  # servers that said "wait", and until when it holds

    # ---- for the server; put() and wait_for_room() from any thread ----

    def start(self) -> None:
        """Begin. Raises RedisError where waiting would not help; a Redis that is not there yet is waited for."""
        try:
            connection = RedisConnection(self._address)
            with connection.socket:
                self._find_place(connection)
        except OSError as error:
            if is_final(error):
                where = f"{self._address.host}:{self._address.port}"
                raise RedisError(f"Redis at {where}: {printable(str(error))}") from None
            self._report("_read", error)
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def put(self, message: Outgoing) -> None:
        """Send a message on its way."""
        kind = b"text" if message.opcode == TEXT else b"binary"
        with self._news:
            self._number += 1
            name = b"%b:%d:%b" % (self._name, self._number, kind)
            add = ("XADD", self._address.stream, "MAXLEN", "~", STREAM_LENGTH, "*", name, message.payload())
            self._outbox.append(serialize_command(*add))
            self._waiting += len(self._outbox[-1])
            self._news.notify_all()

    def wait_for_room(self) -> None:
        """Hold a sender back while too much is on its way: its thread would take time from the reader's, too."""
        if self._fullness() > 1:
            with self._news:
                self._news.wait_for(lambda: self._fullness() <= 0.5 or self._stopped)

    def _fullness(self) -> float:
        """Above 1 senders wait."""
        return max(self._waiting / QUEUE_SIZE, len(self._outbox) / IN_FLIGHT)

    def stop(self, seconds: float) -> None:
        """Wait until what was put in has come back, for so long at most, and end."""
        with self._news:
            number = self._number
            if not self._news.wait_for(lambda: self._returned() >= number, seconds):
                log.warning("Redis did not bring back %d messages", number - self._returned())
            self._stopped = True
            self._news.notify_all()
        for connection in tuple(self._connections.values()):
            shut(connection.socket, socket.SHUT_RDWR)  # its thread gets an OSError
        for thread in self._threads:
            if thread.is_alive():
                thread.join(LISTEN_TIME / 2)  # it may be stuck connecting

    def _returned(self) -> int:
        """The number of the last message of this server that has come back."""
        return self._seen.get(self._name, 0)

    # ---- in the link's threads ----

    def _persist(self, work: Callable[[RedisConnection], None]) -> None:
        """Do a piece of work again and again; where it fails, over a new connection, the second time after a while."""
        who, delay = work.__name__, 0.0
        while not self._stopped:
            try:
                connection = self._connections[who] = RedisConnection(self._address)
                with connection.socket:
                    while not self._stopped:
                        work(connection)
                        self._report(who)
                        delay = 0.0
            except (OSError, MemoryError) as error:
                if delay and not self._stopped:
                    self._report(who, error)
            with self._news:
                self._news.wait_for(lambda: self._stopped, delay)
            delay = min(2 * delay, 2.0) or 0.05

    def _report(self, who: str, error: Exception | None = None) -> None:
        """Log once that Redis is away, and once that it is back."""
        with self._news:
            before = bool(self._failing)
            (self._failing.add if error else self._failing.discard)(who)
            if error and not before:
                log.warning("Redis is away, senders wait: %s", printable(str(error) or "out of memory"))
            if before and not self._failing:
                log.warning("Redis is back")

    def _write(self, connection: RedisConnection) -> None:
        """Write what is in the outbox as one transaction: all of it or nothing, in its order."""
        with self._news:
            self._news.wait_for(self._may_write, LISTEN_TIME)  # what does not come back in that time may be lost
            sizes = itertools.accumulate(map(len, self._outbox))
            fitting = [size for size in itertools.islice(sizes, WRITE_MOST) if size <= RUN_SIZE]
            batch = list(itertools.islice(self._outbox, max(len(fitting), 1) if self._last else 0))
        if batch:
            connection.call(serialize_command("MULTI"), *batch, serialize_command("EXEC"))
        with self._news:
            for command in batch:
                self._outbox.popleft()
                self._waiting -= len(command)
            self._news.notify_all()

    def _may_write(self) -> bool:
        """Whether there is something to write, not too far ahead of what this server reads: that would be trimmed."""
        ahead = self._number - len(self._outbox) - self._returned()
        go = not self._behind and all(time.monotonic() > until for until in self._others_behind.copy().values())
        return self._stopped or bool(self._outbox and self._last and ahead < IN_FLIGHT and go)

    def _read(self, connection: RedisConnection) -> None:
        """Deliver what has been added to the stream."""
        if not connection.placed:
            self._find_place(connection)
        self._server.wait_for_room()
        options = ("COUNT", self._count, "BLOCK", 1 if self._behind else int(LISTEN_TIME * 1000))
        command = serialize_command("XREAD", *options, "STREAMS", self._address.stream, self._last)
        entries = parse_entries(connection.call(command)[0])
        before, self._behind = self._behind, len(entries) == self._count > 1
        if before or self._behind:
            name = b"%b:0:%b" % (self._name, b"wait" if self._behind else b"go")
            connection.call(serialize_command("XADD", self._address.stream, "*", name, ""))
        self._deliver(entries)
        if entries:
            size = sum([len(value) + 1 for _, _, value in entries])
            self._count = max(1, min(READ_MOST, RUN_SIZE * len(entries) // size))

    def _find_place(self, connection: RedisConnection) -> None:
        """At first, go to the end of the stream by way of the history; later, see whether the end is still there."""
        count = 1 if self._last else min(max(self._server.history, 1), STREAM_LENGTH)
        command = serialize_command("XREVRANGE", self._address.stream, "+", "-", "COUNT", count)
        newest = parse_entries([("", connection.call(command)[0])])
        end = newest[0][0] if newest else b"0-0"
        if not self._last:
            self._deliver(newest[::-1] if self._server.history else ())
            self._last = end
        elif [int(part) for part in end.split(b"-")] < [int(part) for part in self._last.split(b"-")]:
            log.warning("Redis has lost the end of the stream")
            self._last = end
        connection.placed = True

    def _deliver(self, entries: Sequence[tuple[bytes, bytes, bytes]]) -> None:
        """Put entries in the server's queue, all but those that are there a second time, and carry them out."""
        missed = 0
        for entry, name, payload in entries:
            match = ENTRY_NAME.fullmatch(name)
            server, number, kind = match.groups() if match else (b"", b"0", b"text")  # anybody may add text
            before = self._seen.get(server, 0)
            if kind in (b"wait", b"go"):
                if server != self._name:
                    self._others_behind[server] = time.monotonic() + WAIT_TIME if kind == b"wait" else 0.0
            elif not match or int(number) > before:
                self._server.enqueue(Outgoing(payload if kind == b"binary" else payload.decode(errors="replace")))
                if match:
                    self._seen[server] = int(number)
                    missed += int(number) - before - 1 if before else 0
            self._last = entry
        if missed:
            log.warning("missed %d messages that Redis has no longer", missed)
        self._server.take_turn()
        with self._news:
            self._news.notify_all()  # of what has come back


def is_final(error: OSError) -> bool:
    """Whether an error at the start will not go away by itself."""
    passing = ("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")
    return isinstance(error, (RedisError, ssl.SSLError, socket.gaierror)) and not str(error).startswith(passing)


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
            raise KeyboardInterrupt

    def server_bind(self) -> None:
        """Called by the constructor. Raises OSError that says where."""
        try:
            super().server_bind()
        except OSError as error:
            raise OSError("{} port {}: {}".format(*self.server_address[:2], error.strerror)) from None


class LogFormatter(logging.Formatter):
    """Time and message, and `warning: ` where somebody should look."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line."""
        level = "warning: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record)} {level}{record.message}".rstrip()


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
    kind = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=25)
    parser = argparse.ArgumentParser(prog="pywebsock", description=about, epilog=EXAMPLES, formatter_class=kind)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on: 0.0.0.0 for all, :: for IPv6 too (%(default)s)")
    add("--port", type=int, default=4545, help="port to listen on, 0 for any free one (%(default)s)")
    origin = "let pages of this origin connect, * for any; repeatable"
    add("--origin", dest="origins", metavar="ORIGIN", action="append", default=[], help=origin)
    add("--cert", metavar="FILE", help="certificate chain in PEM: serve wss:// and https://")
    add("--key", metavar="FILE", help="its private key, where it is not in the same file")
    add("--redis", metavar="URL", help="be one room with all servers on this Redis")
    add("--no-compression", dest="compression", action="store_false", help="do not use permessage-deflate")
    add("--stdin", action="store_true", help="broadcast each line of standard input")
    add("--read-only", action="store_true", help="clients may only listen")
    add = parser.add_argument_group("limits (sizes in bytes, or such as 64K, 16M)").add_argument
    add("--max-message", type=parse_size, metavar="SIZE", default="16M", help="longest message (%(default)s)")
    add(
        "--max-backlog", type=parse_size, metavar="SIZE", default="16M", help="what may wait for a client (%(default)s)"
    )
    add("--max-clients", type=parse_size, metavar="N", default=10_000, help="clients at once (%(default)s)")
    ping = "seconds of silence before a ping, and after it (%(default)g)"
    add("--ping", dest="ping_interval", type=float, metavar="S", default=20.0, help=ping)
    add("--history", type=parse_size, metavar="N", default=0, help="messages that a new client gets first (0)")
    add("--rate", type=float, metavar="N", default=0.0, help="messages a second that a client may send (any)")
    add = parser.add_argument_group("logging").add_mutually_exclusive_group().add_argument
    add("--quiet", action="store_true", help="log only what needs attention")
    add("--verbose", action="store_true", help="log every client that joins, too")
    add("--trace", action="store_true", help="show every handshake and every frame, taken apart")
    return parser


def create_server(options: argparse.Namespace) -> Program:
    """A listening server. Raises OSError, of which ssl.SSLError is one; ValueError and OverflowError for settings."""
    if options.stdin and not sys.stdin:  # its descriptor may soon be another's
        raise OSError("standard input is closed")
    context = None
    if options.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(options.cert, options.key)
        except OSError as error:  # which does not say where
            files = " and ".join(filter(None, (options.cert, options.key)))
            what = "no certificate and key in PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise OSError(f"{files}: {what}") from None
    settings = {name: value for name, value in vars(options).items() if hasattr(BroadcastServer, name)}
    settings.update(tls_context=context, ping_timeout=options.ping_interval)
    return Program((options.host, options.port), **settings)


def locations(server: BroadcastServer, host: str) -> str:
    """The first lines of output: where to point a browser, and that of another device."""
    secure, bound, port = "s" if server.tls_context else "", str(server.server_address[0]), server.server_address[1]
    name, other = "localhost" if bound in ("127.0.0.1", "::1", "0.0.0.0", "::") else host, network_address(bound)
    lines: list[str] = []
    for what, each in (("listening on", name), ("on the network:", other)):
        where = f"[{each}]:{port}" if each and ":" in each else f"{each}:{port}"
        if each and where not in "".join(lines):
            lines.append(f"pywebsock: {what} http{secure}://{where}/ (ws{secure}://{where}/)")
    return "\n".join(lines)


def broadcast_lines(server: BroadcastServer) -> None:
    """Broadcast each line of standard input, in a thread of its own; one over the message limit in pieces."""
    limit = max(server.max_message, 4)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, data = "", b"more"
    while data:
        try:
            data = os.read(0, READ_SIZE)  # sys.stdin has a lock that a thread must not hold when the program ends
        except OSError as error:
            log.warning("standard input: %s", error.strerror)
            data = b""
        *lines, rest = (rest + decoder.decode(data, not data)).split("\n")
        if rest and (not data or len(rest) >= limit):
            lines, rest = [*lines, rest], ""
        for line in lines:
            most = limit if line.isascii() else limit // 4  # characters
            for start in range(0, len(line) or 1, most):
                server.broadcast(line[start : start + most].rstrip("\r"))
    log.info("standard input has ended")


def raise_file_limit() -> None:
    """Let the process have as many open files as it may: one for each client."""
    try:
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, OSError, ValueError):
        pass


def start_logging(options: argparse.Namespace) -> None:
    """Log to standard error: one line for each client that left or was refused, and what went wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO)
    trace_log.addHandler(logging.StreamHandler())
    trace_log.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until a signal; the exit status."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.key and not options.cert:
        parser.error("--key needs --cert")
    start_logging(options)
    raise_file_limit()
    threading.stack_size(256 * 1024)  # for all threads: those of 10,000 clients take 2.5 GB of address space
    try:
        server = create_server(options)
        server.catch_signals()
        print(locations(server, options.host), flush=True)
    except OSError as error:
        print(f"pywebsock: {error}", file=sys.stderr)
        return 1
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    with server:
        if options.stdin:
            threading.Thread(target=broadcast_lines, args=(server,), name="stdin", daemon=True).start()
        try:
            server.serve_forever(0.1)
        except KeyboardInterrupt:
            log.info("stopping")
    return 0


if __name__ == "__main__":
    sys.exit(main())
