"""Weights of the Hugging Face hub, fetched into its own cache: safetensors only, nothing that holds code."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from m2f.model.errors import WeightsError
from m2f.model.weights.sources import HubAddress

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"
_NOTES = ("config.json", "preprocessor_config.json")
"""Names that transformers gives the files of a model."""
_PATIENCE_S = 4.0
"""How long the hub may take to say what it has; looking its name up may hang for longer by itself."""
_REMEDY = (
    "give model.weights the path of a folder that was downloaded elsewhere, set HF_ENDPOINT to a mirror, or set "
    "HF_HUB_OFFLINE=1 with a cache (HF_HOME) that has the model"
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Listing:
    """What the hub says of a revision."""

    commit: str
    files: tuple[str, ...]


def pinned(text: str) -> str:
    """The same address with the commit that its revision means now; where the hub cannot be asked, in the cache.

    Raises WeightsError within 5 s where neither knows it, or where the hub has no such model.
    """
    address = HubAddress.parse(text)
    if address.is_commit:
        return text
    found = _ask(address)
    if not isinstance(found, _Listing):
        folder = _cached_folder(address)
        if folder is None:
            raise _not_to_be_had(address, found)
        return str(HubAddress(address.repo, folder.name))
    if _NOTES[0] not in found.files:
        return str(HubAddress(address.repo, found.commit))
    # Under the revision's own name, so that the cache knows later, without a network, what it means.
    return str(HubAddress(address.repo, _download(address, [_NOTES[0]]).name))


def hub_folder(text: str, *, weights: bool = True) -> Path:
    """The local folder of a model of the hub, as `save_pretrained` writes one; without `weights` its notes alone.

    What the cache has is not fetched again. Raises WeightsError where the hub cannot be reached, has no such model, or
    has no safetensors of it.
    """
    address = HubAddress.parse(pinned(text))
    cached = _cached_folder(address)
    if cached is not None and (_has_weights(cached) or (not weights and (cached / _NOTES[0]).is_file())):
        return cached
    listing = _ask(address)  # within 5 s, where a download without a network would be tried for minutes
    if not isinstance(listing, _Listing):
        raise _not_to_be_had(address, listing)
    if weights and not {_WEIGHTS, _INDEX} & set(listing.files):
        raise WeightsError(
            f"model.weights is {text}, which has neither {_WEIGHTS} nor {_INDEX}; other files may hold code and are "
            "not fetched. Choose a model with safetensors, or convert it and give the path of the folder"
        )
    wanted = [*_NOTES, _WEIGHTS] if _WEIGHTS in listing.files else [*_NOTES, _INDEX, _SHARDS]
    names = [name for name in listing.files if any(fnmatch(name, pattern) for pattern in wanted)]
    return _download(address, names if weights else [name for name in names if name in _NOTES])


def unavailable(repo: str) -> str | None:
    """Why a model of the hub, OWNER/NAME, cannot be had; None where the cache or the hub has it. Answers within 5 s."""
    address = HubAddress(repo)
    cached = _cached_folder(address)
    if cached is not None and _has_weights(cached):
        return None
    try:
        found = _ask(address)
    except WeightsError:
        return f"the hub has no {repo}, or shows it only with a token (HF_TOKEN)"
    return found if isinstance(found, str) else None


def _download(address: HubAddress, names: list[str]) -> Path:
    from huggingface_hub import hf_hub_download

    if not names:
        raise WeightsError(f"model.weights is {address}, which has no {_NOTES[0]}; choose a model of transformers")
    try:
        paths = [Path(hf_hub_download(address.repo, name, revision=address.revision)) for name in names]
    except Exception as error:  # what cannot be fetched fails in many ways
        reason = f"the download failed ({_first_line(error)})"
        raise WeightsError(f"model.weights is {address}, and {reason}; {_REMEDY}") from error
    return paths[0].parent


def _ask(address: HubAddress) -> _Listing | str:
    """What the hub has, or why it cannot be asked. Raises WeightsError where it says that there is no such model."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        info = _within(
            _PATIENCE_S, lambda: HfApi().model_info(address.repo, revision=address.revision, timeout=_PATIENCE_S)
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise WeightsError(
            f"model.weights is {address}, and {constants.ENDPOINT} has no such model or revision, or shows it only "
            "with a token (HF_TOKEN); check owner, name and revision"
        ) from error
    except Exception as error:  # what cannot be reached fails in many ways
        return f"{constants.ENDPOINT} does not answer ({_first_line(error)})"
    if info.sha is None:
        return f"{constants.ENDPOINT} does not say which commit it is"
    return _Listing(info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))


def _not_to_be_had(address: HubAddress, reason: str) -> WeightsError:
    return WeightsError(f"model.weights is {address}, which the cache lacks, and {reason}; {_REMEDY}")


def _cached_folder(address: HubAddress) -> Path | None:
    """The folder of a revision in the cache, complete or not; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    for name in (*_NOTES, _WEIGHTS, _INDEX):
        found = try_to_load_from_cache(address.repo, name, revision=address.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _has_weights(folder: Path) -> bool:
    if (folder / _WEIGHTS).is_file():
        return True
    try:
        shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """What `ask` returns or raises. Raises TimeoutError after `seconds`; its thread then ends when it can."""
    outcome: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
