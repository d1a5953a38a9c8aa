"""Genotypes: the cells that a search derives, as data that can be checked, saved, read and looked up by name.

A genotype says, for each node of a normal and of a reduction cell, which two earlier states it reads and through
which operations. States 0 and 1 are the outputs of the two cells before; node i is state i + 2. No torch here.
"""

import ast
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fpdarts.files import replacing
from fpdarts.kernels.spec import OPERATIONS

# ``none`` takes part in a search but cannot be derived.
DERIVABLE = tuple(name for name in OPERATIONS if name != "none")


class GenotypeError(ValueError):
    """A genotype that is malformed, unreadable or unknown; the message names the wrong entry, and the file if any."""


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell.

    normal, reduce: (operation, source state) pairs, two a node, node after node.
    normal_concat, reduce_concat: the states whose concatenation is the cell's output, each from 2 to nodes + 1.

    Lists and ranges are accepted and kept as tuples. Raises GenotypeError, which names the first wrong entry.
    """

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self):
        for field in ("normal", "reduce"):
            object.__setattr__(self, field, _checked_edges(field, getattr(self, field)))
        if len(self.normal) != len(self.reduce):
            raise GenotypeError(
                f"reduce: {len(self.reduce)} entries make {len(self.reduce) // 2} nodes, but normal has {self.nodes}"
            )
        for field in ("normal_concat", "reduce_concat"):
            object.__setattr__(self, field, _checked_concat(field, getattr(self, field), self.nodes))

    @property
    def nodes(self) -> int:
        """Intermediate nodes of a cell."""
        return len(self.normal) // 2

    def to_dict(self) -> dict[str, list]:
        """Lists, strings and ints only, as saved."""
        return {
            "normal": [list(entry) for entry in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(entry) for entry in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Genotype":
        """The inverse of to_dict. Raises GenotypeError, also for missing and unknown fields."""
        if not isinstance(values, dict):
            raise GenotypeError(f"expected an object with the fields {', '.join(_FIELDS)}; got {_shown(values)}")
        problems = [f"missing field {name!r}" for name in _FIELDS if name not in values]
        problems += [f"unknown field {name!r}" for name in values if name not in _FIELDS]
        if problems:
            raise GenotypeError(f"{', '.join(problems)}; the fields are: {', '.join(_FIELDS)}")
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, one node a line. The file appears whole or not at all. Raises OSError."""
        with replacing(path) as file:
            file.write(self._to_json().encode())

    def _to_json(self) -> str:
        blocks = []
        for name, value in self.to_dict().items():
            if name.endswith("concat"):
                text = json.dumps(value)
            else:
                rows = [f"    {json.dumps(a)}, {json.dumps(b)}" for a, b in zip(value[::2], value[1::2])]
                text = "[\n" + ",\n".join(rows) + "\n  ]"
            blocks.append(f'  "{name}": {text}')
        return "{\n" + ",\n".join(blocks) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Genotype":
        """Read what save wrote. Raises GenotypeError, which names the file, also if it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # with a mark before it, as editors of Windows write it
        except (OSError, ValueError) as error:
            raise GenotypeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GenotypeError(
                f"{path}: not JSON: {error}; text as papers print it is read by `fpdarts genotype import`"
            ) from error
        try:
            return cls.from_dict(values)
        except GenotypeError as error:
            raise GenotypeError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str, origin: str = "genotype text") -> "Genotype":
        """Import the ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)`` that papers print.

        A leading ``NAME =`` and line breaks are fine. The text is parsed as Python but never run: anything besides
        literals and ``range`` of literals is refused. origin: what the error messages call the text, e.g. its file.
        Raises GenotypeError.
        """
        try:
            return cls.from_dict(_fields_of_call(text))
        except GenotypeError as error:
            raise GenotypeError(f"{origin}: {error}") from None


_FIELDS = tuple(field.name for field in fields(Genotype))


def _shown(value: object) -> str:
    """A value as error messages show it: short, whatever was in the file."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked_edges(field: str, value: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, (list, tuple)):
        raise GenotypeError(f"{field}: expected a list of (operation, source state) pairs, got {_shown(value)}")
    edges = []
    for index, entry in enumerate(value):
        where, node = f"{field}[{index}]", index // 2
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise GenotypeError(f"{where}: expected an (operation, source state) pair, got {_shown(entry)}")
        operation, source = entry
        if operation == "none":
            raise GenotypeError(f"{where}: 'none' cannot be derived; the operations are: {', '.join(DERIVABLE)}")
        if not isinstance(operation, str) or operation not in OPERATIONS:
            raise GenotypeError(
                f"{where}: unknown operation {_shown(operation)}; the operations are: {', '.join(DERIVABLE)}"
            )
        if type(source) is not int:  # True == 1 and 1.0 == 1 would pass as states
            raise GenotypeError(f"{where}: the source state must be an integer, got {_shown(source)}")
        if not 0 <= source <= node + 1:
            raise GenotypeError(f"{where}: source state {source} does not exist before node {node} (0..{node + 1})")
        if index % 2 and source == edges[-1][1]:
            raise GenotypeError(f"{where}: both edges of node {node} come from state {source}; they must differ")
        edges.append((operation, source))
    if not edges or len(edges) % 2:
        raise GenotypeError(f"{field}: a cell has two entries for each of its nodes, got {len(edges)} entries")
    return tuple(edges)


def _checked_concat(field: str, value: object, nodes: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, range)):
        raise GenotypeError(f"{field}: expected a list of states, got {_shown(value)}")
    concat = []
    for index, state in enumerate(value):  # entry by entry, so that range(2, 10**12) stops at its first wrong one
        where = f"{field}[{index}]"
        if type(state) is not int:
            raise GenotypeError(f"{where}: the state must be an integer, got {_shown(state)}")
        if not 2 <= state <= nodes + 1:
            raise GenotypeError(f"{where}: state {state} is not one of the {nodes} nodes (2..{nodes + 1})")
        if state in concat:
            raise GenotypeError(f"{where}: state {state} stands twice")
        concat.append(state)
    if not concat:
        raise GenotypeError(f"{field}: at least one node must reach the cell's output")
    return tuple(concat)


def _fields_of_call(text: str) -> dict[str, object]:
    """The arguments of the one ``Genotype(...)`` call in a text, read from its syntax tree."""
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GenotypeError(f"not a Genotype(...) expression: {error}") from error
    call = body[0].value if len(body) == 1 and isinstance(body[0], (ast.Assign, ast.Expr)) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "Genotype":
        raise GenotypeError("expected exactly one Genotype(...) expression, with or without a leading NAME =")
    if len(call.args) > len(_FIELDS):
        raise GenotypeError(f"{len(call.args)} values for the {len(_FIELDS)} fields {', '.join(_FIELDS)}")
    values = {}
    for name, node in [*zip(_FIELDS, call.args), *((keyword.arg, keyword.value) for keyword in call.keywords)]:
        if name in values:
            raise GenotypeError(f"field {name!r} stands twice")
        values[name] = _literal(name, node)
    return values


def _literal(name: str, node: ast.expr) -> object:
    """The value of a literal, or of ``range`` or ``list(range)`` of literals."""
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id == "range":
                return range(*[ast.literal_eval(argument) for argument in node.args])
            if node.func.id in ("list", "tuple") and len(node.args) == 1:
                return _literal(name, node.args[0])
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise GenotypeError(f"{name}: only literals and range(...) are read, got {_shown(ast.unparse(node))}") from None


PUBLISHED = {
    "DARTS_V1": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 2),
        ),
        normal_concat=range(2, 6),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
        ),
        reduce_concat=range(2, 6),
    ),
    "DARTS_V2": Genotype(
        normal=(
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("skip_connect", 0),
            ("dil_conv_3x3", 2),
        ),
        normal_concat=range(2, 6),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ),
        reduce_concat=range(2, 6),
    ),
    "PC_DARTS_cifar": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 0),
            ("dil_conv_3x3", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("avg_pool_3x3", 0),
            ("dil_conv_3x3", 1),
        ),
        normal_concat=range(2, 6),
        reduce=(
            ("sep_conv_5x5", 1),
            ("max_pool_3x3", 0),
            ("sep_conv_5x5", 1),
            ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 2),
        ),
        reduce_concat=range(2, 6),
    ),
    "PC_DARTS_image": Genotype(
        normal=(
            ("skip_connect", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 0),
            ("skip_connect", 1),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1),
            ("dil_conv_5x5", 4),
        ),
        normal_concat=range(2, 6),
        reduce=(
            ("sep_conv_3x3", 0),
            ("skip_connect", 1),
            ("dil_conv_5x5", 2),
            ("max_pool_3x3", 1),
            ("sep_conv_3x3", 2),
            ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 3),
        ),
        reduce_concat=range(2, 6),
    ),
}


def find(name_or_path: str | os.PathLike) -> Genotype:
    """A published genotype by name, else one saved as a JSON file or as genotype.json in a run's directory.

    Raises GenotypeError: an unknown name lists the published ones, a wrong file is named.
    """
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path]
    path = name_or_path
    if os.path.isdir(path):
        path = os.path.join(path, "genotype.json")
        if not os.path.isfile(path):
            raise GenotypeError(f"{name_or_path}: this directory holds no genotype.json; did its search end?")
    if not os.path.isfile(path):
        raise GenotypeError(
            f"{name_or_path}: neither a published genotype ({', '.join(PUBLISHED)}), nor a genotype's JSON file, "
            "nor a directory that holds genotype.json"
        )
    return Genotype.load(path)


def random_genotype(rng: random.Random, nodes: int = 4, operations: Sequence[str] = DERIVABLE) -> Genotype:
    """A genotype drawn uniformly, to compare a search against: two different sources a node, any operation but none.

    Raises GenotypeError if there is nothing to draw from or an operation is unknown.
    """
    operations = [name for name in operations if name != "none"]
    if nodes < 1 or not operations:
        raise GenotypeError(f"a random genotype needs a node and an operation besides none; got {nodes}, {operations}")

    def cell():
        sources = [sorted(rng.sample(range(node + 2), 2)) for node in range(nodes)]
        return tuple((rng.choice(operations), source) for pair in sources for source in pair)

    concat = range(2, nodes + 2)
    return Genotype(normal=cell(), normal_concat=concat, reduce=cell(), reduce_concat=concat)
