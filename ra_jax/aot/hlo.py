"""Bytes that a compiled program sends between chips, computed from its HLO text."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

# Bits of one element, by HLO type.
DTYPE_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
# Bytes that each of n chips sends in a ring algorithm, per byte of the collective's result, by kind of collective.
RING_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # the result is 1/n of the array that is reduced
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Instruction:
    """An HLO instruction.

    Attributes:
        name: its name, without the leading %.
        opcode: its operation, such as "all-gather".
        text: everything right of the `=`.
    """

    name: str
    opcode: str
    text: str

    @property
    def result_bytes(self) -> float:
        """Bytes of the result.

        The result of the start of an asynchronous collective also lists the operands. Their bytes do not count.
        """
        result = self.text[: self.text.index(f" {self.opcode}(")]
        sizes = [
            DTYPE_BITS[kind] * prod(map(int, filter(None, dims.split(",")))) / 8
            for kind, dims in _SHAPE.findall(result)
            if kind in DTYPE_BITS
        ]
        # A start returns (operands, results, …). Only the start of an all-reduce returns just the results.
        if self.opcode.endswith("-start") and self.opcode != "all-reduce-start":
            sizes = [size for size in sizes if size > 4] or sizes  # drops the 4-byte synchronization words
            sizes = sizes[len(sizes) // 2 :]
        return sum(sizes)

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction calls."""
        names = []
        for single, several in _CALLED.findall(self.text):
            names += [single] if single else [name.strip(" %") for name in several.split(",")]
        return names

    def attribute(self, name: str) -> str | None:
        """Return the value of an attribute such as `channel_id`, or None if the instruction has no such attribute.

        A leading % of the value is dropped.
        """
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return match and match[1]


class Program:
    """The computations of an HLO module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        name = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header[1]
                self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif name and (instruction := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(instruction[2])):
                self.computations[name].append(Instruction(instruction[1], opcode[1], instruction[2]))

    @cached_property
    def collective_bytes(self) -> dict[str, float]:
        """Bytes that a chip sends in one run of the program, by kind of collective.

        The body of a loop counts once per iteration. Of the branches of a conditional, only the one that sends the
        most bytes counts.

        Raises:
            ValueError: the number of iterations of a loop cannot be read from the program.
        """
        totals: dict[str, float] = defaultdict(float)
        for kind, sent_bytes, _ in self._collectives(self.entry, {}):
            totals[kind] += sent_bytes
        return dict(totals)

    def _collectives(self, name: str, cache: dict) -> list[tuple[str, float, str]]:
        """Return (kind, bytes, channel) of every collective in one run of the computation `name`.

        cache: the results of earlier calls, by the name of the computation.
        """
        if name in cache:
            return cache[name]
        by_channel: dict[str, tuple[str, float, str]] = {}
        nested: list[tuple[str, float, str]] = []
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in RING_FACTORS:
                channel = instruction.attribute("channel_id") or f"{name}/{instruction.name}"
                sent_bytes = instruction.result_bytes * RING_FACTORS[kind](group_size(instruction.text))
                by_channel[channel] = (kind, sent_bytes, channel)
            elif instruction.opcode == "while":
                trips, body = self._trip_count(instruction), self._collectives(instruction.attribute("body"), cache)
                nested += [(kind, trips * sent_bytes, channel) for kind, sent_bytes, channel in body]
            elif instruction.opcode == "conditional":
                branches = [self._collectives(branch, cache) for branch in instruction.called]
                nested += max(branches, key=lambda branch: sum(sent_bytes for _, sent_bytes, _ in branch), default=[])
            elif not instruction.opcode.endswith(("-done", "-update")):
                # The start and the done of an asynchronous collective call the same computation. `by_channel` counts a
                # collective of the same channel only once.
                for called in instruction.called:
                    by_channel |= {collective[2]: collective for collective in self._collectives(called, cache)}
        cache[name] = [*by_channel.values(), *nested]
        return cache[name]

    def _trip_count(self, loop: Instruction) -> int:
        """Return the trip count of a loop: the compiler's `known_trip_count`, else the constant in its condition."""
        if known := re.search(r'known_trip_count[^0-9]*"?(\d+)', loop.text):
            return int(known[1])
        constants = list(self._constants(loop.attribute("condition")))
        if len(constants) != 1:
            raise ValueError(
                f"loop {loop.name}: the trip count is not known; expected known_trip_count or one constant in the "
                f"loop's condition, got the constants {constants}"
            )
        return constants[0]

    def _constants(self, condition: str) -> Iterator[int]:
        for instruction in self.computations[condition]:
            if match := re.match(r"[su]32\[\]\S* constant\((\d+)\)", instruction.text):
                yield int(match[1])


def group_size(text: str) -> int:
    """Return the number of chips in each group of a collective, from the instruction's `replica_groups`.

    Raises:
        ValueError: the text has no groups in a known form.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\}", text):
        sizes: Mapping[str, int] = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # The entry 'axis' names a whole axis. The entry 'axis':(m)n names a part of size n of an axis. The parts of the
        # axis before this one have the size m.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(part) if part else sizes[axis] for axis, part in axes)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([^}]*)\}", text):
        return listed[1].count(",") + 1
    if "source_target_pairs" in text:
        return 2
    raise ValueError(f"collective: expected replica_groups in a known form or source_target_pairs, got {text[:200]}")
