"""Which datasets Minari's hub has, without waiting for it for long."""

import importlib.util
import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

_CONNECT_SECONDS = 3.0
_LIST_SECONDS = 10.0

_T = TypeVar("_T")


def hub_ids(wanted: str) -> tuple[str | None, list[str]]:
    """Ask the hub for its ids; returns what is wrong with it (or None) and the ids of the wanted group, else of all."""
    remote = os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    if remote.startswith("hf://") and importlib.util.find_spec("huggingface_hub") is None:
        return f'{remote} cannot be asked, as huggingface_hub is missing; pip install "minari[hf]"', []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return f"{remote} cannot be asked, as HF_HUB_OFFLINE is set", []
    if problem := _connection_problem(remote):
        return f"{remote} is unreachable ({problem})", []

    def list_ids() -> list[str]:
        storage = get_cloud_storage()
        return list(storage.list_datasets(prefix=wanted.split("/")[0] + "/")) or list(storage.list_datasets())

    try:
        return None, _within(_LIST_SECONDS, list_ids)
    except Exception as error:
        return f"{remote} could not be listed ({type(error).__name__}: {error})", []


def _connection_problem(remote: str) -> str | None:
    """Try a bare connection first: the hub's own clients retry for a long time when there is no network."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if remote.startswith("hf://") else ""
    url = urllib.parse.urlsplit(endpoint or "https://storage.googleapis.com")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = through.hostname or "", through.port or 8080
    try:
        _within(_CONNECT_SECONDS, lambda: socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close())
    except OSError as error:
        return f"no connection to {host}:{port}: {error}"
    return None


def _within(seconds: float, function: Callable[[], _T]) -> _T:
    """Run a function that has no reliable timeout of its own; raises TimeoutError, and leaves its thread behind."""
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()
