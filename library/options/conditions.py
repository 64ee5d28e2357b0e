"""Flags that do something only beside others: one warning each where they do not."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from library.options.schema import OptionSet

Values = Mapping[str, Any]


def _given(*names: str) -> Callable[[Values], bool]:
    return lambda values: any(values.get(name) for name in names)


def _one_of(name: str, *allowed: Any) -> Callable[[Values], bool]:
    return lambda values: values.get(name) in allowed


_HUBER = _one_of("loss_type", "huber", "smooth_l1")
_DENSITY = ("logit_normal", "mode")
_LOSS_WEIGHTS = ("sigma_sqrt", "cosmap")


def _draws_by_density(values: Values) -> bool:
    return values.get("timestep_sampling", "sigma") == "sigma"


def _scheme_acts(values: Values) -> bool:
    """Densities act on sigma sampling, weights on the loss of sigma_scaled predictions."""
    scheme = values.get("weighting_scheme")
    if scheme in _DENSITY:
        return _draws_by_density(values)
    return scheme not in _LOSS_WEIGHTS or values.get("model_prediction_type", "sigma_scaled") == "sigma_scaled"


_UPLOADS = (_given("huggingface_repo_id"), "it needs --huggingface_repo_id")
_TRACKS = (_given("log_with", "logging_dir"), "it needs --log_with or --logging_dir")
_WANDB = (_one_of("log_with", "wandb", "all"), "it needs --log_with wandb")
_WITHOUT_DENSITY = "only --timestep_sampling sigma draws with the density of --weighting_scheme"
_SAVES = "nothing is saved before the end without --save_every_n_{0} or a matching order"

# option name -> (condition under which it acts, what to say otherwise)
CONDITIONS: dict[str, tuple[Callable[[Values], bool], str]] = {
    "noise_offset_random_strength": (_given("noise_offset"), "it needs --noise_offset"),
    "multires_noise_discount": (_given("multires_noise_iterations"), "it needs --multires_noise_iterations"),
    "ip_noise_gamma_random_strength": (_given("ip_noise_gamma"), "it needs --ip_noise_gamma"),
    "huber_schedule": (_HUBER, "only --loss_type huber and smooth_l1 read it"),
    "huber_c": (_HUBER, "only --loss_type huber and smooth_l1 read it"),
    "huber_scale": (_HUBER, "only --loss_type huber and smooth_l1 read it"),
    "weighting_scheme": (_scheme_acts, _WITHOUT_DENSITY + ", only --model_prediction_type sigma_scaled weights by it"),
    "logit_mean": (
        lambda values: values.get("weighting_scheme") == "logit_normal" and _draws_by_density(values),
        f"it belongs to --weighting_scheme logit_normal, and {_WITHOUT_DENSITY}",
    ),
    "logit_std": (
        lambda values: values.get("weighting_scheme") == "logit_normal" and _draws_by_density(values),
        f"it belongs to --weighting_scheme logit_normal, and {_WITHOUT_DENSITY}",
    ),
    "mode_scale": (
        lambda values: values.get("weighting_scheme") == "mode" and _draws_by_density(values),
        f"it belongs to --weighting_scheme mode, and {_WITHOUT_DENSITY}",
    ),
    "sigmoid_scale": (
        _one_of("timestep_sampling", "sigmoid", "shift", "flux_shift"),
        "only --timestep_sampling sigmoid, shift and flux_shift read it",
    ),
    "discrete_flow_shift": (
        _one_of("timestep_sampling", "sigma", "shift"),
        "only --timestep_sampling sigma and shift read it",
    ),
    "show_timesteps_resolution": (_given("show_timesteps"), "it needs --show_timesteps"),
    "show_timesteps_offset": (_given("show_timesteps"), "it needs --show_timesteps"),
    "sample_sampler": (_given("sample_prompts"), "it needs --sample_prompts"),
    "sample_every_n_steps": (
        lambda values: not values.get("sample_every_n_epochs"),
        "where --sample_every_n_epochs is given, images are made by epochs alone",
    ),
    "save_last_n_epochs": (
        _given("save_every_n_epochs", "save_n_epoch_ratio"),
        _SAVES.format("epochs"),
    ),
    "save_last_n_steps": (_given("save_every_n_steps"), _SAVES.format("steps")),
    "compile_backend": (_given("compile"), "it needs --compile"),
    "compile_mode": (_given("compile"), "it needs --compile"),
    "compile_dynamic": (_given("compile"), "it needs --compile"),
    "compile_fullgraph": (_given("compile"), "it needs --compile"),
    "compile_cache_size_limit": (_given("compile"), "it needs --compile"),
    "bf16_update": (_given("full_bf16"), "adapters are trained in float32 unless --full_bf16 is given"),
    "dynamo_backend": (_given("torch_compile"), "it needs --torch_compile"),
    "ema_device": (_given("ema_decay"), "it needs --ema_decay"),
    "ema_no_warmup": (_given("ema_decay"), "it needs --ema_decay"),
    "ema_samples": (_given("ema_decay"), "it needs --ema_decay"),
    "huggingface_repo_type": _UPLOADS,
    "huggingface_path_in_repo": _UPLOADS,
    "huggingface_repo_visibility": _UPLOADS,
    "save_state_to_huggingface": _UPLOADS,
    "async_upload": _UPLOADS,
    "huggingface_token": (
        _given("huggingface_repo_id", "resume_from_huggingface"),
        "it needs --huggingface_repo_id or --resume_from_huggingface",
    ),
    "resume_from_huggingface": (_given("resume"), "it needs --resume"),
    "log_prefix": (_given("logging_dir"), "it needs --logging_dir"),
    "log_tracker_name": _TRACKS,
    "log_tracker_config": _TRACKS,
    "log_config": _TRACKS,
    "wandb_run_name": _WANDB,
    "wandb_api_key": _WANDB,
}


def condition_warnings(options: OptionSet) -> Iterator[str]:
    """A sentence for each changed option that has no effect beside the others of this run."""
    values = options.values()
    for name in options.changed():
        acts, otherwise = CONDITIONS.get(name, (None, ""))
        if acts is not None and not acts(values):
            yield f"--{name} has no effect: {otherwise}"
    if values.get("zero_terminal_snr") and not values.get("v_parameterization"):
        yield "--zero_terminal_snr: its last step teaches a model nothing that predicts noise; add --v_parameterization"
