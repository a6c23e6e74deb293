"""Prints a secret of Google's Secret Manager: `python -m m2f.cluster.submit.google_secret PROJECT NAME`.

For machines of Google, whose service account may read it: Ray's images hold no client for it. Standard library only.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from urllib.error import URLError
from urllib.request import Request, urlopen

from m2f.cluster.submit.spot_notice import METADATA

SERVICE = "https://secretmanager.googleapis.com"
TIMEOUT_S = 10.0


def read_secret(project: str, name: str, metadata: str = METADATA["gcp"], service: str = SERVICE) -> str:
    """The latest version; `metadata` and `service` are addresses. Raises OSError where one refuses or is silent."""
    account = f"{metadata}/computeMetadata/v1/instance/service-accounts/default/token"
    token = _ask(account, {"Metadata-Flavor": "Google"})["access_token"]
    url = f"{service}/v1/projects/{project}/secrets/{name}/versions/latest:access"
    answer = _ask(url, {"Authorization": f"Bearer {token}"})
    return base64.b64decode(answer["payload"]["data"]).decode().strip()


def _ask(url: str, headers: dict[str, str]) -> Mapping[str, Mapping[str, str]]:
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def main(arguments: list[str]) -> int:
    """Exit status 2 for other arguments than a project and a name, 1 where the secret cannot be read."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m m2f.cluster.submit.google_secret PROJECT NAME\n")
        return 2
    project, name = arguments
    try:
        sys.stdout.write(read_secret(project, name) + "\n")
    except (URLError, OSError) as error:
        sys.stderr.write(
            f"the secret {name} of {project} cannot be read ({error}); give the machine's service account "
            "roles/secretmanager.secretAccessor on it\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
