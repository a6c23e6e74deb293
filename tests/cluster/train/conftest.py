"""What tests of training runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway import Gateway


@pytest.fixture
def gateway(s3_endpoint: str) -> Iterator[Gateway]:
    """A way to the S3 store that can be closed."""
    with Gateway(s3_endpoint) as gateway:
        yield gateway
        gateway.shutdown()
