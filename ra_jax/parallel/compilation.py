"""Compilation: JAX's persistent compilation cache, and the memory of programs, devices and JAX's caches."""

import ctypes
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ra_jax.xla_flags import exact_options


def compile_lowered(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """Compile a lowered function for `platform`, then return the compiler's freed host memory to the system."""
    program = lowered.compile(compiler_options=exact_options(platform))
    trim_host_memory()
    return program


def clear_jit_caches(platform: str) -> None:
    """Clear JAX's caches if the platform is the CPU, where steps and caches share the host's memory.

    The caches take about a tenth as much memory as a small step. The programs of steps are not in these caches and stay
    compiled. Any other function is traced and compiled again at its next call.
    """
    if platform == "cpu":
        jax.clear_caches()
        trim_host_memory()


def trim_host_memory() -> None:
    """Return freed memory to the operating system; glibc keeps it otherwise."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def enable_compilation_cache(folder: str) -> None:
    """Set the folder in which JAX stores compiled programs for later runs.

    `folder` is the value of `--jax_compilation_cache_dir`: a path, "auto" or "none".
    """
    if folder == "auto" and jax.config.jax_compilation_cache_dir:
        return
    if folder == "auto":
        folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ra_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", None if folder == "none" else folder)


def program_memory(program: jax.stages.Compiled) -> int:
    """Return the peak memory of a compiled program in bytes.

    This is the sum of arguments, outputs that do not reuse a donated argument, temporaries and generated code.
    """
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def device_memory() -> int:
    """Return the number of bytes that a program may use: the memory limit that the device reports.

    A CPU device reports no limit. Then this is the physical memory of the host. With several processes this is the
    minimum over all of them, because all must compile the same program.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if limit is None else limit
    if jax.process_count() == 1:
        return limit
    return int(multihost_utils.process_allgather(np.asarray(limit // 2**20, np.int32)).min()) * 2**20
