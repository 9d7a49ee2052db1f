"""HCCL rank tables 1.0 (A2), 1.2 (A3 supernodes) and 2.0 (Ascend 950): read, checked, written."""
