"""Translates preprocessed CUDA source to C++ for the system's compiler: shared memory, and a table of kernels.

Only two CUDA keywords need rewriting: `__shared__` declarations become static variables with guard bytes around them
(or, if `extern`, pointers to the block's dynamic shared memory), and each `__global__` function is entered in a table.
Everything else is ordinary C++ with the headers in include/. Line numbers are preserved.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cllm_gpu.utils.errors import UserError

_BRACES = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|[{}]')
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class KernelDeclaration:
    """The declaration of a `__global__` function."""

    name: str
    parameters: tuple[str, ...]
    """Parameter names in order ("argument 3" for an unnamed one)."""
    is_template: bool
    is_extern_c: bool


def user_part(preprocessed: str, path: str) -> int:
    """Offset of the start of the user's file in the preprocessor's output."""
    last = None
    for marker in re.finditer(rf'^# 1 "{re.escape(path)}"[^\n]*$', preprocessed, re.M):
        last = marker
    return last.start() if last else 0


def included_files(text: str) -> list[str]:
    """The files included in preprocessed text, by its line markers, without the source itself."""
    names = dict.fromkeys(re.findall(r'^# \d+ "([^"<]+)" 1', text, re.M))
    return [name for name in names if not re.search(r"[0-9a-f]{32}\.cu$", name)]


def find_kernels(text: str) -> list[KernelDeclaration]:
    """Every kernel defined in preprocessed text."""
    blocks = _extern_c_blocks(text)
    kernels = []
    for word in re.finditer(r"\b__global__\b", text):
        opening = text.index("(", word.end())
        closing = _matching(text, opening, "(", ")")
        if text[closing + 1 :].lstrip().startswith(";"):
            continue
        name = _NAME.findall(text[word.end() : opening])[-1]
        before = _statement_before(text, word.start())
        in_c = 'extern "C"' in before or any(low < word.start() < high for low, high in blocks)
        parameters = tuple(
            _parameter_name(part, i) for i, part in enumerate(_split(text[opening + 1 : closing])) if part.strip()
        )
        kernels.append(KernelDeclaration(name, parameters, "template" in before, in_c))
    return kernels


def rewrite(text: str) -> str:
    """Preprocessed CUDA source as C++: shared variables rewritten, `__global__` removed."""
    pieces = []
    done = 0
    for word in re.finditer(r"\b__shared__\b", text):
        start = word.start() - len(_statement_before(text, word.start()))
        end = _end_of_statement(text, word.end())
        statement = text[start:end]
        pieces += [text[done:start], _rewrite_shared(statement), "\n" * statement.count("\n")]
        done = end + 1
    pieces.append(text[done:])
    return re.sub(r"\b__(?:global|device|constant|managed)__(?!\w)", "", "".join(pieces))


def find_variables(text: str) -> list[str]:
    """Names of the `__device__` and `__constant__` variables at file scope of preprocessed text, in order."""
    blocks = _extern_c_blocks(text)
    found: dict[str, None] = {}
    for word in re.finditer(r"\b__(?:device|constant|managed)__(?!\w)", text):
        declaration = re.sub(r"\balignas\s*\([^()]*\)", " ", text[word.end() : word.end() + 2000])
        head = re.split(r"[({\[=;]", declaration, maxsplit=1)
        names = _NAME.findall(head[0])
        is_function = declaration[len(head[0]) : len(head[0]) + 1] == "("
        before = _statement_before(text, word.start())
        if is_function or len(names) < 2 or "extern" in before or "template" in before:
            continue
        if _is_at_file_scope(text, word.start(), blocks):
            found[names[-1]] = None
    return list(found)


def _is_at_file_scope(text: str, position: int, extern_c: Sequence[tuple[int, int]]) -> bool:
    depth = 0
    for token in _BRACES.finditer(text, 0, position):
        depth += (token[0] == "{") - (token[0] == "}")
    return depth == sum(low < position < high for low, high in extern_c)


def kernel_table(expressions: Sequence[str], variables: Sequence[str]) -> str:
    """C++ functions that export kernels and variables: `sim_kernel_<i>` and `sim_variable_<i>` return entry i."""
    lines = ['extern "C" {']
    for i, name in enumerate(variables):
        lines.append(
            f'__attribute__((visibility("default"))) sim::Variable sim_variable_{i}() '
            f"{{ return {{&::{name}, sizeof(::{name})}}; }}"
        )
    for i, expression in enumerate(expressions):
        lines.append(
            f'__attribute__((visibility("default"))) const sim::Kernel* sim_kernel_{i}() '
            f"{{ return &sim::Entry<&{expression}>::table; }}"
        )
    return "\n".join([*lines, "}", ""])


def _extern_c_blocks(text: str) -> list[tuple[int, int]]:
    return [(m.end(), _matching(text, m.end() - 1, "{", "}")) for m in re.finditer(r'extern\s+"C"\s*\{', text)]


def _statement_before(text: str, position: int) -> str:
    """The part of the statement at `position` that precedes it."""
    start = max(text.rfind(c, 0, position) for c in ";{}") + 1
    directive = text.rfind("\n#", start, position)
    if directive >= 0 or text.startswith("#", start):
        line_end = text.find("\n", max(directive + 1, start))
        start = line_end + 1
    return text[start:position]


def _end_of_statement(text: str, position: int) -> int:
    depth = 0
    for i in range(position, len(text)):
        if text[i] in "({[":
            depth += 1
        elif text[i] in ")}]":
            depth -= 1
        elif text[i] == ";" and depth == 0:
            return i
    raise UserError("a __shared__ declaration has no end")


def _matching(text: str, opening: int, left: str, right: str) -> int:
    depth = 0
    for token in re.finditer(rf'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|[{re.escape(left + right)}]', text[opening:]):
        depth += (token[0] == left) - (token[0] == right)
        if depth == 0:
            return opening + token.start()
    raise UserError(f"'{left}' has no matching '{right}' in the CUDA source")


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _parameter_name(text: str, index: int) -> str:
    names = _NAME.findall(text.partition("=")[0].partition("[")[0])
    return names[-1] if len(names) > 1 else f"argument {index + 1}"


def _rewrite_shared(statement: str) -> str:
    words = " ".join(line for line in statement.split("\n") if not line.startswith("#"))
    is_extern = re.search(r"\bextern\b", words) is not None
    words = re.sub(r"\b(extern|static|__shared__)\b", " ", words)
    first, *others = _split(words)
    head = first.partition("[")[0].partition("=")[0]
    name = list(_NAME.finditer(head))[-1]
    specifier, first_declarator = first[: name.start()].strip(), first[name.start() :].strip()
    if "=" in words:
        raise UserError(f"CUDA does not allow an initialiser on the shared variable {name[0]!r}")
    make = _dynamic if is_extern else _static
    return " ".join(make(specifier, declarator.strip()) for declarator in (first_declarator, *others))


def _dynamic(specifier: str, declarator: str) -> str:
    name = _NAME.match(declarator)
    if name is None or not re.fullmatch(r"\s*\[\s*\].*", declarator[name.end() :]):
        raise UserError(f"extern __shared__ {specifier} {declarator}: dynamic shared memory is an array without a size")
    extents = declarator[name.end() :].partition("]")[2]
    kind = re.sub(r"\balignas\s*\([^()]*\)", "", specifier)
    if extents:
        return f"{kind} (* const {name[0]}){extents} = reinterpret_cast<{kind} (*){extents}>(sim_dynamic_shared);"
    return f"{kind}* const {name[0]} = reinterpret_cast<{kind}*>(sim_dynamic_shared);"


def _static(specifier: str, declarator: str) -> str:
    match = _NAME.match(declarator)
    if match is None:
        raise UserError(f"cannot read the shared variable {declarator!r}")
    name = match[0]
    return (
        f"struct {name}__type {{ {specifier} {declarator}; }}; static sim::Guarded<{name}__type> {name}__storage; "
        f"auto& {name} = {name}__storage.value.{name}; static unsigned {name}__seen = 0; "
        f'sim::declare_shared({name}__seen, &{name}, sizeof({name}), "{name}");'
    )
