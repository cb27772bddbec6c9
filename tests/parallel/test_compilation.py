"""The memory of devices, and the cache folder of compiled programs."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ra_jax.parallel.compilation import device_memory, enable_compilation_cache


def test_processes_use_the_memory_of_the_smallest_device(monkeypatch):
    own = device_memory()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, x - 1000]))
    assert device_memory() == (own // 2**20 - 1000) * 2**20


@pytest.fixture
def cache_dir():
    """The cache folder of the test session, which is restored after the test."""
    before = jax.config.jax_compilation_cache_dir
    yield before
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_by_default(cache_dir, monkeypatch, tmp_path):
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ra_jax/compiled")
    enable_compilation_cache("none")
    assert jax.config.jax_compilation_cache_dir is None
