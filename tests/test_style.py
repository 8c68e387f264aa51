"""The shape of the code: lines with one thought, functions that fit on a screen, files that are read at a sitting.

Length in lines alone can be bought with dense lines, so that tokens are counted too. Import directions are held by
import-linter, docstrings by ruff (pyproject.toml), circles and names by test_rooms.py.
"""

import ast
import functools
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator

from visionloom.tests.sources import Source, parsed, sources

LONGEST_FUNCTION = 60
"""Lines, docstring included."""
NINTH_DECILE_TOKENS = 150
MOST_TOKENS = 350
MOST_TOKENS_OF_A_KERNEL = 520
"""What a Triton program holds in registers is not handed on; its addresses and masks are arithmetic."""
MOST_ARGUMENTS = 6
LONGEST_FILE = 500
DENSEST_LINE = 30
MEAN_TOKENS_A_LINE = 9.5
DENSE_LINE, DENSE_SHARE = 25, 0.025
"""Share of the lines that may hold as many tokens."""
LEAST_COMMENTS = 0.04
"""Comments for each line of code: where a reader would ask why."""
MOST_SINGLE_CALLERS = 0.45
"""Share of private helpers with one caller: a thought is not cut in two for the sake of length."""

_NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@functools.cache
def tokens_by_line(source: Source) -> Counter[int]:
    """Tokens of code on each line that has some; docstrings have none."""
    docstrings = {
        node.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    counts: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        is_long_text = token.type == tokenize.STRING and token.start[0] != token.end[0]
        if token.type not in _NO_CODE and not is_long_text and token.start[0] not in docstrings:
            counts[token.start[0]] += 1
    return counts


def functions() -> Iterator[tuple[str, Source, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function of the package with its place."""
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{source.path}:{node.lineno} {node.name}", source, node


def last_line(node: ast.stmt) -> int:
    """The line on which a statement ends."""
    assert node.end_lineno is not None
    return node.end_lineno


def first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line on which a function begins; a Triton kernel's begins below its parameters, the tensors of a launch."""
    return node.body[0].lineno if is_kernel(node) else node.lineno


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled by Triton."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def test_functions_fit_on_a_screen() -> None:
    lines = {place: last_line(node) - first_line(node) + 1 for place, _, node in functions()}
    assert {place: length for place, length in lines.items() if length > LONGEST_FUNCTION} == {}


def test_functions_hold_one_thought() -> None:
    tokens: dict[str, int] = {}
    kernels: dict[str, int] = {}
    for place, source, node in functions():
        counts = tokens_by_line(source)
        kind = kernels if is_kernel(node) else tokens
        kind[place] = sum(counts[line] for line in range(first_line(node), last_line(node) + 1))
    assert {place: count for place, count in tokens.items() if count > MOST_TOKENS} == {}
    assert all(count <= MOST_TOKENS_OF_A_KERNEL for count in kernels.values()), kernels
    assert statistics.quantiles(tokens.values(), n=10)[-1] <= NINTH_DECILE_TOKENS


def test_functions_take_few_arguments() -> None:
    counts = {}
    for place, _, node in functions():
        if is_kernel(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts[place] = sum(argument.arg not in ("self", "cls") for argument in arguments)
    assert {place: count for place, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_lines_hold_one_thought() -> None:
    lines = {
        f"{source.path}:{line}": count
        for source in sources()
        for line, count in tokens_by_line(source).items()
    }
    assert {place: count for place, count in lines.items() if count > DENSEST_LINE} == {}
    assert sum(count >= DENSE_LINE for count in lines.values()) <= DENSE_SHARE * len(lines)
    assert statistics.mean(lines.values()) <= MEAN_TOKENS_A_LINE


def test_files_can_be_read_at_a_sitting() -> None:
    lengths = {source.path: len(source.text.splitlines()) for source in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_comments_say_why() -> None:
    """What they say no test can judge; that there are some, it can."""
    comments = sum(
        token.type == tokenize.COMMENT
        for source in sources()
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline)
    )
    assert comments >= LEAST_COMMENTS * sum(len(tokens_by_line(source)) for source in sources())


def test_private_helpers_serve_more_than_one() -> None:
    uses: Counter[str] = Counter()
    helpers = []
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                uses[node.attr] += 1
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                helpers.append(node.name)
    assert sum(uses[name] == 1 for name in helpers) <= MOST_SINGLE_CALLERS * len(helpers)


def test_a_dense_line_is_counted() -> None:
    source = parsed(
        "train/a.py", '"""Doc string."""\nx = [a + b for a, b in c]  # why\n\n\ndef f(): return 1\n'
    )
    assert tokens_by_line(source) == Counter({2: 13, 5: 7})
