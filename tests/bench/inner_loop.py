"""The inner loop of the attention kernel in a disassembly, and what it does for one block pair."""
from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]\s+)?(\S+)\s*(.*?);")
_AMDGCN = re.compile(r"\t([a-z]\w+)(.*)")
_LABEL = re.compile(r"\.?(L\w+):")
_BRANCH = re.compile(r"(BRA|CALL|s_c?branch)")
_TARGET = re.compile(r"\.(L\w+)")
# Products of a warp, or of four under wgmma: mma.sync and wgmma, tcgen05 without its size, MFMA, WMMA.
_SASS_PRODUCT = re.compile(r"(?:UTC)?([IHQ])G?MMA\.?(\S*)")
_AMD_PRODUCT = re.compile(r"v_s?w?mf?ma\w*?_([if]\d+)_(\d+)x(\d+)x(\d+)_(\w+)")
_AMD_FORMATS = {"iu8": "int8", "i8": "int8", "f16": "fp16", "bf16": "fp16"}
# Bits that a thread moves; 32 where the opcode says nothing. LDSM moves matrices of 8 × 16 bytes, one to four.
_SHARED = re.compile(r"(LDSM|STSM|LDS|STS|LDGSTS|ds_(?:read|load|write|store)(?:_2addr|2)?(?:st64|_stride64)?)[._](.*)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str

    @property
    def product(self) -> tuple[str, int] | None:
        """Kind of a tensor instruction and its multiply-adds; 0 where the opcode doesn't tell."""
        found = _SASS_PRODUCT.match(self.opcode)
        if found:
            kind = {"I": "int8", "H": "fp16", "Q": "fp8"}[found[1]]
            size = re.match(r"(\d+)x(\d+)x(\d+)|(\d\d)(\d{1,2})(\d\d)\b", found[2])
            if kind != "int8":
                kind += ", fp16 sums" if ".F16" in self.opcode.split("MMA")[1].split(".E4M3")[0] else ", fp32 sums"
            return kind, math.prod(int(number) for number in size.groups() if number) if size else 0
        found = _AMD_PRODUCT.match(self.opcode)
        if found:
            kind = _AMD_FORMATS.get(found[5], found[5])
            kind += "" if kind == "int8" else ", fp32 sums" if found[1] == "f32" else ", fp16 sums"
            return kind, math.prod(map(int, found.groups()[1:4]))
        return None

    def shared_bytes(self, lanes: int) -> int:
        """Bytes of shared memory that it moves for a warp; conflicts of banks are not counted."""
        found = _SHARED.match(self.opcode + ".")
        if not found:
            return 0
        name, rest = found.groups()
        if name in ("LDSM", "STSM"):
            return 128 * int(re.search(r"M\w*88\.(\d)?", rest)[1] or 1)
        bits = int((re.search(r"(?:^|[a-z.])(32|64|96|128)(?=\.)", rest) or [0, 32])[1])
        return lanes * bits // 8 * (2 if "2" in name.removesuffix("64").replace("st64", "") else 1)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembly by nvdisasm, or of amdgcn text, and the index that each label stands at."""
    pattern = _SASS if "/*0000*/" in text else _AMDGCN
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := pattern.search(line) if pattern is _SASS else pattern.match(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The bodies of all loops: from each label that a later branch goes back to, to the last such branch."""
    ends = {}
    for index, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if _BRANCH.match(instruction.opcode) else None
        if target and labels.get(target[1], math.inf) <= index:
            ends[labels[target[1]]] = index + 1
    return [instructions[start:end] for start, end in ends.items()]


@dataclass(frozen=True)
class InnerLoop:
    """What a warp does for one block pair.

    pairs: block pairs of a round of the loop. products: tensor instructions of a round by opcode. opcodes: others of a
    round, by the first part of their name. tensor: multiply-adds of the whole thread block by kind. instructions: all
    of a warp, with products; vector: on AMD those of the vector unit, elsewhere all.
    """

    pairs: int
    products: dict[str, int]
    tensor: dict[str, float]
    instructions: float
    vector: float
    exponentials: float
    shared_bytes: float
    opcodes: dict[str, int]


def inner_loop(text: str, *, block_q: int, block_k: int, dim: int, warps: int, lanes: int) -> InnerLoop:
    """The shortest loop with both products of a block pair: the one over blocks that need no care.

    All branches inside count as taken and not taken at once. A loop over several block pairs counts for one.
    """
    nominal = 2 * block_q * block_k * dim
    instructions, labels = parse(text)
    for body in sorted(loops(instructions, labels), key=len):
        done = _multiply_adds(body, nominal, block_k, dim, warps)
        pairs = int(sum(done.values()) / nominal + 1e-6)
        if pairs:
            break
    else:
        raise ValueError("found no loop with both products of a block pair")
    opcodes = Counter(x.opcode.split(".")[0] for x in body if not x.product)
    vector = sum(n for name, n in opcodes.items() if name.startswith("v_")) if "s_endpgm" in text else len(body)
    if "s_endpgm" in text:
        vector += sum(1 for x in body if x.product)
    exponentials = sum(x.opcode.startswith(("MUFU.EX2", "v_exp")) for x in body)
    return InnerLoop(pairs, dict(Counter(x.opcode for x in body if x.product)), {k: v / pairs for k, v in done.items()},
                     len(body) / pairs, vector / pairs, exponentials / pairs,
                     sum(x.shared_bytes(lanes) for x in body) / pairs, dict(opcodes.most_common()))


def _multiply_adds(body: list[Instruction], nominal: int, block_k: int, dim: int, warps: int) -> dict[str, float]:
    """Multiply-adds of a thread block by kind in the body of a loop."""
    products = [(x.product, x.opcode) for x in body if x.product]
    if any(opcode.startswith("UTC") for _, opcode in products):  # one thread issues them; the descriptor has the size
        kinds = Counter(kind for (kind, _), _ in products)
        depth = 16 if any(kind.startswith("fp16") for kind in kinds) else 32
        pairs = len(products) // (dim // 32 + block_k // depth)
        return {kind: nominal * pairs / len(kinds) for kind in kinds} if pairs else {}
    done: dict[str, float] = defaultdict(float)
    for (kind, size), opcode in products:
        done[kind] += size * (warps / 4 if re.match("[IHQ]GMMA", opcode) else warps)
    return done if sum(done.values()) >= nominal else {}
