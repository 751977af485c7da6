"""What XLA says of a compiled program: memory, traffic, and what crosses between devices."""

import collections
import dataclasses
import re
from collections.abc import Iterator

import jax.numpy as jnp
from jax.stages import Compiled

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# For compile(): machine code without care, in less time; the HLO and its memory are those of the real program.
ANALYSIS_ONLY = {"xla_backend_optimization_level": 0}
SMALL_BYTES = 16 << 10  # an array in a loop that is no matter for the traffic
# '%name = SHAPE op(' : SHAPE is 'f32[64]{0}' or a tuple of such in brackets; '-done' repeats what '-start' said.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\(", re.MULTILINE)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls=|to_apply=|branch_computations=\{)(?P<names>%[\w.-]+(?:, %[\w.-]+)*)")
_LOOP = re.compile(r"\bbody=%(?P<body>[\w.-]+)(?:.*\"known_trip_count\":\{\"n\":\"(?P<times>\d+)\"\})?")
_ARRAY = re.compile(r"\b(?P<type>[a-z]+\d*\w*)\[(?P<sides>[\d,]*)\]")
_TYPES = {"pred": "bool", "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_TYPES |= {
    f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text: the operation, and the arrays it returns as (element type, shape)."""

    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of what it returns."""
        return sum(_num_bytes(type_, shape) for type_, shape in self.arrays)


def parse_instructions(text: str) -> list[Instruction]:
    """Return every instruction of an HLO module's text, those inside fusions and other computations included."""
    return [Instruction(match["op"], tuple(_parse_arrays(match["shape"]))) for match in _INSTRUCTION.finditer(text)]


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """Return {operation: {'count', 'arrays', 'bytes'}} of what is exchanged between devices in one run of a program.

    Args:
      text: of the compiled module, `compiled.as_text()`. Bytes are those of one device's result; a ring all-reduce of b
        bytes over n devices sends and receives 2 b (n - 1) / n on each.
    """
    found = collections.defaultdict(lambda: {"count": 0, "arrays": 0, "bytes": 0})
    for instruction, times, _ in _walk(text):
        op = instruction.op.removesuffix("-start")
        if op in COLLECTIVES:
            found[op]["count"] += times
            found[op]["arrays"] += times * len(instruction.arrays)
            found[op]["bytes"] += times * instruction.num_bytes
    return dict(found)


def _walk(text: str) -> Iterator[tuple[Instruction, int, bool]]:
    """Every instruction, how often it runs, and whether in a loop: there as often as XLA knows, or once.

    Of a condition all branches run; of the train step's one is empty.
    """
    bodies, entry, lines = {}, None, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match["name"]] = []
            entry = match["name"] if match["entry"] else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("no text of a compiled module: it has no line 'ENTRY %name (...) -> ... {'")

    def visit(name: str, times: int, looped: bool) -> Iterator[tuple[Instruction, int, bool]]:
        for line in bodies[name]:
            yield from ((instruction, times, looped) for instruction in parse_instructions(line))
            if loop := _LOOP.search(line):
                yield from visit(loop["body"], times * int(loop["times"] or 1), True)
            elif called := _CALLED.search(line):
                for inner in re.findall(r"[\w.-]+", called["names"]):
                    yield from visit(inner, times, looped)

    return visit(entry, 1, False)


def analyze_memory(compiled: Compiled) -> dict[str, int]:
    """Return XLA's bytes on one device: 'arguments', 'outputs', 'aliased' (outputs in arguments' place), 'temp', 'all'.

    'all' = arguments + outputs - aliased + temp: what has to fit besides the program itself.
    """
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
    }
    return parts | {"all": parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temp"]}


def count_traffic(compiled: Compiled, num_devices: int) -> float | None:
    """Return the bytes that one call touches, over all devices; None if XLA does not tell.

    Counted after fusion, every operand and result of every kernel once, so caches make the real traffic less. XLA
    counts the body of a loop once, so it tells nothing of a program that does more in loops than draw random numbers.
    """
    if any(looped and instruction.num_bytes > SMALL_BYTES for instruction, _, looped in _walk(compiled.as_text())):
        return None
    num_bytes = (compiled.cost_analysis() or {}).get("bytes accessed")
    return num_bytes and num_bytes * num_devices


def _parse_arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (match["type"], tuple(int(side) for side in match["sides"].split(",") if side))
        for match in _ARRAY.finditer(shape)
    ]


def _num_bytes(type_: str, shape: tuple[int, ...]) -> int:
    size = jnp.dtype(_TYPES[type_]).itemsize if type_ in _TYPES else 0  # 'token' and the like hold nothing
    for side in shape:
        size *= side
    return size
