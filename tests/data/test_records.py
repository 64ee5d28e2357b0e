"""Folders with everything that can be wrong in them."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from library.base.errors import UserError, raise_problems
from library.config_util import resolve_datasets
from library.data import images
from library.data.buckets import Placement
from library.data.presets import from_flags
from library.data.records import ScanRules, scan_dataset


@pytest.fixture
def folder(inputs, tmp_path):
    place = tmp_path / "img"
    shutil.copytree(inputs.folder / "data" / "img", place)
    return place


def scanned(folder, *, allow=False, **subset):
    records, problems = found_in({"image_dir": str(folder), **subset}, allow_missing_captions=allow)
    raise_problems(problems)
    return records


def found_in(*subsets, **rules):
    """Records and problems of subsets."""
    entries = [{"caption_extension": ".txt", **subset} for subset in subsets]
    plans = resolve_datasets({"datasets": [{"resolution": 64, "subsets": entries}]}, {})
    return scan_dataset(plans[0].subsets, where="d", rules=ScanRules(**rules))


def picture(path, size=(8, 6), caption="text", exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **({"exif": exif} if exif else {}))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise brings it upright
    return exif


def problems(call):
    with pytest.raises(UserError) as error:
        call()
    return "\n".join(str(problem) for problem in error.value.problems)


def test_sorted_by_name_with_sizes_and_captions(folder):
    records = scanned(folder)
    assert [record.key for record in records] == sorted(record.key for record in records)
    assert len(records) == 10
    first = records[0]
    assert (first.key, first.size) == ("astronaut.png", (160, 160))
    assert first.caption.startswith("1girl, solo")


def test_names_with_spaces_and_other_alphabets(folder):
    for name in ("a b", "katze \u00e4\u00f6", "\U0001f600"):
        shutil.copy(folder / "cat.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    assert {record.caption for record in scanned(folder)} >= {"a b", "katze \u00e4\u00f6", "\U0001f600"}


def test_broken_images_are_all_named(folder):
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    found = problems(lambda: scanned(folder))
    assert "zero.png: is empty (zero bytes)" in found
    assert "text.jpg: is not an image, whatever its name says" in found


def test_truncated_image_is_named_when_it_is_read(folder):
    data = (folder / "cat.png").read_bytes()
    (folder / "cat.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cat.png: cannot be"):
        images.decode(folder / "cat.png")


def test_captions_that_cannot_be_read(folder):
    (folder / "cat.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "coins.txt").write_text("\n\n")
    found = problems(lambda: scanned(folder))
    assert "cat.txt: is not UTF-8 text" in found
    assert "coins.txt: is an empty caption" in found


def test_byte_order_mark_is_no_part_of_a_caption(folder):
    (folder / "cat.txt").write_text("a cat", encoding="utf-8-sig")
    assert "a cat" in {record.caption for record in scanned(folder)}


def test_captions_under_another_extension_stop(folder):
    found = problems(lambda: scanned(folder, caption_extension=".caption"))
    assert "10 of 10 images" in found and 'set caption_extension = ".txt"' in found
    assert all(record.caption == "" for record in scanned(folder, caption_extension=".caption", allow=True))


def test_many_missing_captions_stop_few_do_not(folder):
    (folder / "cat.txt").unlink()
    assert "" in {record.caption for record in scanned(folder)}
    (folder / "coins.txt").unlink()
    assert "2 of 10 images" in problems(lambda: scanned(folder))
    assert len(scanned(folder, class_tokens="thing")) == 10


def test_empty_and_missing_folders(tmp_path):
    assert "no such folder" in problems(lambda: scanned(tmp_path / "x"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.psd").write_text("")
    assert "holds no images" in problems(lambda: scanned(tmp_path / "x"))
    assert "1 .psd" in problems(lambda: scanned(tmp_path / "x"))


def test_extensions_are_found_in_any_case(tmp_path):
    for name in ("a.PNG", "b.Png", "c.JpEg", "10.png", "1_a.PNG", ".hidden.png", "a_0008x0006_flux.npz"):
        picture(tmp_path / name) if not name.endswith("npz") else (tmp_path / name).write_bytes(b"")
    records, problems = found_in({"image_dir": str(tmp_path)})
    assert [record.key for record in records] == ["10.png", "1_a.PNG", "a.PNG", "b.Png", "c.JpEg"]
    assert not problems


def test_images_in_folders_inside_are_not_found(tmp_path):
    picture(tmp_path / "in" / "a.png")
    records, problems = found_in({"image_dir": str(tmp_path)})
    assert not records
    assert "it holds 1 folder" in str(problems[0]) and "folders inside are not searched" in str(problems[0])


def test_many_images_are_read_in_order(tmp_path):
    data = picture(tmp_path / "0000.png").read_bytes()
    for number in range(1, 620):  # enough for the progress bar
        (tmp_path / f"{number:04d}.png").write_bytes(data)
    records, _ = found_in({"image_dir": str(tmp_path), "class_tokens": "x"})
    assert [record.key for record in records] == [f"{number:04d}.png" for number in range(620)]


def test_caption_of_a_face_image_may_carry_the_name_before_the_face(tmp_path):
    place = tmp_path / "a_b_c_d_e_f"  # only the name of the file counts
    picture(place / "me_1_2_30_40.png", caption=None)
    picture(place / "1_2_30_40.png", caption=None)
    picture(place / "x_y_1_2_3_4.png", caption="own")
    for name in ("me.txt", "1.txt", "x_y.txt", ".txt"):
        (place / name).write_text(f"from {name}")
    records, _ = found_in({"image_dir": str(place)}, allow_missing_captions=True)
    assert {record.key: record.caption for record in records} == {
        "me_1_2_30_40.png": "from me.txt",
        "1_2_30_40.png": "",  # four parts
        "x_y_1_2_3_4.png": "own",
    }


def test_first_line_or_with_wildcards_all_lines(tmp_path):
    picture(tmp_path / "a.png", caption="\n  one \n\ntwo\n")
    (record,), _ = found_in({"image_dir": str(tmp_path)})
    assert record.caption == "one"
    (record,), _ = found_in({"image_dir": str(tmp_path), "enable_wildcard": True})
    assert record.caption == "one\ntwo"


def test_images_with_one_stem_share_the_caption_but_no_caches(tmp_path, messages):
    for name in ("a.png", "a.jpg", "b.png", "a.webp"):
        picture(tmp_path / name, caption="both")
    records, problems = found_in({"image_dir": str(tmp_path)})
    assert {record.key: record.cache_base for record in records} == {
        "a.jpg": str(tmp_path / "a"),
        "a.png": str(tmp_path / "a.png"),
        "a.webp": str(tmp_path / "a.webp"),
        "b.png": str(tmp_path / "b"),
    }
    assert {record.caption for record in records} == {"both"} and not problems
    assert messages.text.count("named alike") == 1 and "3 images" in messages.text


def test_paths_stay_as_given(tmp_path, monkeypatch):
    picture(tmp_path / "in.put" / "a.b.png")
    monkeypatch.chdir(tmp_path)
    (record,), _ = found_in({"image_dir": "in.put"})
    assert (str(record.path), record.cache_base) == (os.path.join("in.put", "a.b.png"), os.path.join("in.put", "a.b"))


def test_exif_turns_are_obeyed_or_mentioned_once(tmp_path, messages):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name, exif=turned())
    picture(tmp_path / "c.jpg")
    records, _ = found_in({"image_dir": str(tmp_path)})
    assert [record.size for record in records] == [(8, 6)] * 3
    assert messages.text.count("--exif_transpose") == 1 and "2 images" in messages.text
    messages.clear()
    records, _ = found_in({"image_dir": str(tmp_path)}, exif_transpose=True)
    assert [record.size for record in records] == [(6, 8), (6, 8), (8, 6)]
    assert "--exif_transpose" not in messages.text


# sizes kept between runs


def info_of(folder):
    return json.loads((folder / "metadata_cache.json").read_text(encoding="utf-8"))


def replace_unnoticed(path, size):
    """Another picture that looks unchanged: as many bytes, the same time."""
    status = path.stat()
    filling = 0
    for _ in range(2):
        text = PngImagePlugin.PngInfo()
        text.add_text("filling", "x" * filling)
        Image.new("RGB", size).save(path, pnginfo=text)
        filling += status.st_size - path.stat().st_size
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_sizes_are_kept_and_trusted_for_unchanged_files(tmp_path, messages):
    exif = turned()
    exif[0x010E] = "a description " * 30
    picture(tmp_path / "a.png", exif=exif)
    subset = {"image_dir": str(tmp_path), "cache_info": True}
    found_in(subset)
    status = (tmp_path / "a.png").stat()
    entry = info_of(tmp_path)[str(tmp_path / "a.png")]
    assert entry["caption"] == "text" and entry["resolution"] == [8, 6]
    assert (entry["file_size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    assert entry["exif_transpose"] is False
    messages.clear()
    replace_unnoticed(tmp_path / "a.png", (20, 10))
    assert found_in(subset)[0][0].size == (8, 6)
    assert "--exif_transpose" in messages.text  # as in the first run
    assert found_in(subset, exif_transpose=True)[0][0].size == (20, 10)  # noted under other rules


def test_a_stale_list_is_not_trusted(tmp_path):
    """The reference took listing, sizes and captions from the file for ever."""
    picture(tmp_path / "a.png", caption="old")
    picture(tmp_path / "gone.png")
    subset = {"image_dir": str(tmp_path), "cache_info": True}
    found_in(subset)
    picture(tmp_path / "a.png", (30, 20), caption="new")
    picture(tmp_path / "b.png")
    (tmp_path / "gone.png").unlink()
    records, _ = found_in(subset)
    assert [(r.key, r.size, r.caption) for r in records] == [("a.png", (30, 20), "new"), ("b.png", (8, 6), "text")]
    assert set(info_of(tmp_path)) == {str(tmp_path / "a.png"), str(tmp_path / "b.png")}


def test_entries_of_the_reference_are_not_trusted(tmp_path):
    path = picture(tmp_path / "a.png")
    (tmp_path / "metadata_cache.json").write_text(json.dumps({str(path): {"caption": "x", "resolution": [0, 0]}}))
    records, problems = found_in({"image_dir": str(tmp_path), "cache_info": True})
    assert (records[0].size, records[0].caption, problems) == ((8, 6), "text", [])


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"%s": 3}'])
def test_damaged_sizes_are_made_again(tmp_path, messages, text):
    path = picture(tmp_path / "a.png")
    (tmp_path / "metadata_cache.json").write_bytes(text.replace("%s", str(path)).encode("latin-1"))
    records, problems = found_in({"image_dir": str(tmp_path), "cache_info": True})
    assert records[0].size == (8, 6) and not problems
    assert ("is damaged and will be made again" in messages.text) == ("%s" not in text)
    assert info_of(tmp_path)[str(path)]["resolution"] == [8, 6]


def test_sizes_are_written_only_when_asked_and_changed(tmp_path, messages):
    picture(tmp_path / "a.png")
    file = tmp_path / "metadata_cache.json"
    subset = {"image_dir": str(tmp_path), "cache_info": True}
    found_in({"image_dir": str(tmp_path)})
    found_in(subset, write_info=False)
    assert not file.exists()
    found_in(subset)
    before = file.stat().st_mtime_ns, file.stat().st_ino
    found_in(subset)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    file.unlink()
    file.mkdir()
    assert not found_in(subset)[1]
    assert "cannot be written" in messages.text


# control images


def pairs(tmp_path, **controls):
    for name in ("a", "b"):
        picture(tmp_path / "img" / f"{name}.png")
    (tmp_path / "control").mkdir(exist_ok=True)
    for name, size in controls.items():
        picture(tmp_path / "control" / f"{name}.jpg", size, caption=None)
    return {"image_dir": str(tmp_path / "img"), "conditioning_data_dir": str(tmp_path / "control")}


def test_control_images_are_found_by_stem(tmp_path):
    subset = pairs(tmp_path, a=(8, 6), b=(8, 6))
    picture(tmp_path / "control" / "a.PNG", caption=None)
    records, problems = found_in(subset)
    assert [record.control for record in records] == [
        tmp_path / "control" / "a.PNG",  # first in sorted order
        tmp_path / "control" / "b.jpg",
    ]
    assert not problems


def test_subsets_may_share_a_folder_of_control_images(tmp_path):
    subset = pairs(tmp_path, a=(8, 6), b=(8, 6), c=(8, 6))
    picture(tmp_path / "more" / "c.png")
    records, problems = found_in(subset, {**subset, "image_dir": str(tmp_path / "more")})
    assert len(records) == 3 and not problems


def test_a_metadata_file_may_list_a_part_of_the_pairs(tmp_path):
    subset = pairs(tmp_path, a=(8, 6), b=(8, 6))
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "c"}}')
    records, problems = found_in({**subset, "metadata_file": str(tmp_path / "m.json")})
    assert [record.control for record in records] == [tmp_path / "control" / "a.jpg"] and not problems


# bad images are left out


def test_bad_images_are_left_out_on_request(tmp_path, messages):
    picture(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "damaged.webp", lossless=True)
    data = bytearray((tmp_path / "damaged.webp").read_bytes())
    data[40:-40] = b"\xff" * (len(data) - 80)  # header and end are fine, what lies between is not
    (tmp_path / "damaged.webp").write_bytes(data)
    for number in range(6):
        (tmp_path / f"zero{number}.png").write_bytes(b"")
    records, problems = found_in({"image_dir": str(tmp_path)}, skip_bad_images=True)
    assert [record.key for record in records] == ["a.png"] and not problems
    assert messages.text.count("left out 7 images") == 1
    assert "damaged.webp: cannot be" in messages.text and "and 2 more" in messages.text
    _, problems = found_in({"image_dir": str(tmp_path), "class_tokens": "x"})
    assert len(problems) == 6 and all("--skip_bad_images" in str(problem) for problem in problems)


def test_an_image_goes_with_its_bad_control_image(tmp_path, messages):
    subset = pairs(tmp_path, a=(8, 6), b=(8, 6))
    (tmp_path / "control" / "b.jpg").write_bytes(b"")
    records, problems = found_in(subset, skip_bad_images=True)
    assert [record.key for record in records] == ["a.png"] and not problems
    assert "b.png: has a control image that is empty" in messages.text


def test_only_bad_images_are_a_problem(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    records, problems = found_in({"image_dir": str(tmp_path)}, skip_bad_images=True)
    assert not records and len(problems) == 1
    assert "none of its 1 image can be read (a.png: is empty" in str(problems[0])


# datasets made from flags


def test_flags_name_a_metadata_file(tmp_path, messages):
    assert from_flags({"in_json": "m.json", "train_data_dir": "img"}) == {
        "datasets": [{"subsets": [{"image_dir": "img", "metadata_file": "m.json"}]}]
    }
    # absolute keys need no folder; the reference demanded one
    config = from_flags({"in_json": "m.json", "train_data_dir": None, "reg_data_dir": "r"})
    assert config == {"datasets": [{"subsets": [{"metadata_file": "m.json"}]}]}
    assert "--reg_data_dir has no effect" in messages.text
    assert resolve_datasets(config, {"resolution": 64})[0].subsets[0].image_dir is None


def test_flags_name_pairs():
    flags = {"train_data_dir": "img", "conditioning_data_dir": "c"}
    wanted = {"image_dir": "img", "conditioning_data_dir": "c", "num_repeats": 1}
    assert from_flags(flags, control=True) == {"datasets": [{"subsets": [wanted]}]}
    for missing in flags:
        with pytest.raises(UserError, match=f"--{missing}: is needed"):
            from_flags({**flags, missing: None}, control=True)


def test_flags_name_numbered_folders_and_masks(tmp_path):
    (tmp_path / "img" / "10_cat").mkdir(parents=True)
    (tmp_path / "reg" / "1_cat").mkdir(parents=True)
    flags = {"train_data_dir": str(tmp_path / "img"), "reg_data_dir": str(tmp_path / "reg")}
    subsets = from_flags(flags)["datasets"][0]["subsets"]
    assert [subset["num_repeats"] for subset in subsets] == [10, 1]
    assert not any("conditioning_data_dir" in subset for subset in subsets)
    subsets = from_flags({**flags, "conditioning_data_dir": "masks"})["datasets"][0]["subsets"]
    assert [subset.get("conditioning_data_dir") for subset in subsets] == ["masks", None]
    with pytest.raises(UserError, match="no data"):
        from_flags({})


def test_cut_is_the_middle_of_the_resized_image():
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(20)
    part = images.cut(pixels, Placement((10, 10), (20, 10), (5, 0)), None)
    assert part.shape == (10, 10, 3)
    assert part[0, :, 0].tolist() == list(range(5, 15))


@pytest.mark.parametrize(
    "name", ["lanczos", "nearest", "bilinear", "bicubic", "area", "box", "linear", "cubic", "lanczos4", None]
)
def test_interpolations(name):
    pixels = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))
    resized = images.resize(pixels, (32, 48), name)
    assert resized.shape == (48, 32, 3)
    assert abs(float(resized.mean()) - float(pixels.mean())) < 4


def test_unit_range():
    assert images.to_unit_range(np.array([[[0, 128, 255]]], dtype=np.uint8)).ravel() == pytest.approx(
        [-1, 0.00392, 1], abs=1e-4
    )


def test_every_kind_of_png_decodes(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (8, 6)).save(path)
        assert images.decode(path).shape == (6, 8, 3)
