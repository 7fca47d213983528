"""Features of a frozen backbone, computed once, and an ensemble of small heads on them.

Run: python examples/frozen_features.py. The backbone here is a stand-in; any network that gives [N, F] will do.
"""

import torch
from torch import nn

import forde_fast as ff


def main():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
    digits = ff.data.load("digits")
    pixels = ff.data.Normalisation.fit(digits.train_images)
    with torch.no_grad():
        features, test_features = (backbone.eval()(pixels(x)) for x in (digits.train_images, digits.test_images))

    normalise = ff.data.Normalisation.fit(features)  # per feature
    x = normalise(features)
    ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (x.shape[1], 1, 1), hidden=(64, 64)), members=4)
    # the basis belongs to what the members receive: the features, not the images
    trainer = ff.Trainer(ensemble, lengthscale=ff.PCA.fit(x, rank=64), repulsion_weight=10.0)
    trainer.fit(ff.data.Loader(x, digits.train_labels, batch_size=128), epochs=10)
    scores = ff.score(ensemble.predict_proba(normalise(test_features)), digits.test_labels)
    print(f"accuracy {scores['accuracy']:.3f}, nll {scores['nll']:.3f}")
    return scores


if __name__ == "__main__":
    main()
