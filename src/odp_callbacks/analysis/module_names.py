"""Where a LoRA module is in its model, by its name: in which layer, and of which kind."""

from collections.abc import Sequence


def parse_module_name(module: str) -> tuple[str, int, str]:
    """Split a module's name at the number of its layer.

    Returns:
        What precedes the number; the number, or -1 if there is none; and what follows, the kind of module.

    Examples:
        >>> parse_module_name("model.layers.3.self_attn.q_proj"), parse_module_name("lm_head")
        (('model.layers', 3, 'self_attn.q_proj'), ('', -1, 'lm_head'))
    """
    name_parts = module.split(".")
    for part_index, name_part in enumerate(name_parts):
        if name_part.isdecimal():
            return ".".join(name_parts[:part_index]), int(name_part), ".".join(name_parts[part_index + 1 :])
    return "", -1, module


def module_positions(modules: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Find the layer and the kind of each module; where two modules share both, the kind includes what precedes.

    Examples:
        >>> module_positions(["model.layers.3.self_attn.q_proj", "lm_head"])
        {'model.layers.3.self_attn.q_proj': (3, 'self_attn.q_proj'), 'lm_head': (-1, 'lm_head')}
    """
    parsed_names = {module: parse_module_name(module) for module in modules}
    positions = {module: (layer, kind) for module, (_, layer, kind) in parsed_names.items()}
    if len(set(positions.values())) < len(positions):  # a model of several towers, such as vision and language
        positions = {
            module: (layer, f"{tower}.{kind}".strip(".")) for module, (tower, layer, kind) in parsed_names.items()
        }
    return positions


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of each kind's name, or the whole name if two kinds end alike.

    Examples:
        >>> short_kinds(["self_attn.q_proj", "mlp.up_proj"])
        {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'up_proj'}
        >>> short_kinds(["attn.c_proj", "mlp.c_proj"])
        {'attn.c_proj': 'attn.c_proj', 'mlp.c_proj': 'mlp.c_proj'}
    """
    last_parts = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return {kind: last if last_parts.count(last) == 1 else kind for kind, last in zip(kinds, last_parts, strict=True)}
