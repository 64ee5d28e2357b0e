"""diffusers' transformers with the weights of ours."""

from types import SimpleNamespace

import torch

from library import anima_utils, hunyuan_image_utils, sd3_utils
from library.modules.components import Variant
from library.modules.layer_names import find_rule
from support.diffusers_layout import to_diffusers


def sd3(ours):
    from diffusers import SD3Transformer2DModel

    p = ours.params
    model = SD3Transformer2DModel(
        sample_size=p.pos_embed_size * p.patch_size,
        patch_size=p.patch_size,
        in_channels=p.in_channels,
        num_layers=p.depth,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_attention_heads=p.num_heads,
        joint_attention_dim=p.context_size,
        caption_projection_dim=p.hidden_size,
        pooled_projection_dim=p.pooled_size,
        out_channels=p.out_channels,
        pos_embed_max_size=p.pos_embed_size,
        dual_attention_layers=p.dual_blocks,
        qk_norm="rms_norm" if p.qk_norm else None,
    )
    state = dict(ours.state_dict())
    positions = state.pop("pos_embed")
    rules = sd3_utils.diffusers_layers(Variant(name="", base_model_version="", config={"params": p}))
    model.load_state_dict({**to_diffusers(state, rules), "pos_embed.pos_embed": positions})
    return model.requires_grad_(False).eval()


def hunyuan_image(ours):
    from diffusers.models.transformers import transformer_hunyuanimage

    p = ours.params
    model = transformer_hunyuanimage.HunyuanImageTransformer2DModel(
        in_channels=p.in_channels,
        out_channels=p.out_channels,
        num_attention_heads=p.num_heads,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_layers=p.depth,
        num_single_layers=p.single_depth,
        num_refiner_layers=p.refiner_depth,
        text_embed_dim=p.text_size,
        text_embed_2_dim=p.glyph_size,
        rope_axes_dim=p.axes_dim,
    )
    # its hidden width is a constant there
    projection = transformer_hunyuanimage.HunyuanImageByT5TextProjection
    model.context_embedder_2 = projection(p.glyph_size, p.glyph_hidden[0], p.hidden_size)
    model.load_state_dict(to_diffusers(ours.state_dict(), hunyuan_image_utils.DIFFUSERS_LAYERS))
    return model.requires_grad_(False).eval()


def call_hunyuan_image(model, given):
    """The arguments of ours under diffusers' names."""
    return model(
        hidden_states=given["latents"],
        timestep=given["timesteps"],
        encoder_hidden_states=given["text"],
        encoder_attention_mask=given["text_mask"],
        encoder_hidden_states_2=given["glyphs"],
        encoder_attention_mask_2=given["glyph_mask"],
        return_dict=False,
    )[0]


_ANIMA_NORMS = {
    f"{ours}.{letter}_norm": f"{theirs}.norm_{letter}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for letter in "qk"
}


def _anima_state(state):
    """Our (published) names to diffusers' names, by the rules for layers and the norms' renames."""
    result = {}
    for name, tensor in state.items():
        path, leaf = name.rsplit(".", 1)
        if path.startswith("llm_adapter."):
            continue
        if path == "t_embedding_norm":
            new = "time_embed.norm"
        elif path.endswith("_norm"):
            _, number, norm = path.split(".", 2)
            new = f"transformer_blocks.{number}.{_ANIMA_NORMS[norm]}"
        else:
            _, (new,) = find_rule(anima_utils.DIFFUSERS_LAYERS, path)
        result[f"{new}.{leaf}"] = tensor
    return result


def anima(ours, monkeypatch):
    """diffusers resizes a mask of zeros with a package that is not there."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask, size, interpolation):
        return torch.nn.functional.interpolate(mask, size, mode="nearest")

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    p = ours.params
    model = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=p.in_channels,
        out_channels=p.out_channels,
        num_attention_heads=p.num_heads,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_layers=p.depth,
        mlp_ratio=p.mlp_size / p.hidden_size,
        text_embed_dim=p.context_dim,
        adaln_lora_dim=p.adaln_dim,
        max_size=(128, 512, 512),
        rope_scale=p.rope_scale,
        extra_pos_embed_type=None,
    )
    model.load_state_dict(_anima_state(ours.state_dict()))
    for block in model.transformer_blocks:  # diffusers leaves its default here
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    return model.eval().requires_grad_(False)


def call_anima(model, latents, times, context):
    """Latents [B, C, h, w] as a video of one frame."""
    mask = torch.zeros(1, 1, *(8 * side for side in latents.shape[2:]))
    arguments = {"timestep": times, "encoder_hidden_states": context, "padding_mask": mask, "return_dict": False}
    return model(latents[:, :, None], **arguments)[0][:, :, 0]
