"""Flags that parse but do nothing yet, and flags that can mean nothing for a model family.

A line goes from these tables when the feature arrives.
"""

from collections.abc import Iterator, Mapping

from library.base.errors import Problem
from library.options.optimizer import OptimizerOptions
from library.options.rates import rate_warnings
from library.options.schema import OptionSet


def _same(feature: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, feature)


# option name -> the feature behind it
PENDING_FLAGS: dict[str, str] = {
    **_same("a dataset class of your own", "dataset_class"),
    **_same(
        "DeepSpeed",
        "deepspeed",
        "zero_stage",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "fp16_master_weights_and_gradients",
    ),
}

_UNET_ONLY = "it changes the discrete noise schedule, which flow-matching models do not have"
_CLIP_ONLY = "it belongs to the CLIP prompts of Stable Diffusion"

_FLOW_NO_EFFECT: dict[str, str] = {
    "v2": "it names Stable Diffusion 2.x",
    "v_parameterization": "flow-matching models always predict velocity",
    "clip_skip": _CLIP_ONLY,
    "max_token_length": _CLIP_ONLY,
    "zero_terminal_snr": _UNET_ONLY,
    "min_snr_gamma": "weights by signal-to-noise ratio belong to the discrete schedule; see --weighting_scheme",
    "scale_v_pred_loss_like_noise_pred": _UNET_ONLY,
    "v_pred_like_loss": _UNET_ONLY,
    "debiased_estimation_loss": "weights by signal-to-noise ratio belong to the discrete schedule",
    "weighted_captions": "weights of words are read in the captions of Stable Diffusion and SDXL only",
    "sample_sampler": "samples are made with the flow's own Euler method",
}

# family name, or "*" for all -> option name -> why nothing happens
NO_EFFECT: dict[str, dict[str, str]] = {
    "*": {
        "lowram": "models are always read from disk straight to where they are used",
        "highvram": "memory is only freed where that costs no time",
        "disable_mmap_load_safetensors": "files are mapped and streamed, which needs no memory of its own",
        "ddp_gradient_as_bucket_view": "adapter gradients are averaged without the wrapper this configures",
        "ddp_static_graph": "adapter gradients are averaged without the wrapper this configures",
        "persistent_data_loader_workers": "data-loader processes are always kept over epochs",
    },
    "flux": {
        **_FLOW_NO_EFFECT,
        "vae": "the autoencoder is named by --ae",
        "controlnet_model_name_or_path": "only flux_train_control_net.py uses it",
    },
    "sd3": {
        **_FLOW_NO_EFFECT,
        **dict.fromkeys(("save_clip", "save_t5xxl"), "text encoders are never put into the files that training writes"),
        **dict.fromkeys(("t5xxl_device", "t5xxl_dtype"), "T5 runs where the others run, in their number format"),
    },
    "lumina": {
        **_FLOW_NO_EFFECT,
        "vae": "the autoencoder is named by --ae",
        "sample_batch_size": "sample images are made one after the other",
    },
    "hunyuan_image": {**_FLOW_NO_EFFECT},
    "anima": {
        **_FLOW_NO_EFFECT,
        **dict.fromkeys(
            ("llm_adapter_lr", "self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr"),
            "rates of parts are for training the whole model; network_reg_lrs in --network_args sets those of adapters",
        ),
    },
    "sdxl": {"clip_skip": "SDXL always uses the layer before the last"},
}


def no_effect_reasons(family: str) -> Mapping[str, str]:
    """Option name -> why it does nothing for this family."""
    return {**NO_EFFECT["*"], **NO_EFFECT.get(family, {})}


def pending_problems(options: OptionSet, family: str) -> Iterator[Problem]:
    """A problem for each changed option whose feature is not there yet.

    Args:
        options: the parsed options.
        family: name of the model family; what can mean nothing for it is a warning instead.
    """
    ignored = no_effect_reasons(family)
    changed = options.changed()
    for name in changed:
        if name in PENDING_FLAGS and name not in ignored:
            yield Problem(f"--{name}", f"{PENDING_FLAGS[name]} is not available in this version yet")


def no_effect_warnings(options: OptionSet, family: str) -> Iterator[str]:
    """A sentence for each changed option that does nothing in this run."""
    changed = options.changed()
    for name, reason in no_effect_reasons(family).items():
        if name in changed:
            yield f"--{name} has no effect: {reason}"
    yield from rate_warnings(options)
    if options[OptimizerOptions].optimizer_type and "use_8bit_adam" in changed:
        yield "--use_8bit_adam has no effect beside --optimizer_type"
