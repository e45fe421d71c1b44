"""Virtual addresses of services: a stand-in for kube-proxy.

A connection goes to one of the endpoints that are ready when it is opened and stays there, as with
the real one: an endpoint that is not ready any more keeps the connections it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

from kube.node import POLL_S, Object, listed, local
from kubernetes import client

_Key = tuple[str, int]
"""Name and port of a service."""

CHUNK_BYTES = 1 << 16


class Proxy:
    """Listens for every service of a namespace that has an address, in a thread of its own."""

    def __init__(self, api: client.ApiClient, *, namespace: str) -> None:
        self._core = client.CoreV1Api(api)
        self._namespace = namespace
        self._targets: dict[_Key, list[tuple[str, int]]] = {}
        self._servers: dict[_Key, asyncio.Server] = {}
        self._turn = itertools.count()
        self._connections: set[asyncio.Task[Any]] = set()
        self._stopped = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        while not self._stopped.is_set():
            services, endpoints = await asyncio.gather(
                self._list(self._core.list_namespaced_service),
                self._list(self._core.list_namespaced_endpoints),
            )
            if services:
                await self._listen(services, {e["metadata"]["name"]: e for e in endpoints})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), POLL_S)
        for server in self._servers.values():
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _list(self, call: Callable[..., Any]) -> list[Object]:
        return await asyncio.to_thread(listed, call, self._namespace)

    async def _listen(self, services: list[Object], endpoints: dict[str, Object]) -> None:
        known: set[_Key] = set()
        for service in services:
            name, address = service["metadata"]["name"], service["spec"].get("clusterIP", "None")
            for port in service["spec"].get("ports", []) if address != "None" else []:
                key = (name, int(port["port"]))
                known.add(key)
                self._targets[key] = targets(endpoints.get(name, {}), port.get("name", ""))
                if key not in self._servers:
                    self._servers[key] = await asyncio.start_server(
                        self._connected(key), local(address), key[1]
                    )
        for key in set(self._servers) - known:
            self._servers.pop(key).close()

    def _connected(self, key: _Key) -> Callable[..., Any]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await self._relay(key, reader, writer)
            except (OSError, asyncio.CancelledError):
                pass  # refused, cut off, or the end: the client sees that of its connection
            finally:
                self._connections.discard(task)
                writer.close()

        return connected

    async def _relay(
        self, key: _Key, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        found = self._targets[key]
        if not found:
            return
        reader_there, writer_there = await asyncio.open_connection(
            *found[next(self._turn) % len(found)]
        )
        ways = [
            asyncio.create_task(pump(reader, writer_there)),
            asyncio.create_task(pump(reader_there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer_there.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes bytes on until the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def targets(endpoints: Object, port_name: str) -> list[tuple[str, int]]:
    """Where the ready endpoints of one port of a service listen on this machine."""
    return [
        (local(address["ip"]), int(port["port"]))
        for subset in endpoints.get("subsets") or []
        for address in subset.get("addresses") or []
        for port in subset.get("ports") or []
        if port.get("name", "") == port_name
    ]
