"""`titan download` against a local server that speaks the hub's protocol, breaks connections and lies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
BIG = random.Random(0).randbytes(300_000)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": BIG,
    "original/consolidated.00.pth": BIG[:5000],
}


@dataclass
class Hub:
    """What the server has, and how it misbehaves: faults are used up one by one, file by file."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    faults: dict[str, list[Any]] = field(default_factory=dict)
    listed: list[str] | None = None
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def sibling(self, name: str) -> dict[str, Any]:
        content = self.files.get(name, b"")
        entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
        if len(content) > 1000:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry["blobId"] = "f" * 40
        else:
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {**entry, **self.claims.get(name, {})}


class Handler(BaseHTTPRequestHandler):
    """Speaks the hub's protocol for what `self.server.hub` has."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # pyright: ignore[reportAttributeAccessIssue]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def plain(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.refuse is not None:
            status, code = self.hub.refuse
            self.plain(status, b"{}", **({"X_Error_Code": code} if code else {}))
        elif path.startswith("/api/models/"):
            names = self.hub.listed or list(self.hub.files)
            body = {"id": "org/repo", "sha": SHA, "siblings": [self.hub.sibling(name) for name in names]}
            self.plain(200, json.dumps(body).encode(), Content_Type="application/json")
        else:
            self.file(path.partition(f"/resolve/{SHA}/")[2], with_body)

    def file(self, name: str, with_body: bool) -> None:
        if name not in self.hub.files:
            self.plain(404, X_Error_Code="EntryNotFound")
            return
        content = self.hub.files[name]
        common = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA}
        if with_body:
            self.body(name, content, common)
        else:
            self.plain(200, content, **common)

    def body(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        self.hub.asked.append((name, wanted))
        fault = self.hub.faults.get(name, [None]).pop(0) if self.hub.faults.get(name) else None
        if isinstance(fault, int):
            self.plain(fault)
            return
        if fault == "other content":
            content = bytes(len(content))
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-").partition("-")[0]) if wanted and self.hub.ranges else 0
        )
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    known = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = known  # type: ignore[attr-defined]
    known.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield known
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import sys
from titan_core.jobs import download
download._PAUSE = 0.01
from titan_cli.main import main
main(sys.argv[1:])
"""


def titan(hub: Hub | str, *words: str, folder: Path, code: int = 0, **env: str) -> dict[str, Any]:
    """Run `titan download org/repo`, which must end with `code`, and return its JSON."""
    url = hub if isinstance(hub, str) else hub.url
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    settings = {**clean, "HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), **env}
    command = [sys.executable, "-c", SCRIPT, "download", *(words or ("org/repo",)), "--json"]
    done = subprocess.run(command, env=settings, cwd=folder, capture_output=True, check=False, timeout=120)
    assert done.returncode == code, done.stdout.decode() + done.stderr.decode()
    return json.loads(done.stdout)


def came(folder: Path, hub: Hub, *names: str) -> None:
    """Exactly these files are there, with the right bytes."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {name: hub.files[name] for name in names}


def test_weights_config_and_tokenizer_are_the_default(hub: Hub, tmp_path: Path) -> None:
    done = titan(hub, folder=tmp_path)
    came(tmp_path / "repo", hub, "config.json", "tokenizer.json", "model.safetensors")
    assert done["bytes"] == done["total_bytes"] == len(BIG) + 25
    assert done["revision"] == SHA
    hub.asked.clear()
    assert titan(hub, folder=tmp_path)["bytes"] == 0  # all is there, and right
    assert hub.asked == []


def test_choice_of_files(hub: Hub, tmp_path: Path) -> None:
    titan(hub, "org/repo", "--assets", "config", "--to", "a", folder=tmp_path)
    came(tmp_path / "a", hub, "config.json")
    titan(hub, "org/repo", "--assets", "all", "--exclude", "*.safetensors", "--to", "b", folder=tmp_path)
    came(tmp_path / "b", hub, "config.json", "tokenizer.json", "original/consolidated.00.pth")
    titan(hub, "org/repo", "--include", "original/*", "--to", "c", folder=tmp_path)
    came(tmp_path / "c", hub, "original/consolidated.00.pth")
    wrong = titan(hub, "org/repo", "--include", "*.gguf", folder=tmp_path, code=1)
    assert "no file of org/repo matches *.gguf" in wrong["error"]["message"]
    assert "config.json" in wrong["error"]["tip"]


def test_dry_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    done = titan(hub, "org/repo", "--dry-run", folder=tmp_path)
    assert {file["name"]: file["size"] for file in done["files"]}["model.safetensors"] == len(BIG)
    assert done["total_bytes"] == len(BIG) + 25
    assert hub.asked == []
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections_are_gone_on_from(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    hub.ranges = ranges
    hub.faults["model.safetensors"] = ["drop", 503, "drop", 429, "drop"]
    done = titan(hub, "org/repo", "--include", "model.safetensors", folder=tmp_path)
    came(tmp_path / "repo", hub, "model.safetensors")
    assert done["retries"] == 5
    asked = [wanted for name, wanted in hub.asked if name == "model.safetensors"]
    assert asked[0] is None
    half, more = len(BIG) // 2, len(BIG) // 2 + len(BIG) // 4
    assert asked[1:5] == [f"bytes={half}-", f"bytes={half}-", f"bytes={more}-", f"bytes={more}-"] or not ranges


def test_a_connection_that_always_breaks_is_an_error_and_the_next_call_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = ["drop"] * 6
    wrong = titan(hub, "org/repo", "--include", "model.safetensors", folder=tmp_path, code=4)
    assert "could not be fetched in 6 attempts: the connection broke" in wrong["error"]["message"]
    assert not (tmp_path / "repo/model.safetensors").exists()
    hub.asked.clear()
    titan(hub, "org/repo", "--include", "model.safetensors", folder=tmp_path)
    came(tmp_path / "repo", hub, "model.safetensors")
    assert hub.asked[0][1] is not None  # from where it broke


def test_other_content_of_the_same_size_is_noticed(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {"model.safetensors": ["other content"], "config.json": ["other content"]}
    assert titan(hub, folder=tmp_path)["retries"] == 2
    came(tmp_path / "repo", hub, "config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize("claim", [len(BIG) + 1, len(BIG) - 1])
def test_a_size_that_lies_is_an_error(hub: Hub, tmp_path: Path, claim: int) -> None:
    hub.claims["model.safetensors"] = {"size": claim}
    wrong = titan(hub, "org/repo", "--include", "model.safetensors", folder=tmp_path, code=4)
    assert "could not be fetched" in wrong["error"]["message"]
    assert not (tmp_path / "repo/model.safetensors").exists()


def test_a_damaged_file_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    titan(hub, folder=tmp_path)
    path = tmp_path / "repo/model.safetensors"
    path.write_bytes(bytes(len(BIG)))
    assert titan(hub, folder=tmp_path)["bytes"] == len(BIG)
    assert path.read_bytes() == BIG


def test_names_that_lead_out_of_the_folder_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.listed = ["config.json", "../../evil.json"]
    wrong = titan(hub, "org/repo", "--assets", "all", folder=tmp_path, code=4)
    assert "lists `../../evil.json`, which lies outside" in wrong["error"]["message"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no repository org/repo, or it is private"),
        (403, "GatedRepo", "org/repo is gated"),
        (401, "GatedRepo", "org/repo is gated"),
        (404, "RevisionNotFound", "org/repo has no revision `v9`"),
        (401, "", "does not know you|or it is private"),
        (403, "", r"does not let you read this \(403\)"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path, status: int, code: str, message: str) -> None:
    import re

    hub.refuse = (status, code)
    wrong = titan(hub, "org/repo", "--revision", "v9", folder=tmp_path, code=4)["error"]
    assert re.search(message, wrong["message"]), wrong
    assert "hf auth login" in wrong["tip"] or "a branch" in wrong["tip"]


def test_no_network_and_offline(tmp_path: Path) -> None:
    wrong = titan("http://127.0.0.1:9", folder=tmp_path, code=4)["error"]
    assert wrong["message"] == "the service cannot be reached"
    assert wrong["where"] == "http://127.0.0.1:9"
    off = titan("http://127.0.0.1:9", folder=tmp_path, code=4, HF_HUB_OFFLINE="1")["error"]
    assert "HF_HUB_OFFLINE is set" in off["message"]


def test_the_cache_of_the_client(hub: Hub, tmp_path: Path) -> None:
    done = titan(hub, "org/repo", "--cache", folder=tmp_path)
    place = Path(done["folder"])
    assert place.parent.name == "snapshots"
    assert (place / "model.safetensors").read_bytes() == BIG
    from titan_core.interop.files import inside

    assert inside(place, "config.json").read_bytes() == FILES["config.json"]  # the cache's links are good links


def test_a_full_disk_is_known_before(hub: Hub, tmp_path: Path) -> None:
    hub.claims["model.safetensors"] = {"size": 1 << 60}
    wrong = titan(hub, folder=tmp_path, code=3)["error"]
    assert "are to be fetched" in wrong["message"]
    assert hub.asked == []


def test_wrong_words(tmp_path: Path) -> None:
    wrong = titan("http://127.0.0.1:9", "a/b/c", folder=tmp_path, code=2)["error"]
    assert "`a/b/c` is no repository" in wrong["message"]
    wrong = titan("http://127.0.0.1:9", "a/b", "--to", "x", "--cache", folder=tmp_path, code=2)["error"]
    assert "two places" in wrong["message"]
