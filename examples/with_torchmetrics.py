"""An ensemble's probabilities scored by another library. Run: python examples/with_torchmetrics.py

torchmetrics' accuracy is the mean over classes unless told `average="micro"`, and its bins of the calibration error
hold their lower edge where ours hold the upper one.
"""

import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassCalibrationError

import forde_fast as ff


def main():
    digits = ff.data.load("digits")
    normalise = ff.data.Normalisation.fit(digits.train_images)
    x = normalise(digits.train_images)
    ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (1, 8, 8), hidden=(32,)), members=3)
    trainer = ff.Trainer(ensemble, lengthscale=ff.PCA.fit(x), repulsion_weight=10.0)
    trainer.fit(ff.data.Loader(x, digits.train_labels, batch_size=128), epochs=4)

    prediction = ensemble.predict(normalise(digits.test_images))
    metrics = {
        "accuracy": MulticlassAccuracy(10, average="micro"),
        "ece": MulticlassCalibrationError(10, n_bins=15),
        "auroc": MulticlassAUROC(10),
    }
    found = {name: float(metric(prediction.mean, digits.test_labels)) for name, metric in metrics.items()}
    own = ff.score(prediction.mean, digits.test_labels)
    wrong = prediction.mean.argmax(1) != digits.test_labels
    print(f"torchmetrics {found}")
    print(f"forde_fast   {own}")
    print(f"total uncertainty where it is right {float(prediction.total[~wrong].mean()):.2f} nats,"
          f" where it is wrong {float(prediction.total[wrong].mean()):.2f}")  # fmt: skip
    return found, own


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
