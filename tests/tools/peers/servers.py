"""Broadcast servers with packages of PyPI: `servers.py NAME PORT [deflate] [CERTIFICATE.pem]`.

Each sends in the fastest way that its package documents, without Pings, and has a long queue of new connections.
"""

from __future__ import annotations

import asyncio
import importlib
import ssl
import sys
import typing

TLS = typing.Optional[ssl.SSLContext]


def websockets(port: int, deflate: bool, tls: TLS) -> None:
    """Run websockets, with asyncio."""
    server: typing.Any = importlib.import_module("websockets.asyncio.server")
    clients: set[typing.Any] = set()

    async def talk(client: typing.Any) -> None:
        clients.add(client)
        try:
            async for message in client:
                server.broadcast(clients, message)
        finally:
            clients.discard(client)

    async def main() -> None:
        how = {"compression": "deflate" if deflate else None, "ssl": tls, "max_size": None}
        async with server.serve(talk, "127.0.0.1", port, ping_interval=None, backlog=4096, **how):
            await asyncio.Event().wait()

    asyncio.run(main())


def picows(port: int, deflate: bool, tls: TLS) -> None:
    """Run picows, with uvloop if it is installed."""
    package: typing.Any = importlib.import_module("picows")
    clients: set[typing.Any] = set()

    class Client(package.WSListener):  # type: ignore[misc]
        def on_ws_connected(self, transport: typing.Any) -> None:
            clients.add(transport)

        def on_ws_disconnected(self, transport: typing.Any) -> None:
            clients.discard(transport)

        def on_ws_frame(self, transport: typing.Any, frame: typing.Any) -> None:
            if frame.msg_type == package.WSMsgType.CLOSE:
                transport.disconnect()
            elif frame.msg_type == package.WSMsgType.TEXT:
                payload = frame.get_payload_as_bytes()
                for client in clients:
                    client.send(package.WSMsgType.TEXT, payload)

    async def main() -> None:
        server = await package.ws_create_server(lambda request: Client(), "127.0.0.1", port, backlog=4096, ssl=tls)
        await server.serve_forever()

    try:
        loop = importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    loop.run_until_complete(main())


def aiohttp(port: int, deflate: bool, tls: TLS) -> None:
    """Run aiohttp, with asyncio."""
    web: typing.Any = importlib.import_module("aiohttp.web")
    clients: set[typing.Any] = set()

    async def talk(request: typing.Any) -> typing.Any:
        client = web.WebSocketResponse(compress=deflate, max_msg_size=0)
        await client.prepare(request)
        clients.add(client)
        try:
            async for message in client:
                for other in list(clients):
                    await other.send_str(message.data)
        finally:
            clients.discard(client)
        return client

    application = web.Application()
    application.router.add_get("/", talk)
    how = {"ssl_context": tls, "access_log": None, "print": None}
    web.run_app(application, host="127.0.0.1", port=port, backlog=4096, **how)


def websocket_server(port: int, deflate: bool, tls: TLS) -> None:
    """Run websocket-server: a thread for each client; without Nagle's algorithm, which delays small messages."""
    package: typing.Any = importlib.import_module("websocket_server")
    package.websocket_server.WebSocketHandler.disable_nagle_algorithm = True
    package.WebsocketServer.request_queue_size = 4096
    server = package.WebsocketServer(host="127.0.0.1", port=port)
    server.set_fn_message_received(lambda client, server, message: server.send_message_to_all(message))
    server.run_forever()


if __name__ == "__main__":
    context = None
    if sys.argv[-1].endswith(".pem"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[-1])
    globals()[sys.argv[1]](int(sys.argv[2]), "deflate" in sys.argv, context)
