"""A proxy between clients and an HTTP server that injects faults into the traffic."""

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from dataclasses import dataclass

_METHODS = (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")
_BODY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>injected</Message></Error>"
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n"
)


@dataclass
class Faults:
    """What goes wrong; may be changed at any time.

    Attributes
    ----------
    refuse_every
        Every so many requests are answered 503; 0: none.
    reset_every
        Every so many requests the connection is reset in the middle of the answer; 0: none.
    stalled
        Nothing passes any more, connections stay open.
    """

    refuse_every: int = 0
    reset_every: int = 0
    stalled: bool = False


class FaultProxy:
    """Listens on one address and passes everything on to another, in a thread of its own.

    Parameters
    ----------
    host, port
        Where it listens.
    target_host, target_port
        The server.
    """

    def __init__(self, host: str, port: int, target_host: str, target_port: int) -> None:
        self.faults = Faults()
        self.requests = self.refused = self.reset = 0
        self.host, self.port = host, port
        self._target = (target_host, target_port)
        self._count = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        """URL to give to clients."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError(f"the fault proxy cannot listen on {self.host}:{self.port}")

    def stop(self) -> None:
        """Stop listening and drop all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serve = asyncio.start_server(self._client, self.host, self.port, backlog=512)
        self._loop.run_until_complete(serve)
        self._ready.set()
        self._loop.run_forever()
        open_ones = asyncio.all_tasks(self._loop)
        for task in open_ones:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*open_ones, return_exceptions=True))
        self._loop.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection(*self._target)
        except OSError:
            _abort(writer)
            return
        doomed = asyncio.Event()
        done, rest = await asyncio.wait(
            [
                asyncio.ensure_future(self._requests_of(reader, forth, writer, doomed)),
                asyncio.ensure_future(self._answers_of(back, writer, doomed)),
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        if rest and not any(task.result() for task in done):
            await asyncio.wait(rest, timeout=30)
        for task in rest:
            task.cancel()
        for end in (writer, forth):
            with contextlib.suppress(Exception):
                end.close()

    async def _requests_of(
        self,
        reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        doomed: asyncio.Event,
    ) -> bool:
        """Pass requests on; return whether the connection was ended on purpose."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self._wait_while_stalled()
                if data.split(b" ", 1)[0] in _METHODS:
                    self.requests += 1
                    number, faults = next(self._count), self.faults
                    if faults.reset_every and number % faults.reset_every == 0:
                        doomed.set()
                    elif faults.refuse_every and number % faults.refuse_every == 0:
                        self.refused += 1
                        client.write(_REFUSAL % len(_BODY))
                        if not data.startswith(b"HEAD"):
                            client.write(_BODY)
                        await client.drain()
                        return True
                server.write(data)
                await server.drain()
            server.write_eof()
        return False

    async def _answers_of(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> bool:
        with contextlib.suppress(ConnectionError):
            while data := await server.read(1 << 16):
                await self._wait_while_stalled()
                if doomed.is_set():
                    self.reset += 1
                    client.write(data[: len(data) // 2])
                    _abort(client)
                    return True
                client.write(data)
                await client.drain()
        return False

    async def _wait_while_stalled(self) -> None:
        while self.faults.stalled:
            await asyncio.sleep(0.05)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of a farewell."""
    connection = writer.get_extra_info("socket")
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
