"""Print a secret of Google's Secret Manager: `python -m m2f.cluster.submit.google_secret PROJECT NAME`.

It works on Google Cloud machines whose service account may read the secret. This module uses only the standard
library, because Ray's images contain no client for Secret Manager.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from http.client import HTTPException
from urllib.request import Request, urlopen

from m2f.cluster.submit.spot_notice import METADATA_URLS

SECRET_MANAGER_URL = "https://secretmanager.googleapis.com"
TIMEOUT_S = 10.0
"""Seconds for one request. A node waits for the secret before it starts Ray."""


def read_secret(
    project: str, name: str, metadata: str = METADATA_URLS["gcp"], service: str = SECRET_MANAGER_URL
) -> str:
    """Return the latest version of a secret.

    `metadata` and `service` are the base URLs of the metadata server and of Secret Manager. Raises OSError if one of
    them refuses the request or does not answer, and HTTPException, ValueError or KeyError for an unexpected response.
    """
    account = f"{metadata}/computeMetadata/v1/instance/service-accounts/default/token"
    token = _request_json(account, {"Metadata-Flavor": "Google"})["access_token"]
    url = f"{service}/v1/projects/{project}/secrets/{name}/versions/latest:access"
    response = _request_json(url, {"Authorization": f"Bearer {token}"})
    return base64.b64decode(response["payload"]["data"]).decode().strip()


def _request_json(url: str, headers: dict[str, str]) -> Mapping[str, Mapping[str, str]]:
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as response:
        return json.load(response)


def main(arguments: list[str]) -> int:
    """Print the secret. Return exit status 2 for wrong arguments, 1 if the secret cannot be read, otherwise 0."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m m2f.cluster.submit.google_secret PROJECT NAME\n")
        return 2
    project, name = arguments
    try:
        sys.stdout.write(read_secret(project, name) + "\n")
    except (OSError, HTTPException, ValueError, KeyError) as error:
        sys.stderr.write(
            f"the secret {name} of {project} cannot be read ({type(error).__name__}: {error}); give the machine's "
            "service account roles/secretmanager.secretAccessor on it\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
