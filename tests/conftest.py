"Where the models of `cases.py` compute: on the CPU, or where the environment variable REVVIT_DEVICE says"
import os

import pytest

def pytest_configure(config):
    if not (name := os.environ.get('REVVIT_DEVICE')): return
    from revvit.core.device import pick_device
    try: pick_device(name)
    except ValueError as e: raise pytest.UsageError(f"REVVIT_DEVICE={name}: {e}")
