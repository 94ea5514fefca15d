"""`epigone serve NODE`: a node behind the OpenAI interface, on this machine unless told otherwise."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from epigone.arena.accounts import Accounts, Bounds, Key, State
from epigone.errors import UserError, did_you_mean
from epigone.opened import OpenedNode, open_node
from epigone.storage.places import on_store

HERE = ("127.0.0.1", "::1", "localhost")
HEADER_SECONDS = 10.0
"""For a client to send the head of a question."""


@dataclass(frozen=True)
class Serve:
    """Put a node behind the OpenAI interface: completions, chat, scores as a policy shows them.

    Who may ask is told by 'epigone keys BOX'. Any client of the interface works: base URL http://HOST:PORT/v1.

    Attributes:
        node: the node: KEY as in teacher@0 or student@1.s2, NAME where one node has it, or RUN/KEY.
        run: the run directory; by default the one below runs/ that has the node.
        policy: what leaves the box: all, best20, best5, rounded, text, or a Python file whose function 'policy' returns
            an epigone.arena.policies.Policy.
        box: the file with keys, quotas and the query log; by default box.sqlite in the run directory.
        open: whoever gives no key may ask too; only on this machine.
        host: where questions are taken.
        port: of the host; 0 takes any that is free.
        slots: texts that are written side by side.
        waiting: texts that may wait for a slot, before others are told to come back later.
        best: scores of a place that may be asked for, at most.
        bounds: what one question may want.
    """

    node: tyro.conf.Positional[str]
    run: Path | None = None
    policy: str = "all"
    box: Path | None = None
    open: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 16
    waiting: int = 256
    best: int = 20
    bounds: Bounds = field(default_factory=Bounds)


def serve_node(given: Serve) -> None:
    """Serve until a signal ends it.

    Raises UserError for a node that cannot be served, a policy that is none, a port that is taken, and where nobody
    may ask; Busy where another server holds the box.
    """
    try:
        import uvicorn

        from epigone.arena.server import application
    except ModuleNotFoundError as error:
        raise UserError(f"'{error.name}' is missing: pip install 'epigone[serve]'") from None
    if given.open and given.host not in HERE:
        raise UserError(f"--open on {given.host}: whoever reaches it could ask; make keys, or serve on 127.0.0.1")
    opened = open_node(given.node, given.run)
    path = given.box or _beside(opened)
    with Accounts(path, serving=True) as accounts, _listening(given) as listening:
        if not given.open and not accounts.everyone():
            raise UserError(f"nobody may ask: make a key with 'epigone keys {path} --add NAME', or give --open")
        with _box(given, opened, accounts) as box:
            host, port = listening.getsockname()[:2]
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            print(f"{box.name} answers at {where}; policy {given.policy}, keys and log in {path}", flush=True)
            config = uvicorn.Config(
                application(box),
                http=_patient_protocol(),
                log_config=None,  # its own closes the handlers that others have, and absl's closes its stream then
                log_level="error",
                access_log=False,  # the log of the box says who asked what; nothing else does
                server_header=False,
                timeout_graceful_shutdown=10,
            )
            uvicorn.Server(config).run(sockets=[listening])


def _beside(opened: OpenedNode) -> Path:
    if on_store(opened.run):
        raise UserError(f"{opened.run} is a bucket: give a file on this machine with --box")
    return opened.run / "box.sqlite"


@contextlib.contextmanager
def _listening(given: Serve) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in given.host else socket.AF_INET
    try:
        listening = socket.create_server((given.host, given.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{given.host}:{given.port} cannot be served: {getattr(error, 'strerror', 0) or error}"
        ) from None
    with listening:
        yield listening


@contextlib.contextmanager
def _box(given: Serve, opened: OpenedNode, accounts: Accounts) -> Iterator[Any]:
    """The engine, warm, and what stands around it."""
    from epigone.arena.engine import Engine
    from epigone.arena.server import Box
    from epigone.models.config import DecoderConfig

    policy = _policy(given.policy)
    model: Any = opened.model
    config = opened.node.model
    if not isinstance(config, DecoderConfig):
        raise UserError(f"'{opened.node.key}' counts words: only decoders are served")
    best = min(given.best, opened.tokenizer.tokens) if policy.shows else None
    sizes = {"best": best or 0, "slots": given.slots, "waiting": given.waiting}
    name = f"{opened.run.name}/{opened.node.key}"
    anyone = Key("anyone", State.OPEN, 2**31, 2**62) if given.open else None
    with Engine(model.config, model.params, policy, **sizes) as engine:
        engine.warm()
        if engine.error:
            raise UserError(f"'{opened.node.key}' cannot be served: {engine.error}")
        yield Box(name, opened.tokenizer, engine, model.config.max_length, best, accounts, given.bounds, anyone)


def _policy(name: str) -> Any:
    from epigone.arena.policies import POLICIES, Policy
    from epigone.verbs.run import load_function

    if name in POLICIES:
        return POLICIES[name]
    if not name.endswith(".py"):
        raise UserError(f"there is no policy '{name}'{did_you_mean(name, POLICIES)}; or give a Python file")
    policy = load_function(Path(name), "policy", "that returns a Policy")()
    if not isinstance(policy, Policy):
        raise UserError(f"'policy' of '{name}' returned {type(policy).__name__}, not a Policy")
    return policy


def _patient_protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol, which would wait for ever for the head of a question; this one waits HEADER_SECONDS."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._late: asyncio.TimerHandle | None = None
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            """From a new connection, or the first byte of a head, until the head is whole; no byte buys more time."""
            if self._has_question() or self.transport.is_closing():
                self._forget()
            elif self._late is None:
                self._late = self.loop.call_later(HEADER_SECONDS, self._is_late)

        def _has_question(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _is_late(self) -> None:
            if not self._has_question() and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.transport.close()

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

    return Patient
