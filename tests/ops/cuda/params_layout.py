"""How the launcher packs kernels' structs, as C++ that compiles only where the compiler lays them out alike."""

from __future__ import annotations

from cllm_gpu.ops.cuda.kernel_source import kernel_parameters, load_source, source_directory

SOURCES_WITH_STRUCTS = sorted(
    path.name
    for path in source_directory().glob("*.cu")
    if any(signature.struct for signature in kernel_parameters(path.name).values())
)


def with_layout_asserted(source: str, offset_of: str) -> str:
    """Text of a source and an assertion for the size of each struct and for the place of each field.

    `offset_of`: the compiler's own expression for an offset, with {struct} and {field}.
    """
    structs = [signature.struct for signature in kernel_parameters(source).values() if signature.struct is not None]
    lines = [load_source(source)]
    for struct in structs:
        lines.append(f"static_assert(sizeof({struct.name}) == {struct.size});")
        for path, offset in zip(struct.paths, struct.offsets, strict=True):
            lines.append(f"static_assert({offset_of.format(struct=struct.name, field=path)} == {offset});")
    return "\n".join([*lines, ""])
