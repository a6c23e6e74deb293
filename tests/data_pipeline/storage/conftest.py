"""Fixtures of the tests of storage: short pauses between attempts, fictitious credentials, and no known endpoints."""

from __future__ import annotations

import pytest

from m2f.data_pipeline.storage import s3 as s3_store


@pytest.fixture(autouse=True)
def _no_reached_endpoints(monkeypatch):
    """Reset the endpoints that have answered this process, because tests share addresses."""
    monkeypatch.setattr(s3_store, "_REACHED_ENDPOINTS", set())


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch):
    monkeypatch.setattr(s3_store, "_BACKOFF_BASE_S", 0.001)
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
