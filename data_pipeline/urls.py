"""Check URLs before they are stored in a recipe, checkpoint, job, log or in MLflow: none may hold a secret.

A URL is refused if it has more than scheme, host, port and path, whatever the rest looks like, because a token cannot
be distinguished from a name.
"""

from __future__ import annotations

import re

REMEDY = (
    "Remove that part, and set credentials in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "or MLFLOW_TRACKING_TOKEN, for an MLflow server; PGUSER and PGPASSWORD for a PostgreSQL database; "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a store"
)
"""Last sentence of messages about a result of `url_problem`."""

REMOVED = "(removed: it may have held a secret)"

_IGNORED_CHARACTERS = re.compile(r"^[\x00-\x20]+|[\t\r\n]")  # characters that URL clients ignore
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?")
_BUCKET = re.compile(r"[A-Za-z0-9._-]*")
_USER = re.compile(r"[^/@]*:.*@", re.DOTALL)
_PATH_SCHEMES = ("file", "s3", "sqlite")
"""Schemes whose paths may hold an `@`, because their URLs have no user."""
_NAME_SCHEMES = ("hf-hub", "hf_hub", "hub", "local-dir")
"""Prefixes of model names in timm and `model.weights`; such a name may end with `@revision`."""


def url_problem(text: str) -> str | None:
    """Return why a URL may not be stored, as the end of a sentence, or None if it may.

    A text that is not a URL may be stored, unless it looks like `user:password@host`. The result does not repeat the
    text.
    """
    text = _IGNORED_CHARACTERS.sub("", text)
    scheme, authority, path, extra = _split(text)
    holds_paths = _kind(scheme) in _PATH_SCHEMES
    if authority is None:
        is_name = holds_paths or scheme in _NAME_SCHEMES
        return "has a user or password before an @" if not is_name and _USER.match(text) else None
    if scheme and not _SCHEME.fullmatch(scheme):
        return "does not start with a URL scheme"
    if "@" in authority or ("@" in path + extra and not holds_paths):
        return "has a user, token or password before an @ (write %40 for an @ in a path)"
    if extra or (";" in path and not holds_paths):
        return "has parameters after ?, # or ;"
    if not (_BUCKET if _kind(scheme) == "s3" else _HOST).fullmatch(authority):
        return "has something other than host and port, or a bucket name, after ://"
    return "contains a second URL" if "://" in path else None


def without_secrets(text: str) -> str:
    """Return the text without the parts that `url_problem` refuses; REMOVED if scheme, host and path are unclear."""
    if url_problem(text) is None:
        return text
    scheme, authority, path, extra = _split(_IGNORED_CHARACTERS.sub("", text))
    if not scheme or authority is None:
        return REMOVED
    shorter = f"{scheme}://{authority.rpartition('@')[2]}{path}"
    if url_problem(shorter) is not None:
        rest = f"{authority}{path}{extra}".rpartition("@")[2]
        shorter = f"{scheme}://{re.split('[?#;]', rest)[0]}"
    return REMOVED if url_problem(shorter) is not None else shorter


def _kind(scheme: str) -> str:
    """Return a scheme without its driver, in lower case: `mysql` for `mysql+pymysql`."""
    return scheme.partition("+")[0].lower()


def _split(text: str) -> tuple[str, str | None, str, str]:
    """Return scheme, authority, path with its first slash, and the rest, which starts with ? or #.

    If the text is not a URL, the scheme is the part before its first colon, the authority is None, and the others are
    empty.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text.startswith("//"):
            return text.partition(":")[0], None, "", ""
        scheme, rest = "", text[2:]
    address, mark, extra = _cut(rest, "?#")
    authority, slash, path = _cut(address, "/\\")
    return scheme, authority, slash + path, mark + extra


def _cut(text: str, marks: str) -> tuple[str, str, str]:
    """Split a text at the first of the marks. Return the text before it, the mark, and the text after it."""
    index = next((i for i, character in enumerate(text) if character in marks), len(text))
    return text[:index], text[index : index + 1], text[index + 1 :]
