import importlib.metadata

import triton


def test_this_is_the_ascend_triton():
    assert importlib.metadata.version("triton-ascend") == "3.2.0"
    assert triton.__file__.startswith(__import__("sys").prefix)
