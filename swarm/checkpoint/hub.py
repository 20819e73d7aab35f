"""Models on the hub: what a repository holds, without downloading its weights, and single weight files when asked for.

    look_up(repo) --one request--> commit, file names, SHA-256 of the weight files
                  --small files--> config, tokenizer, index      --> Found(path, digest, weight_map, files)
    HubFiles.fetch(shards) --one download each, content checked--> paths
    fetch_files(repo, names) --the same for a repository of any other kind, such as an adapter--> paths

The content digest is computed from the hashes that the hub keeps for large files, so it equals the one of a downloaded
directory. Files go where every program of the hub keeps them (HF_HOME). What a branch pointed to is remembered, so that
a model that was used before is found again without a network.

Trusts the hub's answers no further than a stranger's: names are checked, sizes limited, downloads hashed.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub import errors as hub_errors

from swarm.checkpoint import content
from swarm.checkpoint.cache import file_sha256, write_atomically
from swarm.errors import CheckpointMismatch, UnknownModel

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 10.0
_MAX_SMALL_FILES = 64
_MAX_SMALL_FILE_BYTES = content.MAX_INDEX_BYTES
_SMALL_FILE = re.compile(r"(additional_chat_templates/)?[A-Za-z0-9][\w.\-]*\.(json|txt|model|jinja|tiktoken)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNREACHABLE: tuple[type[Exception], ...] = (OSError, hub_errors.HTTPError)  # type: ignore[attr-defined]
"""OSError includes offline mode and error statuses; HTTPError, of the HTTP library below, refused connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A repository at one commit."""

    path: Path
    """The snapshot directory: config, tokenizer, index, and each weight file once it is fetched."""
    digest: str
    weight_map: dict[str, str]
    files: "HubFiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """The files of one commit of a repository."""

    repo: str
    commit: str
    sha256: dict[str, str] = field(repr=False)
    """Expected content of each weight file."""
    cache_dir: Path
    hub_cache: Path | None = None
    token: str | None = field(default=None, repr=False)
    is_offline: bool = False

    def fetch(self, shards: Iterable[str], /) -> dict[str, Path]:
        """Path of each weight file, after downloading what is missing.

        Raises:
            UnknownModel: a download failed; what was complete is kept.
            CheckpointMismatch: a file has other content than the hub announced.
        """
        paths = {}
        for shard in shards:
            path = paths[shard] = self.download(shard)
            found = file_sha256(path, cache_dir=self.cache_dir)
            if found != self.sha256[shard]:
                raise CheckpointMismatch(
                    f"{shard} of {self.repo} has SHA-256 {found}, the hub announced {self.sha256[shard]}; delete {path}"
                )
        return paths

    def is_here(self, shard: str, /) -> bool:
        """Whether a weight file was downloaded already."""
        found = try_to_load_from_cache(self.repo, shard, cache_dir=self.hub_cache, revision=self.commit)
        return isinstance(found, str)

    def download(self, name: str) -> Path:
        """Download one file unless it is there.

        Raises:
            UnknownModel: the hub can't be reached or refuses.
        """
        try:
            return Path(
                _api(self.token).hf_hub_download(
                    self.repo,
                    name,
                    revision=self.commit,
                    cache_dir=self.hub_cache,
                    local_files_only=self.is_offline,
                )
            )
        except _UNREACHABLE as error:
            raise UnknownModel(f"can't download {name} of {self.repo}: {_reason(error)}") from error


def look_up(
    repo: str,
    *,
    revision: str | None,
    hub_cache: Path | None,
    token: str | None,
    cache_dir: Path,
    is_offline: bool = False,
) -> Found:
    """Find a repository, and download its small files.

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None means the main branch.
        hub_cache: where files go instead of the hub's own cache.
        token: for repositories that need one.
        cache_dir: for what we remember ourselves.
        is_offline: don't ask the hub, now or later.

    Raises:
        UnknownModel: no such repository or revision, no access, or no network and it wasn't used before.
        UnsupportedModel: it has no safetensors.
        CheckpointMismatch: its files contradict each other.
    """
    listing, files = _files(repo, revision, hub_cache, token, cache_dir, is_offline)
    if "config.json" not in listing.small:
        raise UnknownModel(f"{repo} on the hub is no transformers checkpoint: it has no config.json")
    if not {content.INDEX_FILE, content.SINGLE_FILE} & {*listing.small, *listing.weights}:
        raise content.no_safetensors(f"{repo} on the hub", list(listing.weights))
    paths = {name: files.download(name) for name in listing.small}
    directory = paths["config.json"].parent
    if content.INDEX_FILE not in listing.small:
        files.download(content.SINGLE_FILE)  # its header is the index, and every part of the model needs it
    weight_map = content.read_weight_map(directory)
    for shard in sorted(set(weight_map.values())):
        if shard not in listing.weights:
            raise CheckpointMismatch(f"{repo} has no {shard}, which {content.INDEX_FILE} names")
        if shard not in files.sha256:  # small enough for git itself: the hub keeps no SHA-256 of it
            files.sha256[shard] = file_sha256(files.download(shard), cache_dir=cache_dir)
    digest = content.content_digest(
        content.read_config(directory), {shard: files.sha256[shard] for shard in set(weight_map.values())}
    )
    return Found(path=directory, digest=digest, weight_map=weight_map, files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Some files of a repository."""

    paths: dict[str, Path]
    """Of those that were asked for and are there, all in one directory."""
    others: tuple[str, ...]
    """What else lies in the top folder."""


def fetch_files(
    repo: str,
    wanted: Mapping[str, int],
    *,
    revision: str | None,
    hub_cache: Path | None,
    token: str | None,
    cache_dir: Path,
    is_offline: bool = False,
) -> Fetched:
    """Download files of any repository, those that are there.

    Args:
        repo: "org/name".
        wanted: by name in the top folder, the largest size in bytes that is accepted.
        revision, hub_cache, token, cache_dir, is_offline: as for `look_up`.

    Raises:
        UnknownModel: no such repository or revision, no access, or no network and it wasn't used before.
        CheckpointMismatch: a file is too large, or has other content than the hub announced.
    """
    listing, files = _files(repo, revision, hub_cache, token, cache_dir, is_offline)
    names = {*listing.small, *listing.weights}
    paths = {}
    for name, limit in wanted.items():
        if name not in names:
            continue
        if listing.sizes.get(name, 0) > limit:
            raise CheckpointMismatch(f"{name} of {repo} has {listing.sizes[name]} bytes, limit {limit}")
        paths[name] = files.fetch([name])[name] if name in listing.sha256 else files.download(name)
    return Fetched(paths=paths, others=tuple(sorted(names - set(wanted))))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """What a repository holds at a commit."""

    commit: str
    small: tuple[str, ...]
    """Config, tokenizer and index files."""
    weights: tuple[str, ...]
    """All other files of the top folder."""
    sha256: dict[str, str]
    """Of those weight files that the hub stores outside git."""
    sizes: dict[str, int]
    """Of all files of the top folder, where the hub tells."""


def _files(
    repo: str, revision: str | None, hub_cache: Path | None, token: str | None, cache_dir: Path, is_offline: bool
) -> tuple[_Listing, HubFiles]:
    """What a repository has, and what downloads it; arguments and errors as `look_up`."""
    listing = _list(repo, revision or "main", token, cache_dir, is_offline)
    files = HubFiles(
        repo=repo,
        commit=listing.commit,
        sha256=listing.sha256,
        cache_dir=cache_dir,
        hub_cache=hub_cache,
        token=token,
        is_offline=is_offline,
    )
    return listing, files


def _list(repo: str, revision: str, token: str | None, cache_dir: Path, is_offline: bool) -> _Listing:
    """Ask the hub, or without a network remember what it said. A full commit never changes, so it is asked for once."""
    note = cache_dir / "hub" / repo.replace("/", "--") / f"{quote(revision, safe='')}.json"
    remembered = _read_note(note)
    if remembered is not None and (is_offline or _COMMIT.fullmatch(revision)):
        return remembered
    if is_offline:
        raise UnknownModel(
            f"{repo} is not in the cache, and a private swarm calls no host outside itself: fetch it first, with"
            f" `hf download {repo} --local-dir DIR`, and name the directory"
        )
    try:
        listing = _ask(repo, revision, token)
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        raise UnknownModel(_refusal(repo, revision, error)) from error
    except _UNREACHABLE as error:
        if remembered is None:
            raise UnknownModel(
                f"can't look up {repo} (no such directory here, so it is taken for a hub id): {_reason(error)}"
            ) from error
        logger.warning("can't reach the hub (%s); using %s as of commit %.8s", _reason(error), repo, remembered.commit)
        return remembered
    write_atomically(note, json.dumps(asdict(listing)).encode())
    return listing


def _ask(repo: str, revision: str, token: str | None) -> _Listing:
    info = _api(token).model_info(repo, revision=revision, files_metadata=True, timeout=_REQUEST_TIMEOUT_S)
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise CheckpointMismatch(f"the hub named no commit for {repo} at {revision}: {info.sha!r}")
    siblings = info.siblings or []
    small = sorted(it.rfilename for it in siblings if _is_small(it.rfilename, it.size))
    return _Listing(
        commit=info.sha,
        small=tuple(small[:_MAX_SMALL_FILES]),
        weights=tuple(sorted(it.rfilename for it in siblings if "/" not in it.rfilename and it.rfilename not in small)),
        sha256={it.rfilename: it.lfs.sha256 for it in siblings if it.lfs and _SHA256.fullmatch(it.lfs.sha256)},
        sizes={it.rfilename: it.size for it in siblings if "/" not in it.rfilename and it.size is not None},
    )


def _is_small(name: str, size: int | None) -> bool:
    if not _SMALL_FILE.fullmatch(name) or (name.endswith(".index.json") and name != content.INDEX_FILE):
        return False
    return size is None or size <= _MAX_SMALL_FILE_BYTES


def _read_note(note: Path) -> _Listing | None:
    try:
        found = json.loads(note.read_bytes())
        return _Listing(
            commit=found["commit"],
            small=tuple(found["small"]),
            weights=tuple(found["weights"]),
            sha256=dict(found["sha256"]),
            sizes=dict(found["sizes"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _api(token: str | None) -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def _refusal(repo: str, revision: str, error: Exception) -> str:
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{repo} asks for its terms to be accepted on the hub, and then for a token (hf auth login)"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    return f"no model {repo!r} on the hub, or it is private and needs a token (hf auth login); no such directory either"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
