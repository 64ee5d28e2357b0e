"""What every option of the LoRA scripts does: what it is set to, and where the difference shows."""

from dataclasses import dataclass

from library.options.pending import NO_EFFECT, PENDING_FLAGS


@dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        given: flags with it; `{...}` stands for files of the test.
        shows: what differs: losses, rates, weights, shapes, dtypes, metadata, files, said, plan, stopped, events.
        beside: flags of both runs.
        family: whose script.
        subset: lines of the dataset file's subset in both runs.
        dataset: lines of its dataset.
    """

    given: str
    shows: str
    beside: str = ""
    family: str = "flux"
    subset: str = ""
    dataset: str = ""


def sd(given, shows, beside="", **more):
    return Row(given, shows, beside, "sd", **more)


SPLIT = "validation_split = 0.3"
SCHEDULE = "--max_train_steps 6 --lr_scheduler"
_BY_FLAGS = "--dataset_config none --resolution 128 --bucket_reso_steps 64 --caption_extension .txt"
FOLDERS = f"{_BY_FLAGS} --train_data_dir {{folders}}"
ALPHA = f"{_BY_FLAGS} --train_data_dir {{alpha_folders}}"
FILE = "--dataset_config none --in_json {metadata} --train_data_dir {images} --resolution 128"
CACHED = "--cache_text_encoder_outputs --network_train_unet_only"
VELOCITY = "--v_parameterization"

ROWS: dict[str, Row] = {
    # model
    "pretrained_model_name_or_path": Row("--pretrained_model_name_or_path {other_model}", "losses"),
    "clip_l": Row("--clip_l {other_clip}", "losses"),
    "t5xxl": Row("--t5xxl {other_t5}", "losses"),
    "ae": Row("--ae {other_ae}", "losses"),
    "vae": sd("--vae {other_vae}", "losses"),
    "v_parameterization": sd(VELOCITY, "losses"),
    "clip_skip": sd("--clip_skip 2", "losses"),
    "max_token_length": sd("--max_token_length 150", "losses"),
    "no_half_vae": Row("--no_half_vae", "losses", "--mixed_precision bf16"),
    "tokenizer_cache_dir": Row("--tokenizer_cache_dir {nowhere}", "stopped"),
    "t5xxl_max_token_length": Row("--t5xxl_max_token_length 48", "losses"),
    "apply_t5_attn_mask": Row("--apply_t5_attn_mask", "losses"),
    "guidance_scale": Row("--guidance_scale 1.0", "losses"),
    # what is trained
    "network_module": Row("--network_module lycoris.kohya", "metadata"),
    "network_dim": Row("--network_dim 2", "shapes"),
    "network_alpha": Row("--network_alpha 4", "metadata"),
    "network_dropout": Row("--network_dropout 0.5", "losses"),
    "network_args": Row("--network_args single_dim=2", "shapes"),
    "network_train_unet_only": Row("--network_train_unet_only", "shapes"),
    "network_train_text_encoder_only": Row("--network_train_text_encoder_only", "shapes"),
    "network_weights": Row("--network_weights {adapter}", "losses"),
    "dim_from_weights": Row("--dim_from_weights", "stopped", "--network_weights {small_adapter}"),
    "base_weights": Row("--base_weights {adapter}", "losses"),
    "base_weights_multiplier": Row("--base_weights_multiplier 2", "losses", "--base_weights {adapter}"),
    "scale_weight_norms": Row("--scale_weight_norms 0.001", "weights"),
    "text_encoder_lr": Row("--text_encoder_lr 1e-4", "rates"),
    "unet_lr": Row("--unet_lr 1e-4", "rates"),
    # data by flags
    "train_data_dir": Row(FOLDERS, "plan"),
    "resolution": Row("--resolution 192", "losses", FOLDERS),
    "train_batch_size": Row("--train_batch_size 2", "losses", FOLDERS),
    "enable_bucket": Row("--enable_bucket", "plan", f"{FOLDERS} --min_bucket_reso 64"),
    "min_bucket_reso": Row("--min_bucket_reso 128", "plan", f"{FOLDERS} --enable_bucket --min_bucket_reso 64"),
    "max_bucket_reso": Row("--max_bucket_reso 128", "plan", f"{FOLDERS} --enable_bucket --min_bucket_reso 64"),
    "bucket_reso_steps": Row("--bucket_reso_steps 32", "plan", f"{FOLDERS} --enable_bucket --min_bucket_reso 64"),
    "bucket_no_upscale": Row("--bucket_no_upscale", "plan", f"{FOLDERS} --enable_bucket --min_bucket_reso 64"),
    "caption_extension": Row("--caption_extension .caption", "losses", FOLDERS),
    "reg_data_dir": Row("--reg_data_dir {reg}", "plan", FOLDERS),
    "prior_loss_weight": Row(
        "--prior_loss_weight 0.1", "losses", f"{FOLDERS} --reg_data_dir {{reg}} --max_train_steps 8"
    ),
    "in_json": Row(FILE, "plan"),
    "dataset_repeats": Row("--dataset_repeats 3", "plan", FILE),
    "dataset_config": Row("--dataset_config {other_toml}", "losses"),
    "conditioning_data_dir": Row("--conditioning_data_dir {masks}", "losses", f"{ALPHA} --masked_loss"),
    "masked_loss": Row("--masked_loss --conditioning_data_dir {masks}", "losses", ALPHA),
    "alpha_mask": Row("--alpha_mask", "losses", ALPHA),
    "alpha_background": Row("--alpha_background #ff0000", "losses", ALPHA),
    "skip_bad_images": Row("--skip_bad_images", "stopped", FOLDERS.replace("{folders}", "{bad_folders}")),
    "resize_interpolation": Row("--resize_interpolation nearest", "losses"),
    "color_aug": Row("--color_aug", "losses", "--max_train_steps 6"),
    "flip_aug": Row("--flip_aug", "losses", "--max_train_steps 6"),
    "random_crop": Row("--random_crop", "losses", "--max_train_steps 4"),
    "face_crop_aug_range": Row("--face_crop_aug_range 1.5,2", "losses", FOLDERS.replace("{folders}", "{face_folders}")),
    # captions
    "caption_prefix": Row("--caption_prefix photo", "losses"),
    "caption_suffix": Row("--caption_suffix photo", "losses"),
    "caption_separator": Row("--caption_separator e --keep_tokens 0", "losses", "--shuffle_caption"),
    "secondary_separator": Row("--secondary_separator e", "losses", "--shuffle_caption"),
    "shuffle_caption": Row("--shuffle_caption", "losses"),
    "keep_tokens": Row("--keep_tokens 3", "losses", "--shuffle_caption"),
    "keep_tokens_separator": Row("--keep_tokens_separator a", "losses", "--shuffle_caption"),
    "caption_dropout_rate": Row("--caption_dropout_rate 1", "losses"),
    "caption_dropout_every_n_epochs": Row("--caption_dropout_every_n_epochs 1", "losses"),
    "caption_tag_dropout_rate": Row("--caption_tag_dropout_rate 0.8", "losses"),
    "token_warmup_min": Row("--token_warmup_min 3", "losses", "--token_warmup_step 10 --shuffle_caption"),
    "token_warmup_step": Row("--token_warmup_step 10", "losses", "--shuffle_caption"),
    "weighted_captions": sd("--weighted_captions", "losses", "--caption_prefix (photo:1.8)"),
    # caches
    "cache_latents": Row("--cache_latents", "plan"),
    "cache_latents_to_disk": Row("--cache_latents_to_disk", "plan"),
    "cache_text_encoder_outputs": Row("--cache_text_encoder_outputs", "plan", "--network_train_unet_only"),
    "cache_text_encoder_outputs_to_disk": Row(
        "--cache_text_encoder_outputs_to_disk", "plan", "--network_train_unet_only"
    ),
    "cache_caption_variants": Row("--cache_caption_variants 2", "stopped", f"{CACHED} --shuffle_caption"),
    "vae_sample": Row("--vae_sample", "losses"),
    # noise and loss
    "noise_offset": Row("--noise_offset 0.5", "losses"),
    "noise_offset_random_strength": Row("--noise_offset_random_strength", "losses", "--noise_offset 0.5"),
    "adaptive_noise_scale": Row("--adaptive_noise_scale 0.5", "losses", "--noise_offset 0.5"),
    "multires_noise_iterations": Row("--multires_noise_iterations 4", "losses"),
    "multires_noise_discount": Row("--multires_noise_discount 0.9", "losses", "--multires_noise_iterations 4"),
    "ip_noise_gamma": Row("--ip_noise_gamma 0.5", "losses"),
    "ip_noise_gamma_random_strength": Row("--ip_noise_gamma_random_strength", "losses", "--ip_noise_gamma 0.5"),
    "zero_terminal_snr": sd("--zero_terminal_snr", "losses", VELOCITY),
    "min_timestep": Row("--min_timestep 800", "losses"),
    "max_timestep": Row("--max_timestep 200", "losses"),
    "num_timestep_buckets": Row("--num_timestep_buckets 4", "losses"),
    "loss_type": Row("--loss_type l1", "losses"),
    "huber_schedule": Row("--huber_schedule constant", "losses", "--loss_type huber"),
    "huber_c": Row("--huber_c 0.5", "losses", "--loss_type smooth_l1"),
    "huber_scale": Row("--huber_scale 2", "losses", "--loss_type huber"),
    "min_snr_gamma": sd("--min_snr_gamma 1", "losses", "--max_train_steps 8"),
    "scale_v_pred_loss_like_noise_pred": sd("--scale_v_pred_loss_like_noise_pred", "losses", VELOCITY),
    "v_pred_like_loss": sd("--v_pred_like_loss 0.5", "losses"),
    "debiased_estimation_loss": sd("--debiased_estimation_loss", "losses"),
    "timestep_sampling": Row("--timestep_sampling uniform", "losses"),
    "sigmoid_scale": Row("--sigmoid_scale 3", "losses", "--timestep_sampling sigmoid"),
    "discrete_flow_shift": Row("--discrete_flow_shift 1", "losses"),
    "model_prediction_type": Row("--model_prediction_type raw", "losses"),
    "weighting_scheme": Row("--weighting_scheme sigma_sqrt", "losses"),
    "logit_mean": Row("--logit_mean 1", "losses", "--weighting_scheme logit_normal"),
    "logit_std": Row("--logit_std 0.2", "losses", "--weighting_scheme logit_normal"),
    "mode_scale": Row("--mode_scale 0.1", "losses", "--weighting_scheme mode"),
    "show_timesteps": Row("--show_timesteps console", "said"),
    "show_timesteps_resolution": Row(
        "--show_timesteps_resolution 1024", "said", "--show_timesteps console --timestep_sampling flux_shift"
    ),
    "show_timesteps_offset": Row(
        "--show_timesteps_offset 1", "said", "--show_timesteps console --timestep_sampling sigmoid"
    ),
    # optimizer and schedule
    "optimizer_type": Row("--optimizer_type SGDNesterov", "metadata"),
    "optimizer_args": Row("--optimizer_args weight_decay=0.9", "weights"),
    "use_8bit_adam": Row("--use_8bit_adam", "metadata"),
    "use_lion_optimizer": Row("--use_lion_optimizer", "metadata"),
    "learning_rate": Row("--learning_rate 1e-4", "rates"),
    "max_grad_norm": Row("--max_grad_norm 0.001", "weights", "--optimizer_type SGDNesterov"),
    "fused_backward_pass": Row(
        "--fused_backward_pass", "plan", "--optimizer_type Adafactor --optimizer_args relative_step=False"
    ),
    "lr_scheduler": Row("--lr_scheduler cosine", "rates"),
    "lr_scheduler_type": Row("--lr_scheduler_type StepLR --lr_scheduler_args step_size=1", "rates"),
    "lr_scheduler_args": Row(
        "--lr_scheduler_args \"step_rules='1:1,0.1'\"",
        "rates",
        "--lr_scheduler piecewise_constant --lr_scheduler_args \"step_rules='1:5,0.2'\"",
    ),
    "lr_warmup_steps": Row("--lr_warmup_steps 2", "rates", f"{SCHEDULE} constant_with_warmup"),
    "lr_decay_steps": Row("--lr_decay_steps 5", "rates", f"{SCHEDULE} warmup_stable_decay"),
    "lr_scheduler_num_cycles": Row("--lr_scheduler_num_cycles 3", "rates", f"{SCHEDULE} cosine_with_restarts"),
    "lr_scheduler_power": Row("--lr_scheduler_power 3", "rates", f"{SCHEDULE} polynomial"),
    "lr_scheduler_timescale": Row("--lr_scheduler_timescale 2", "rates", f"{SCHEDULE} inverse_sqrt"),
    "lr_scheduler_min_lr_ratio": Row(
        "--lr_scheduler_min_lr_ratio 0.9", "rates", f"{SCHEDULE} cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1"
    ),
    "max_train_steps": Row("--max_train_steps 3", "plan"),
    "max_train_epochs": Row("--max_train_epochs 1", "plan"),
    "gradient_accumulation_steps": Row("--gradient_accumulation_steps 2", "losses"),
    "seed": Row("--seed 7", "losses"),
    "initial_step": Row("--initial_step 1", "events"),
    "initial_epoch": Row("--initial_epoch 2", "events", "--max_train_steps 12"),
    "skip_until_initial_step": Row("--skip_until_initial_step", "losses", "--initial_step 3 --max_train_steps 5"),
    "ema_decay": Row("--ema_decay 0.9", "files"),
    "ema_no_warmup": Row("--ema_no_warmup", "average", "--ema_decay 0.9"),
    "ema_samples": Row(
        "--ema_samples ema", "validation", "--ema_decay 0.99 --ema_no_warmup --learning_rate 0.01", dataset=SPLIT
    ),
    # computing
    "mixed_precision": Row("--mixed_precision bf16", "losses"),
    "full_bf16": Row("--full_bf16", "dtypes", "--mixed_precision bf16"),
    "bf16_update": Row("--bf16_update kahan", "weights", "--mixed_precision bf16 --full_bf16"),
    "fp8_base": Row("--fp8_base", "losses", "--mixed_precision bf16"),
    "fp8_base_unet": Row("--fp8_base_unet", "losses", "--mixed_precision bf16"),
    "gradient_checkpointing": Row("--gradient_checkpointing", "plan"),
    "xformers": Row("--xformers", "stopped"),
    "torch_compile": Row("--torch_compile --dynamo_backend nvprims_nvfuser", "stopped"),
    "dynamo_backend": Row("--dynamo_backend nvprims_nvfuser", "stopped", "--torch_compile --dynamo_backend eager"),
    # results
    "output_dir": Row("--output_dir {elsewhere}", "files"),
    "output_name": Row("--output_name other", "files"),
    "save_precision": Row("--save_precision bf16", "dtypes"),
    "save_model_as": Row("--save_model_as pt", "files"),
    "save_every_n_steps": Row("--save_every_n_steps 1", "files"),
    "save_every_n_epochs": Row("--save_every_n_epochs 1", "files", "--max_train_epochs 2"),
    "save_n_epoch_ratio": Row("--save_n_epoch_ratio 2", "files", "--max_train_epochs 2"),
    "save_last_n_steps": Row("--save_last_n_steps 1", "files", "--save_every_n_steps 1 --max_train_steps 4"),
    "save_last_n_epochs": Row("--save_last_n_epochs 1", "files", "--save_every_n_epochs 1 --max_train_epochs 4"),
    "save_state": Row("--save_state", "files"),
    "save_state_on_train_end": Row("--save_state_on_train_end", "files"),
    "save_last_n_steps_state": Row(
        "--save_last_n_steps_state 1", "files", "--save_state --save_every_n_steps 1 --max_train_steps 4"
    ),
    "save_last_n_epochs_state": Row(
        "--save_last_n_epochs_state 1", "files", "--save_state --save_every_n_epochs 1 --max_train_epochs 4"
    ),
    "no_metadata": Row("--no_metadata", "metadata"),
    "training_comment": Row("--training_comment hello", "metadata"),
    **{
        f"metadata_{name}": Row(f"--metadata_{name} x", "metadata")
        for name in (
            *("title", "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase"),
            *("preprocessor", "is_negative_embedding"),
        )
    },
    "metadata_thumbnail": Row("--metadata_thumbnail {picture}", "metadata"),
    "sample_prompts": Row("--sample_prompts {prompts} --sample_at_first", "files"),
    "sample_at_first": Row("--sample_at_first", "files", "--sample_prompts {prompts}"),
    "sample_every_n_steps": Row("--sample_every_n_steps 1", "files", "--sample_prompts {prompts}"),
    "sample_every_n_epochs": Row(
        "--sample_every_n_epochs 1", "files", "--sample_prompts {prompts} --max_train_epochs 1"
    ),
    "sample_sampler": sd("--sample_sampler euler_a", "pictures", "--sample_prompts {prompts} --sample_at_first"),
    "logging_dir": Row("--logging_dir {logs}", "logs"),
    "log_with": Row("--log_with tensorboard", "stopped"),
    "log_prefix": Row("--log_prefix mine", "logs", "--logging_dir {logs}"),
    "log_tracker_name": Row("--log_tracker_name mine", "logs", "--logging_dir {logs}"),
    # validation
    "validation_split": Row("--validation_split 0.3", "plan"),
    "validation_seed": Row("--validation_seed 9", "validation", dataset=SPLIT),
    "validate_every_n_steps": Row("--validate_every_n_steps 1", "validation", dataset=SPLIT),
    "validate_every_n_epochs": Row("--validate_every_n_epochs 2", "validation", "--max_train_epochs 3", dataset=SPLIT),
    "max_validation_steps": Row("--max_validation_steps 1", "validation", dataset=SPLIT),
    "validate_at_first": Row("--validate_at_first", "validation", dataset=SPLIT),
    "save_best": Row("--save_best --validate_every_n_steps 1", "files", dataset=SPLIT),
    # looking and debugging
    "dry_run": Row("--dry_run", "files"),
    "debug_dataset": Row("--debug_dataset", "files"),
    "record_steps": Row("--record_steps {record}", "recorded"),
    "nan_policy": Row("--nan_policy skip", "stopped", "--learning_rate 1e30 --max_train_steps 6"),
    "verify_caches": Row("--verify_caches", "said", "--cache_latents_to_disk --console_log_level DEBUG"),
}

# option -> the test that shows what it does
ELSEWHERE: dict[str, str] = {
    "async_upload": "tests/checkpoint/test_hub.py",
    "huggingface_path_in_repo": "tests/checkpoint/test_hub.py",
    "huggingface_repo_id": "tests/checkpoint/test_hub.py",
    "huggingface_repo_type": "tests/checkpoint/test_hub.py",
    "huggingface_repo_visibility": "tests/checkpoint/test_hub.py",
    "huggingface_token": "tests/checkpoint/test_hub.py",
    "save_state_to_huggingface": "tests/checkpoint/test_hub.py",
    "resume_from_huggingface": "tests/checkpoint/test_hub.py",
    "log_config": "tests/tracking/test_trackers.py",
    "log_tracker_config": "tests/tracking/test_trackers.py",
    "wandb_api_key": "tests/tracking/test_trackers.py",
    "wandb_run_name": "tests/tracking/test_trackers.py",
    "cache_format": "tests/engine/test_caches.py",
    "skip_cache_check": "tests/engine/test_caches.py",
    "cache_info": "tests/data/test_metadata.py",
    "text_encoder_batch_size": "tests/engine/test_every_option.py::test_batches_of_caches",
    "vae_batch_size": "tests/engine/test_every_option.py::test_batches_of_caches",
    "max_data_loader_n_workers": "tests/engine/test_equalities.py::test_four_workers",
    "allow_missing_captions": "tests/data/test_records.py",
    "enable_wildcard": "tests/data/test_captions.py",
    "exif_transpose": "tests/data/test_images.py",
    "compile": "tests/modules/test_compiling.py",
    "compile_backend": "tests/engine/test_runs.py::test_compiled_blocks_train_the_same",
    "compile_dynamic": "tests/engine/test_runs.py::test_compiled_blocks_train_the_same",
    "compile_fullgraph": "tests/engine/test_every_option.py::test_settings_reach_the_compiler",
    "compile_mode": "tests/engine/test_every_option.py::test_settings_reach_the_compiler",
    "compile_cache_size_limit": "tests/engine/test_every_option.py::test_settings_reach_the_compiler",
    "cpu_offload_checkpointing": "tests/engine/test_computing.py::test_offloaded_activations_change_nothing",
    "unsloth_offload_checkpointing": "tests/engine/test_computing.py::test_offloaded_activations_change_nothing",
    "mem_eff_attn": "tests/engine/test_computing.py::test_attention_in_small_pieces_is_the_same_attention",
    "blocks_to_swap": "tests/engine/test_computing.py::test_swapped_blocks_change_nothing",
    "model_type": "tests/parity/test_parity_flux.py::test_chroma_equals_diffusers",
    "save_also_as": "tests/third_party/test_dialects.py",
    "attn_mode": "tests/families/test_anima.py",
    "split_attn": "tests/families/test_contracts.py::test_other_attention_is_the_same_attention",
    "train_inpainting": "tests/engine/test_inpainting.py::test_a_run_sees_what_is_kept",
    "split_mode": "tests/engine/test_computing.py::test_the_old_flag_of_swapping_and_too_many_blocks",
    "cuda_allow_tf32": "tests/engine/test_every_option.py::test_flags_of_the_back_end",
    "cuda_cudnn_benchmark": "tests/engine/test_every_option.py::test_flags_of_the_back_end",
    "ema_device": "tests/engine/test_averages.py::test_an_average_lies_beside_every_result_and_follows_the_formula",
    "config_file": "tests/options/test_options_schema.py",
    "output_config": "tests/options/test_options_schema.py",
    "strict_config": "tests/options/test_options_schema.py",
    "console_log_file": "tests/engine/test_every_option.py::test_how_messages_are_printed",
    "console_log_level": "tests/engine/test_every_option.py::test_how_messages_are_printed",
    "console_log_simple": "tests/engine/test_every_option.py::test_how_messages_are_printed",
    "interactive": "tests/e2e/test_orders.py::test_orders_from_stdin_and_a_flood_of_them",
    "replay_steps": "tests/engine/test_golden_replay.py::test_losses",
    "resume": "tests/engine/test_resume.py",
    "resume_changed_data": "tests/engine/test_resume.py",
    "save_state_every_n_minutes": "tests/engine/test_every_option.py::test_states_by_time",
    "ddp_timeout": "tests/engine/test_every_option.py::test_waiting_times_reach_the_processes",
    "v2": "tests/engine/test_every_option.py::test_a_wrong_version_is_named",
    "full_fp16": "tests/engine/test_every_option.py::test_the_scaler_takes_gradients_in_half_precision",
}

# family -> file of the tests that show what its own options do
OF_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sd3": (
        "tests/families/test_sd3.py",
        (
            *("clip_g", "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "apply_lg_attn_mask"),
            *("pos_emb_random_crop_rate", "enable_scaled_pos_embed", "training_shift"),
        ),
    ),
    "lumina": (
        "tests/families/test_lumina.py",
        (
            *("gemma2", "gemma2_max_token_length", "system_prompt", "add_system_prompt_to_negative_prompt"),
            *("use_flash_attn", "use_sage_attn"),
        ),
    ),
    "hunyuan_image": (
        "tests/families/test_hunyuan_image.py",
        ("text_encoder", "byt5", "fp8_scaled", "fp8_vl", "text_encoder_cpu", "vae_chunk_size"),
    ),
    "anima": (
        "tests/families/test_anima.py",
        (
            *("qwen3", "llm_adapter_path", "t5_tokenizer_path", "qwen3_max_token_length", "t5_max_token_length"),
            *("attn_mode", "vae_chunk_size", "vae_disable_cache", "qwen_image_vae_2d"),
        ),
    ),
}

# option -> why nothing shows, or cannot show here
EXCEPTIONS: dict[str, str] = {
    "help": "prints this list",
    "sdpa": "asks for what happens anyway",
    **{name: f"refused: {feature} is not there yet" for name, feature in PENDING_FLAGS.items()},
    **{name: reason for family in NO_EFFECT for name, reason in NO_EFFECT.get(family, {}).items()},
}
