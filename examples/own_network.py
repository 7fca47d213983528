"""A network of your own, pretrained or not, with its own optimiser. Run: python examples/own_network.py"""

import torch
from torch import nn

import forde_fast as ff


class Patches(nn.Module):
    """4 x 4 patches of an 8 x 8 image, mixed by attention: any nn.Module that can be differentiated twice will do."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.mix = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.mix(self.embed(x).flatten(2).mT).mean(1))


def main():
    digits = ff.data.load("digits")
    normalise = ff.data.Normalisation.fit(digits.train_images)
    x, y = normalise(digits.train_images), digits.train_labels
    ensemble = ff.Ensemble(Patches, members=3)  # Ensemble.from_modules([...]) takes networks that are there already
    trainer = ff.Trainer(
        ensemble,
        lengthscale=ff.PCA.fit(x).blend(0.4),
        repulsion_weight=10.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01),
    )
    trainer.fit(ff.data.Loader(x, y, batch_size=128), epochs=10)
    scores = ff.score(ensemble.predict_proba(normalise(digits.test_images)), digits.test_labels)
    print(f"accuracy {scores['accuracy']:.3f}, nll {scores['nll']:.3f}")
    return scores


if __name__ == "__main__":
    main()
