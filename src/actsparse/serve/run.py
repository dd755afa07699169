"""A server's life: a socket, signals, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket as sockets
import sys
from types import FrameType

import uvicorn

from actsparse.models.text import TextError
from actsparse.serve.app import Server


def listen(host: str, port: int) -> sockets.socket:
    """A listening socket; TextError, naming the address, where that cannot be."""
    try:
        kind, *_, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE)[0]
        return sockets.create_server(address[:2], family=kind, backlog=256)
    except (OSError, UnicodeError) as error:
        raise TextError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None


def serve_until_told(server: Server, socket: sockets.socket, grace_s: float) -> None:
    """Serve until SIGTERM or Ctrl-C.  What runs is finished, within ``grace_s``; a second signal does not wait."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(grace_s),
        server_header=False,
        h11_max_incomplete_event_size=1 << 16,
    )
    host, port = socket.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
    runner = _Runner(config, server)
    # uvicorn raises the signals that it took again when it is done.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        asyncio.run(runner.serve(sockets=[socket]))
    server.engine.close(0 if runner.impatient else grace_s)


class _Runner(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self.impatient = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take nothing new; the second time do not wait either."""
        first = not self.should_exit
        if first:
            self._server.engine.drain()
        else:
            self.impatient = self.force_exit = True
        super().handle_exit(sig, frame)
        # Last, and not able to fail: whoever read our messages may be gone, and an exception here would end in whatever runs.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            if first:
                running = sum(run for run, _ in self._server.engine.load().values())
                what = f"{signal.Signals(sig).name}: finishing {running} answers; once more ends them"
                print(what, file=sys.stderr, flush=True)
