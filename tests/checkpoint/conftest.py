"""A cache folder of its own for every test; slow tests share the user's, so that the real model is fetched once."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
