"""Class names that contradict each other are a fault; missing names are none."""

import pytest

from msn_export.metrics.diagnose import label_faults

SHIFTED = "the candidate's class names are the reference's shifted by "
NAMES = ("cat", "dog", "fox", "owl")


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (NAMES, None),
        ((), None),
        (("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), None),
        (("owl", "cat", "dog", "fox"), SHIFTED + "+1"),
        (("none", "cat", "dog", "fox"), SHIFTED + "+1"),
        (("dog", "fox", "owl", "cat"), SHIFTED + "-1"),
        (("cat", "dog", "fox"), "the reference names 4 classes, the candidate 3"),
        (
            ("cat", "fox", "dog", "owl"),
            "2 class names differ: class 1 is 'fox', the reference's 'dog'",
        ),
    ],
)  # fmt: skip
def test_class_names(candidate, message) -> None:
    assert label_faults(NAMES, candidate) == ([message] if message else [])
