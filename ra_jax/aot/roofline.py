"""Memory that a compiled step needs per chip, and lower bounds of its compute and communication time."""

from dataclasses import asdict, dataclass

import jax

from ra_jax.aot.abstract_step import AbstractStep
from ra_jax.aot.hlo import Program
from ra_jax.aot.topology import Chip


@dataclass(frozen=True)
class Footprint:
    """Memory of one chip, in bytes.

    Attributes:
        arguments: train state, weights and batch.
        temporaries: everything else in memory at the peak, including the program's code.
        available: memory of the chip.
    """

    arguments: int
    temporaries: int
    available: int

    @classmethod
    def from_program(cls, program: jax.stages.Compiled, chip: Chip) -> "Footprint":
        """Read from the compiler's memory analysis how much memory `program` needs per chip."""
        memory = program.memory_analysis()
        # Aliased outputs are the new train state, which reuses the memory of the donated one.
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + max(0, outputs)
        return cls(memory.argument_size_in_bytes, temporaries, int(chip.memory))

    @property
    def total(self) -> int:
        """Bytes in use at the peak: arguments and temporaries."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the total fits the memory of the chip."""
        return self.total <= self.available


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the step time. They are computed, not measured.

    Attributes:
        flops: model FLOPs of the whole step over all chips (`models.flops.step_flops`).
        compute_seconds: time for these FLOPs if every chip computes at its peak.
        collective_bytes: bytes that one chip sends, by kind of collective.
        collective_seconds: time to send these bytes if all links of the chip run at full bandwidth.
    """

    flops: float
    compute_seconds: float
    collective_bytes: dict[str, float]
    collective_seconds: float

    @classmethod
    def from_program(cls, program: jax.stages.Compiled, step: AbstractStep, chip: Chip) -> "Roofline":
        """Compute the bounds for `program`, which is `step` compiled for chips of the kind `chip`."""
        chips = step.partitioner.mesh.size
        sent_bytes = Program(program.as_text()).collective_bytes
        return cls(
            flops=step.flops,
            compute_seconds=step.flops / chips / chip.peak_flops,
            collective_bytes=sent_bytes,
            collective_seconds=sum(sent_bytes.values()) / chip.link_bandwidth,
        )

    @property
    def seconds(self) -> float:
        """Lower bound of the step time [s]: the larger of compute and communication time.

        It assumes that compute and communication overlap fully.
        """
        return max(self.compute_seconds, self.collective_seconds)

    @property
    def mfu_bound(self) -> float:
        """Upper bound of the model FLOPs utilization (MFU): compute_seconds / seconds, at most 1."""
        return self.compute_seconds / self.seconds

    def to_dict(self) -> dict:
        """Return the fields, `seconds` and `mfu_bound` by name, for JSON."""
        return asdict(self) | {"seconds": self.seconds, "mfu_bound": self.mfu_bound}
