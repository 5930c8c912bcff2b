import pytest
import torch

from fewstep.data.store import ClassStore
from fewstep.training.build import classification_episodes
from fewstep.training.config import ClassificationOptions

AS_DRAWN = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)


@pytest.mark.parametrize("option", [{"rotations": "episode"}, {"flips": True}], ids=str)
def test_images_are_changed_in_training_alone(option):
    store = ClassStore.from_counts(AS_DRAWN.repeat(20, 1, 1, 1), [5] * 4, "abcd")
    options = ClassificationOptions(ways=3, queries=2, eval_queries=2, **option)
    stores = dict.fromkeys(("train", "val", "test"), store)
    for split in ("train", "val", "test"):
        batch = classification_episodes(options, stores, split, 0, "cpu").batch(0, 50)
        as_drawn = (batch.x_support == AS_DRAWN / 255).flatten(2).all(-1)
        if split == "train":
            assert 0 < as_drawn.double().mean() < 1
        else:
            assert as_drawn.all()
