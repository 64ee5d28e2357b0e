"""Our denoisers' weights under diffusers' names, by the tables that exports use."""

from library.modules.layer_names import find_rule, layer_parts


def to_diffusers(state, rules):
    """Tensors by diffusers' names; norms that are called `scale` are called `weight` there."""
    result = {}
    for name, tensor in state.items():
        path, leaf = name.rsplit(".", 1)
        rule, names = find_rule(rules, path)
        inputs = state.get(f"{path}.weight", tensor).shape[-1]
        for theirs, part in zip(names, layer_parts(rule, tensor, inputs), strict=True):
            result[f"{theirs}.{'weight' if leaf == 'scale' else leaf}"] = part
    return result
