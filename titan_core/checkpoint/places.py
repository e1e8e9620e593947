"""Which kind of storage a path or URL means."""

from __future__ import annotations

from titan_core.checkpoint.local import LocalStorage
from titan_core.checkpoint.remote import RemoteStorage
from titan_core.checkpoint.storage import Storage


def open_storage(place: str) -> Storage:
    """Open a folder or a URL. Raises `MachineError` if the package for that kind of URL is missing."""
    if place.startswith("file://"):
        return LocalStorage(place.removeprefix("file://"))
    return RemoteStorage(place) if "://" in place else LocalStorage(place)


def split(step_path: str) -> tuple[Storage, str]:
    """Return the storage and the relative path of a step that is given as one path or URL."""
    root, slash, folder = step_path.rstrip("/").rpartition("/")
    return open_storage(root or ("/" if slash else ".")), folder
