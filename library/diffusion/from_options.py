"""Noise processes, noise and loss as a run's options describe them."""

from library.diffusion import ddpm, flow
from library.diffusion.ddpm import Ddpm, SnrWeights
from library.diffusion.flow import DataFlow, RectifiedFlow
from library.diffusion.losses import SampleLoss
from library.diffusion.noise import NoiseRecipe
from library.diffusion.process import NoiseProcess
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.loss import LossOptions, SnrLossOptions
from library.options.model import ModelOptions
from library.options.noise import NoiseOptions
from library.options.schema import OptionSet


def ddpm_process(options: OptionSet) -> Ddpm:
    """The discrete process of families that predict noise or velocity."""
    noise, loss = options[NoiseOptions], options[SnrLossOptions]
    return Ddpm(
        min_timestep=noise.min_timestep or 0,
        max_timestep=ddpm.NUM_TIMESTEPS if noise.max_timestep is None else noise.max_timestep,
        velocity=options[ModelOptions].v_parameterization,
        zero_terminal=noise.zero_terminal_snr,
        weights=SnrWeights(
            min_snr_gamma=loss.min_snr_gamma,
            scale_velocity=loss.scale_v_pred_loss_like_noise_pred,
            velocity_like=loss.v_pred_like_loss,
            debiased=loss.debiased_estimation_loss,
        ),
    )


def flow_process(options: OptionSet, *, weighted: bool) -> RectifiedFlow:
    """The straight flow of families that choose how noise levels are drawn.

    Args:
        options: of the run.
        weighted: whether `--weighting_scheme` weights the loss.
    """
    noise, density, sampling = options[NoiseOptions], options[FlowOptions], options[FlowSamplingOptions]
    return RectifiedFlow(
        sampling=sampling.timestep_sampling,
        sigmoid_scale=sampling.sigmoid_scale,
        shift=sampling.discrete_flow_shift,
        weighting_scheme=density.weighting_scheme,
        logit_mean=density.logit_mean,
        logit_std=density.logit_std,
        mode_scale=density.mode_scale,
        weighted=weighted,
        min_sigma=(noise.min_timestep or 0) / flow.NUM_TIMESTEPS,
        max_sigma=1.0 if noise.max_timestep is None else noise.max_timestep / flow.NUM_TIMESTEPS,
    )


def data_flow_process(options: OptionSet, shift: float) -> DataFlow:
    """The straight flow of families that are judged by the data that the velocity leads to.

    Args:
        options: of the run.
        shift: of the drawn noise levels.
    """
    noise, density = options[NoiseOptions], options[FlowOptions]
    return DataFlow(
        shift=shift,
        weighting_scheme=density.weighting_scheme,
        logit_mean=density.logit_mean,
        logit_std=density.logit_std,
        mode_scale=density.mode_scale,
        weighted=True,
        min_sigma=(noise.min_timestep or 0) / flow.NUM_TIMESTEPS,
        max_sigma=1.0 if noise.max_timestep is None else noise.max_timestep / flow.NUM_TIMESTEPS,
    )


def noise_recipe(options: NoiseOptions) -> NoiseRecipe:
    """What is drawn in a step besides plain noise."""
    return NoiseRecipe(
        offset=options.noise_offset,
        offset_random=options.noise_offset_random_strength,
        adaptive_scale=options.adaptive_noise_scale,
        coarse_levels=options.multires_noise_iterations,
        coarse_discount=options.multires_noise_discount,
        perturbation=options.ip_noise_gamma,
        perturbation_random=options.ip_noise_gamma_random_strength,
    )


def sample_loss(options: LossOptions, process: NoiseProcess) -> SampleLoss:
    """How predictions are judged."""
    return SampleLoss(
        process=process,
        kind=options.loss_type,
        schedule=options.huber_schedule,
        c=options.huber_c,
        scale=options.huber_scale,
    )
