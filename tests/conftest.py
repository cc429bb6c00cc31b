"""Options and seeding that hold for every test."""

import os
import sys

import pytest
from hypothesis import settings

# Triton reads this when it is imported: kernels run in its interpreter. Ahead-of-time compilation is done in processes
# of its own, without it: one process cannot do both. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Wall-clock deadlines flake on two cores; in CI the same examples are drawn every time.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the files in tests/golden/ instead of comparing with them",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten; without it a missing file fails."""
    return request.config.getoption("--update-golden")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed, as pytest-randomly prints it in the header; give it to every generator a test makes."""
    return request.config.getoption("randomly_seed", default=0)  # 0: run with `-p no:randomly`


@pytest.fixture(autouse=True)
def _seed_torch(seed: int, request: pytest.FixtureRequest) -> None:
    """pytest-randomly reseeds `random` and numpy before each test; this does torch, once it is loaded."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.random.manual_seed(seed)
        if request.node.get_closest_marker("slow") is None and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # the tensors are tiny: on a busy machine threads only wait for each other
