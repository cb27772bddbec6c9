"""Compiling: the cache between runs, and the memory that programs and their compiler need."""

import ctypes
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ra_jax.xla_flags import exact_options


def compile_lowered(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """The program for such devices; memory of the host that its compiler needed goes back to the system."""
    program = lowered.compile(compiler_options=exact_options(platform))
    trim_host_memory()
    return program


def clear_jit_caches(platform: str) -> None:
    """Clear JAX's caches where the host's memory is the devices' own: a tenth of what a small step takes.

    Compiled steps stay; any other function is traced and compiled again when it is called again.
    """
    if platform == "cpu":
        jax.clear_caches()
        trim_host_memory()


def trim_host_memory() -> None:
    """Memory that was freed goes back to the system, which glibc does not do by itself."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def enable_compilation_cache(where: str) -> None:
    """Have JAX keep compiled programs in a folder between runs: see `--jax_compilation_cache_dir`."""
    if where == "auto" and jax.config.jax_compilation_cache_dir:
        return
    if where == "auto":
        where = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ra_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", None if where == "none" else where)


def program_memory(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs at its peak: arguments, results that are not arguments, temporaries."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def device_memory() -> int:
    """Bytes that a program may use: the device's own limit, or the host's memory where it has none (CPU); of several
    processes the least, since all have to compile the same program."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if limit is None else limit
    if jax.process_count() == 1:
        return limit
    return int(multihost_utils.process_allgather(np.asarray(limit // 2**20, np.int32)).min()) * 2**20
