"""Cache files: formats, layouts, fingerprints."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from library.base.lazy import resolve
from library.caching.files import CacheDamaged, CacheFile, sweep_leftovers, write_cache
from library.caching.fingerprints import Source, digest
from library.caching.latent_files import (
    LatentEntry,
    LatentLayout,
    LatentRequest,
    Status,
    find,
    read_entry,
    write_entry,
)
from library.caching.text_files import TextLayout, TextRequest, find_text, read_text, write_text
from library.data.buckets import stated_crop
from library.families import FAMILIES

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "caches"
LATENTS = sorted(p for p in GOLDEN.rglob("*.npz") if not p.stem.endswith(("_te", "_te_outputs")))
TEXTS = sorted(p for p in GOLDEN.rglob("*.npz") if p.stem.endswith(("_te", "_te_outputs")))
FAMILY_OF = {"sd15_lora_b2_cache_disk": "sd", "sd35_lora_b2_cache_disk": "sd3", "sdxl_lora_b2_cache_disk": "sdxl"}


def family_of(path):
    return resolve(FAMILIES[FAMILY_OF[path.parent.name]])


def layout_of(family, **more):
    spec = family.latent
    return LatentLayout(suffix=spec.cache_suffix, channels=spec.channels, unsized=spec.unsized_caches, **more)


def request_for(base, size, latent_size, image=None, recipe=(1, 2), **more):
    bucket = latent_size[1] * 8, latent_size[0] * 8
    values = {"flipped": False, "alpha_mask": False, **more}
    return LatentRequest(
        base=str(base),
        image=image,
        size=size,
        latent_size=latent_size,
        stated_crop=stated_crop(size, bucket),
        recipe=recipe,
        **values,
    )


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"not looked into")
    return path


def flux_layout(**more):
    return layout_of(resolve(FAMILIES["flux"]), **more)


def test_there_are_files_of_the_reference():
    assert len(LATENTS) == 14
    assert len(TEXTS) == 4


@pytest.mark.parametrize("path", LATENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_latents_of_the_reference_are_read_and_ours_are_laid_out_alike(path, tmp_path):
    family = family_of(path)
    stem, size, _ = path.stem.rsplit("_", 2)
    size = tuple(map(int, size.split("x")))
    with np.load(path) as theirs:
        key = next(name for name in theirs.files if name.startswith("latents")).removeprefix("latents")
        latents, crop = torch.from_numpy(theirs[f"latents{key}"]), theirs[f"crop_ltrb{key}"]
        layout = layout_of(family)
        request = request_for(path.parent / stem, size, tuple(latents.shape[-2:]))
        assert layout.path(request.base, size) == path
        found = find(layout, request)
        assert found.status is Status.UNKNOWN
        assert torch.equal(read_entry(found, flipped=False, alpha_mask=False).latents, latents)
        np.testing.assert_allclose(request.stated_crop, crop)
        source = tmp_path / "a.png"
        source.write_bytes(b"x")
        own = request_for(tmp_path / stem, size, tuple(latents.shape[-2:]), image=source)
        written = write_entry(layout, own, LatentEntry(latents, None, None), Source.of(source))
        assert written.name == path.name
        with np.load(written) as ours:
            for name in theirs.files:
                sized = name if key else f"{name}{own.key}"  # since 0.11 these carry the size in every family
                assert ours[sized].shape == theirs[name].shape
                assert ours[sized].dtype == theirs[name].dtype
                np.testing.assert_array_equal(ours[sized], theirs[name])
            extra = set(ours.files) - {name if key else f"{name}{own.key}" for name in theirs.files}
        assert extra == {f"source{own.key}", f"recipe{own.key}"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_texts_of_the_reference_are_read_and_ours_are_laid_out_alike(path, tmp_path):
    spec = family_of(path).text
    with np.load(path) as theirs:
        flags = {name: theirs[name].item() for name, kind in spec.arrays.items() if kind == "bool"}
        layout = TextLayout(suffix=spec.cache_suffix, arrays=spec.arrays, flags=flags)
        base = str(path).removesuffix(f"{spec.cache_suffix}.npz")
        request = TextRequest(base=base, texts=("whatever it was",), recipe=(1, 2))
        found = find_text(layout, request)
        assert found.status is Status.UNKNOWN
        read = read_text(layout, found.path, "")
        values = {name: torch.from_numpy(theirs[name]) for name in theirs.files}
        assert all(torch.equal(read[name], values[name]) for name in read)
        own = TextRequest(base=str(tmp_path / "a"), texts=("a caption",), recipe=(1, 2))
        with np.load(write_text(layout, own, {"a caption": values})) as ours:
            assert set(ours.files) == {*theirs.files, "caption", "recipe"}
            for name in theirs.files:
                assert ours[name].dtype == theirs[name].dtype
                np.testing.assert_array_equal(ours[name], theirs[name])
        # another setting than the file's makes it useless
        for name, value in flags.items():
            other = TextLayout(suffix=spec.cache_suffix, arrays=spec.arrays, flags={**flags, name: not value})
            assert find_text(other, request).status is Status.STALE


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_is_written_is_read_and_numpy_reads_it(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    arrays = {
        "f": torch.randn(3, 4),
        "half": torch.randn(2).half(),
        "b": torch.randn(2).bfloat16(),
        "i": torch.arange(4),
        "i32": torch.arange(3, dtype=torch.int32),
        "flag": torch.tensor(True),
        "d": torch.tensor([1 / 3], dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    write_cache(path, arrays)
    with CacheFile(path) as file:
        assert {name: tuple(v.shape) for name, v in arrays.items()} == file.shapes
        for name, value in arrays.items():
            read = file.read(name)
            exact = value.to(torch.bfloat16) if suffix == "safetensors" and name in ("f", "half") else value
            assert torch.equal(read.double(), exact.double()), name
        file.verify()
    if suffix == "npz":
        with np.load(path) as again:
            assert again["half"].dtype == np.float16
            assert again["b"].dtype == np.float32
            np.testing.assert_array_equal(again["f"], arrays["f"].numpy())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncation_is_always_seen(tmp_path, suffix, keep):
    path = tmp_path / f"x.{suffix}"
    write_cache(path, {"a": torch.randn(500), "b": torch.randn(500)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(CacheDamaged), CacheFile(path) as file:
        file.read("a")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "x.npz"
    write_cache(path, {"a": torch.randn(5000), "b": torch.randn(5000)})
    with CacheFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(CacheDamaged, match="ends in the middle of b"):
            file.read("b")


def test_a_member_that_says_more_than_it_holds(tmp_path):
    """Entries that overlap the next one, as interrupted writes of other programs leave them."""
    path = tmp_path / "x.npz"
    write_cache(path, {"a": torch.zeros(10), "b": torch.zeros(10)})
    content = path.read_bytes()
    assert content.count(b"'shape': (10,)") == 2
    path.write_bytes(content.replace(b"'shape': (10,)", b"'shape': (99,)", 1))
    with pytest.raises(CacheDamaged, match="a.npy is truncated"):
        CacheFile(path)


def test_compressed_files_are_not_taken(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10))
    with pytest.raises(CacheDamaged, match="is compressed"):
        CacheFile(tmp_path / "x.npz")


def test_a_file_is_replaced_not_overwritten(tmp_path):
    """Whoever reads the old one while the new one is written still has all of it."""
    path = tmp_path / "x.npz"
    write_cache(path, {"a": torch.zeros(100_000)})
    with CacheFile(path) as old:
        write_cache(path, {"a": torch.ones(100_000)})
        assert old.read("a").sum() == 0
    with CacheFile(path) as new:
        assert new.read("a").sum() == 100_000


def test_a_flipped_bit_is_found_when_checksums_are_compared(tmp_path, image):
    layout, request = flux_layout(), request_for(tmp_path / "a", (64, 64), (8, 8), image)
    path = write_entry(layout, request, LatentEntry(torch.randn(16, 8, 8), None, None), Source.of(image))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))
    assert find(layout, request).status is Status.VALID
    assert find(layout, request, verify=True).status is Status.DAMAGED


def test_an_entry_is_out_of_date_when_its_image_or_its_recipe_changed(tmp_path, image):
    layout, request = flux_layout(), request_for(tmp_path / "a", (64, 64), (8, 8), image)
    write_entry(layout, request, LatentEntry(torch.randn(16, 8, 8), None, None), Source.of(image))
    assert find(layout, request).status is Status.VALID
    other = request_for(tmp_path / "a", (64, 64), (8, 8), image, recipe=(1, 3))
    assert find(layout, other).status is Status.STALE
    os.utime(image, ns=(1, 1))  # copied: another time, the same content
    assert find(layout, request).status is Status.VALID
    image.write_bytes(b"not looked intO")
    assert find(layout, request).status is Status.STALE
    assert find(layout, request, trust=True).status is Status.UNKNOWN


def test_flips_and_masks_must_be_there_when_asked_for_and_are_ignored_when_not(tmp_path, image):
    layout = flux_layout()
    plain = request_for(tmp_path / "a", (64, 64), (8, 8), image)
    both = request_for(tmp_path / "a", (64, 64), (8, 8), image, flipped=True, alpha_mask=True)
    latents, mirrored, mask = torch.randn(16, 8, 8), torch.randn(16, 8, 8), torch.rand(64, 64)
    write_entry(layout, plain, LatentEntry(latents, None, None), Source.of(image))
    assert find(layout, both).status is Status.STALE
    write_entry(layout, both, LatentEntry(latents, mirrored, mask), Source.of(image))
    found = find(layout, both)
    assert torch.equal(read_entry(found, flipped=True, alpha_mask=True).latents, mirrored)
    assert torch.equal(read_entry(found, flipped=True, alpha_mask=True).alpha_mask, mask)
    # the reference applies a stored mask for ever
    assert read_entry(find(layout, plain), flipped=False, alpha_mask=False).alpha_mask is None


def test_several_sizes_live_in_one_file(tmp_path, image):
    layout = flux_layout()
    requests = [request_for(tmp_path / "a", (100, 50), size, image) for size in ((8, 16), (16, 32))]
    values = [torch.randn(16, *request.latent_size) for request in requests]
    for request, value in zip(requests, values):
        path = write_entry(layout, request, LatentEntry(value, None, None), Source.of(image))
    assert path.name == "a_0100x0050_flux.npz"
    for request, value in zip(requests, values):
        assert torch.equal(read_entry(find(layout, request), flipped=False, alpha_mask=False).latents, value)


def test_unsized_latents_are_taken_only_when_they_fit(tmp_path):
    """The reference trains another bucket on whatever size the file has."""
    layout = layout_of(resolve(FAMILIES["sd"]))
    np.savez(tmp_path / "a_0064x0064_sd.npz", latents=np.zeros((4, 8, 8), np.float32))
    assert find(layout, request_for(tmp_path / "a", (64, 64), (8, 8))).status is Status.UNKNOWN
    assert find(layout, request_for(tmp_path / "a", (64, 64), (8, 16))).status is Status.MISSING
    np.savez(tmp_path / "b.npz", latents=np.zeros((4, 8, 8), np.float32))  # the oldest name
    assert find(layout, request_for(tmp_path / "b", (64, 64), (8, 8))).path.name == "b.npz"
    assert find(layout, request_for(tmp_path / "b", (64, 64), (4, 4))).status is Status.MISSING


def test_families_with_sizes_in_their_names_need_them(tmp_path):
    np.savez(tmp_path / "a_0064x0064_flux.npz", latents=np.zeros((16, 8, 8), np.float32))
    assert find(flux_layout(), request_for(tmp_path / "a", (64, 64), (8, 8))).status is Status.MISSING


def test_latents_of_another_family_are_never_taken(tmp_path):
    """The reference's train_db writes and reads SDXL's names for SD 1.x."""
    np.savez(tmp_path / "a_0064x0064_sdxl.npz", latents=np.zeros((4, 8, 8), np.float32))
    request = request_for(tmp_path / "a", (64, 64), (8, 8))
    assert find(layout_of(resolve(FAMILIES["sd"])), request).status is Status.MISSING
    assert find(layout_of(resolve(FAMILIES["sdxl"])), request).status is Status.UNKNOWN


def test_video_shaped_latents_are_squeezed(tmp_path):
    layout = layout_of(resolve(FAMILIES["anima"]))
    np.savez(tmp_path / "a_0064x0064_anima.npz", latents_8x8=np.ones((16, 1, 8, 8), np.float32))
    found = find(layout, request_for(tmp_path / "a", (64, 64), (8, 8)))
    assert read_entry(found, flipped=False, alpha_mask=False).latents.shape == (16, 8, 8)


def test_either_format_is_found_whatever_is_written(tmp_path, image):
    request = request_for(tmp_path / "a", (64, 64), (8, 8), image)
    write_entry(flux_layout(), request, LatentEntry(torch.randn(16, 8, 8), None, None), Source.of(image))
    assert find(flux_layout(format="safetensors"), request).status is Status.VALID
    # an edited image is made again in the new format, which then comes first
    image.write_bytes(b"edited")
    assert find(flux_layout(format="safetensors"), request).status is Status.STALE
    write_entry(
        flux_layout(format="safetensors"), request, LatentEntry(torch.ones(16, 8, 8), None, None), Source.of(image)
    )
    found = find(flux_layout(format="safetensors"), request)
    assert (found.status, found.path.suffix) == (Status.VALID, ".safetensors")
    assert find(flux_layout(), request).status is Status.VALID


def text_layout(**more):
    spec = resolve(FAMILIES["lumina"]).text
    return TextLayout(suffix=spec.cache_suffix, arrays=spec.arrays, flags={}, **more)


def outputs(value):
    return {
        "hidden_state": torch.full((4, 3), float(value)),
        "input_ids": torch.arange(4),
        "attention_mask": torch.ones(4, dtype=torch.int64),
    }


def test_a_text_is_out_of_date_when_caption_or_settings_changed(tmp_path):
    layout = text_layout()
    request = TextRequest(base=str(tmp_path / "a"), texts=("cat",), recipe=(1, 2))
    write_text(layout, request, {"cat": outputs(1)})
    assert find_text(layout, request).status is Status.VALID
    for other in (
        TextRequest(base=request.base, texts=("dog",), recipe=(1, 2)),
        TextRequest(base=request.base, texts=("cat",), recipe=(1, 3)),
    ):
        assert find_text(layout, other).status is Status.STALE
        assert find_text(layout, other).missing == other.texts


def test_only_new_variants_are_made(tmp_path):
    layout = text_layout()
    two = TextRequest(base=str(tmp_path / "a"), texts=("x, y", "y, x"), recipe=(1, 2))
    write_text(layout, two, {"x, y": outputs(1), "y, x": outputs(2)})
    three = TextRequest(base=two.base, texts=("x, y", "y, x", "x"), recipe=(1, 2))
    found = find_text(layout, three)
    assert found.missing == ("x",)
    path = write_text(layout, three, {"x": outputs(3)})
    assert find_text(layout, three).status is Status.VALID
    read = [read_text(layout, path, three.key(text))["hidden_state"][0, 0].item() for text in three.texts]
    assert read == [1, 2, 3]
    # the plain names hold the first one, for other programs
    with np.load(path) as arrays:
        assert arrays["hidden_state"][0, 0] == 1


def test_a_file_without_fingerprint_serves_one_text_only(tmp_path):
    layout = text_layout()
    np.savez(tmp_path / "a_lumina_te.npz", **{name: v.numpy() for name, v in outputs(1).items()})
    one = TextRequest(base=str(tmp_path / "a"), texts=("cat",), recipe=(1, 2))
    assert find_text(layout, one).status is Status.UNKNOWN
    two = TextRequest(base=one.base, texts=("cat", "dog"), recipe=(1, 2))
    assert find_text(layout, two).missing == ("cat", "dog")


def test_half_written_files_of_dead_processes_are_removed(tmp_path):
    for name in (".a_flux.npz.123.tmp", ".b_te.safetensors.124.tmp", ".c.npz.125.tmp", "keep.npz", ".keep.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert sweep_leftovers(tmp_path, lambda number: number == 125) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.npz.125.tmp", ".keep.tmp", "keep.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    write_cache(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_cache(path, {"a": torch.ones(2, requires_grad=True)})  # numpy refuses it in the middle of the work
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_digests_tell_parts_apart():
    assert digest("a", "b") != digest("ab")
    assert digest("a", None) != digest("a", "None ")
    assert digest("\N{SNOWMAN}", "\ud800") == digest("\N{SNOWMAN}", "\ud800")
