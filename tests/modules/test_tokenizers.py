"""Where tokenizers come from."""

import json

import pytest
from support.runs import Inputs

from library.base.errors import UserError
from library.modules.tokenizers import find_tokenizer, load_tokenizer

HUB_IDS = {"CLIPTokenizer": "openai/clip-vit-large-patch14", "T5Tokenizer": "google/t5-v1_1-xxl"}


@pytest.mark.parametrize("class_name", HUB_IDS)
def test_without_files_no_empty_tokenizer_is_made(class_name, tmp_path):
    with pytest.raises(UserError, match="the hub did not give it"):
        load_tokenizer(class_name, HUB_IDS[class_name], cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("class_name", HUB_IDS)
def test_local_files_are_enough(class_name, inputs: Inputs):
    tokenizer = load_tokenizer(class_name, HUB_IDS[class_name], cache_dir=str(inputs.folder / "tokenizers"))
    assert len(set(tokenizer("a photo of a cat").input_ids)) > 3


def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    assert find_tokenizer("a/b", cache_dir=None, beside=[tmp_path]) is None
