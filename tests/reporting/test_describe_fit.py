"""A fitted classifier in rows: what it was fitted on, how good it is, what was compared."""

from msn_export.reporting.describe import artifact_rows
from msn_export.reporting.describe_fit import fit_rows
from tests.builders.manifests import example, fit


def test_rows_say_what_was_fitted_and_how_good_it_is() -> None:
    assert list(fit_rows(fit(), itself=True)) == [
        ("fitted on", "50 images of digits, 5 of each class (seed 0), 3 classes"),
        ("features", "msn: [CLS] before the final LayerNorm, centred and of norm 1"),
        ("C", "400"),
        (
            "accuracy",
            "90.0%, 95 % of such samples 74.4% to 96.5%; 30 images: the images not drawn",
        ),
        ("", "2 draws: 85.0% on average, standard deviation 7.1%; this is the first"),
        ("least right", "[bird]: 70.0%"),
        ("least right", "cat: 100.0%"),
        ("against", "scikit-learn's decision function on PyTorch's features, 50 images"),
        ("", "relative error 3.0e-07, 100.0% of the classes the same"),
    ]


def test_a_strength_that_was_chosen_is_shown_with_the_others() -> None:
    record = fit(C=40.0, strengths={"4": 0.9, "40": 0.95}, blocks=2, features="embedding")
    rows = dict(fit_rows(record, itself=True))
    assert rows["C"] == "40, chosen by cross-validation: 90.0% at 4, 95.0% at 40"
    assert rows["features"] == "embedding: [CLS] behind the final LayerNorm of the last 2 blocks"


def test_what_was_not_measured_says_why() -> None:
    record = fit(accuracy=None, unmeasured="class 'a' has 1", relative=None, same=None)
    rows = dict(fit_rows(record, itself=True))
    assert rows["accuracy"] == "not measured: class 'a' has 1"
    assert "against" not in rows


def test_of_an_artifact_that_was_made_from_it_the_accuracy_is_that_before() -> None:
    engine = example(fit=fit())
    assert "accuracy before" in dict(artifact_rows(engine))
    assert "accuracy before" not in dict(artifact_rows(example(fit=fit(), source=None)))
