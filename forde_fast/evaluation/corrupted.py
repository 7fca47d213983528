"""An ensemble's scores under corruption, and their averages as the tables have them."""

from collections.abc import Callable, Iterable, Sequence

from forde_fast.evaluation.checks import Array
from forde_fast.evaluation.metrics import Scorer
from forde_fast.validation import expect, one_of


def evaluate_corruptions(
    member_probs_of: Callable[[Array], Array],
    images: Array,
    labels: Array,
    names: Sequence[str],
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    preset: str = "cifar",
    seed: int = 0,
) -> dict:
    """Score an ensemble on corrupted copies of uint8 images [N, H, W] or [N, H, W, C].

    `member_probs_of` takes corrupted images, uint8 like `images`, and returns [M, N, K]. The corruptions,
    severities, seed and preset are those of `forde_fast.data.corruptions.corrupt`.

    Returns what `score_corrupted` does. Raises, before any work, ValueError for an unknown corruption or one named
    twice and TypeError for names or severities that are no list; else as `corrupt` and `score_members` do.
    """
    from forde_fast.data.corruptions import CORRUPTIONS, corrupt

    _check_choices("names", names)
    _check_choices("severities", severities)
    for name in names:
        one_of(name, "names", CORRUPTIONS)
    made = ((n, s, corrupt(images, n, s, seed=seed, preset=preset), labels) for n in names for s in severities)
    return score_corrupted(member_probs_of, made)


def score_corrupted(member_probs_of: Callable[[Array], Array], corrupted: Iterable[tuple]) -> dict:
    """Score an ensemble on what `corrupted` yields, (name, severity, images, labels), such as `data.CorruptedFiles`.

    One name and severity may come in many parts: no more than a part is held. Returns "by_corruption": {name:
    {severity: numbers of `Scorer`}} and the means of each number over all of them (the tables' cA is "accuracy",
    cNLL "nll", cECE "ece").
    """
    scorers: dict[str, dict[int, Scorer]] = {}
    for name, severity, images, labels in corrupted:
        scorer = scorers.setdefault(name, {}).setdefault(severity, Scorer())
        scorer.add(member_probs_of(images), labels)
    by_corruption = {n: {s: scorer.result() for s, scorer in by.items()} for n, by in scorers.items()}
    return {**mean_scores(by_corruption, by_corruption), "by_corruption": by_corruption}


def mean_scores(by_corruption: dict, names: Iterable[str], severities: Iterable[int] = (1, 2, 3, 4, 5)) -> dict:
    """The mean of each number over the corruptions `names` at those of the `severities` that were scored."""
    names, wanted = list(names), set(severities)
    for name in names:
        scored = ", ".join(map(str, by_corruption)) or "none"
        expect(name in by_corruption, "names", f"corruptions that were scored ({scored})", repr(name))
    everything = [s for name in names for severity, s in by_corruption[name].items() if severity in wanted]
    expect(bool(everything), "names", "corruptions that were scored at these severities", "none")
    return {key: sum(scores[key] for scores in everything) / len(everything) for key in everything[0]}


def averages(by_corruption: dict) -> dict[str, dict]:
    """{"standard", "extra", "all": mean_scores}: of the benchmark's 15 corruptions, the 4 besides, and all, as the
    paper averages; a group of which nothing was scored is left out."""
    from forde_fast.data.corruptions import CORRUPTIONS, EXTRA, STANDARD

    groups = {"standard": STANDARD, "extra": EXTRA, "all": CORRUPTIONS}
    present = {group: [name for name in names if name in by_corruption] for group, names in groups.items()}
    return {group: mean_scores(by_corruption, names) for group, names in present.items() if names}


def _check_choices(name: str, values: Sequence) -> None:
    known = isinstance(values, Sequence) and not isinstance(values, str)
    expect(known, name, "a list", repr(values), error=TypeError)
    expect(0 < len(values) == len(set(values)), name, "at least one, each once", list(values))
