"""`chiasm status`: who is in the system, once or live."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from chiasm import errors
from chiasm.cli import connection, failures, running
from chiasm.membership import MemberInfo, Topology
from chiasm.telemetry import logs
from chiasm.transport import tls as credentials
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Modality, ShardSpec

CONNECT_TIMEOUT_S = 5.0
REFRESH_S = 0.5


@connection.options
def status(
    endpoint: Annotated[
        str,
        typer.Option(
            envvar="CHIASM_ORCHESTRATOR",
            metavar="HOST:PORT",
            help="Address of the orchestrator; unset: that of the running `chiasm up`.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow changes until Ctrl-C.")] = False,
    *,
    access: connection.TlsOptions,
) -> None:
    """Shows the members of a running system: role, address, state, shards, metrics."""
    logs.configure("status", level="error")
    with failures.reported():
        address = endpoint or running.find()
        if not address:
            raise errors.Unavailable("no running `chiasm up` found; name one with --endpoint")
        # `up` speaks plain text, whatever the environment says of another system.
        credentials.use(port=None, peers=access.files() if endpoint else None)
        try:
            asyncio.run(_status(address, as_json=as_json, watch=watch))
        except KeyboardInterrupt:
            raise typer.Exit from None


async def _status(address: str, *, as_json: bool, watch: bool) -> None:
    watcher = TopologyWatcher(address)
    watcher.start()
    try:
        topology = await watcher.wait_for(
            lambda t: bool(t.instance_id),
            timeout_s=CONNECT_TIMEOUT_S,
            what=f"the orchestrator at {address}",
        )
        if watch:
            await _follow(watcher, as_json=as_json)
        elif as_json:
            _write_json(topology)
        else:
            Console().print(table(topology))
    finally:
        await watcher.close()


async def _follow(watcher: TopologyWatcher, *, as_json: bool) -> None:
    """Runs until interrupted: a table that changes in place on a terminal, else one for every
    change, or a JSON object."""
    console = Console()
    if as_json or not console.is_terminal:
        topologies: asyncio.Queue[Topology] = asyncio.Queue()
        topologies.put_nowait(watcher.current)
        watcher.subscribe(topologies.put_nowait)
        while True:
            # Not in the callback: a reader that goes away, as `head` does, ends this task.
            topology = await topologies.get()
            if as_json:
                _write_json(topology)
            else:
                console.print(table(topology))
    with Live(table(watcher.current), console=console, auto_refresh=False) as live:
        while True:
            live.update(table(watcher.current), refresh=True)
            await asyncio.sleep(REFRESH_S)


def table(topology: Topology) -> Table:
    """The members, one a row."""
    caption = "complete" if topology.is_complete() else "incomplete"
    if topology.settling:
        caption += "; members are still coming back"
    missing = ", ".join(f"{m} {s}" for m in Modality for s in topology.missing(m))
    if missing:
        caption += f"; no server for {missing}"
    headers = ("role", "address", "state", "shards", "weights", "metrics")
    view = Table(*headers, caption=caption, caption_justify="left")
    colours = {"ready": "green", "loading": "yellow", "draining": "red"}
    for member in sorted(topology.members, key=lambda m: (m.role, m.address)):
        view.add_row(
            member.role,
            member.address,
            f"[{colours[member.state]}]{member.state}[/]",
            _shards(member),
            " ".join(s.weights for s in member.shard_sets),
            member.metrics_address,
        )
    return view


def _shards(member: MemberInfo) -> str:
    held = [s for s in member.shard_sets if s.shards]
    return " ".join(f"{s.modality} {ShardSpec(s.shards, s.num_shards)}" for s in held)


def _write_json(topology: Topology) -> None:
    view = dataclasses.asdict(topology) | {"complete": topology.is_complete()}
    sys.stdout.write(json.dumps(view) + "\n")
    sys.stdout.flush()
