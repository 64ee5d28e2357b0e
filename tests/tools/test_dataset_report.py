"""The report about a dataset: every finding, the files it writes, how it ends."""

import csv
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config_util import resolve_datasets
from library.data.build import scan
from library.data.dataset import ImageSet
from library.data.records import ScanRules
from library.data.report import dataset_findings, inspect, tag_counts
from tools import dataset_report

TOOL = Path(dataset_report.__file__)


def photo(seed, size=(64, 64)):
    """A picture with structure: large blurred blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((256, 256), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BOX)


def picture(path, seed=0, size=(64, 64), caption="a tag", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, size).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def plans_of(folder, *, dataset=(), **subset):
    entry = {"image_dir": str(folder), "caption_extension": ".txt", **subset}
    return resolve_datasets({"datasets": [{"resolution": 64, "subsets": [entry], **dict(dataset)}]}, {})


def report_of(folder, *, dataset=(), allow=True, duplicates=True, **subset):
    plans = plans_of(folder, dataset=dataset, **subset)
    rules = ScanRules(allow_missing_captions=allow, write_info=False)
    return inspect(plans, source="d", rules=rules, step=8, duplicates=duplicates)


def findings(report):
    found = {finding.kind: finding for finding in report.findings if finding.kind != "warning"}
    assert len(found) == len([one for one in report.findings if one.kind != "warning"])
    return found


def names(finding):
    return [Path(file).name for file in finding.files]


def test_nothing_odd_gives_no_finding(tmp_path):
    for seed in range(4):
        picture(tmp_path / f"{seed}.png", seed)
    report = report_of(tmp_path, dataset={"batch_size": 2}.items())
    assert report.findings == () and report.problems == ()


def test_missing_captions(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2, caption=None)
    found = findings(report_of(tmp_path))
    assert list(found) == ["missing_captions"]
    assert found["missing_captions"].message == "1 of 2 images have no caption and are trained on empty text"
    assert names(found["missing_captions"]) == ["b.png"]


def test_class_tokens_stand_in(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2, caption=None)
    picture(tmp_path / "c_10_10_8_8.png", 3, caption=None)
    (tmp_path / "c.txt").write_text("before the position of the face")
    found = findings(report_of(tmp_path, class_tokens="cat"))
    assert list(found) == ["class_tokens"] and names(found["class_tokens"]) == ["b.png"]
    assert "1 of 3 images" in found["class_tokens"].message and "'cat'" in found["class_tokens"].message


def test_bucket_fill(tmp_path):
    for seed in range(5):
        picture(tmp_path / f"square{seed}.png", seed)
    picture(tmp_path / "wide.png", 9, size=(128, 32))
    options = {"batch_size": 4, "enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 32}
    found = findings(report_of(tmp_path, dataset=options.items()))["bucket_fill"]
    assert found.message == (
        "2 of 2 buckets end an epoch with a batch of less than 4, and 1 never fills one: 128x32 with 1 visit"
    )
    assert names(found) == ["wide.png"]
    full = {**options, "batch_size": 1}
    assert "bucket_fill" not in findings(report_of(tmp_path, dataset=full.items()))


def test_crop_loss_names_the_worst_first(tmp_path):
    picture(tmp_path / "square.png", 1)
    picture(tmp_path / "wide.png", 2, size=(128, 64))
    picture(tmp_path / "wider.png", 3, size=(256, 64))
    picture(tmp_path / "nearly.png", 4, size=(72, 64))  # 11 %
    found = findings(report_of(tmp_path))["crop_loss"]
    assert names(found) == ["wider.png", "wide.png"]
    assert found.message == (
        "2 of 4 images lose more than 20% to the crop (mean of all 34.0%): wider.png 75.0%, wide.png 50.0%"
    )


def test_enlarged_and_small(tmp_path):
    picture(tmp_path / "tiny.png", 1, size=(16, 16))
    picture(tmp_path / "right.png", 2)
    picture(tmp_path / "double.png", 3, size=(32, 32))  # exactly twice is not named
    found = findings(report_of(tmp_path))
    assert found["enlarged"].message == "1 of 3 images is enlarged more than 2 times: tiny.png (16x16) 4.0 times"
    assert "small_images" not in found
    kept = {"enable_bucket": True, "min_bucket_reso": 8, "bucket_reso_steps": 8, "bucket_no_upscale": True}
    found = findings(report_of(tmp_path, dataset=kept.items()))
    assert "enlarged" not in found and names(found["small_images"]) == ["tiny.png"]
    assert "less than 25% of the pixels of 64x64: tiny.png (16x16)" in found["small_images"].message


def test_several_datasets_are_numbered(tmp_path):
    picture(tmp_path / "a" / "wide.png", 1, size=(128, 64))
    picture(tmp_path / "b" / "wide.png", 2, size=(128, 64))
    plans = [*plans_of(tmp_path / "a"), *plans_of(tmp_path / "b")]
    images = scan(plans, source="d", seed=0, step=8, rules=ScanRules()).train
    assert [one.message[:10] for one in dataset_findings(images)] == ["dataset 0:", "dataset 1:"]


def test_wrong_extension_and_undecodable(tmp_path):
    picture(tmp_path / "right.jpg", 1)
    picture(tmp_path / "wrong.png", 2, format="JPEG")
    rotten = picture(tmp_path / "rotten.png", 3)
    content = bytearray(rotten.read_bytes())
    content[60:90] = b"\0" * 30  # the header stays whole
    rotten.write_bytes(content)
    found = findings(report_of(tmp_path))
    assert names(found["wrong_extension"]) == ["wrong.png"] and "wrong.png is JPEG" in found["wrong_extension"].message
    assert names(found["undecodable"]) == ["rotten.png"]
    assert "undecodable" not in findings(report_of(tmp_path, duplicates=False))


def test_duplicates(tmp_path):
    original = picture(tmp_path / "a.png", 1)
    shutil.copy(original, tmp_path / "same.png")
    picture(tmp_path / "smaller.jpg", 1, size=(48, 48), quality=85)
    picture(tmp_path / "other.png", 2)
    for side in (64, 80):  # flat pictures are not compared
        Image.new("RGB", (side, side), "grey").save(tmp_path / f"flat{side}.png")
    for low, high in ((0, 120), (130, 250)):  # same shape, other brightness
        ramp = np.tile(np.linspace(low, high, 64, dtype=np.uint8), (64, 1))
        Image.fromarray(ramp).save(tmp_path / f"ramp{low}.png")
    report = report_of(tmp_path)
    found = findings(report)
    assert [sorted(path.name for path in group) for group in report.exact] == [["a.png", "same.png"]]
    assert [sorted(path.name for path in group) for group in report.near] == [["a.png", "smaller.jpg"]]
    assert found["duplicates"].message == "2 images in 1 group are the same file within their group: a.png = same.png"
    assert "a.png = smaller.jpg" in found["near_duplicates"].message
    assert not report_of(tmp_path, duplicates=False).exact


def test_a_folder_in_two_datasets_is_no_duplicate(tmp_path):
    picture(tmp_path / "a.png", 1)
    plans = [*plans_of(tmp_path), *plans_of(tmp_path)]
    report = inspect(plans, source="d", rules=ScanRules(write_info=False))
    assert report.exact == () and report.tags == {"a tag": 1}


def test_equal_images_on_both_sides_of_the_validation_split(tmp_path):
    original = picture(tmp_path / "a.png", 1)
    for copy in range(3):
        shutil.copy(original, tmp_path / f"copy{copy}.png")
    found = findings(report_of(tmp_path, validation_split=0.5, validation_seed=1))
    assert found["validation_leak"].message == "1 group of equal images is both trained and validated on"
    assert "validation_leak" not in findings(report_of(tmp_path))


def test_caption_files_beside_images(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2, caption=None)
    (tmp_path / "b.tags").write_text("unread")
    (tmp_path / "gone.txt").write_text("no image")
    report = report_of(tmp_path)
    found = findings(report)
    assert names(found["other_captions"]) == ["b.tags"] and "1 .tags file in" in found["other_captions"].message
    assert names(found["unused_captions"]) == ["gone.txt"]
    assert any(finding.kind == "warning" and "b" in finding.message for finding in report.findings)


def test_tags(tmp_path):
    picture(tmp_path / "a.png", 1, caption="Cat, sofa ,, cat")
    picture(tmp_path / "b.png", 2, caption="cat, night scene")
    sets = report_of(tmp_path).images.train
    assert tag_counts(sets) == {"cat": 2, "sofa": 1, "night scene": 1}
    picture(tmp_path / "b.png", 2, caption="me ||| cat;dog")
    other = report_of(tmp_path, keep_tokens_separator="|||", secondary_separator=";").images.train
    assert tag_counts(other) == {"cat": 2, "sofa": 1, "me": 1, "dog": 1}


def test_findings_of_many_records_are_quick(tmp_path):
    picture(tmp_path / "a.png", 1)
    plan = plans_of(tmp_path, dataset={"enable_bucket": True, "min_bucket_reso": 32, "batch_size": 3}.items())[0]
    (record,) = report_of(tmp_path).images.train[0].records
    records = [
        replace(record, path=Path(f"{n}.png"), key=f"{n}.png", size=(40 + n % 200, 40 + n % 170), caption="")
        for n in range(10_000)
    ]
    images = ImageSet.build(plan, records)
    start = time.perf_counter()
    found = dataset_findings([images])
    assert time.perf_counter() - start < 1
    assert found[0].message.startswith("10000 of 10000 images")


@pytest.fixture
def dataset_file(tmp_path):
    """A dataset file over three images, one of them strongly cut, one without caption."""
    folder = tmp_path / "images"
    picture(folder / "a.png", 1, caption="cat, sofa")
    picture(folder / "b.png", 2, caption="cat")
    picture(folder / "wide.png", 3, size=(128, 64), caption=None)
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
        f"image_dir = '{folder}'\ncaption_extension = '.txt'\ncache_info = true\n"
    )
    return file


def call(*arguments):
    dataset_report.main([str(argument) for argument in arguments])


def test_the_report_as_a_program(dataset_file, tmp_path):
    out = tmp_path / "report"
    command = [sys.executable, TOOL, "--dataset_config", dataset_file, "--output", out, "--allow_missing_captions"]
    done = subprocess.run([*map(str, command), "--family", "sdxl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].strip() for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows["images"] == "3" and rows["captions"] == "2, 1 missing"
    assert rows["cropped away"] == "16.7% on average, worst 50.0% (wide.png)"
    assert rows["most frequent"] == "cat (2), sofa (1)"
    assert rows["report"] == str(out / "report.md")
    assert sorted(path.name for path in out.iterdir()) == [
        "buckets.png",
        "report.json",
        "report.md",
        "sheet_dataset0_64x64.png",
        "tags.csv",
    ]
    facts = json.loads((out / "report.json").read_text())
    assert (facts["images"], facts["captions"], facts["missing_captions"]) == (3, 2, 1)
    assert facts["datasets"][0]["buckets"][0]["visits"] == 3 and facts["datasets"][0]["buckets"][0]["last_batch"] == 1
    assert facts["crop_loss"]["worst"] == 0.5 and facts["crop_loss"]["worst_file"].endswith("wide.png")
    assert facts["tags"]["used_once"] == ["sofa"] and facts["duplicates"] == []
    text = (out / "report.md").read_text()
    assert "**missing captions**: 1 of 3 images" in text and "](<sheet_dataset0_64x64.png>)" in text
    assert "## Problems" not in text
    with open(out / "tags.csv", newline="") as file:
        assert list(csv.reader(file)) == [["tag", "images"], ["cat", "2"], ["sofa", "1"]]
    assert not (tmp_path / "images" / "metadata_cache.json").exists()


def test_problems_end_with_code_2_and_are_in_the_report(dataset_file, tmp_path, capsys):
    (tmp_path / "images" / "zero.png").write_bytes(b"")
    out = tmp_path / "report"
    with pytest.raises(SystemExit) as end:
        call("--dataset_config", dataset_file, "--output", out)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "zero.png: is empty (zero bytes)" in errors and "images have no .txt caption" in errors
    assert all(line.startswith("error: ") for line in errors.splitlines() if "zero.png" in line)
    facts = json.loads((out / "report.json").read_text())
    assert len(facts["problems"]) == 2 and facts["images"] == 3
    assert "Training stops at these" in (out / "report.md").read_text()
    assert (out / "sheet_dataset0_64x64.png").is_file()
    call("--dataset_config", dataset_file, "--output", out, "--skip_bad_images", "--allow_missing_captions")
    facts = json.loads((out / "report.json").read_text())
    assert facts["problems"] == []
    assert any(one["kind"] == "warning" and "zero.png" in one["message"] for one in facts["findings"])


def test_nothing_readable_still_gives_a_report(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "zero.png").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        call("--train_data_dir", tmp_path / "images", "--resolution", 64, "--output", tmp_path / "out")
    assert end.value.code == 2
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["images"] == 0 and len(facts["problems"]) >= 1 and facts["pictures"] == []


def test_plain_folders_and_numbered_folders(dataset_file, tmp_path):
    flags = ["--resolution", "64", "--caption_extension", ".txt", "--allow_missing_captions", "--sheet_images", "0"]
    call("--train_data_dir", tmp_path / "images", "--output", tmp_path / "out", *flags, "--no_duplicates")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["images"] == 3 and facts["duplicates"] is None and facts["pictures"] == ["buckets.png"]
    picture(tmp_path / "base" / "4_cat" / "a.png", 1, caption=None)
    call("--train_data_dir", tmp_path / "base", "--output", tmp_path / "out", *flags)
    (dataset,) = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]
    assert dataset["subsets"][0]["name"] == "4_cat" and dataset["subsets"][0]["visits"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "sdx"], "did you mean 'sdxl'?"),
        (["--alpha_background", "pink"], "--alpha_background = 'pink'"),
        (["--top_tags", "-1"], "--top_tags = -1: must be at least 0"),
        (["--topp_tags", "1"], "did you mean --top_tags?"),
    ],
)
def test_wrong_flags(dataset_file, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        call("--dataset_config", dataset_file, "--output", tmp_path / "out", *flags)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_that_the_family_cannot_train(dataset_file, tmp_path, capsys):
    dataset_file.write_text(dataset_file.read_text().replace("resolution = 64", "resolution = 68"))
    arguments = ("--dataset_config", dataset_file, "--output", tmp_path / "out", "--allow_missing_captions")
    call(*arguments)
    with pytest.raises(SystemExit) as end:
        call(*arguments, "--family", "sdxl")
    assert end.value.code == 2 and "must be multiples of" in capsys.readouterr().err


def test_pictures_never_land_among_the_training_images(dataset_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call("--dataset_config", dataset_file, "--output", tmp_path / "images")
    assert end.value.code == 2 and "holds images of the dataset" in capsys.readouterr().err
    assert not list((tmp_path / "images").glob("sheet*"))


def test_help_names_the_flags_of_training():
    text = dataset_report.setup_parser().format_help()
    assert "--bucket_no_upscale" in text and "--exif_transpose" in text and "--debug_dataset" not in text
