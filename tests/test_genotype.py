"""Genotypes as data: files, texts, names and drawings."""

import json
import random
import subprocess
import sys

import pytest

from fpdarts.draw import draw
from fpdarts.genotype import DERIVABLE, PUBLISHED, Genotype, GenotypeError, find, random_genotype

GENOTYPE = PUBLISHED["PC_DARTS_cifar"]


def changed(field, index=None, entry=None, **fields):
    """A valid genotype's dict with one entry, or whole fields, replaced."""
    values = GENOTYPE.to_dict()
    if index is not None:
        values[field][index] = entry
    values.update(fields)
    return values


def test_the_module_needs_no_torch():
    code = "import sys, fpdarts.genotype, fpdarts.draw; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Files


@pytest.mark.parametrize("name", PUBLISHED)
def test_file_round_trip(name, tmp_path):
    path = tmp_path / "genotype.json"
    PUBLISHED[name].save(path)
    assert Genotype.load(path) == PUBLISHED[name]
    assert find(path) == find(str(path)) == find(tmp_path) == PUBLISHED[name]
    assert [p.name for p in tmp_path.iterdir()] == ["genotype.json"], "a temporary file stayed"


def test_file_is_exactly_the_documented_json(tmp_path):
    GENOTYPE.save(tmp_path / "g.json")
    text = (tmp_path / "g.json").read_text()
    values = json.loads(text)
    assert list(values) == ["normal", "normal_concat", "reduce", "reduce_concat"]
    assert values["normal"][:2] == [["sep_conv_3x3", 1], ["skip_connect", 0]]
    assert values["normal_concat"] == [2, 3, 4, 5]
    assert '    ["sep_conv_3x3", 1], ["skip_connect", 0],\n' in text, "one node a line"


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "genotype.json"
    GENOTYPE.save(path)

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        PUBLISHED["DARTS_V1"].save(path)
    assert Genotype.load(path) == GENOTYPE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "expected an object"),
        (b"{}", "missing field 'normal', missing field 'normal_concat'"),
        (json.dumps(changed("normal", 3, ["sep_conv_9x9", 1])).encode(), r"normal\[3\]: unknown operation"),
    ],
    ids=["truncated", "not text", "nested", "a list", "empty object", "wrong entry"],
)
def test_load_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(GenotypeError, match=message) as error:
        Genotype.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_load_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(GenotypeError, match="missing.json: cannot be read: No such file"):
        Genotype.load(tmp_path / "missing.json")


# Validation


@pytest.mark.parametrize(
    "values, message",
    [
        (changed("normal", 3, ["sep_conv_9x9", 1]), r"normal\[3\]: unknown operation 'sep_conv_9x9'; .*max_pool_3x3"),
        (changed("normal", 3, [["sep_conv_3x3"], 1]), r"normal\[3\]: unknown operation \['sep_conv_3x3'\]"),
        (changed("normal", 0, ["none", 1]), r"normal\[0\]: 'none' cannot be derived"),
        (changed("reduce", 4, ["skip_connect", 5]), r"reduce\[4\]: source state 5 does not exist before node 2 \(0..3"),
        (changed("reduce", 0, ["skip_connect", -1]), r"reduce\[0\]: source state -1 does not exist before node 0"),
        (changed("normal", 1, ["skip_connect", 1]), r"normal\[1\]: both edges of node 0 come from state 1"),
        (changed("normal", 1, ["skip_connect", False]), r"normal\[1\]: the source state must be an integer, got False"),
        (changed("normal", 1, ["skip_connect", "0"]), r"normal\[1\]: the source state must be an integer, got '0'"),
        (changed("normal", 1, ["skip_connect", 0.0]), r"normal\[1\]: the source state must be an integer, got 0\.0"),
        (changed("normal", 2, ["skip_connect"]), r"normal\[2\]: expected an \(operation, source state\) pair"),
        (changed("normal", 2, "skip_connect"), r"normal\[2\]: expected an \(operation, source state\) pair"),
        (changed(None, normal=GENOTYPE.normal[:7]), "normal: a cell has two entries for each of its nodes, got 7"),
        (changed(None, normal=[]), "normal: a cell has two entries for each of its nodes, got 0"),
        (changed(None, normal={"a": 1}), "normal: expected a list"),
        (changed(None, reduce=GENOTYPE.reduce[:6]), "reduce: 6 entries make 3 nodes, but normal has 4"),
        (changed("normal_concat", 3, 6), r"normal_concat\[3\]: state 6 is not one of the 4 nodes \(2\.\.5\)"),
        (changed("reduce_concat", 0, 1), r"reduce_concat\[0\]: state 1 is not one of"),
        (changed("reduce_concat", 1, 2), r"reduce_concat\[1\]: state 2 stands twice"),
        (changed("reduce_concat", 1, True), r"reduce_concat\[1\]: the state must be an integer, got True"),
        (changed(None, reduce_concat=[]), "reduce_concat: at least one node"),
        (changed(None, reduce_concat="2345"), "reduce_concat: expected a list"),
        (changed(None, nodes=4), "unknown field 'nodes'; the fields are: normal, normal_concat, reduce, reduce_concat"),
        ({k: v for k, v in GENOTYPE.to_dict().items() if k != "reduce"}, "missing field 'reduce'"),
    ],
)
def test_validation_names_the_wrong_entry(values, message):
    with pytest.raises(GenotypeError, match=message):
        Genotype.from_dict(values)


def test_the_constructor_validates_and_keeps_tuples():
    genotype = Genotype(**GENOTYPE.to_dict())
    assert genotype == GENOTYPE and hash(genotype) == hash(GENOTYPE)
    assert genotype.nodes == 4
    assert genotype.normal_concat == (2, 3, 4, 5)
    with pytest.raises(GenotypeError):
        Genotype(normal=[], normal_concat=[2], reduce=[], reduce_concat=[2])
    with pytest.raises(AttributeError):
        genotype.normal = ()


# Texts of papers

TEXT = """
  PCDARTS = Genotype(
    normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
            ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)],
    normal_concat=range(2, 6),
    reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2),
            ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)],
    reduce_concat=[2, 3, 4, 5])
"""


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("PCDARTS = ", ""),
        TEXT.replace("range(2, 6)", "list(range(2, 6))"),
        " ".join(TEXT.split()),
        repr(GENOTYPE),
    ],
    ids=["named", "bare", "list of a range", "one line", "own repr"],
)
def test_parse(text):
    assert Genotype.parse(text) == GENOTYPE


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected exactly one Genotype"),
        ("Genotype(", "not a Genotype"),
        ("a\0b", "not a Genotype"),
        ("(" * 10_000, "not a Genotype"),
        ("Other(normal=[])", "expected exactly one Genotype"),
        ("Genotype(normal=[])\nGenotype(normal=[])", "expected exactly one Genotype"),
        ("Genotype()", "missing field 'normal'"),
        (TEXT.replace("reduce_concat", "other"), "missing field 'reduce_concat', unknown field 'other'"),
        (TEXT.replace("('skip_connect', 0)", "('sep_conv_9x9', 0)"), r"normal\[1\]: unknown operation 'sep_conv_9x9'"),
        (TEXT.replace("range(2, 6)", "range(2, 10**12)"), "only literals"),
        (TEXT.replace("range(2, 6)", "range(2, 1000000000000)"), r"normal_concat\[4\]: state 6 is not"),
        (TEXT.replace("range(2, 6)", "range()"), "normal_concat: only literals"),
        (TEXT.replace("Genotype(", "Genotype(*x, "), "normal: only literals"),
        (TEXT.replace("Genotype(", "Genotype(**x, "), "only literals"),
        (TEXT.replace("Genotype(", "Genotype([], "), "field 'normal' stands twice"),
    ],
)
def test_parse_errors_name_the_origin(text, message):
    with pytest.raises(GenotypeError, match=message) as error:
        Genotype.parse(text, origin="paper.txt")
    assert str(error.value).startswith("paper.txt: ")


@pytest.mark.parametrize(
    "template",
    [
        "{}",
        "x = {}",
        "Genotype(normal={}, normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[('sep_conv_3x3', {})], normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[], normal_concat=range(2, {}), reduce=[], reduce_concat=[2])",
        "Genotype(*{})",
        "{}.Genotype(normal=[])",
        "Genotype({}=1)",
    ],
)
def test_parse_never_runs_the_text(template, tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(GenotypeError):
        Genotype.parse(template.format(f"__import__('os').system('touch {trap}')"))
    assert not trap.exists()


# As the authors' repositories print them.
PRINTED = {
    "DARTS_V1": """Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1),
        ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5],
        reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0),
        ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])""",
    "DARTS_V2": """Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
        ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
        reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
        ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])""",
    "PC_DARTS_image": """Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0),
        ('skip_connect', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)],
        normal_concat=range(2, 6), reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2),
        ('max_pool_3x3', 1), ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)],
        reduce_concat=range(2, 6))""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_published_genotypes_are_as_they_were_printed(name):
    assert PUBLISHED[name] == Genotype.parse(PRINTED[name])


# Names


@pytest.mark.parametrize("name", PUBLISHED)
def test_find_a_published_name(name):
    assert find(name) is PUBLISHED[name]


def test_find_errors_say_what_exists(tmp_path):
    with pytest.raises(GenotypeError, match="DARTS_V3: neither .*DARTS_V1, DARTS_V2, PC_DARTS_cifar, PC_DARTS_image"):
        find("DARTS_V3")
    with pytest.raises(GenotypeError, match="holds no genotype.json"):
        find(tmp_path)
    with pytest.raises(GenotypeError, match="neither"):
        find("x" * 5000)


# Random genotypes


def test_random_genotypes_are_valid_seeded_and_cover_everything():
    draws = [random_genotype(random.Random(seed)) for seed in range(200)]
    assert draws == [random_genotype(random.Random(seed)) for seed in range(200)]
    assert {name for g in draws for name, _ in g.normal + g.reduce} == set(DERIVABLE)
    last_node = {frozenset(source for _, source in g.normal[6:]) for g in draws}
    assert len(last_node) == 10, "all pairs of the last node's five sources"


def test_random_genotype_options():
    genotype = random_genotype(random.Random(0), nodes=2, operations=["none", "skip_connect"])
    assert {name for name, _ in genotype.normal} == {"skip_connect"}
    assert genotype.nodes == 2 and genotype.reduce_concat == (2, 3)
    for options in ({"nodes": 0}, {"operations": ["none"]}, {"operations": ["conv"]}):
        with pytest.raises(GenotypeError):
            random_genotype(random.Random(0), **options)


# Drawings


@pytest.mark.parametrize("suffix, start", [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".PNG", b"\x89PNG")])
def test_draw_is_deterministic(tmp_path, suffix, start):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    draw(GENOTYPE, first)
    draw(GENOTYPE, second)
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_draw_any_number_of_nodes_and_nodes_without_an_output(tmp_path):
    for nodes in (1, 2, 5):
        draw(random_genotype(random.Random(nodes), nodes), tmp_path / f"{nodes}.svg")
    draw(Genotype(GENOTYPE.normal, [5], GENOTYPE.reduce, [2, 5]), str(tmp_path / "partial.svg"))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["cell.pdf", "cell"])
def test_draw_refuses_another_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"the suffixes are: \.svg, \.png"):
        draw(GENOTYPE, tmp_path / name)
    assert not list(tmp_path.iterdir())
