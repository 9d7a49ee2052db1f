import pytest

from v4_ascend.config.devices import bundled_devices, device_profile
from v4_ascend.errors import ConfigError


@pytest.mark.parametrize("name", ["ascend-950dt-96", "cpu", "cpu-emulated-npu", "nvidia-h200"])
def test_bundled_profiles_are_found_by_name(name):
    assert device_profile(name, "here").name == name
    assert name in bundled_devices()


def test_only_the_emulated_device_is_emulated():
    emulated = [n for n in bundled_devices() if device_profile(n, "here").emulated]
    assert emulated == ["cpu-emulated-npu"]


def test_an_unknown_profile_is_refused_with_what_is_alike():
    with pytest.raises(
        ConfigError, match="here: no device profile 'nvidia-h20'; did you mean 'nvidia-h200'"
    ):
        device_profile("nvidia-h20", "here")
