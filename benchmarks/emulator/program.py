"""PTX of one kernel, read for the machine."""

import ctypes
import re

SIZES = {"pred": 1, "s8": 2, "u8": 2, "bf16": 2, "bf16x2": 4, "s16x2": 4}  # of registers, in bytes
SIZES |= {f"{letter}{bits}": bits // 8 for letter in "bsuf" for bits in (8, 16, 32, 64)}
SPECIAL = ("%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%tid.x")
LANES = 32
PARAMETER = re.compile(r"_param_(\d+)")
# modifiers by which nothing changes here: the machine rounds to the nearest, and is exact where approximate is allowed
PLAIN = {"rn", "ftz", "approx", "full", "uni", "sync", "aligned", "cta", "gpu", "acq_rel", "global", "cg", "volatile"}


class UnknownInstruction(NotImplementedError):
    """PTX that the machine does not know."""


class Program:
    """A kernel, loaded into the machine. parameters: their sizes in bytes. at: registers that hold them."""

    def __init__(self, machine: ctypes.CDLL, ptx: str):
        self.machine = machine
        self.name = re.search(r"\.entry (\w+)", ptx)[1]
        self.parameters = [SIZES[kind] for kind in re.findall(r"^\s*\.param \.(\w+)[^\n]*_param_\d+", ptx, re.M)]
        self.warps = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1]) // LANES
        self.handle = ctypes.c_void_p(machine.machine_kernel())
        self.at = [-1] * len(self.parameters)
        self._memory = bytearray()
        self._declared, self._registers, self._constants = {}, {}, {}
        self._read(ptx)
        self.special = [self._registers.get(name, (-1,))[0] for name in SPECIAL]

    def _read(self, ptx: str):
        self.statements, self.sources, self._labels, self._tables = _statements(ptx, self._declared)
        self._emitted, first = [], []
        for line, statement in enumerate(self.statements):
            first.append(len(self._emitted))
            self._line = line
            self._emit(statement)
        first.append(len(self._emitted))
        for name, arguments in self._emitted:
            if name == "bra":
                arguments["target"] = first[arguments["target"]]
            elif name == "brx":
                arguments["listed"] = [first[target] for target in arguments["listed"]]
            self._load(name, **arguments)
        memory = (ctypes.c_uint8 * len(self._memory)).from_buffer(self._memory)
        self.machine.machine_registers(self.handle, memory, ctypes.c_int64(len(memory)))

    def _load(self, name, operands=(), listed=(), immediate=0, size=0, target=0, line=0, predicate=-1, negated=False):
        operands = (ctypes.c_int * 4)(*operands, *[-1] * (4 - len(operands)))
        known = self.machine.machine_add(
            self.handle, name.encode(), predicate, negated, operands, (ctypes.c_int * len(listed))(*listed),
            len(listed), ctypes.c_int64(immediate), size, target, line,
        )  # fmt: skip
        if not known:
            raise UnknownInstruction(self.told(line))

    def _unknown(self):
        return UnknownInstruction(self.told(self._line))

    def told(self, line: int) -> str:
        return f"{self.statements[line]} ({self.name}, {self.sources[line]})" if line < len(self.statements) else "end"

    # registers

    def _place(self, size: int) -> int:
        self._memory += b"\0" * (-len(self._memory) % 64)
        # what is not set is not a number, or an address where nothing is
        self._memory += (b"\0" if size == 1 else b"\xff") * (LANES * size)
        return len(self._memory) - LANES * size

    def _register(self, text: str, size: int) -> tuple[int, int]:
        """Where a register, or a constant of that many bytes, lies, and its bytes."""
        if text in self._registers:
            return self._registers[text]
        kind = "b32" if text in SPECIAL else self._declared.get(text) or self._declared.get(text.rstrip("0123456789"))
        if kind is None:
            key = (_number(text), size)
            if key not in self._constants:
                at = self._constants[key] = self._place(size)
                value = key[0] & ((1 << 8 * size) - 1)
                self._memory[at : at + LANES * size] = value.to_bytes(size, "little") * LANES
            return self._constants[key], size
        self._registers[text] = self._place(SIZES[kind]), SIZES[kind]
        return self._registers[text]

    def _operand(self, text: str, size: int) -> int:
        """Of a register that is wider only the low bits are meant."""
        if text == "_":
            return -1
        at, actual = self._register(text, size)
        if actual < size:
            raise self._unknown()
        if actual > size:
            narrow = self._place(size)
            self._add(f"cvt.u{8 * size}.u{8 * actual}", [narrow, at])
            return narrow
        return at

    def _result(self, text: str, size: int) -> int:
        at, actual = self._register(text, size) if text != "_" else (-1, size)
        if actual != size:
            raise self._unknown()
        return at

    def _address(self, text: str, size: int) -> tuple[int, int]:
        base, sign, offset = re.fullmatch(r"\[\s*([^\s+-]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()
        return self._operand(base, size), _number(offset or "0") * (-1 if sign == "-" else 1)

    # instructions

    def _add(self, name: str, operands=(), **arguments):
        self._emitted.append((name, {"operands": operands, "line": self._line, **self._guard, **arguments}))

    def _emit(self, statement: str):
        guard, text = re.fullmatch(r"(?:@(\S+)\s+)?(.*)", statement, re.S).groups()
        self._guard = {}
        if guard:
            self._guard = {"predicate": self._operand(guard.lstrip("!"), 1), "negated": guard.startswith("!")}
        name, _, operands = text.replace("\t", " ").partition(" ")
        parts = [part for part in name.replace("::", ".").split(".") if part not in PLAIN]
        if parts[0] == "bar" and "warp" in parts:
            parts = ["fence"]
        read = getattr(self, f"_read_{parts[0]}", self._read_other)
        read(parts, _split(operands))

    def _read_bra(self, parts, operands):
        self._add("bra", target=self._labels[operands[0]])

    def _read_brx(self, parts, operands):
        listed = [self._labels[label] for label in self._tables[operands[1]]]
        self._add("brx", [self._operand(operands[0], 4)], listed=listed)

    def _read_ret(self, parts, operands):
        self._add("ret")

    def _read_bar(self, parts, operands):
        if len(operands) > 1 and _number(operands[1]) != LANES * self.warps:
            raise self._unknown()
        self._add("bar")

    def _read_fence(self, parts, operands):
        self._add("fence")

    def _read_ld(self, parts, operands):
        kind = parts[-1]
        if "param" in parts:
            return self._parameter(kind, *operands)
        self._access(parts, operands[1], _group(operands[0]))

    def _parameter(self, kind, to, address):
        at, size = self._register(to, SIZES[kind])
        named = PARAMETER.search(address)
        if not named:  # one of several
            which, offset = self._address(address, 8)
            if offset or size != SIZES[kind]:
                raise self._unknown()
            listed = [self._place_of(i) if held == size else -1 for i, held in enumerate(self.parameters)]
            return self._add(f"ld.param.b{8 * size}", [at, which], listed=listed)
        number = int(named[1])
        if size == SIZES[kind] == self.parameters[number]:
            self._add(f"mov.b{8 * size}", [at, self._place_of(number)])
        else:
            self._add(f"cvt.{kind[0]}{8 * size}.{kind}", [at, self._place_of(number)])

    def _place_of(self, parameter: int) -> int:
        if self.at[parameter] < 0:
            self.at[parameter] = self._place(self.parameters[parameter])
        return self.at[parameter]

    def _read_st(self, parts, operands):
        self._access(parts, operands[0], _group(operands[1]))

    def _access(self, parts, address, values):
        shared, size = "shared" in parts, int(parts[-1][1:]) // 8
        at, offset = self._address(address, 4 if shared else 8)
        listed = [number for value in values for number in self._register(value, size)]
        if any(actual < size for actual in listed[1::2]):
            raise self._unknown()
        space = "shared" if shared else "global"
        self._add(f"{parts[0]}.{space}.b{8 * size}", [at], listed=listed, immediate=offset)

    def _read_cp(self, parts, operands):
        if parts[2] in ("commit_group", "wait_group"):
            return self._add(f"cp.async.{parts[2]}", immediate=_number(operands[0]) if operands else 0)
        (to, offset), (source, distance) = self._address(operands[0], 4), self._address(operands[1], 8)
        taken = self._operand(operands[3] if len(operands) > 3 else operands[2], 4)
        size = _number(operands[2])
        self._add("cp.async", [to, source, taken], size=size, immediate=offset, target=distance)

    def _read_mma(self, parts, operands):
        known = {"m16n8k16.row.col.f32.bf16.bf16.f32": "mma.bf16", "m16n8k8.row.col.f32.tf32.tf32.f32": "mma.tf32"}
        name = known.get(".".join(parts[1:]))
        if name is None:
            raise self._unknown()
        self._add(name, listed=[self._operand(register, 4) for matrix in operands for register in _group(matrix)])

    def _read_wgmma(self, parts, operands):
        if parts[1] == "fence":
            return self._add("fence")
        if parts[1] in ("commit_group", "wait_group"):
            return self._add(f"wgmma.{parts[1]}", immediate=_number(operands[0]) if operands else 0)
        kind, columns = parts[-1], int(re.fullmatch(r"m64n(\d+)k\d+", parts[2])[1])
        in_registers = operands[1].startswith("{")
        *signs, left_side, right_side = [_number(text) for text in operands[4:]] + [0] * (8 - len(operands))
        if in_registers:  # then the left matrix cannot be transposed, and nothing is said of it
            left_side, right_side = 0, left_side
        if kind not in ("bf16", "tf32") or parts[3] != "f32" or signs != [1, 1]:
            raise self._unknown()
        listed = [self._operand(register, 4) for register in _group(operands[0])]
        listed += [self._operand(register, 4) for register in _group(operands[1]) if in_registers]
        left = -1 if in_registers else self._operand(operands[1], 8)
        right, added = self._operand(operands[2], 8), self._operand(operands[3], 1)
        sides = left_side + 2 * right_side
        self._add(f"wgmma.{kind}", [right, left, added], listed=listed, size=columns, immediate=sides)

    def _read_ldmatrix(self, parts, operands):
        self._matrices(parts, operands[1], operands[0])

    def _read_stmatrix(self, parts, operands):
        self._matrices(parts, operands[0], operands[1])

    def _matrices(self, parts, address, registers):
        at, offset = self._address(address, 4)
        listed = [number for register in _group(registers) for number in self._register(register, 4)]
        name = parts[0] + ".trans" * ("trans" in parts)
        self._add(name, [at], listed=listed, immediate=offset)

    def _read_shfl(self, parts, operands):
        to = self._result(operands[0].partition("|")[0], 4)
        self._add(f"shfl.{parts[1]}", [to, *(self._operand(text, 4) for text in operands[1:4])])

    def _read_redux(self, parts, operands):
        self._add(".".join(parts), [self._result(operands[0], 4), self._operand(operands[1], 4)])

    def _read_atom(self, parts, operands):
        at, offset = self._address(operands[1], 8)
        to, value = self._result(operands[0], 4), self._operand(operands[2], 4)
        self._add(".".join(parts), [to, at, value], immediate=offset)

    def _read_mov(self, parts, operands):
        size = SIZES[parts[1]]
        if operands[1].startswith("{"):
            halves = [self._operand(text, size // 2) for text in _group(operands[1])]
            self._add(f"pack.b{8 * size}", [self._result(operands[0], size), *halves])
        elif operands[0].startswith("{"):
            halves = [self._result(text, size // 2) for text in _group(operands[0])]
            self._add(f"unpack.b{8 * size}", [*halves, self._operand(operands[1], size)])
        else:
            kind = "pred" if size == 1 else f"b{8 * size}"
            self._add(f"mov.{kind}", [self._result(operands[0], size), self._operand(operands[1], size)])

    def _read_cvt(self, parts, operands):
        kinds = [part for part in parts[1:] if part != "relu"]
        size = SIZES[kinds[1] if kinds[1] != "s8" else kinds[0]]  # there are no registers of 8 bits
        sources = [self._operand(text, size) for text in operands[1:]]
        self._add(".".join(parts), [self._result(operands[0], SIZES[kinds[0]]), *sources])

    def _read_setp(self, parts, operands):
        results = [self._result(text, 1) for text in operands[0].split("|")]
        size = SIZES[parts[-1]]
        self._add(".".join(parts), [*results, *(self._operand(text, size) for text in operands[1:])])

    def _read_selp(self, parts, operands):
        size = SIZES[parts[1]]
        chosen = [self._operand(text, size) for text in operands[1:3]]
        self._add(f"selp.b{8 * size}", [self._result(operands[0], size), *chosen, self._operand(operands[3], 1)])

    def _read_other(self, parts, operands):
        size, wide = SIZES.get(parts[-1]), "wide" in parts
        if size is None:
            raise self._unknown()
        sizes = [size] * (len(operands) - 1)
        if parts[0] in ("shl", "shr", "bfe"):
            sizes[1:] = [4] * (len(sizes) - 1)
        elif wide and parts[0] == "mad":
            sizes[2] = 2 * size
        sources = [self._operand(text, each) for text, each in zip(operands[1:], sizes)]
        self._add(".".join(parts), [self._result(operands[0], size * (1 + wide)), *sources])


def _statements(ptx: str, declared: dict) -> tuple[list[str], list[str], dict[str, int], dict[str, list[str]]]:
    """Instructions, the lines of source that they are of, the instruction that follows each label, and tables of
    labels. declared: is given kinds of registers."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    body = re.split(r"\n\}", body)[0]  # what follows is for debuggers
    body = re.sub(r"^\s*\.loc[^\n/]*//\s*(\S+)[^\n]*", r"\n.loc \1;", body, flags=re.M)
    body = re.sub(r"//[^\n]*|^\s*\.pragma[^\n]*", "", body, flags=re.M)
    found, sources, labels, tables, source = [], [], {}, {}, "its source"
    for text in body.split(";"):
        text = text.strip()
        while match := re.match(r"[{}]\s*|(\$?\w+):\s*(?!\s*\.branchtargets)", text):
            if match[1]:
                labels[match[1]] = len(found)
            text = text[match.end() :]
        if match := re.fullmatch(r"(\$?\w+):\s*\.branchtargets\s+(.*)", text, re.S):
            tables[match[1]] = _split(match[2])
        elif text.startswith(".loc"):
            source = text.split()[1]
        elif text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            declared |= {re.sub(r"<\d+>", "", name): kind[1:] for name in _split(names)}
        elif text:
            found.append(text)
            sources.append(source)
    return found, sources, labels, tables


def _split(operands: str) -> list[str]:
    """At commas outside of braces."""
    return [text.strip() for text in re.split(r",(?![^{]*\})", operands) if text.strip()]


def _group(operands: str) -> list[str]:
    return _split(operands.strip("{} "))


def _number(text: str) -> int:
    if text == "global_smem":  # shared memory begins at 0
        return 0
    if named := PARAMETER.search(text):  # an address, of which nothing is asked but whose it is
        return int(named[1])
    text = text.rstrip("U")
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
        return int(text[2:], 16)
    return int(text, 0)
