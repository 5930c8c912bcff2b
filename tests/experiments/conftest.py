"""A few tiny images in place of a data set."""

import pytest

from fewstep.data.folder import ImageFolder
from tests.data.conftest import write_images


@pytest.fixture
def images(tmp_path, own_cache):
    write_images(tmp_path / "images", {f"c{i:02d}": 4 for i in range(12)})
    return ImageFolder(root=tmp_path / "images", size=16)
