"""Models by name: `hf:OWNER/REPO[@REVISION][:QUANT or FILE.gguf]` becomes a file in the hub's cache.

The library huggingface_hub implements the protocol, the token and the cache, which all its users share (HF_HOME). This
module adds what the library lacks: it chooses the file in a repo, and resumes the download of an earlier run (recent
releases of the library delete an interrupted download). The content is downloaded over plain HTTP and stored under the
names that the library documents for its cache. Only files that are too large for plain HTTP are downloaded by the
library, without resuming. Only public names of the library are used, so its versions 0.x, 1.x and 2.x all work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refengine.errors import HubError, needs_extra, one_line
from refengine.hub.explain import endpoint, explained, log_of_library, no_space, unreachable, without_secrets
from refengine.hub.names import COMMIT, SPLIT_NAME, Reference, RepoFile, choose, models_of, parse, size_text

MAX_HTTP_BYTES = 50 * 10**9  # the hub serves larger files only in chunks
PATIENCE_S = 0.5  # how long to wait for another process that downloads the same file before a message says so
RETRIES = 5  # after a connection breaks without having delivered another chunk
CHUNK_BYTES = 10 * 2**20  # how much is written at a time; an interruption loses less than this
DIGEST_TOLD_BYTES = 2**30  # checking files of this size takes long, so a message says so

Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """A model file in the cache. path: of the file, or of its first part. pinned: its name with the commit's hash."""

    path: Path
    commit: str
    pinned: str
    n_downloaded: int


def resolve(name: str | os.PathLike[str], tell: Tell | None = None) -> Path:
    """The path of a model's file. For a name on the hub, downloads the file if it is not in the cache.

    Raises HubError.
    """
    reference = parse(name) if isinstance(name, str) else None
    return Path(name) if reference is None else fetch(reference, tell).path


def fetch(reference: Reference, tell: Tell | None = None, progress: Progress | None = None) -> Found:
    """Download a model's files if they are not in the cache. Raises HubError.

    tell: gets messages for the user. progress: called with (bytes done, total bytes) during the download.
    """
    tell = tell or (lambda text: None)
    with needs_extra("hub", f"{reference.text[:200]}, a model's name on the hub,"):
        import huggingface_hub  # noqa: F401
    with log_of_library(tell):
        try:
            return _fetch(reference, tell, progress or (lambda done, total: None))
        except HubError:
            raise
        except Exception as e:
            message = explained(reference, e)
            if message is None:
                raise
            raise HubError(without_secrets(f"{reference.text}: {message}")) from None


def _fetch(reference: Reference, tell: Tell, progress: Progress) -> Found:
    pinned = _pinned_in_cache(reference)
    if pinned is not None:
        tell(f"{pinned.pinned} is in the cache")
        return pinned
    try:
        commit, files = _listing(reference)
    except Exception as e:
        why = unreachable(e)
        if why is None:
            raise
        return _from_cache(reference, without_secrets(why), tell)
    chosen = choose(reference, files)
    for file in chosen:
        if {"", ".", ".."} & set(re.split(r"[/\\]", file.name)):
            raise HubError(f"{reference.text}: the repo's file name {file.name!r} is not allowed")
    name = _pinned_name(reference, commit, chosen)
    total = sum(file.size or 0 for file in chosen)
    missing = [file for file in chosen if _cached(reference, commit, file.name) is None]
    if missing:
        _check_space(reference, missing)
        parts = f", {len(missing)} of {len(chosen)} parts" if len(chosen) > 1 else ""
        tell(f"downloading {name}{parts}, {size_text(sum(file.size or 0 for file in missing))}")
    else:
        tell(f"{name} is in the cache")
    done = total - sum(file.size or 0 for file in missing)
    for file in missing:
        _download(reference, commit, file, tell, _after(done, total, progress))
        done += file.size or 0
    _remember(reference, commit)
    paths = [_checked(reference, commit, file) for file in chosen]
    return Found(paths[0], commit, name, sum(file.size or 0 for file in missing))


def _checked(reference: Reference, commit: str, file: RepoFile) -> Path:
    """The path of a file in the cache. Raises HubError if it has not the size that the hub has announced."""
    path = _cached(reference, commit, file.name)
    if path is None:
        raise HubError(f"{reference.text}: {file.name} has disappeared from the cache: run the command again")
    size = path.stat().st_size
    if file.size not in (None, size):
        raise HubError(f"{reference.text}: {path} has {size} bytes, not {file.size}: delete it, then try again")
    return path


def _after(before: int, total: int, progress: Progress) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _pinned_in_cache(reference: Reference) -> Found | None:
    """The file of a name with commit and file name, if it is in the cache. It never changes, so no request is sent."""
    commit, name = reference.revision, reference.choice
    if commit is None or name is None or not COMMIT.fullmatch(commit) or not name.lower().endswith(".gguf"):
        return None
    split = SPLIT_NAME.fullmatch(name)
    names = [name]
    if split:
        count = int(split["count"])
        names = [f"{split['prefix']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    paths = [_cached(reference, commit, name) for name in names]
    if not paths or paths[0] is None or None in paths:
        return None
    return Found(paths[0], commit, _pinned_name(reference, commit, [RepoFile(names[0])]), 0)


def _listing(reference: Reference) -> tuple[str, list[RepoFile]]:
    """The commit that the revision currently refers to, and its files."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    if not (get_token() or "").isascii():
        raise HubError(f"{reference.text}: the token (HF_TOKEN) has characters that are not allowed in a token")
    try:
        info = HfApi().model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        commit = info.sha
        files = [RepoFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or []]
    except HFValidationError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        commit, files = None, []
    if commit is None or not COMMIT.fullmatch(commit):
        raise HubError(f"{reference.text}: the server at {endpoint()} is not a hub")
    return commit, files


def _from_cache(reference: Reference, why: str, tell: Tell) -> Found:
    """The model's files in the cache, used if the hub cannot be reached. Raises HubError if there are none."""
    folder = _repo_folder(reference)
    revision = reference.revision or "main"
    with contextlib.suppress(OSError):
        if not COMMIT.fullmatch(revision):
            revision = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    try:
        chosen = choose(reference, _snapshot(folder / "snapshots" / revision))
    except HubError:
        cached = [
            f"{_pinned_name(reference, snapshot.name, model.files)} ({size_text(model.size)})"
            for snapshot in sorted(folder.glob("snapshots/*"))
            for model in models_of(_snapshot(snapshot))
            if len(model.files) == model.n_parts
        ]
        has = (
            f"the cache has only other models of this repo: {', '.join(cached)}"
            if cached
            else f"the cache has no model of this repo ({folder.parent})"
        )
        raise HubError(f"{reference.text}: the hub at {endpoint()} cannot be reached ({why}), and {has}") from None
    name = _pinned_name(reference, revision, chosen)
    tell(f"the hub cannot be reached ({why}): using {name} from the cache")
    return Found(folder / "snapshots" / revision / chosen[0].name, revision, name, 0)


def _snapshot(folder: Path) -> list[RepoFile]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [RepoFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def _repo_folder(reference: Reference) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{reference.repo.replace('/', '--')}"


def _cached(reference: Reference, commit: str, name: str) -> Path | None:
    """The path of a file in the cache, or None. Raises ValueError for a name that would leave the cache's folder."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(reference.repo, name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def _pinned_name(reference: Reference, commit: str, files: Sequence[RepoFile]) -> str:
    return f"hf:{reference.repo}@{commit}:{files[0].name}"


def _check_space(reference: Reference, missing: Sequence[RepoFile]) -> None:
    folder = _repo_folder(reference)
    partial = sum(_partial(folder, file.sha256).stat().st_size for file in missing if _is_begun(folder, file))
    needed = sum(file.size or 0 for file in missing) - partial
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(f"{reference.text}: {no_space(f'{size_text(needed)} are needed, {size_text(free)} are free')}")


def _is_begun(folder: Path, file: RepoFile) -> bool:
    return file.sha256 is not None and _partial(folder, file.sha256).is_file()


def _partial(folder: Path, etag: str | None) -> Path:
    """The path of an unfinished download. Versions 0.x of the library also resume from it."""
    return folder / "blobs" / f"{etag}.incomplete"


def _download(reference: Reference, commit: str, file: RepoFile, tell: Tell, progress: Callable[[int], None]) -> None:
    """Put a file into the cache. This function stores the content under its ETag; the library adds the file's name."""
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(reference.repo, file.name, revision=commit)
    metadata = get_hf_file_metadata(url)
    etag = metadata.etag
    if etag is None or metadata.commit_hash is None or re.fullmatch(r"[\w-]{1,200}", etag, re.ASCII) is None:
        raise HubError(f"{reference.text}: the server at {endpoint()} is not a hub")
    size = metadata.size if file.size is None else file.size
    if size is None or size <= MAX_HTTP_BYTES:
        folder = _repo_folder(reference)
        blob, partial = folder / "blobs" / etag, _partial(folder, etag)
        lock = folder.parent / ".locks" / folder.name / f"{etag}.lock"  # the library's
        for parent in (blob.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(FileLock(lock, timeout=PATIENCE_S))
            except TimeoutError:
                tell(f"{file.name}: another process is downloading it; waiting")
                held.enter_context(FileLock(lock))
            if not blob.exists():
                digest = file.sha256 or (etag if re.fullmatch("[0-9a-f]{64}", etag) else None)
                _complete(reference, RepoFile(file.name, size, digest), url, partial, tell, progress)
                os.replace(partial, blob)
        path = hf_hub_download(reference.repo, file.name, revision=commit)
        if not os.path.islink(path):  # the file system has no links, so the library has made a copy
            blob.unlink(missing_ok=True)
    else:
        hf_hub_download(reference.repo, file.name, revision=commit)


class _Refused(Exception):
    """The response was not the whole file. status: the HTTP status, or None if the response ended too early."""

    def __init__(self, status: int | None) -> None:
        super().__init__("it ended too early" if status is None else f"it answers with HTTP status {status}")
        self.for_now = status is None or status in (408, 429) or status >= 500


def _get(url: str, file: RepoFile, partial: Path, tell: Tell, progress: Callable[[int], None]) -> None:
    """Append the missing rest to `partial`. If a connection breaks, a new one continues where it stopped.

    Raises _Refused or httpx.TransportError if several attempts in a row deliver nothing.
    """
    import httpx
    from huggingface_hub import constants, get_token
    from tqdm import tqdm

    hidden = True if constants.HF_HUB_DISABLE_PROGRESS_BARS else None  # None: hidden only without a terminal
    token = get_token()
    headers = {"Accept-Encoding": "identity"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    done = partial.stat().st_size if partial.exists() else 0
    progress(done)
    n_failures = 0
    # The hub redirects to another host; httpx does not send the token there.
    with (
        open(partial, "ab") as target,
        httpx.Client(headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as client,
        tqdm(desc=file.name, total=file.size, initial=done, unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        while file.size is None or done < file.size:
            try:
                with client.stream("GET", url, headers={"Range": f"bytes={done}-"} if done else {}) as response:
                    if response.status_code >= 400:
                        raise _Refused(response.status_code)
                    if done and response.status_code != 206:  # the server does not support ranges and sends everything
                        target.truncate(0)
                        bar.update(-done)
                        done = 0
                    for chunk in response.iter_bytes(CHUNK_BYTES):
                        target.write(chunk)
                        target.flush()
                        done += len(chunk)
                        n_failures = 0
                        bar.update(len(chunk))
                        progress(done)
                if file.size is None:
                    return
                if done < file.size:
                    raise _Refused(None)
            except (httpx.TransportError, _Refused) as e:
                n_failures += 1
                if n_failures > RETRIES or (isinstance(e, _Refused) and not e.for_now):
                    raise
                tell(f"{file.name}: {without_secrets(one_line(str(e))[:200])}. Trying to resume the download")
                time.sleep(2 ** (n_failures - 1))


def _complete(
    reference: Reference, file: RepoFile, url: str, partial: Path, tell: Tell, progress: Callable[[int], None]
) -> None:
    """Download the missing rest of `partial`, and check the whole file. Raises HubError."""
    done = partial.stat().st_size if partial.exists() else 0
    if file.size is not None and done > file.size:
        partial.unlink()
        done = 0
    if done:
        tell(f"{file.name}: resuming after {size_text(done)} from an earlier run")
    try:
        _get(url, file, partial, tell, progress)
    except Exception as e:
        n_kept = partial.stat().st_size if partial.exists() else 0
        if file.size is not None and n_kept > file.size:  # not this file's bytes
            partial.unlink()
            n_kept = 0
        why = str(e) if isinstance(e, _Refused) else unreachable(e)
        if why is None:
            raise
        why = without_secrets(why)
        advice = f"run the same command again to resume after {size_text(n_kept)}" if n_kept else "try again later"
        raise HubError(f"{reference.text}: the download of {file.name} was interrupted ({why}); {advice}") from None
    if file.size is not None and file.size >= DIGEST_TOLD_BYTES:
        tell(f"{file.name}: checking its SHA-256")
    if file.sha256 is not None and _sha256(partial) != file.sha256:
        partial.unlink()
        if done:
            tell(f"{file.name}: the part from the earlier run was damaged; downloading from the start")
            _complete(reference, file, url, partial, tell, progress)
            return
        raise HubError(
            f"{reference.text}: the downloaded {file.name} did not have the SHA-256 that the hub announced, and was "
            "deleted: run the command again"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(reference: Reference, commit: str) -> None:
    """Store the commit that the revision refers to, in the library's format, for later runs without a network."""
    revision = reference.revision or "main"
    if COMMIT.fullmatch(revision):
        return
    note = _repo_folder(reference) / "refs" / revision
    with contextlib.suppress(OSError):  # a read-only cache
        if note.is_file() and note.read_text(encoding="utf-8") == commit:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(commit)
        os.chmod(temporary, 0o644)
        os.replace(temporary, note)
