"""Comparisons with other implementations: they need torch and transformers, and never the network."""

import os

import flags

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def pytest_configure(config):
    """Our side of a comparison runs as users have it: one device, all cores, compiled with every optimisation."""
    if config.getoption("markexpr").startswith("peers"):
        of_tests = {*flags.DEVICES.split(), *flags.THREADS.split(), *flags.QUICK.split()}
        os.environ["XLA_FLAGS"] = " ".join(x for x in os.environ["XLA_FLAGS"].split() if x not in of_tests)
