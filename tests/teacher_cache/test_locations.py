"""Where labels are, and the warning of a token that others can read."""

from __future__ import annotations

import pytest

from sskt.teacher_cache import locations
from sskt.teacher_cache.locations import label_location


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_warned", set())


def test_a_token_over_plain_http_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSKT_TOKEN", "sskt_secret")
    for _ in range(3):
        label_location("http://labels.example.org:8080")
    (record,) = caplog.records
    assert "is sent unencrypted to http://labels.example.org:8080" in record.getMessage()
    assert "sskt_secret" not in record.getMessage()


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://labels.example.org", "sskt_secret"),
        ("http://127.0.0.1:8080", "sskt_secret"),
        ("http://[::1]:8080", "sskt_secret"),
        ("http://localhost:8080/labels", "sskt_secret"),
        ("http://labels.example.org", ""),
        ("s3://bucket/labels", "sskt_secret"),
        ("labels", "sskt_secret"),
    ],
)
def test_where_no_token_can_be_read_nothing_is_said(
    url: str, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSKT_TOKEN", token)
    label_location(url)
    assert caplog.records == []
