"""All model families; one line each."""

FAMILIES: dict[str, str] = {
    "sd": "library.sd_train_utils:FAMILY",
    "sdxl": "library.sdxl_train_utils:FAMILY",
    "sd3": "library.sd3_train_utils:FAMILY",
    "flux": "library.flux_train_utils:FAMILY",
    "lumina": "library.lumina_train_utils:FAMILY",
    "hunyuan_image": "library.hunyuan_image_train_utils:FAMILY",
    "anima": "library.anima_train_utils:FAMILY",
}
