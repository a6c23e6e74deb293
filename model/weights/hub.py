"""Weights of the Hugging Face hub, downloaded into its own cache: safetensors only, no files that can contain code."""

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
_CONFIGS = ("config.json", "preprocessor_config.json")
"""Config files that transformers stores beside the weights."""
_TIMM_WEIGHTS = (_WEIGHTS, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of weights that timm loads. It prefers safetensors and reads the others without executing code."""
_TIMEOUT_S = 4.0
"""Maximum seconds to wait for the hub's answer. Name resolution alone could otherwise take longer."""
_REMEDY = (
    "to a folder that was downloaded elsewhere, set HF_ENDPOINT to a mirror, or set HF_HUB_OFFLINE=1 with a cache "
    "(HF_HOME) that contains the model"
)
"""End of a message, after `set` and the name of the setting."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Listing:
    """Commit and file names of a revision, as listed by the hub."""

    commit: str
    files: tuple[str, ...]


def pin_revision(text: str, setting: str = "model.weights") -> str:
    """Return the address with its revision replaced by the current commit, or by the cached one if offline.

    Raises WeightsError, which names `setting`, if the hub has no such model, if neither hub nor cache knows the
    revision (after at most 5 s), or if `config.json` cannot be downloaded.
    """
    address = HubAddress.parse(text, setting)
    if address.is_commit:
        return text
    found = _query_hub(address, setting)
    if not isinstance(found, _Listing):
        folder = _cached_folder(address)
        if folder is None:
            raise _unavailable_error(address, found, setting)
        return str(HubAddress(address.repo, folder.name))
    if _CONFIGS[0] not in found.files:
        return str(HubAddress(address.repo, found.commit))
    # Download by the revision's name, so that the cache can resolve it later without a network.
    return str(HubAddress(address.repo, _download(address, [_CONFIGS[0]], setting).name))


def hub_folder(text: str, *, weights: bool = True, setting: str = "model.weights") -> Path:
    """Return the local folder of a hub model, as `save_pretrained` writes it.

    Without `weights`, the folder holds config files only. Files in the cache are not downloaded again. Raises
    WeightsError if the hub is not reachable, has no such model, or has no safetensors files for it.
    """
    address = HubAddress.parse(pin_revision(text, setting))
    cached = _cached_folder(address)
    if cached is not None and (_has_weights(cached) or (not weights and (cached / _CONFIGS[0]).is_file())):
        return cached
    # This fails within 5 s; a download without a network would be retried for minutes.
    listing = _query_hub(address, setting)
    if not isinstance(listing, _Listing):
        raise _unavailable_error(address, listing, setting)
    if weights and not {_WEIGHTS, _INDEX} & set(listing.files):
        raise WeightsError(
            f"{setting} is {text}, which has neither {_WEIGHTS} nor {_INDEX}; other files may contain code and "
            f"are not downloaded. Choose a model with safetensors, or convert it and set {setting} to the folder"
        )
    patterns = [*_CONFIGS, _WEIGHTS] if _WEIGHTS in listing.files else [*_CONFIGS, _INDEX, _SHARDS]
    names = [name for name in listing.files if any(fnmatch(name, pattern) for pattern in patterns)]
    return _download(address, names if weights else [name for name in names if name in _CONFIGS], setting)


def unavailable_reason(repo: str) -> str | None:
    """Return why a timm model OWNER/NAME of the hub is not available, or None if the cache or the hub has it.

    Takes at most 5 s.
    """
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repo, name), str) for name in _TIMM_WEIGHTS):
        return None
    try:
        found = _query_hub(HubAddress(repo))
    except WeightsError:
        return f"the hub has no {repo}, or requires a token for it (HF_TOKEN)"
    return found if isinstance(found, str) else None


def _download(address: HubAddress, names: list[str], setting: str) -> Path:
    from huggingface_hub import hf_hub_download

    if not names:
        raise WeightsError(f"{setting} is {address}, which has no {_CONFIGS[0]}; choose a transformers model")
    try:
        paths = [Path(hf_hub_download(address.repo, name, revision=address.revision)) for name in names]
    except Exception as error:  # downloads fail with many exception types
        reason = f"the download failed ({_first_line(error)}){_token_remedy(error)}"
        raise WeightsError(f"{setting} is {address}, but {reason}; set {setting} {_REMEDY}") from error
    return paths[0].parent


def _query_hub(address: HubAddress, setting: str = "model.weights") -> _Listing | str:
    """Return the hub's listing, or why the hub gives none. Raises WeightsError if the hub has no such model."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        info = _run_with_timeout(
            _TIMEOUT_S, lambda: HfApi().model_info(address.repo, revision=address.revision, timeout=_TIMEOUT_S)
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise WeightsError(
            f"{setting} is {address}, but {constants.ENDPOINT} has no such model or revision, or requires a token "
            "for it (HF_TOKEN); check owner, name and revision"
        ) from error
    except HfHubHTTPError as error:
        return f"{constants.ENDPOINT} answers with an error ({_first_line(error)}){_token_remedy(error)}"
    except (ValueError, LookupError, TypeError) as error:  # for example the login page of a proxy
        return f"{constants.ENDPOINT} answers with an error (not a description of a model: {_first_line(error)})"
    except Exception as error:  # connections fail with many exception types
        return f"{constants.ENDPOINT} does not answer ({_first_line(error)})"
    if info.sha is None:
        return f"{constants.ENDPOINT} did not return a commit"
    return _Listing(info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))


def _unavailable_error(address: HubAddress, reason: str, setting: str) -> WeightsError:
    return WeightsError(f"{setting} is {address}, which is not in the cache, and {reason}; set {setting} {_REMEDY}")


def _cached_folder(address: HubAddress) -> Path | None:
    """Return the cached folder of a revision, complete or not, or None. The folder's name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    for name in (*_CONFIGS, _WEIGHTS, _INDEX):
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


def _run_with_timeout(seconds: float, function: Callable[[], _T]) -> _T:
    """Run `function` in a thread and return its result or raise its error; raise TimeoutError after `seconds`.

    After a timeout, the thread continues in the background until `function` ends.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _token_remedy(error: Exception) -> str:
    """Return what to do if the hub refuses access; empty for other errors."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
