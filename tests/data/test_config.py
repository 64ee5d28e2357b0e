"""Dataset configuration: fallbacks, and what is said about mistakes."""

import pytest

from library.base.errors import UserError
from library.config_util import read_config, resolve_datasets
from library.data.build import dataset_plans, scan
from library.data.presets import from_folder_flags
from library.data.records import ScanRules


def resolve(config, **command_line):
    return resolve_datasets(config, command_line, source="d.toml")


def problems(call):
    with pytest.raises(UserError) as error:
        call()
    return [str(problem) for problem in error.value.problems]


def test_fallback_order():
    config = {
        "general": {"flip_aug": True, "num_repeats": 2, "batch_size": 3},
        "datasets": [
            {"resolution": 64, "num_repeats": 4, "subsets": [{"image_dir": "a"}, {"image_dir": "b", "num_repeats": 5}]},
            {"resolution": [64, 96], "batch_size": 1, "subsets": [{"image_dir": "a", "flip_aug": False}]},
        ],
    }
    first, second = resolve(config, dataset_repeats=9, keep_tokens=3, train_batch_size=8)
    assert [subset.num_repeats for subset in first.subsets] == [4, 5]
    assert [subset.flip_aug for subset in first.subsets] == [True, True]
    assert (first.batch_size, second.batch_size) == (3, 1)
    assert second.resolution == (64, 96)
    assert second.subsets[0].num_repeats == 2
    # false in the file beats a flag; what the file leaves open comes from the command line
    assert resolve(config, flip_aug=True)[1].subsets[0].flip_aug is False
    assert second.subsets[0].captions.keep_tokens == 3


def test_resolution_from_the_command_line():
    config = {"datasets": [{"subsets": [{"image_dir": "a"}]}]}
    assert resolve(config, resolution="512,768")[0].resolution == (512, 768)
    assert resolve(config, resolution="512")[0].resolution == (512, 512)
    assert "d.toml: datasets[0].resolution: is needed" in problems(lambda: resolve(config))[0]


def test_integers_are_numbers_and_text_is_a_resolution():
    config = {"datasets": [{"resolution": "64,64", "validation_split": 1, "subsets": [{"image_dir": "a"}]}]}
    assert resolve(config)[0].resolution == (64, 64)


def test_all_mistakes_at_once_with_their_place():
    config = {
        "generall": {},
        "datasets": [
            {
                "resolution": "big",
                "batch_size": 0,
                "enable_buckets": True,
                "image_dir": "a",
                "subsets": [{"image_dir": 3, "flip_aug": "yes", "resize_interpolation": "cubik"}],
            }
        ],
    }
    found = "\n".join(problems(lambda: resolve(config)))
    for text in (
        "d.toml: generall: unknown key",
        "d.toml: datasets[0].enable_buckets: unknown key; did you mean enable_bucket?",
        "d.toml: datasets[0].image_dir: belongs to another level ([[datasets.subsets]])",
        "d.toml: datasets[0].resolution = 'big'",
        "d.toml: datasets[0].batch_size = 0",
        "d.toml: datasets[0].subsets[0].image_dir = 3",
        "d.toml: datasets[0].subsets[0].flip_aug = 'yes'",
        "d.toml: datasets[0].subsets[0].resize_interpolation = 'cubik'",
    ):
        assert text in found


def test_limits_must_hold_the_resolution():
    config = {"datasets": [{"resolution": 512, "enable_bucket": True, "subsets": [{"image_dir": "a"}]}]}
    assert "min_bucket_reso = 1024" in problems(lambda: resolve(config, min_bucket_reso=1024, max_bucket_reso=2048))[0]
    assert "max_bucket_reso = 256" in problems(lambda: resolve(config, max_bucket_reso=256))[0]


def test_the_same_folder_twice(tmp_path):
    twice = [{"image_dir": str(tmp_path)}, {"image_dir": f"{tmp_path}/../{tmp_path.name}"}]
    found = problems(lambda: resolve({"datasets": [{"resolution": 64, "subsets": twice}]}))
    assert "is the one of subsets[0] too" in found[0]


def test_keys_of_subsets_reach_them_from_every_level():
    values = {
        "color_aug": True,
        "random_crop": True,
        "face_crop_aug_range": [1, 3],
        "alpha_mask": True,
        "cache_info": True,
        "custom_attributes": {"diff_output_preservation": True},
        "validation_split": 1,
        "validation_seed": 5,
        "loss_weight": 0.5,
    }
    for level in ("general", "dataset", "subset"):
        config = {"general": {}, "datasets": [{"resolution": 64, "subsets": [{"image_dir": "a"}]}]}
        place = {"general": config["general"], "dataset": config["datasets"][0]}
        place.get(level, config["datasets"][0]["subsets"][0]).update(values)
        subset = resolve(config)[0].subsets[0]
        for name, value in values.items():
            found = getattr(subset, name)
            assert found == (tuple(map(float, value)) if isinstance(value, list) else value), (level, name)


def test_keys_of_subsets_that_belong_there_only():
    general = {"image_dir": "x", "metadata_file": "x", "conditioning_data_dir": "x"}
    config = {"general": general, "datasets": [{"resolution": 64, "subsets": [{"image_dir": "a"}]}]}
    found = problems(lambda: resolve(config))
    assert len(found) == 3
    assert all("belongs to another level ([[datasets.subsets]])" in text for text in found)
    # a flag that names a folder is not the folder of every subset of a file
    subset = {"image_dir": "a"}
    plan = resolve({"datasets": [{"resolution": 64, "subsets": [subset]}]}, conditioning_data_dir="x")[0]
    assert plan.subsets[0].conditioning_data_dir is None


def test_ranges():
    def given(value, **command_line):
        entry = {"image_dir": "a"} | ({} if value is None else {"face_crop_aug_range": value})
        config = {"datasets": [{"resolution": 64, "subsets": [entry]}]}
        return resolve(config, **command_line)[0].subsets[0].face_crop_aug_range

    assert given([1, 3]) == (1.0, 3.0)
    assert given("2.0,4.0") == (2.0, 4.0)
    assert given(None, face_crop_aug_range="2,4") == (2.0, 4.0)
    assert "the smaller number first" in problems(lambda: given([3, 1]))[0]
    assert "expected two numbers" in problems(lambda: given([3]))[0]


@pytest.mark.parametrize("level", ["general", "datasets", "subsets"])
def test_misspelt_keys_are_named_at_every_level(level):
    config = {"general": {}, "datasets": [{"resolution": 64, "subsets": [{"image_dir": "a"}]}]}
    place = {"general": config["general"], "datasets": config["datasets"][0]}
    place.get(level, config["datasets"][0]["subsets"][0])["flip_aug_"] = True
    found = problems(lambda: resolve(config))
    assert len(found) == 1
    assert "flip_aug_: unknown key; did you mean flip_aug?" in found[0]


def test_metadata_and_folders():
    both = [{"metadata_file": "m.json", "image_dir": "a"}, {"image_dir": "a"}]
    plan = resolve({"datasets": [{"resolution": 64, "subsets": both}]})[0]
    assert [str(subset.metadata_file) for subset in plan.subsets] == ["m.json", "None"]
    twice = {"datasets": [{"resolution": 64, "subsets": [{"metadata_file": "m.json"}, {"metadata_file": "./m.json"}]}]}
    assert "is the one of subsets[0] too" in problems(lambda: resolve(twice))[0]
    reg = {"datasets": [{"resolution": 64, "subsets": [{"metadata_file": "m.json", "is_reg": True}]}]}
    assert "regularization images come from folders" in problems(lambda: resolve(reg))[0]
    neither = {"datasets": [{"resolution": 64, "subsets": [{"num_repeats": 2}]}]}
    assert "image_dir: is needed" in problems(lambda: resolve(neither))[0]


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in problems(lambda: read_config(tmp_path / "a.toml"))[0]
    (tmp_path / "a.yaml").write_text("")
    assert "expected a .toml or .json file" in problems(lambda: read_config(tmp_path / "a.yaml"))[0]
    (tmp_path / "a.toml").write_text("[[datasets]\n")
    assert "cannot be read" in problems(lambda: read_config(tmp_path / "a.toml"))[0]
    (tmp_path / "a.json").write_text('{"datasets": []}')
    assert read_config(tmp_path / "a.json") == {"datasets": []}


def test_folders_named_with_repeats(tmp_path):
    for name in ("10_cat", "3_a_b", "5", "notes", "0_none"):
        (tmp_path / name).mkdir()
    subsets = from_folder_flags(str(tmp_path), None)["datasets"][0]["subsets"]
    found = {(subset["num_repeats"], subset.get("class_tokens")) for subset in subsets}
    assert found == {(10, "cat"), (3, "a_b"), (5, None)}
    assert "no such folder" in problems(lambda: from_folder_flags(str(tmp_path / "x"), None))[0]
    assert "no data" in problems(lambda: from_folder_flags(None, None))[0]


def test_step_of_the_model():
    config = {"datasets": [{"resolution": 500, "subsets": [{"image_dir": "a"}]}]}
    plans, source = dataset_plans(config, {})
    found = problems(lambda: scan(plans, source=source, seed=0, step=64, rules=ScanRules(allow_missing_captions=True)))
    assert any("must be multiples of 64 for this model" in text for text in found)
    assert any("no such folder" in text for text in found)
