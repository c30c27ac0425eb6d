"""Where a source file can be changed a little, so that a good suite should notice."""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """One change of a file.

    Attributes:
      file: Its path from the root of the project.
      line: Where the change is.
      scope: The first and last line of the function or class around it.
      span: What is replaced, as positions in the bytes of the file.
      text: The line as it was.
      before: What is replaced.
      after: What it becomes.
    """

    file: str
    line: int
    scope: tuple[int, int]
    span: tuple[int, int]
    text: str
    before: str
    after: str

    @property
    def key(self) -> str:
        """What no other mutant has."""
        return f"{self.file}:{self.line}:{self.span[0]}: {self.before} -> {self.after}"

    def applied(self, source: bytes) -> bytes:
        """The file with the change."""
        start, end = self.span
        return source[:start] + self.after.encode() + source[end:]


OTHER = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Pow: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult},
    **{ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift},
}
OTHER_FUNCTION = {"min": "max", "max": "min", "any": "all", "all": "any"}
NO_CODE = {"annotation", "returns", "decorator_list", "type_params"}


def mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a file, in order."""
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
    for node, scope, is_condition in _code(ast.parse(source), (1, len(lines))):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = lines[node.lineno - 1].decode().strip()
        before = source[start:end].decode()
        for after in _changes(node, is_condition):
            if after != before:  # As it is in `while True`.
                span = (start, end)
                yield Mutant(file, node.lineno, scope, span, text, before, after)


def _code(
    node: ast.AST, scope: tuple[int, int]
) -> Iterator[tuple[ast.AST, tuple[int, int], bool]]:
    """The nodes that do something, their scope, and whether they are conditions.

    Annotations, decorators, messages and assertions are left out.
    """
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if name in NO_CODE or not isinstance(child, ast.AST) or _is_alias(child):
                continue
            if isinstance(child, ast.JoinedStr | ast.Assert):
                continue
            if hasattr(child, "lineno"):
                yield child, scope, name in ("test", "ifs")
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from _code(child, (child.lineno, child.end_lineno))
            elif not isinstance(child, ast.Raise):
                yield from _code(child, scope)


def _is_alias(node: ast.AST) -> bool:
    """Whether `node` names a type, as in `Step = Callable[..., int] | None`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return False
    name = node.targets[0].id.lstrip("_")
    return name[0].isupper() and not name.isupper()


def _changes(node: ast.AST, is_condition: bool) -> Iterator[str]:
    """What could be in the place of `node`."""
    now = ast.unparse(node)
    for new in _other_nodes(node):
        text = ast.unparse(new)
        is_part = isinstance(new, ast.expr) and not isinstance(new, ast.Slice)
        if text != now:
            yield f"({text})" if is_part else text
    if is_condition:
        yield from (f"(not ({now}))", "True", "False")


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def _other_nodes(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op, *rest]):
            yield _with(node, ops=[OTHER[type(op)](), *rest])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            yield _with(node, op=OTHER[type(op)]())
        case ast.AugAssign(op=op) if type(op) in OTHER:
            yield _with(node, op=OTHER[type(op)]())
            yield ast.Pass()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Slice(lower=lower, upper=upper):
            one = ast.Constant(1)
            if lower is not None:
                yield _with(node, lower=ast.BinOp(lower, ast.Add(), one))
            if upper is not None:
                yield _with(node, upper=ast.BinOp(upper, ast.Sub(), one))
        case ast.Call(func=ast.Name(id=name)) if name in OTHER_FUNCTION:
            yield _with(node, func=ast.Name(OTHER_FUNCTION[name]))
        case ast.Call(args=[first, second, *rest]) if not _has_star(first, second):
            yield _with(node, args=[second, first, *rest])
        case ast.Return(value=value) if value and ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def _has_star(*args: ast.expr) -> bool:
    return any(isinstance(arg, ast.Starred) for arg in args)
