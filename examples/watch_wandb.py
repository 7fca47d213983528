"""A training watched in Weights & Biases: a callback per step and one per epoch are all that it takes.

Run: pip install wandb; WANDB_MODE=offline python examples/watch_wandb.py
"""

import sys

import forde_fast as ff

try:
    import wandb
except ImportError:
    print("wandb: expected the package, from pip install wandb, got none installed", file=sys.stderr)
    sys.exit(2)


def main():
    digits = ff.data.load("digits")
    x = ff.data.Normalisation.fit(digits.train_images)(digits.train_images)
    ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (1, 8, 8), hidden=(32,)), members=3)
    trainer = ff.Trainer(ensemble, lengthscale=ff.PCA.fit(x), repulsion_weight=10.0)
    run = wandb.init(project="forde", config={"members": 3, "repulsion_weight": 10.0})

    def on_step(epoch, log):
        if trainer.steps % 10 == 0:  # reading a number waits for the device
            run.log({name: float(value) for name, value in log._asdict().items()}, step=trainer.steps)

    def on_epoch(epoch, mean):
        run.log({"epoch": epoch, "epoch/cross_entropy": float(mean.cross_entropy)}, step=trainer.steps)

    loader = ff.data.Loader(x, digits.train_labels, batch_size=64)
    trainer.fit(loader, epochs=3, on_step=on_step, on_epoch=on_epoch)
    run.finish()


if __name__ == "__main__":
    main()
