"""Images and captions that a metadata file lists."""

import json
import shlex

import pytest
from PIL import Image

from library.config_util import resolve_datasets
from library.data import images
from library.data.records import ScanRules, scan_dataset

FLUX = ("_flux.npz", "_flux.safetensors")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "img"
    place.mkdir()
    return place


def picture(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def scanned(folder, content, *, name="meta.json", rules=None, image_dir=True, **subset):
    """Records and problems; the content is a dict, a list of lines, or the file's text."""
    file = folder.parent / name
    if isinstance(content, list):
        content = "\n".join(json.dumps(line) for line in content)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    entry = {"metadata_file": str(file), **({"image_dir": str(folder)} if image_dir else {}), **subset}
    plans = resolve_datasets({"datasets": [{"resolution": 64, "subsets": [entry]}]}, {})
    rules = rules or ScanRules(latent_suffixes=FLUX, allow_missing_captions=True)
    return scan_dataset(plans[0].subsets, where="d", rules=rules)


def only(problems):
    assert len(problems) == 1, problems
    return str(problems[0])


def test_json_and_json_lines_say_the_same(folder):
    picture(folder / "sub" / "b.png")
    picture(folder / "a.png", (20, 10))
    entries = {"sub/b.png": {"caption": "c", "tags": "t1, t2", "train_resolution": [1, 1]}, "a.png": {"tags": "t"}}
    lines = [{"image_path": key, **values} for key, values in entries.items()]
    records, problems = scanned(folder, entries)
    assert not problems
    assert [(r.key, r.size, r.caption, r.path) for r in records] == [
        ("sub/b.png", (8, 6), "c,t1, t2", folder / "sub" / "b.png"),
        ("a.png", (20, 10), "t", folder / "a.png"),
    ]
    assert [r.cache_base for r in records] == [str(folder / "sub" / "b"), str(folder / "a")]
    assert scanned(folder, lines, name="meta.jsonl") == (records, [])
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(line) for line in lines) + "\n"
    assert scanned(folder, text, name="META.JSONL") == (records, [])


def test_absolute_paths_need_no_folder(folder):
    path = picture(folder / "a.png")
    (record,), problems = scanned(folder, {str(path): {"caption": "c"}}, image_dir=False)
    assert (record.path, record.key, problems) == (path, "a.png", [])
    (record,), _ = scanned(folder.parent, {str(path): {"caption": "c"}})
    assert record.key == "img/a.png"


def test_relative_paths_need_a_folder(folder):
    picture(folder / "a.png")
    found = only(scanned(folder, {"a.png": {}}, image_dir=False)[1])
    assert "meta.json" in found and "1 relative path (a.png): set image_dir" in found


def test_a_missing_folder_is_named_once(folder):
    found = only(scanned(folder.parent / "nowhere", {"a": {}, "b": {}})[1])
    assert "image_dir" in found and "no such folder" in found


@pytest.mark.parametrize("key", ["a", "a.png", "a.jpg", "./a", "a.tiff"])
def test_keys_without_extension_or_file_take_the_image_of_the_stem(folder, key):
    """The reference joined the key to the folder as it was, and found no image."""
    for name in ("a.PNG", "a.webp", "ab.png", "b.a.png"):
        picture(folder / name)
    (record,), problems = scanned(folder, {key: {"caption": "c"}})
    assert (record.key, record.exists, problems) == ("a.PNG", True, [])


def test_dots_are_part_of_a_stem(folder):
    picture(folder / "mix_v1.png")
    assert "mix_v1.5" in only(scanned(folder, {"mix_v1.5": {"caption": "c"}})[1])
    picture(folder / "mix_v1.5.png")
    (record,), _ = scanned(folder, {"mix_v1.5": {"caption": "c"}})
    assert record.key == "mix_v1.5.png"


def test_images_of_formats_that_folders_are_not_searched_for(folder):
    picture(folder / "a.tiff")
    (record,), problems = scanned(folder, {"a.tiff": {"caption": "c"}})
    assert (record.key, record.size, problems) == ("a.tiff", (8, 6), [])


def test_caches_of_equal_stems_do_not_mix(folder):
    """Whichever of them a file lists, names are those of a scanned folder."""
    for name in ("a.png", "a.jpg"):
        picture(folder / name)
    (record,), _ = scanned(folder, {"a.png": {"caption": "c"}})
    assert record.cache_base == str(folder / "a.png")


@pytest.mark.parametrize(
    ("entry", "rules", "wanted"),
    [
        ({"caption": "c", "tags": "t1,t2"}, {}, "c,t1,t2"),
        ({"caption": "c", "tags": "t1,t2"}, {"caption_separator": "; "}, "c; t1,t2"),
        ({"tags": "t1,t2"}, {}, "t1,t2"),
        ({"caption": "", "tags": "t1"}, {}, "t1"),
        ({"caption": "one\ntwo", "tags": "t"}, {}, "one,t"),
        ({"caption": "one\n\n two", "tags": "t1\nt2"}, {"enable_wildcard": True}, "one,t1,t2\ntwo,t1,t2"),
        # the reference lost these tags: it had no line to append them to
        ({"caption": "", "tags": "t1\nt2"}, {"enable_wildcard": True}, "t1,t2"),
        ({"tags": "t1"}, {"enable_wildcard": True}, "t1"),
        ({"caption": None, "tags": None, "image_size": None}, {}, ""),
        ({}, {"class_tokens": "cat"}, "cat"),
        ({"caption": "c"}, {"class_tokens": "cat"}, "c"),
    ],
)
def test_captions(folder, entry, rules, wanted):
    picture(folder / "a.png")
    (record,), problems = scanned(folder, {"a.png": entry}, **rules)
    assert (record.caption, problems) == (wanted, [])


def test_many_missing_captions_stop(folder):
    for number in range(4):
        picture(folder / f"{number}.png")
    entries = {"0.png": {"caption": "c"}, "1.png": {}, "2.png": {"tags": " "}, "3.png": {"tags": "t"}}
    found = only(scanned(folder, entries, rules=ScanRules())[1])
    assert "2 of 4 images" in found and "meta.json" in found and "--allow_missing_captions" in found
    assert not scanned(folder, entries)[1]
    assert not scanned(folder, entries, rules=ScanRules(), class_tokens="x")[1]


def test_a_wrong_size_gives_way_to_the_header(folder, messages):
    picture(folder / "a.png")
    picture(folder / "b.png")
    picture(folder / "c.png")
    entries = {
        "a.png": {"caption": "c", "image_size": [8, 6]},
        "b.png": {"caption": "c", "image_size": [6, 8]},
        "c.png": {"caption": "c", "image_size": [1, 1], "width": 8, "height": 6},  # width and height win
    }
    records, problems = scanned(folder, entries)
    assert [record.size for record in records] == [(8, 6)] * 3 and not problems
    assert messages.text.count("image_size of 1 image differs") == 1
    assert "b.png: (6, 8), not (8, 6)" in messages.text


# caches without images


@pytest.mark.parametrize("key", ["a.png", "a", "sub/../a.jpg"])
@pytest.mark.parametrize("suffix", FLUX)
def test_a_cache_stands_in_for_a_missing_image(folder, key, suffix):
    (folder / "sub").mkdir()
    (folder / f"a_0300x1200{suffix}").write_bytes(b"")
    (record,), problems = scanned(folder, {key: {"caption": "c"}})
    assert (record.size, record.exists, record.caption, problems) == ((300, 1200), False, "c", [])
    assert f"{record.cache_base}_0300x1200" in (str(folder / "a_0300x1200"), str(folder / "sub/../a_0300x1200"))


def test_an_image_with_its_own_caches_keeps_them_when_it_is_gone(folder):
    (folder / "a.png_0300x0200_flux.npz").write_bytes(b"")
    (record,), _ = scanned(folder, {"a.png": {"caption": "c"}})
    assert record.cache_base == str(folder / "a.png")


def test_caches_of_longer_names_are_not_taken(folder):
    """The reference compared beginnings: `a` took the size, and the latents, of `a_b`."""
    (folder / "a_b_0300x0500_flux.npz").write_bytes(b"")
    (folder / "a_0300x0500_sdxl.npz").write_bytes(b"")  # of another family
    found = only(scanned(folder, {"a.png": {"caption": "c"}})[1])
    assert "1 entry without image or latent cache: a.png" in found


def test_an_image_takes_no_size_from_a_cache(folder):
    picture(folder / "a.png")
    (folder / "a_b_0300x0500_flux.npz").write_bytes(b"")
    (folder / "a_0300x0500_flux.npz").write_bytes(b"")
    (record,), _ = scanned(folder, {"a.png": {"caption": "c"}})
    assert (record.size, record.path, record.exists) == ((8, 6), folder / "a.png", True)


def test_caches_of_several_sizes_need_a_size(folder):
    for name in ("a_0300x0200_flux.npz", "a_0300x0200_flux.safetensors", "a_0030x0020_flux.npz"):
        (folder / name).write_bytes(b"")
    found = only(scanned(folder, {"a": {"caption": "c"}})[1])
    assert "1 entry without image and with latent caches of several sizes: a; add image_size" in found
    (record,), problems = scanned(folder, {"a": {"caption": "c", "image_size": [30, 20]}})
    assert (record.size, problems) == ((30, 20), [])
    assert "without image or latent cache" in only(scanned(folder, {"a": {"image_size": [31, 20]}})[1])


def test_missing_images_are_counted(folder):
    picture(folder / "there.png")
    entries = {"there.png": {}, **{f"sub/{number}.png": {} for number in range(12)}}
    found = only(scanned(folder, entries)[1])
    assert "12 entries" in found and "sub/9.png and 2 more" in found and "meta.json" in found


def test_formats_that_need_a_package(folder, without_jxl):
    suffix, package = next(iter(images.optional_formats().items()))
    (folder / f"a{suffix}").write_bytes(b"x")
    found = only(scanned(folder, {f"a{suffix}": {"caption": "c"}})[1])
    assert f"(a{suffix})" in found and f"pip install {shlex.quote(package)}" in found


# damaged files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a.png": {"caption": "c"},}', "line 1: is damaged JSON"),
        ('{\n"a.png": {"caption": c}}', "line 2: is damaged JSON"),
        ("[]", 'expected an object as {"a.png"'),
        ("3", "expected an object"),
        ("{}", "lists no images"),
        ("", "lists no images"),
        ('{"a.png": "text"}', "'a.png': expected an object as {\"caption\""),
        ('{"a.png": {"caption": ["c"]}}', "'a.png': caption: expected text, not [\"c\"]"),
        ('{"a.png": {"tags": 3}}', "'a.png': tags: expected text, not 3"),
        ('{"a.png": {"image_size": "8x6"}}', "'a.png': image_size: expected width and height"),
        ('{"a.png": {"image_size": [0, 0]}}', "above 0, not [0, 0]"),
        ('{"a.png": {"image_size": [8, true]}}', "image_size: expected"),
        ('{"a.png": {"width": 8}}', "width and height: expected"),
        ('{"": {}}', "expected the path of an image as key"),
        ('{"a.png": {}, "a.png": {}}', "keys that are there twice: a.png; keep one"),
        ('{"a.png": {"tags": "x", "tags": "y"}}', "keys that are there twice: tags"),
    ],
)
def test_damaged_json(folder, content, expected):
    picture(folder / "a.png")
    found = only(scanned(folder, content)[1])
    assert expected in found and "meta.json" in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "is damaged JSON"),
        ("3", 'expected an object as {"image_path"'),
        ("{}", "image_path: expected the path of an image, not null"),
        ('{"image_path": ""}', "image_path: expected"),
        ('{"image_path": "a.png", "tags": []}', "tags: expected text"),
        ('{"image_path": "a.png", "tags": "x", "tags": "y"}', "twice: tags"),
    ],
)
def test_damaged_json_lines(folder, line, expected):
    picture(folder / "a.png")
    picture(folder / "b.png")
    text = '{"image_path": "b.png", "caption": "c"}\n\n' + line
    records, problems = scanned(folder, text, name="meta.jsonl")
    assert "meta.jsonl: line 3: " in only(problems) and expected in only(problems)
    assert [record.key for record in records] == ["b.png"]


def test_every_damaged_line_is_named(folder):
    found = scanned(folder, "{\n3\n", name="meta.jsonl")[1]
    assert [("line 1" in str(found[0])), ("line 2" in str(found[1]))] == [True, True]


def test_the_same_image_twice(folder):
    """Equal keys overwrote each other in the reference."""
    picture(folder / "a.png")
    lines = [{"image_path": name, "caption": name} for name in ("a.png", "a", "a", str(folder / "a.png"))]
    records, problems = scanned(folder, lines, name="meta.jsonl")
    assert len(records) == 1
    assert "the same image twice" in only(problems) and "a (also a.png)" in only(problems)


def test_single_letter_names_twice(folder):
    picture(folder / "a.png")
    assert "twice" in only(scanned(folder, [{"image_path": "a"}, {"image_path": "a"}], name="m.jsonl")[1])


def test_files_that_cannot_be_read(folder):
    plans = {"datasets": [{"resolution": 64, "subsets": [{"metadata_file": str(folder.parent / "m.json")}]}]}

    def found():
        return only(scan_dataset(resolve_datasets(plans, {})[0].subsets, where="d", rules=ScanRules())[1])

    assert "d.subsets[0].metadata_file" in found() and "no such file" in found()
    (folder.parent / "m.json").write_bytes(b'{"caf\xe9": {}}')
    assert "m.json: is not UTF-8 text" in found()
    (folder.parent / "m.json").unlink()
    (folder.parent / "m.json").mkdir()
    assert "m.json: cannot be read" in found()


def test_bad_images_of_a_metadata_file(folder, messages):
    picture(folder / "a.png")
    (folder / "bad.png").write_bytes(b"")
    entries = {"a.png": {"caption": "c"}, "bad": {"caption": "c"}}
    found = only(scanned(folder, entries)[1])
    assert "bad.png: is empty" in found and "--skip_bad_images" in found
    records, problems = scanned(folder, entries, rules=ScanRules(skip_bad_images=True))
    assert [record.key for record in records] == ["a.png"] and not problems
    assert "left out 1 image" in messages.text


def test_sizes_are_kept_beside_the_images(folder):
    picture(folder / "a.png")
    picture(folder / "b.png")
    (folder / "c_0300x0200_flux.npz").write_bytes(b"")
    scanned(folder, {"a": {"caption": "one"}, "c": {"caption": "c"}}, cache_info=True)
    scanned(folder, {"b": {"caption": "two"}}, cache_info=True)  # another file over the same images
    content = json.loads((folder / "metadata_cache.json").read_text())
    assert {key: entry["caption"] for key, entry in content.items()} == {
        str(folder / "a.png"): "one",
        str(folder / "b.png"): "two",
    }
