"""TPU topologies: devices to compile for without TPU hardware, and the published specifications of the chips."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

import jax

from ra_jax.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """Specifications of a TPU chip, from Google's "TPU system architecture" pages.

    Attributes:
        peak_flops: peak rate of dense bf16 matrix products [FLOP/s].
        memory: memory of the chip [bytes].
        link_bandwidth: total bandwidth of all links to other chips, in one direction [bytes/s].
        dimensions: number of dimensions of the grid of chips.
    """

    peak_flops: float
    memory: float
    link_bandwidth: float
    dimensions: int = 2


CHIPS = {
    "v5e": Chip(197e12, 16e9, 200e9),
    "v5p": Chip(459e12, 95e9, 600e9, dimensions=3),
    "v6e": Chip(918e12, 32e9, 448e9),
}
EXAMPLES = ("v5e:1x1", "v5e:4x4", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v6e:2x4", "v6e:8x8", "v6e:16x16")


def topology_devices(name: str) -> tuple[list[jax.Device], Chip]:
    """Return the devices of a topology such as "v5e:4x4", and the specifications of its chips.

    This needs the package libtpu, but no TPU.

    Raises:
        ConfigError: libtpu does not support the topology, or libtpu is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+" + r"x\d+" * (CHIPS[kind].dimensions - 1), shape):
        raise ConfigError(
            f"--topology {name}: unknown; expected a kind of chip and a grid, such as {', '.join(EXAMPLES)}"
        )
    if find_spec("libtpu") is None:
        raise ConfigError(f"--topology {name}: compiling for a TPU needs libtpu: pip install 'ra_jax[tpu]'")
    # Without these settings, libtpu waits for the metadata server of a TPU machine, and only one process can load it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-1")
    from jax.experimental import topologies

    # By default libtpu assumes that a host has 2 x 2 chips. A topology of a single chip has no such host.
    single_chip = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **single_chip)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology {name}: not supported by libtpu ({error}); expected a kind of chip and a grid, such as "
            f"{', '.join(EXAMPLES)}"
        ) from error
    return list(description.devices), CHIPS[kind]
