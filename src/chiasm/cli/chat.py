"""`chiasm chat`: a conversation in the terminal, streamed; works with piped input too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from chiasm import errors
from chiasm.cli import connection, failures, messages
from chiasm.cli.generate import DEFAULT_ENDPOINT, Endpoint, Timeout
from chiasm.client import Client, Delta, Finished, Media, Message, Sampling, assistant, user
from chiasm.types import MediaKind

_HELP = "/image PATH, /video PATH add a file to the next message; /reset forgets; /quit ends"


@connection.options
def chat(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random stream.")] = None,
    enable_thinking: Annotated[
        bool, typer.Option("--enable-thinking", help="Let the model think first.")
    ] = False,
    timeout: Timeout = 600.0,
    *,
    access: connection.Access,
) -> None:
    """Talks with the model until /quit or the end of the input."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    console = Console(highlight=False, soft_wrap=True)
    with failures.reported():
        client = Client(endpoint, timeout_s=timeout, tls=access.files(), api_key=access.api_key)
    with client:
        with failures.reported():
            name = client.get_model().name
        console.print(f"[bold]{name}[/] at {endpoint}. {_HELP}")
        session = Session(client, console, sampling, enable_thinking=enable_thinking)
        for line in _lines(console):
            if not session.take(line.strip()):
                return


class Session:
    """One conversation: its history, and the media that wait for the next message."""

    def __init__(
        self, client: Client, console: Console, sampling: Sampling, *, enable_thinking: bool
    ) -> None:
        self._client, self._console = client, console
        self._sampling, self._enable_thinking = sampling, enable_thinking
        self.history: list[Message] = []
        self._media: list[Media] = []

    def take(self, line: str) -> bool:
        """Obeys a command or sends a message; False when the conversation is over."""
        command, _, argument = line.partition(" ")
        try:
            match command:
                case "":
                    pass
                case "/quit" | "/exit":
                    return False
                case "/reset":
                    self.history.clear()
                    self._media.clear()
                case "/image" | "/video":
                    self._attach(MediaKind(command[1:]), argument.strip())
                case _ if command.startswith("/"):
                    self._console.print(_HELP)
                case _:
                    self._ask(line)
        except errors.ChiasmError as error:
            self._console.print(f"error: {failures.line(error)}", style="red", markup=False)
            is_refused = isinstance(error, errors.InvalidArgument) and command[0] != "/"
            if is_refused and self._media:
                self._media.clear()  # or the next message would be refused for them too
                self._console.print("(the files wait no longer)", style="dim")
        return True

    def _attach(self, kind: MediaKind, path: str) -> None:
        self._media += messages.load_media(kind, [path], name=f"/{kind}")
        self._console.print(f"{len(self._media)} file(s) go with the next message", style="dim")

    def _ask(self, text: str) -> None:
        """A turn enters the history only when its answer is complete."""
        turn = user(*self._media, text)
        answer: list[str] = []
        try:
            for event in self._client.generate(
                [*self.history, turn],
                sampling=self._sampling,
                enable_thinking=self._enable_thinking,
            ):
                if isinstance(event, Delta):
                    answer.append(event.text)
                    if event.reasoning_text:
                        self._console.print(event.reasoning_text, end="", markup=False, style="dim")
                    self._console.print(event.text, end="", markup=False)
                elif isinstance(event, Finished):
                    self._console.print(f"\n({_note(event)})", style="dim")
        except KeyboardInterrupt:
            self._console.print("\n(interrupted)", style="dim")
            return
        self._media.clear()
        reply = "".join(answer)
        self.history.append(turn)
        if reply:
            self.history.append(assistant(reply))


def _note(finished: Finished) -> str:
    """What an answer has cost."""
    usage, seconds = finished.usage, finished.timings.total_ns / 1e9
    prompt = f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached"
    return f"{usage.completion_tokens} tokens, {seconds:.1f} s; {prompt}"


def _lines(console: Console) -> Iterator[str]:
    """Lines of the input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.decode(errors="surrogateescape")
        return
    while True:
        try:
            yield console.input("[bold green]> [/]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
