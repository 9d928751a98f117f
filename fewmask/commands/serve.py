"""fewmask serve: a page on this computer where a photo is dropped and its mask appears."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path

from fewmask.types import UserError


def serve(model: Path, port: int, host: str = "127.0.0.1") -> int:
    """Serve the page and POST /predict until interrupted; by default only this computer can reach them.

    Raises UserError where the extra "serve" is not installed, the model cannot be opened or the port is taken.
    """
    try:
        import uvicorn

        from fewmask.deploy.serve import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"fastapi", "uvicorn", "starlette", "python_multipart"}:
            raise
        raise UserError(f"Serving needs {error.name}, which is missing; run: pip install 'fewmask[serve]'") from None
    from fewmask.deploy.open_model import open_model

    _require_free(host, port)
    app = create_app(open_model(model), host)
    if not is_loopback(host):
        print(f"Warning: anyone who can reach {host}:{port} can use this page.", file=sys.stderr)
    print(f"Open http://{host}:{port} and drop a photo; Ctrl-C ends it.", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)
    return 0


def is_loopback(host: str) -> bool:
    """Return whether only this computer can reach the host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"Cannot listen on {host}:{port} ({reason}); choose another --port.") from None
