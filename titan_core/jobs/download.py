"""`titan download`: files of a Hugging Face repository, whole and checked, however often the connection breaks.

Nothing here loads torch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from titan_core.jobs.hub_errors import explain, may_pass, unreachable
from titan_core.runtime.errors import MachineError, RemoteError, RunFailed, UsageError
from titan_core.runtime.events import Listener, Note, Planned, Progress, silent

Asset = Literal["tokenizer", "config", "index", "weights", "all"]
PATTERNS: dict[Asset, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.*",
        "*.tiktoken",
    ),
    "config": ("config.json", "generation_config.json"),
    "index": ("*.safetensors.index.json",),
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "all": ("*",),
}
DEFAULT: tuple[Asset, ...] = ("tokenizer", "config", "index", "weights")
# name -> (repository, patterns)
SHORTCUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flux-autoencoder": ("black-forest-labs/FLUX.1-dev", ("ae.safetensors",)),
    "flux-encoders": (
        "black-forest-labs/FLUX.1-dev",
        ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"),
    ),
}
_ATTEMPTS = 6
_PAUSE = 1.0  # seconds before the second attempt; doubled each time, to 30 at most
_TIMEOUT = 30.0  # seconds without a byte
_READ_AT_ONCE = 1 << 20
_HASH_AT_ONCE = 4 << 20
_ASIDE = ".titan-download"  # in the folder: what has come of files that are not whole


@dataclass(frozen=True)
class File:
    """A file of the repository. `sha256` is known of large files, `blob` (git's SHA-1) of small ones."""

    name: str
    size: int | None
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Downloaded:
    """What is where now. `revision` is the commit; `bytes` what this call had to fetch."""

    repo: str
    revision: str
    folder: str
    files: list[dict[str, Any]]
    bytes: int
    total_bytes: int
    retries: int
    dry_run: bool


@dataclass
class _Counts:
    """What all threads have done."""

    retries: int = 0
    bytes: int = 0
    stopped: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def add(self, num_bytes: int) -> None:
        if self.stopped:
            raise RunFailed("another file has failed")
        with self.lock:
            self.bytes += num_bytes


def run(
    repo: str,
    *,
    assets: Sequence[Asset] = DEFAULT,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    folder: str | None = None,
    cache: bool = False,
    workers: int = 4,
    dry_run: bool = False,
    listener: Listener = silent,
) -> Downloaded:
    """Fetch files into a folder (default: the repository's short name), or into the Hugging Face cache.

    Each file is checked against the size and hash that the repository gives; a file that is there already and right is
    not fetched again. Raises `RemoteError` where the service refuses or cannot be reached.
    """
    hub = _hub()
    repo, include = _resolve(repo, include)
    patterns = list(include) or [pattern for asset in assets for pattern in PATTERNS[asset]]
    info = _ask(lambda: hub.HfApi().model_info(repo, revision=revision, files_metadata=True), repo, revision)
    commit = info.sha or revision or "main"
    chosen = [file for file in _files(info, repo) if _wanted(file.name, patterns, exclude)]
    if not chosen:
        names = ", ".join(file.name for file in _files(info, repo))[:300]
        raise RunFailed(f"no file of {repo} matches {', '.join(patterns)}", tip=f"it has {names}")
    place = Path(folder or repo.rpartition("/")[2])
    missing = chosen if cache else [file for file in chosen if not _is_there(place, file)]
    total, needed = (sum(file.size or 0 for file in files) for files in (chosen, missing))
    where = "the Hugging Face cache" if cache else str(place)
    listener(Planned([("from", f"{repo} at {commit[:12]}"), ("to", f"{where}, {len(chosen)} files, {_gb(total)}")]))
    counts = _Counts()
    listed = [{"name": f.name, "size": f.size, "there": f not in missing} for f in chosen]
    if not dry_run and missing:
        _check_space(_cache_folder(hub) if cache else place, needed)
        fetch = _Fetcher(hub, repo, commit, None if cache else place, counts, listener)
        where = _fetch_all(fetch, missing, needed, workers, listener) or where
    return Downloaded(repo, commit, where, listed, 0 if dry_run else needed, total, counts.retries, dry_run)


def _resolve(repo: str, include: Sequence[str]) -> tuple[str, Sequence[str]]:
    if repo in SHORTCUTS:
        name, patterns = SHORTCUTS[repo]
        return name, include or patterns
    if not 1 <= len(repo.split("/")) <= 2 or not all(repo.split("/")):
        raise UsageError(f"`{repo}` is no repository", tip=f"OWNER/NAME, or one of {', '.join(SHORTCUTS)}")
    return repo, include


def _hub() -> Any:
    """Load the client, silent: progress and retries are ours."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return huggingface_hub


def _files(info: Any, repo: str) -> Iterator[File]:
    """List the repository's files. A name that leads out of the folder is refused."""
    for entry in info.siblings or []:
        name = entry.rfilename
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            message = f"the repository lists `{name}`, which lies outside of the folder: refused"
            raise RemoteError(message, where=repo, tip="do not trust this service")
        lfs = entry.lfs
        digest = None if lfs is None else lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256
        yield File(name, entry.size, digest, None if digest else entry.blob_id)


def _wanted(name: str, patterns: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns) and not any(
        fnmatch.fnmatchcase(name, p) for p in exclude
    )


# ---------------------------------------------------------------------------------------------- fetching


@dataclass(frozen=True)
class _Fetcher:
    hub: Any
    repo: str
    commit: str
    folder: Path | None
    counts: _Counts
    listener: Listener

    def __call__(self, file: File) -> Path:
        """Fetch one file and check it; after a broken connection it goes on from the bytes that came."""
        pause, last, wrong = _PAUSE, "", None
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.counts.retries += 1
                self.listener(Note(f"{file.name}: {last}; again in {pause:.0f} s"))
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
            try:
                path = self._into_folder(file) if self.folder else self._into_cache(file, force=wrong is not None)
            except Exception as error:
                known = explain(error, self.repo, self.commit)
                if not may_pass(error):
                    raise known from error
                last = known.message
                continue
            wrong = _difference(path, file)
            if wrong is None:
                return self._in_place(path, file)
            last = f"what came is not what the repository says: {wrong}"
            path.unlink(missing_ok=True)
        tip = "the files that are whole stay: the same command goes on"
        raise RemoteError(
            f"`{file.name}` could not be fetched in {_ATTEMPTS} attempts: {last}", where=self.repo, tip=tip
        )

    def _into_cache(self, file: File, force: bool) -> Path:
        """Let the client fetch a file: the layout of the cache is its own."""
        path = self.hub.hf_hub_download(self.repo, file.name, revision=self.commit, force_download=force)
        self.counts.add(file.size or 0)
        return Path(path)

    def _into_folder(self, file: File) -> Path:
        """Fetch what is still missing of a file, beside the folder's files, and return where."""
        assert self.folder is not None
        part = self.folder / _ASIDE / f"{file.name}.{self.commit[:12]}"
        part.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if have == file.size:
            return part
        if file.size is not None and have > file.size:
            part.unlink()
            have = 0
        self.counts.add(have)
        with self._open(file, have) as answer, part.open("r+b" if have else "wb") as out:
            if have and answer.status != 206:  # the service starts again from the first byte
                self.counts.add(-have)
                have = 0
            out.seek(have)
            out.truncate()
            expected = file.size if file.size is not None else have + int(answer.headers["Content-Length"])
            try:
                while data := answer.read(_READ_AT_ONCE):
                    out.write(data)
                    self.counts.add(len(data))
            finally:
                came = out.tell()
        if came != expected:
            self.counts.add(-came)
        if came < expected:
            raise ConnectionError(f"it ended after {came:,} of {expected:,} bytes")
        return part

    def _open(self, file: File, have: int) -> Any:
        """Ask for a file from byte `have` on. The token goes to the service only, not to where it sends us."""
        url = self.hub.hf_hub_url(self.repo, file.name, revision=self.commit)
        location = self.hub.get_hf_file_metadata(url).location
        headers = {"Range": f"bytes={have}-"} if have else {}
        if urlsplit(location).netloc == urlsplit(url).netloc:
            headers |= self.hub.utils.build_hf_headers()
        return urlopen(Request(location, headers={**headers, "Accept-Encoding": "identity"}), timeout=_TIMEOUT)

    def _in_place(self, path: Path, file: File) -> Path:
        if self.folder is None:
            return path
        target = self.folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        return path.replace(target)


def _fetch_all(fetch: _Fetcher, files: list[File], needed: int, workers: int, listener: Listener) -> str | None:
    """Fetch files side by side; returns the folder of the cache that they are in, if they are in the cache."""
    found: tuple[Path, File] | None = None
    pool = ThreadPoolExecutor(workers, "titan-download")
    waiting: dict[Future[Path], File] = {pool.submit(fetch, file): file for file in files}
    try:
        while waiting:
            ready, _ = wait(waiting, timeout=0.25, return_when=FIRST_COMPLETED)
            for future in ready:
                file = waiting.pop(future)
                found = (future.result(), file)
            listener(Progress("download", needed if not waiting else min(fetch.counts.bytes, needed), needed, "bytes"))
    finally:
        fetch.counts.stopped = bool(waiting)  # what is under way stops at its next piece; what came stays
        pool.shutdown(wait=True, cancel_futures=True)
    if fetch.folder is not None:
        shutil.rmtree(fetch.folder / _ASIDE, ignore_errors=True)
        return None
    return None if found is None else str(found[0]).removesuffix(found[1].name).rstrip("/")


def _is_there(folder: Path, file: File) -> bool:
    path = folder / file.name
    return path.is_file() and _difference(path, file) is None


def _difference(path: Path, file: File) -> str | None:
    """Return how a file differs from what the repository says of it."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size:,} bytes for {file.size:,}"
    if file.sha256 is not None and _digest(path, hashlib.sha256()) != file.sha256:
        return "its SHA-256 is another"
    if file.blob is not None and _digest(path, hashlib.sha1(b"blob %d\0" % size)) != file.blob:
        return "its git hash is another"
    return None


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while data := file.read(_HASH_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def _check_space(place: Path, needed: int) -> None:
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise MachineError(f"{_gb(needed)} are to be fetched, {_gb(free)} are free", where=str(place))


def _cache_folder(hub: Any) -> Path:
    return Path(hub.constants.HF_HUB_CACHE)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _ask(question: Callable[[], Any], repo: str, revision: str | None) -> Any:
    """Ask the service, and again if the connection breaks."""
    pause = _PAUSE
    for attempt in range(_ATTEMPTS):
        try:
            return question()
        except Exception as error:
            if attempt == _ATTEMPTS - 1 or not may_pass(error) or unreachable(error):
                raise explain(error, repo, revision) from error
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
    raise AssertionError
