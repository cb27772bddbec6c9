"""Bytes that a compiled program sends between chips, computed from its HLO text."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

# Bits of one element, by HLO type.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
# Bytes that each of n chips sends in a ring algorithm, per byte of the collective's result, by kind of collective.
SENT = {
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

        The result of an asynchronous start also lists the operands. Their bytes do not count.
        """
        result = self.text[: self.text.index(f" {self.opcode}(")]
        sizes = [
            BITS[kind] * prod(map(int, filter(None, dims.split(",")))) / 8
            for kind, dims in _SHAPE.findall(result)
            if kind in BITS
        ]
        # A start returns (operands, results, …), but the start of an all-reduce returns only the results.
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
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found and found[1]


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
            elif name and (found := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(found[2])):
                self.computations[name].append(Instruction(found[1], opcode[1], found[2]))

    @cached_property
    def collectives(self) -> dict[str, float]:
        """Bytes that a chip sends in one run of the program, by kind of collective.

        The body of a loop counts once per iteration. Of the branches of a conditional, only the one that sends the
        most bytes counts.

        Raises:
            ValueError: the number of iterations of a loop cannot be read from the program.
        """
        totals: dict[str, float] = defaultdict(float)
        for kind, sent, _ in self._sent(self.entry, {}):
            totals[kind] += sent
        return dict(totals)

    def _sent(self, name: str, known: dict) -> list[tuple[str, float, str]]:
        """Return (kind, bytes, channel) of every collective in one run of the computation `name`.

        known: results of earlier calls, by computation.
        """
        if name in known:
            return known[name]
        found: dict[str, tuple[str, float, str]] = {}
        repeated: list[tuple[str, float, str]] = []
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in SENT:
                channel = instruction.attribute("channel_id") or f"{name}/{instruction.name}"
                sent = instruction.result_bytes * SENT[kind](group_size(instruction.text))
                found[channel] = (kind, sent, channel)
            elif instruction.opcode == "while":
                rounds = self._rounds(instruction)
                repeated += [(k, sent * rounds, c) for k, sent, c in self._sent(instruction.attribute("body"), known)]
            elif instruction.opcode == "conditional":
                branches = [self._sent(branch, known) for branch in instruction.called]
                repeated += max(branches, key=lambda branch: sum(sent for _, sent, _ in branch), default=[])
            elif not instruction.opcode.endswith(("-done", "-update")):
                # Start and done of an asynchronous collective both contain it. Its channel makes it count once.
                for called in instruction.called:
                    found |= {channel: (k, sent, channel) for k, sent, channel in self._sent(called, known)}
        known[name] = [*found.values(), *repeated]
        return known[name]

    def _rounds(self, loop: Instruction) -> int:
        """Return the trip count of a loop: the compiler's `known_trip_count`, else the constant in its condition."""
        if noted := re.search(r'known_trip_count[^0-9]*"?(\d+)', loop.text):
            return int(noted[1])
        bounds = list(self._bounds(loop.attribute("condition")))
        if len(bounds) != 1:
            raise ValueError(f"the loop {loop.name} does not tell how often it runs (bounds {bounds})")
        return bounds[0]

    def _bounds(self, condition: str) -> Iterator[int]:
        for instruction in self.computations[condition]:
            if found := re.match(r"[su]32\[\]\S* constant\((\d+)\)", instruction.text):
                yield int(found[1])


def group_size(text: str) -> int:
    """Return the number of chips in each group of a collective, from the instruction's `replica_groups`.

    Raises:
        ValueError: the text has no groups in a known form.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\}", text):
        sizes: Mapping[str, int] = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # Each entry is a whole axis, 'axis', or a part of one, 'axis':(size of the parts before it)size of this part.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(part) if part else sizes[axis] for axis, part in axes)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([^}]*)\}", text):
        return listed[1].count(",") + 1
    if "source_target_pairs" in text:
        return 2
    raise ValueError(f"a collective does not tell its groups: {text[:200]}")
