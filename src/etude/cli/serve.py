"""The page."""

from __future__ import annotations

from typing import Annotated

import typer

from etude.cli.options import StoreAt, opened

PORT = 8489


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes any free port.")] = PORT,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    store: StoreAt = None,
) -> None:
    """Show papers, methods, studies and the store as a page, on this machine alone.

    Running studies are live there, finished ones have their report. Needs the extra `serve` (pip install 'etude[serve]'). Ctrl-C ends it.
    """
    import logging
    import socket

    from etude.values.errors import InputError

    try:
        import uvicorn

        from etude.serve.app import create_app
    except ImportError as error:
        raise InputError(f"the page needs the package {error.name}, which is not installed", remedy="pip install 'etude[serve]'") from error
    place = opened(store)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        raise InputError(f"port {port} cannot be had: {error.strerror}", remedy="Choose another with --port; 0 takes any free one.") from error
    listening.listen(128)  # who reads the address below may come at once
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    logging.basicConfig(level=logging.WARNING)
    app = create_app(place)
    app.state.library.index()
    typer.echo(f"{address} shows {place.root}; Ctrl-C ends it")
    if open_:
        import webbrowser

        webbrowser.open(address)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
