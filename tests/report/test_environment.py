"""Environments of several runs in one list."""

from halfstep.report.environment import summary


def test_shared_facts_appear_once_and_differing_ones_as_a_range() -> None:
    runs = [
        {"torch": "2.13.0", "load": 0.25, "cpu_flags": ["avx2", "amx"], "git_revision": "abc", "amx": True},
        {"torch": "2.13.0", "load": 1.5, "cpu_flags": ["avx2", "amx"], "git_revision": "def", "amx": True},
    ]
    assert summary(runs) == [
        ("PyTorch", "2.13.0"),
        ("Load", "0.250 to 1.50 over 2 runs"),
        ("CPU flags", "avx2, amx"),
        ("Git revision", "abc; def"),
        ("Amx", "yes"),
    ]


def test_nested_missing_and_byte_values() -> None:
    environment = {"gpu": {"name": "T4", "memory_bytes": 2**34}, "cpu_flags": [], "git_revision": None}
    assert summary([environment]) == [
        ("GPU: name", "T4"),
        ("GPU: memory", "16.0 GiB"),
        ("CPU flags", "none"),
        ("Git revision", "unknown"),
    ]
    assert summary([]) == []
