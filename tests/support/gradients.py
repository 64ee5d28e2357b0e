"""Gradients of our modules and of others'."""


def gradients_of(ours, theirs, call, name):
    """The gradient of one weight, by the same name in both modules: (ours, theirs).

    Args:
        ours: a module.
        theirs: one with the same weights.
        call: module -> output, whose sum of squares is differentiated.
        name: of the weight.
    """
    found = []
    for module in (ours, theirs):
        module.requires_grad_(False)
        weight = module.get_parameter(name).requires_grad_()
        call(module).square().sum().backward()
        found.append(weight.grad)
        weight.grad = None
        weight.requires_grad_(False)
    return found
