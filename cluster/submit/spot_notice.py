"""Watch for the preemption notice of a spot machine and drain its Ray node, so that the run saves a checkpoint.

Every spot machine runs `python -m m2f.cluster.submit.spot_notice aws` (or gcp). On Kubernetes, a preStop hook drains
the node instead. This module uses only the standard library.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Literal, get_args
from urllib.error import HTTPError
from urllib.request import Request, urlopen

LOGGER = logging.getLogger(__name__)
Cloud = Literal["aws", "gcp"]
POLL_S, TIMEOUT_S = 2.0, 2.0
"""Pause between two requests and limit of one, in seconds. Both together fit into the safety margin of NOTICE_S."""
METADATA_URLS: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
NOTICE_S: dict[Cloud, int] = {"aws": 110, "gcp": 25}
"""Seconds that the machine keeps running after the notice, minus a safety margin."""


def drain_on_notice(
    cloud: Cloud, drain: Callable[[int], None], metadata: str | None = None, poll_s: float = POLL_S
) -> None:
    """Wait for the notice, then call `drain(seconds_left)` once. `metadata` replaces the URL of the metadata server."""
    while not is_preempted(cloud, metadata or METADATA_URLS[cloud]):
        time.sleep(poll_s)
    drain(NOTICE_S[cloud])


def is_preempted(cloud: Cloud, metadata: str) -> bool:
    """Return whether the cloud has announced the preemption of this machine.

    Returns False if the metadata server does not answer.
    """
    try:
        match cloud:
            case "aws":
                token = _request(
                    f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT"
                )
                url = f"{metadata}/latest/meta-data/spot/instance-action"
                return bool(_request(url, {"X-aws-ec2-metadata-token": token}))
            case "gcp":
                url = f"{metadata}/computeMetadata/v1/instance/preempted"
                return _request(url, {"Metadata-Flavor": "Google"}).strip() == "TRUE"
    except HTTPError as error:
        if error.code != 404:  # AWS answers 404 without a notice
            LOGGER.warning("%s: %s", metadata, error)
    except (OSError, HTTPException) as error:  # the next poll asks again
        LOGGER.warning("%s: %s: %s", metadata, type(error).__name__, error)
    return False


def drain_this_node(seconds: int) -> None:
    """Drain this node with Ray's command, which finds the node that it runs on."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    subprocess.run(["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)], check=True)


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urlopen(Request(url, headers=headers, method=method), timeout=TIMEOUT_S) as response:
        return response.read().decode()


def main(arguments: list[str]) -> int:
    """Watch for the notice and drain the node. Return exit status 2 for an unknown cloud, otherwise 0."""
    for cloud in get_args(Cloud):
        if arguments == [cloud]:
            drain_on_notice(cloud, drain_this_node)
            return 0
    sys.stderr.write(f"usage: python -m m2f.cluster.submit.spot_notice {'|'.join(get_args(Cloud))}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
