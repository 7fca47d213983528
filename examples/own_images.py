"""Class folders of images, from the folder to the ensemble's uncertainty. Run: python examples/own_images.py

The images are made here; put a folder of your own, with one folder per class in it, in their place.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import forde_fast as ff


def make_images(folder: Path) -> Path:
    """Stripes along one axis or the other, in noise."""
    random = np.random.default_rng(0)
    for name in ("across", "down"):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            stripes = (np.indices((12, 12))[int(name == "down")] + random.integers(4)) // 2 % 2
            pixels = 90 + 80 * stripes + random.normal(scale=25, size=(12, 12))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def main():
    with tempfile.TemporaryDirectory() as folder:
        images = ff.data.load("folder", make_images(Path(folder) / "stripes"))
    normalise = ff.data.Normalisation.fit(images.train_images)
    x = normalise(images.train_images)
    ensemble = ff.Ensemble(lambda: ff.models.cnn(num_classes=2, width=8), members=3)
    trainer = ff.Trainer(ensemble, lengthscale=ff.PCA.fit(x), repulsion_weight=5.0)
    trainer.fit(ff.data.Loader(x, images.train_labels, batch_size=32, augment=True, padding=1), epochs=8)

    prediction = ensemble.predict(normalise(images.test_images))
    scores = ff.score(prediction.mean, images.test_labels)
    print(f"{images.classes}: accuracy {scores['accuracy']:.2f}, nll {scores['nll']:.3f}")
    print(f"mean epistemic uncertainty {float(prediction.epistemic.mean()):.3f} nats")
    return scores


if __name__ == "__main__":
    main()
