from os import fspath
from pathlib import Path

import pytest

from fewstep.data.folder import ImageFolder
from fewstep.data.mini_imagenet import MiniImageNet
from fewstep.data.omniglot import Omniglot
from tests.data.conftest import write_images


class Named:
    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return fspath(self.path)


@pytest.mark.parametrize("dataset", [ImageFolder, MiniImageNet, Omniglot])
@pytest.mark.parametrize("given", [str, Named])
def test_a_folder_may_be_given_by_its_name(dataset, given, tmp_path):
    assert dataset(given(tmp_path)) == dataset(tmp_path)
    assert dataset().root is None


def test_images_are_read_from_a_folder_given_by_its_name(tmp_path):
    write_images(tmp_path, {f"class{i}": 2 for i in range(10)})
    assert sum(map(len, ImageFolder(str(tmp_path), size=8).splits().values())) == 10
