"""Number formats and ways of computing: what they change, and what they must not."""

import pytest
import torch
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file
from library.training import build

FAMILIES = ["flux"]  # what every family keeps is in tests/families/test_contracts.py
BF16 = ("--mixed_precision", "bf16")


@pytest.fixture
def run(inputs, tmp_path):
    """A run's losses, its file and the session it had."""

    def make(name, *more, family="flux", **dataset):
        folder = tmp_path / name
        folder.mkdir()
        arguments = network_arguments(family, inputs, folder, dataset_toml(folder, inputs, **dataset), *more)
        outcome = run_training(family, arguments)
        return outcome.losses, load_file(folder / "out" / "last.safetensors")

    return make


@pytest.fixture
def sessions(monkeypatch):
    made = []
    original = build.Session
    monkeypatch.setattr(build, "Session", lambda **parts: made.append(original(**parts)) or made[-1])
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flag", ["--cpu_offload_checkpointing", "--unsloth_offload_checkpointing"])
def test_offloaded_activations_change_nothing(run, family, flag):
    plain = run("plain", "--gradient_checkpointing", family=family)
    moved = run("moved", "--gradient_checkpointing", flag, family=family)
    assert plain[0] == moved[0]
    assert all(torch.equal(value, moved[1][name]) for name, value in plain[1].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_small_pieces_is_the_same_attention(run, sessions, family):
    plain, pieces = run("plain", family=family), run("pieces", "--mem_eff_attn", family=family)
    assert pieces[0] == pytest.approx(plain[0], rel=1e-5)
    used = [
        {
            getattr(getattr(part, "attend", None), "__name__", type(getattr(part, "processor", None)).__name__)
            for part in session.components.denoiser.modules()
        }
        for session in sessions
    ]
    assert not {"attend_by_item", "SlicedAttnProcessor"} & used[0]
    assert {"attend_by_item", "SlicedAttnProcessor"} & used[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_throughout(run, sessions, family):
    mixed, full = run("mixed", *BF16, family=family), run("full", *BF16, "--full_bf16", family=family)
    assert {p.dtype for p in sessions[0].optimizer.parameters} == {torch.float32}
    assert {p.dtype for p in sessions[1].optimizer.parameters} == {torch.bfloat16}
    assert {value.dtype for name, value in full[1].items() if "lora_up" in name} == {torch.bfloat16}
    assert full[0] == pytest.approx(mixed[0], rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_base_models(run, sessions, family):
    wide, narrow = run("wide", *BF16, family=family), run("narrow", *BF16, "--fp8_base", family=family)
    unet_only = run("unet", *BF16, "--fp8_base_unet", family=family)

    def formats(session):
        parts = session.components.denoiser, *session.components.text_encoders
        return [any(p.dtype == torch.float8_e4m3fn for p in part.parameters()) for part in parts]

    assert not any(formats(sessions[0])) and all(formats(sessions[1]))
    assert formats(sessions[2])[0] and not any(formats(sessions[2])[1:])
    assert narrow[0] != wide[0] != unet_only[0]
    assert narrow[0] == pytest.approx(wide[0], rel=0.1) and unet_only[0] == pytest.approx(wide[0], rel=0.1)


def test_eight_bit_models_through_checkpointed_and_compiled_blocks(run):
    plain = run("plain", *BF16, "--fp8_base")
    more = ("--gradient_checkpointing", "--compile", "--compile_backend", "aot_eager", "--compile_dynamic", "true")
    wrapped = run("wrapped", *BF16, "--fp8_base", *more)
    assert wrapped[0] == pytest.approx(plain[0], rel=2e-2)


def test_adapters_cannot_be_merged_into_eight_bits(run):
    with pytest.raises(UserError, match="--base_weights.*8-bit"):
        run("merged", *BF16, "--fp8_base", "--base_weights", __file__)


def test_compiling_the_whole_model(run):
    plain = run("plain")
    compiled = run("compiled", "--torch_compile", "--dynamo_backend", "eager")
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    with pytest.raises(UserError, match="--dynamo_backend.*no such backend"):
        run("unknown", "--torch_compile", "--dynamo_backend", "nvprims_nvfuser")


@pytest.mark.parametrize("kind", ["stochastic", "kahan"])
def test_small_changes_of_half_precision_weights(run, kind):
    """At a small rate weights rounded to nearest hardly move; with either remedy they go as far as in float32."""
    rate, none = ("--learning_rate", "1e-4", "--max_train_steps", "24"), ("--learning_rate", "1e-30")
    begin = run("begin", *BF16, *none)[1]
    start = run("start", *BF16, "--full_bf16", *none)[1]
    exact = run("exact", *BF16, *rate)[1]
    nearest = run("nearest", *BF16, "--full_bf16", *rate)[1]
    remedy = run("remedy", *BF16, "--full_bf16", "--bf16_update", kind, *rate)[1]
    names = [name for name in exact if "lora_down" in name]

    def progress(found):
        """Share of float32's way that was gone."""
        ways = [(found[name].float() - start[name].float(), exact[name] - begin[name]) for name in names]
        return sum(float((a * b).sum()) for a, b in ways) / sum(float(b.square().sum()) for _, b in ways)

    assert abs(1 - progress(remedy)) < 0.2 < abs(1 - progress(nearest))


def test_half_precision_updates_resume_exactly(inputs, tmp_path):
    more = (*BF16, "--full_bf16", "--bf16_update", "kahan", "--save_state", "--save_every_n_steps", "2")
    results = {}
    for name, steps in (("straight", ("4",)), ("stopped", ("2", "4"))):
        folder = tmp_path / name
        folder.mkdir()
        arguments = network_arguments("flux", inputs, folder, dataset_toml(folder, inputs), *more)
        for number, length in enumerate(steps):
            run_training("flux", [*arguments, "--max_train_steps", length, *(["--resume", "auto"] if number else [])])
        results[name] = load_file(folder / "out" / "last.safetensors")
    assert all(torch.equal(value, results["stopped"][name]) for name, value in results["straight"].items())


@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing",)], ids=["plain", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_blocks_change_nothing(run, family, more):
    plain = run("plain", *more, family=family)
    swapped = run("swapped", *more, "--blocks_to_swap", "3", family=family)
    assert plain[0] == swapped[0]
    assert all(torch.equal(value, swapped[1][name]) for name, value in plain[1].items())


def test_the_old_flag_of_swapping_and_too_many_blocks(run, monkeypatch):
    counts = []
    original = build.BlockSwapper
    monkeypatch.setattr(
        build, "BlockSwapper", lambda blocks, *given: counts.append(given[0]) or original(blocks, *given)
    )
    run("old", "--split_mode")
    assert counts == [4]  # eighteen in the real model, all of the tiny one
    with pytest.raises(UserError, match="--blocks_to_swap = 99"):
        run("many", "--blocks_to_swap", "99")
