"""A training watched in TensorBoard. Run: python examples/watch_tensorboard.py [folder], then

tensorboard --logdir folder
"""

import sys

import forde_fast as ff
from forde_fast.watching import TensorBoard


def main(folder: str = "runs/tensorboard"):
    digits = ff.data.load("digits")
    x = ff.data.Normalisation.fit(digits.train_images)(digits.train_images)
    ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (1, 8, 8), hidden=(32,)), members=3)
    trainer = ff.Trainer(ensemble, lengthscale=ff.PCA.fit(x), repulsion_weight=10.0)
    with TensorBoard(folder, trainer) as board:
        loader = ff.data.Loader(x, digits.train_labels, batch_size=128)
        trainer.fit(loader, epochs=3, on_step=board.on_step, on_epoch=board.on_epoch)


if __name__ == "__main__":
    main(*sys.argv[1:])
