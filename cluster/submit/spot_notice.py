"""Runs on a spot machine: polls the cloud for the preemption notice and drains the Ray node, so that the run saves.

`python -m m2f.cluster.submit.spot_notice aws` (or gcp); on Kubernetes a preStop hook does the same. Standard library
only.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

LOGGER = logging.getLogger(__name__)
Cloud = Literal["aws", "gcp"]
POLL_S = 2.0
TIMEOUT_S = 2.0
METADATA: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
NOTICE_S: dict[Cloud, int] = {"aws": 110, "gcp": 25}
"""How long the machine stays after the notice, less a margin."""


def watch(cloud: Cloud, drain: Callable[[int], None], metadata: str | None = None, poll_s: float = POLL_S) -> None:
    """Wait for the notice, then call `drain(seconds left)` once. `metadata` is the address of another server."""
    while not is_preempted(cloud, metadata or METADATA[cloud]):
        time.sleep(poll_s)
    drain(NOTICE_S[cloud])


def is_preempted(cloud: Cloud, metadata: str) -> bool:
    """Whether the cloud has announced the end of this machine; False where the metadata server does not answer."""
    try:
        match cloud:
            case "aws":
                token = _ask(
                    f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT"
                )
                url = f"{metadata}/latest/meta-data/spot/instance-action"
                return bool(_ask(url, {"X-aws-ec2-metadata-token": token}))
            case "gcp":
                url = f"{metadata}/computeMetadata/v1/instance/preempted"
                return _ask(url, {"Metadata-Flavor": "Google"}).strip() == "TRUE"
    except HTTPError as error:
        if error.code != 404:  # AWS: no notice
            LOGGER.warning("%s: %s", metadata, error)
    except (URLError, OSError) as error:
        LOGGER.warning("%s: %s", metadata, error)
    return False


def drain_this_node(seconds: int) -> None:
    """Ray's own command, which finds the node that it runs on."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    subprocess.run(["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)], check=True)


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urlopen(Request(url, headers=headers, method=method), timeout=TIMEOUT_S) as answer:
        return answer.read().decode()


def main(arguments: list[str]) -> int:
    """Exit status 2 for an unknown cloud."""
    for cloud in get_args(Cloud):
        if arguments == [cloud]:
            watch(cloud, drain_this_node)
            return 0
    sys.stderr.write(f"usage: python -m m2f.cluster.submit.spot_notice {'|'.join(get_args(Cloud))}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
