"""Compiling block by block, over adapters and checkpointing: how many graphs, and what a forward and backward give."""

import pytest
import torch
from torch import nn

from library.modules.checkpointing import checkpointed
from library.modules.compiling import compile_blocks, decompile_blocks, trains
from networks import lora_flux


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


class DoubleStreamBlock(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.img_attn, self.norm = Attention(size), nn.LayerNorm(size)

    def forward(self, x, vec):
        return x + self.img_attn(self.norm(x) * vec)


class SingleStreamBlock(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x, vec):
        return x + self.linear2(torch.relu(self.linear1(x * vec)))


class Model(nn.Module):
    def __init__(self, double=3, single=3):
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(single))

    @property
    def blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, x, vec):
        for block in self.blocks:
            x = block(x, vec)
        return x


class Counter:
    """A backend that runs the graph as it is and counts how many it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def fresh_compiler():
    config = torch._dynamo.config
    kept = {name: getattr(config, name) for name in ("recompile_limit", "fail_on_recompile_limit_hit")}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(config, name, value)


def prepared(**arguments):
    torch.manual_seed(0)
    model = Model().requires_grad_(False).train()
    network = lora_flux.create_network(1.0, 4, 2.0, None, [None], model, **arguments)
    network.apply_to([None], model, False, True)
    network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, None)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    for block in model.blocks:
        checkpointed(block)
    return model, network


def run(model, network, length):
    torch.manual_seed(length)
    network.zero_grad()
    y = model(torch.randn(2, length, 16), torch.randn(2, 1, 16))
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("dynamic, expected", [(None, [2, 4, 4, 4]), (True, [2, 2, 2, 2])])
def test_one_graph_per_block_kind(dynamic, expected):
    model, network = prepared()
    reference = [run(model, network, length) for length in (8, 12, 8, 20)]
    counter = Counter()
    compile_blocks(model.blocks, backend=counter, dynamic=dynamic, fullgraph=True, grad_inputs={"x"})
    graphs = []
    for length, (expected_y, expected_grads) in zip((8, 12, 8, 20), reference):
        y, grads = run(model, network, length)
        graphs.append(counter.graphs)
        torch.testing.assert_close(y, expected_y)
        assert len(grads) == len(expected_grads) == 24
        for got, wanted in zip(grads, expected_grads):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert graphs == expected


def test_aot_autograd_over_adapters_and_checkpoints():
    model, network = prepared()
    expected_y, expected = run(model, network, 8)
    compile_blocks(model.blocks, backend="aot_eager", grad_inputs={"x"})
    y, grads = run(model, network, 8)
    torch.testing.assert_close(y, expected_y)
    for got, wanted in zip(grads, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_another_rank_is_another_graph():
    model, network = prepared(network_reg_dims="single_blocks_2=2")
    counter = Counter()
    compile_blocks(model.blocks, backend=counter, dynamic=True, grad_inputs={"x"})
    run(model, network, 8)
    run(model, network, 12)
    assert counter.graphs == 3


def test_unmarked_inputs_would_cost_a_graph():
    """What the marking is for: the first block is the only one whose input needs no gradient."""
    model, network = prepared()
    counter = Counter()
    compile_blocks(model.blocks, backend=counter, dynamic=True, grad_inputs=())
    run(model, network, 8)
    assert counter.graphs == 3


def test_reaching_the_limit_is_an_error():
    model, network = prepared()
    compile_blocks(model.blocks, backend=Counter(), dynamic=False, cache_size_limit=3, grad_inputs={"x"})
    run(model, network, 8)
    with pytest.raises(Exception, match="recompile_limit") as caught:
        run(model, network, 12)
    assert "RecompileLimit" in type(caught.value).__name__


def test_module_dropout_compiles_into_one_graph():
    model, network = prepared(module_dropout="0.5", rank_dropout="0.5")
    network.on_epoch_start(None, model)
    counter = Counter()
    compile_blocks(model.blocks, backend=counter, dynamic=True, fullgraph=True, grad_inputs={"x"})
    first, _ = run(model, network, 8)
    assert torch.isfinite(first).all()
    assert counter.graphs == 2


def test_hooks_stay_outside_of_the_graph():
    model, network = prepared()
    counter = Counter()
    compile_blocks(model.blocks, backend=counter, dynamic=True, fullgraph=True, grad_inputs={"x"})
    log = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: log.append(index))
        block.register_full_backward_hook(lambda *_, index=index: log.append(-index))
    run(model, network, 8)
    assert log == [0, 1, 2, 3, 4, 5, -5, -4, -3, -2, -1, 0]
    assert counter.graphs == 2


def test_undoing_and_repeating():
    model, network = prepared()
    before = [block.__dict__["forward"] for block in model.blocks]
    counter = Counter()
    compile_blocks(model.blocks, backend=counter)
    compile_blocks(model.blocks, backend=counter)
    decompile_blocks(model.blocks)
    decompile_blocks(model.blocks)
    assert [block.__dict__["forward"] for block in model.blocks] == before
    run(model, network, 8)
    assert counter.graphs == 0
    plain = nn.Linear(2, 2)
    compile_blocks([plain], backend=counter)
    plain(torch.ones(1, 2))
    decompile_blocks([plain])
    assert "forward" not in plain.__dict__
    assert counter.graphs == 1


def test_which_blocks_train():
    model, _ = prepared(train_blocks="single")
    assert [trains(block) for block in model.blocks] == [False] * 3 + [True] * 3
    assert trains(nn.Linear(1, 1))
