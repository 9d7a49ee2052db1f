from pathlib import Path

import huggingface_hub.constants
import pytest

from v4_ascend.errors import CheckpointError, ConfigError
from v4_ascend.runtime.load import resolve_checkpoint


def test_a_path_is_itself():
    assert resolve_checkpoint("models/v4") == Path("models/v4")


@pytest.mark.parametrize("reference", ["hf:", "hf:two words", "hf:a/b/c"])
def test_what_is_no_repository_is_refused_with_the_form(reference):
    with pytest.raises(ConfigError, match=f"^{reference}: must be hf:org/name or hf:org/name@rev"):
        resolve_checkpoint(reference)


def test_offline_a_repository_that_is_not_cached_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="^hf:org/name@v1: cannot be fetched: Cannot find"):
        resolve_checkpoint("hf:org/name@v1")
