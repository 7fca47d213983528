"""The algorithm without the Trainer: State, init, update, all pure functions. Run: python examples/functional_core.py

For loops of your own: every step gives a new State and leaves the old one, and the ensemble, as they were.
"""

from dataclasses import replace

import torch

import forde_fast as ff
from forde_fast.step import SGD, Objective, init, update


def main():
    digits = ff.data.load("digits")
    normalise = ff.data.Normalisation.fit(digits.train_images)
    x, y = normalise(digits.train_images), digits.train_labels
    ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (1, 8, 8), hidden=(64,)), members=4)
    objective = Objective(ff.Method(ff.InputGradients()), ff.PCA.fit(x), repulsion_weight=10.0)
    sgd, state = SGD(lr=0.1), init(ensemble)
    loader = ff.data.Loader(x, y, batch_size=128)
    for epoch in range(8):
        now = replace(sgd, lr=sgd.lr * (1.0 if epoch < 4 else 0.1))
        for batch, labels in loader:
            state, log = update(state, batch, labels, ensemble, objective, now)
        print(f"epoch {epoch}: cross-entropy {float(log.cross_entropy):.3f}, cosine {float(log.gradient_cosine):.3f}")

    with torch.no_grad():  # the ensemble takes the State over
        ensemble.flat.copy_(state.parameters)
        for member, buffers in zip(ensemble.members, state.buffers, strict=True):
            member.load_state_dict(buffers, strict=False)
    scores = ff.score(ensemble.predict_proba(normalise(digits.test_images)), digits.test_labels)
    print(f"accuracy {scores['accuracy']:.3f}")
    return scores


if __name__ == "__main__":
    main()
