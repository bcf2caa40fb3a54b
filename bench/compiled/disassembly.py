"""Counts the instructions in a kernel's main loop from the output of nvdisasm, without running the kernel.

The main loop is the one with the tensor-core instructions. The counted path through its body is that of a steady
iteration: the path with the most tensor-core instructions, 16-byte copies (the next tile exists and is aligned) and
16-byte reads of shared memory (the thread has data for the lattice's symmetry), and among these the shortest (no mask,
no rescaling, no waiting). A branch after the vote on matches of the score terms is weighted with the fraction of groups
that still match; every other branch is taken either always or never.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.utils.errors import UserError

INSTALL = "nvdisasm is not installed: pip install nvidia-cuda-nvdisasm (or add a CUDA toolkit's bin folder to the PATH)"
TENSOR, COPY = "HMMA", "LDGSTS"
CLASSES: dict[str, str] = {
    "tensor core": r"HMMA",
    "matrix load": r"LDSM",
    "special function": r"MUFU",
    "float": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|CHK|2F)|F2FP|HADD2|HFMA2|HMUL2",
    "integer, compare": r"U?(IADD3?|IMAD|LEA|LOP3|SHF|ISETP|PLOP3|SEL|PRMT|P2R|BREV|FLO)|I(MNMX|ABS|2F|2FP)|F2I"
    r"|VIADD|VIADDMNMX|VIMNMX|R2P|LOP|SGXT|BMSK",
    "load, store": r"LD[GLSC]|U?LDC|ST[GLS]|LDGSTS|LDGDEPBAR|DEPBAR|R2UR",
    "branch, vote, exchange": r"BRA|BSSY|BSYNC|VOTE|SHFL|BAR|WARPSYNC|EXIT|CALL|RET|NANOSLEEP|BREAK|YIELD",
    "other": r"\w+",
}
"""Class → pattern of opcodes, without modifiers; the first class that matches applies."""
_CLASS = re.compile("|".join(f"(?P<c{i}>(?:{opcodes})$)" for i, opcodes in enumerate(CLASSES.values())))
_FUNCTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L\w*):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L\w*)\)")


@dataclass(frozen=True)
class Instruction:
    """A machine instruction."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str
    """The guarding predicate register, without negation; empty if there is none."""
    target: str
    """The target label of a branch; empty for other instructions."""

    @property
    def is_branch(self) -> bool:
        """Whether it is a branch within the kernel; BRA.DIV, for divergent warps (which do not occur here), is not."""
        return self.opcode == "BRA"

    @property
    def is_conditional(self) -> bool:
        """Whether it is guarded by one or two predicates."""
        return bool(self.predicate) or len(self.operands) > 1

    @property
    def is_steady(self) -> bool:
        """Whether a steady iteration executes it."""
        return self.opcode.startswith(TENSOR) or self.is_copy or self.is_chunk

    @property
    def is_copy(self) -> bool:
        """Whether it is a 16-byte asynchronous copy to shared memory."""
        return self.opcode.startswith(COPY) and self.opcode.endswith(".128")

    @property
    def is_chunk(self) -> bool:
        """Whether it reads 16 bytes of shared memory, as for the lattice's symmetry."""
        return self.opcode.startswith("LDS.") and self.opcode.endswith(".128")

    @property
    def kind(self) -> str:
        """Its class in CLASSES."""
        found = _CLASS.match(self.opcode.partition(".")[0])
        return list(CLASSES)[int(str(found.lastgroup if found else "c")[1:])]


@dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel in order, and its labels: label → index of the next instruction."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]


def find_nvdisasm() -> str | None:
    """Find nvdisasm on the PATH, in a CUDA toolkit, or in the wheel nvidia-cuda-nvdisasm. None if it is not found."""
    name = "nvdisasm.exe" if os.name == "nt" else "nvdisasm"
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    installed = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [*(Path(home) / "bin" / name for home in homes), *sorted(installed.glob(f"*/bin/{name}"), reverse=True)]
    return shutil.which("nvdisasm") or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _run(*arguments: str) -> str:
    program = find_nvdisasm()
    if program is None:
        raise UserError(INSTALL)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"nvdisasm failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def nvdisasm_version() -> str:
    """The version, such as "13.5.37". Raises UserError if nvdisasm is not installed."""
    found = re.search(r"\bV(\d[\d.]*)", _run("--version"))
    return found[1] if found else "unknown"


def disassemble(machine_code: bytes) -> dict[str, Kernel]:
    """The kernels of a compiled module (a cubin), by name. Raises UserError if nvdisasm is missing or fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(machine_code)
        return parse(_run("-c", str(path)))


def parse(text: str) -> dict[str, Kernel]:
    """Parse the output of `nvdisasm -c`. Returns its kernels by name."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            kernel = kernels[function[1]] = Kernel(function[1], [], {})
        elif kernel is None:
            continue
        elif label := _LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif found := _INSTRUCTION.match(line):
            _, predicate, opcode, rest = found.groups()
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            target = _TARGET.search(rest) if opcode.startswith("BRA") else None
            kernel.instructions.append(Instruction(opcode, operands, predicate or "", target[1] if target else ""))
    return kernels


@dataclass(frozen=True)
class _Path:
    """A path from an instruction to the end of the iteration."""

    steady: int
    counts: tuple[float, ...]
    """Number of instructions of every class."""

    def __lt__(self, other: _Path) -> bool:
        return (self.steady, -sum(self.counts)) < (other.steady, -sum(other.counts))

    def after(self, instruction: Instruction, times: int) -> _Path:
        """This path preceded by one instruction, executed `times` times."""
        counts = list(self.counts)
        counts[list(CLASSES).index(instruction.kind)] += times
        return _Path(self.steady + instruction.is_steady, tuple(counts))

    def mixed(self, other: _Path, share: float) -> _Path:
        """The weighted mean of this path and `other`, which has the weight `share`."""
        pairs = zip(self.counts, other.counts, strict=True)
        return _Path(self.steady, tuple((1.0 - share) * own + share * its for own, its in pairs))


class MainLoop:
    """The loop over tiles in a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        """Raises UserError if the kernel has no loop with tensor-core instructions."""
        self._kernel = kernel
        ends = [i for i, instruction in enumerate(kernel.instructions) if self._goes_back(i, instruction)]
        loops = [(self._target(end), end) for end in ends]
        best = max(loops, key=lambda loop: (self._count(TENSOR, *loop), loop[0] - loop[1]), default=(0, 0))
        self.start, self.end = best
        self.tensor_instructions = self._count(TENSOR, self.start, self.end)
        """Number of tensor-core instructions per iteration and warp."""
        if not self.tensor_instructions:
            raise UserError(f"{kernel.name} has no loop with {TENSOR} instructions")
        self._inner = [(start, end) for start, end in loops if self.start <= start and end < self.end]
        self._orders = self._match_orders()

    @property
    def ladders(self) -> int:
        """Number of groups of pairs per iteration whose matches are tried order by order, with branches in between."""
        return sum(order == 1 for order in self._orders.values())

    @property
    def orders(self) -> int:
        """Maximum number of branches of a ladder."""
        return max(self._orders.values(), default=0)

    def counts(self, copies: int, shares: Sequence[float] = ()) -> dict[str, float]:
        """Class → instructions that a warp issues in a steady iteration.

        copies: 16-byte copies per thread, which determine the trip count of the inner loops that contain them
        shares: fraction of groups in which some pair matches in 1, 2, … tokens; 0 past the end
        Raises UserError if the number of copies is inconsistent with the code.
        """
        times = self._times(copies)
        body = self._kernel.instructions[self.start : self.end + 1]
        ways = [_Path(0, (0.0,) * len(CLASSES))] * (len(body) + 1)
        for i in reversed(range(len(body))):
            rest = self._rest(self.start + i, ways, shares)
            ways[i] = rest.after(body[i], times[i]) if rest else _Path(-1, ways[-1].counts)
        return dict(zip(CLASSES, ways[0].counts, strict=True))

    def _rest(self, i: int, ways: list[_Path], shares: Sequence[float]) -> _Path | None:
        """The best path after instruction i; None if it always leaves the loop."""
        instruction, on = self._kernel.instructions[i], ways[i + 1 - self.start]
        if i == self.end or not instruction.is_branch or self._goes_back(i, instruction):
            return on
        target = self._target(i)
        if target > self.end:
            return on if instruction.is_conditional else None
        there = ways[target - self.start]
        if not instruction.is_conditional:
            return there
        if i in self._orders:
            order = self._orders[i]
            before, here = ((1.0, *shares, *[0.0] * order)[n] for n in (order - 1, order))
            return there.mixed(on, here / before if before else 0.0)
        return max(on, there)

    def _times(self, copies: int) -> list[int]:
        """How often each instruction of the body runs: once, or in a loop with copies as often as `copies` requires."""
        times = [1] * (self.end + 1 - self.start)
        loops = [(start, end) for start, end in self._inner if self._copies(start, end)]
        inside = sum(self._copies(start, end) for start, end in loops)
        outside = self._copies(self.start, self.end) - inside
        trips = (copies - outside) // inside if inside else 1
        if trips < 1 or trips * inside + outside != copies:
            raise UserError(
                f"{self._kernel.name}: {copies} copies a thread, but {inside} in loops and {outside} outside"
            )
        for start, end in loops:
            times[start - self.start : end + 1 - self.start] = [trips] * (end + 1 - start)
        return times

    def _match_orders(self) -> dict[int, int]:
        """Branch after a vote on matches → the order voted on; the branches of a group have one target."""
        orders: dict[int, int] = {}
        ladders: dict[str, int] = {}
        for i in range(self.start, self.end):
            instruction = self._kernel.instructions[i]
            if instruction.is_branch and self._goes_forward(i) and self._votes_on_matches(i):
                ladders[instruction.target] = orders[i] = ladders.get(instruction.target, 0) + 1
        return orders

    def _votes_on_matches(self, i: int) -> bool:
        """Whether the branch depends on a vote, unless it is a vote on a floating-point comparison."""
        instruction = self._kernel.instructions[i]
        vote = self._writer(i, instruction.predicate) if instruction.predicate else None
        if vote is None or not self._kernel.instructions[vote].opcode.startswith("VOTE"):
            return False
        voted_on = self._kernel.instructions[vote].operands[1].lstrip("!")
        source = self._writer(vote, voted_on)
        return source is not None and not self._kernel.instructions[source].opcode.startswith("FSETP")

    def _writer(self, i: int, predicate: str) -> int | None:
        """Index of the last instruction of the body before i that sets the predicate register; None if none does."""
        for at in reversed(range(self.start, i)):
            instruction = self._kernel.instructions[at]
            count = 2 if re.match(r"[IF]SETP|PLOP3", instruction.opcode) else 1
            if predicate in instruction.operands[:count]:
                return at
        return None

    def _goes_back(self, i: int, instruction: Instruction) -> bool:
        return instruction.is_branch and self._target(i) < i

    def _goes_forward(self, i: int) -> bool:
        return i < self._target(i) <= self.end

    def _target(self, i: int) -> int:
        return self._kernel.labels[self._kernel.instructions[i].target]

    def _count(self, prefix: str, start: int, end: int) -> int:
        return sum(entry.opcode.startswith(prefix) for entry in self._kernel.instructions[start : end + 1])

    def _copies(self, start: int, end: int) -> int:
        return sum(entry.is_copy for entry in self._kernel.instructions[start : end + 1])
