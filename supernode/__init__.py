"""Planning: which rank holds what. Integers in, integers out; no tensor library."""

if __name__ != "v4_ascend.supernode":
    raise ImportError(f"import v4_ascend.supernode, not {__name__}")
