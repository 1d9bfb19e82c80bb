"""Comparisons with other implementations: they need torch and transformers, and never the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

# What tests/conftest.py sets.
OF_TESTS = (
    "--xla_force_host_platform_device_count=",
    "--xla_cpu_multi_thread_eigen=",
    "--xla_backend_optimization_level=",
)


def pytest_configure(config):
    """Our side of a comparison runs as users have it: one device, all cores, compiled with every optimisation."""
    if config.getoption("markexpr").startswith("peers"):
        flags = os.environ["XLA_FLAGS"].split()
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if not flag.startswith(OF_TESTS))
