"""What a compiled step needs and how fast it can be: memory, arithmetic and communication of a chip."""

from dataclasses import asdict, dataclass

import jax

from ra_jax.aot.abstract_step import TracedStep
from ra_jax.aot.hlo import Program
from ra_jax.aot.topology import Chip


@dataclass(frozen=True)
class Footprint:
    """Bytes of a chip. arguments: state, weights and batch; temporaries: what else is alive at the peak."""

    arguments: int
    temporaries: int
    available: int

    @classmethod
    def of(cls, program: jax.stages.Compiled, chip: Chip) -> "Footprint":
        """What a program for such chips needs of each, by the compiler's own account."""
        memory = program.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state is donated
        temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + max(0, outputs)
        return cls(memory.argument_size_in_bytes, temporaries, int(chip.memory))

    @property
    def total(self) -> int:
        """Bytes in use at the peak."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the chip has that much memory."""
        return self.total <= self.available


@dataclass(frozen=True)
class Roofline:
    """Bounds of a step's time, none of them measured.

    flops: model FLOPs of the whole step (`training.flops.step_flops`); compute_seconds: those at every chip's peak;
    collective_bytes: that a chip sends, by kind; collective_seconds: those over all its links; seconds: the larger of
    the two, as if one were done behind the other; mfu_bound: compute_seconds / seconds.
    """

    flops: float
    compute_seconds: float
    collective_bytes: dict[str, float]
    collective_seconds: float

    @classmethod
    def of(cls, program: jax.stages.Compiled, step: TracedStep, chip: Chip) -> "Roofline":
        """The bounds of a step's program on such chips."""
        chips = step.partitioner.mesh.size
        moved = Program(program.as_text()).collectives
        return cls(step.flops, step.flops / chips / chip.peak, moved, sum(moved.values()) / chip.link_bandwidth)

    @property
    def seconds(self) -> float:
        """Bound of the step's time [s]."""
        return max(self.compute_seconds, self.collective_seconds)

    @property
    def mfu_bound(self) -> float:
        """Largest possible share of all chips' peak that model FLOPs make."""
        return self.compute_seconds / self.seconds

    def to_dict(self) -> dict:
        """Fields and bounds by name, for JSON."""
        return asdict(self) | {"seconds": self.seconds, "mfu_bound": self.mfu_bound}
