"""Scorers of the benchmarks: truth tables made by hand, and lmms-eval's own functions."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from quota_jax.errors import QuotaError
from quota_jax.evaluate import answers
from quota_jax.evaluate.task import Instance, Scores
from quota_jax.evaluate.tasks import TASKS
from quota_jax.evaluate.vqa_text import normalize_vqa

UTILS = "lmms_eval.tasks."


def _instances(*truths: dict, keys: Sequence[str] | None = None) -> list[Instance]:
    keys = keys or [str(place) for place in range(len(truths))]
    return [
        Instance(key=key, prompt="", pictures=(), truth=truth)
        for key, truth in zip(keys, truths, strict=True)
    ]


def _score(name: str, truths: Sequence[dict], given: Sequence[str]) -> Scores:
    """Scores; the headline must be what its units say."""
    scores = TASKS[name].score(_instances(*truths), given)
    members: dict[str, list[float]] = {}
    for key, value in scores.units.items():
        members.setdefault(scores.strata.get(key, ""), []).append(value)
    total = sum(scores.weights.get(s, 1) * sum(v) / len(v) for s, v in members.items())
    assert scores.metrics[scores.headline] == pytest.approx(total, rel=1e-12)
    return scores


def _metrics(name: str, truths: Sequence[dict], given: Sequence[str]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in _score(name, truths, given).metrics.items()}


YES_NO = [
    # answer, POPE's script, MME in lmms-eval, MME's script; lmms-eval's POPE takes the text itself
    ("yes", "yes", "yes", "yes"),
    ("No", "no", "no", "no"),
    ("Yes.", "yes", "yes", "yes"),
    ("no.", "no", "no", "no"),
    ("y", "yes", "yes", "other"),
    ("N", "yes", "no", "other"),
    ("N.", "yes", "no", "other"),
    ("x", "yes", "other", "other"),
    ("", "yes", "other", "other"),
    ("Yes, there is no dog", "no", "yes", "yes"),
    ("Yes. There is no dog", "yes", "yes", "yes"),
    ("No, it is", "no", "no", "no"),
    ("NO", "yes", "no", "no"),
    ("It is not", "no", "other", "other"),
    ("I know", "yes", "other", "other"),
    ("know", "yes", "no", "no"),
    ("Nothing", "yes", "no", "no"),
    ("not", "no", "no", "no"),
    ("a yes", "yes", "other", "other"),
    (". yes", "yes", "yes", "other"),
    ("y.e.s", "yes", "yes", "other"),
]

LETTER = [
    # answer, MMBench's two rules (A cat, B dog, C red dog), the same with the search behind them
    ("B", "B", "B"),
    ("B.", "B", "B"),
    ("(B)", "B", "B"),
    ("(B).", "B", "B"),
    ("B)", "B", "B"),
    ("B:", "B", "B"),
    (":B,", "B", "B"),
    ("b", "", ""),
    ("The answer is B", "B", "B"),
    ("The answer is B.", "B", "B"),
    ("A cat", "A", "A"),  # three words at most: a bare A is a letter
    ("A really big dog", "B", "B"),  # more: perhaps an article, so the option's text decides
    ("A really red dog", "", "A"),  # two options' texts: the search takes the A at the start
    ("A dog or B then", "B", "B"),  # two bare letters, one option's text
    ("It is a cat", "A", "A"),
    ("E", "E", "E"),
    ("E.", "E", "E"),  # not among the options, and a letter all the same
    ("A, B", "B", "B"),  # one bare letter
    ("A. B.", "", "A"),  # two of a form: the search takes the one at the start
    ("", "", ""),
    ("xyz", "", ""),
    ("Answer:C", "", "C"),
    ("Failed to obtain answer via API", "", "A"),
]

SCIENCE = [
    # answer, lmms-eval, LLaVA's script
    ("B", "B", "B"),
    ("b", "B", ""),
    ("B.", "B", ""),
    ("B. dog", "B", "B"),
    ("B.dog", "B", ""),
    ("b. dog", "B. DOG", ""),
    ("The answer is B.", "THE ANSWER IS B.", "B"),
    ("The answer is B. The answer is C.", "THE ANSWER IS B. THE ANSWER IS C.", ""),
    ("F", "F", ""),
    ("(B)", "(B)", ""),
    ("", "", ""),
]

VQA = [
    ("The Coca-Cola", "coca cola"),
    ("two dogs", "2 dogs"),
    ("None", "0"),
    ("dont walk", "don't walk"),
    ("it's 3.5", "it 's 3.5"),
    ("end.", "end"),
    ("a.b", "ab"),
    ("1,000", "1000"),
    ("well - known", "well known"),
    ("what?!", "what"),
    ("line\nbreak", "line break"),
    ("an", ""),
]


def test_truth_tables():
    options = {"A": "cat", "B": "dog", "C": "red dog"}
    for answer, pope, mme, official in YES_NO:
        assert answers.pope_official_yes_no(answer) == pope, answer
        assert answers.mme_yes_no(answer) == mme, answer
        assert answers.mme_official_yes_no(answer) == official, answer
    for answer, inferred, searched in LETTER:
        found = answers.infer_option(answer, options)
        assert found == inferred, answer
        assert (found or answers.search_letter(answer, "ABCD")) == searched, answer
    for answer, lmms, llava in SCIENCE:
        assert answers.science_letter(answer) == lmms, answer
        assert answers.science_official_letter(answer) == llava, answer
    for text, normal in VQA:
        assert normalize_vqa(text) == normal, text


def test_pope_per_split_and_pooled():
    rows = [
        # split, truth, answer
        ("random", "yes", "Yes"),
        ("random", "yes", "Yes."),
        ("random", "no", "no"),
        ("random", "no", " yes\n"),
        ("popular", "yes", "no"),
        ("popular", "no", "There is no dog"),
    ]
    truths = [{"split": split, "answer": truth} for split, truth, _ in rows]
    metrics = _metrics("pope", truths, [answer for *_, answer in rows])
    # "Yes." and "There is no dog" are neither to lmms-eval: 2 right, 1 hit, 1 false alarm, 1 miss.
    assert metrics["accuracy"] == 33.333333
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (50, 50, 50)
    assert metrics["official_accuracy"] == 66.666667
    assert metrics["official_recall"] == 66.666667
    assert (metrics["random/accuracy"], metrics["random/recall"]) == (50, 100)
    assert (metrics["random/official_accuracy"], metrics["popular/f1"]) == (75, 0)
    assert (metrics["yes_ratio"], metrics["truth_yes_ratio"]) == (33.333333, 50)
    assert "adversarial/accuracy" not in metrics


def test_mme_points_by_hand():
    def pair(category, image):
        return [
            {"category": category, "image": image, "answer": "yes"},
            {"category": category, "image": image, "answer": "no"},
        ]

    truths = [*pair("color", "1"), *pair("color", "2"), *pair("code_reasoning", "1")]
    scores = _score("mme", truths, ["Yes", "no", "Yes", "y", "N", "no"])
    # color: pictures worth 200 and 50; code: 50, of which the official parser sees the same.
    assert scores.units == {"color/1": 200, "color/2": 50, "code_reasoning/1": 50}
    expected = {"perception": 125, "cognition": 50, "total": 175, "color/accuracy": 75}
    expected |= {"color/accuracy_plus": 50, "official_total": 175}
    assert expected.items() <= dict(scores.metrics).items()
    assert scores.chance == 150
    assert _metrics("mme", truths, ["y"] * 6)["official_total"] == 0
    with pytest.raises(QuotaError, match="picture color/2 has 1 questions, 2 are scored"):
        _score("mme", truths[:3], ["Yes"] * 3)


def test_mmbench_counts_whole_groups():
    options = {"A": "cat", "B": "banana", "C": "cow"}
    turned = {"A": "banana", "B": "cow", "C": "cat"}
    two = {"A": "yes", "B": "no"}
    truths = [
        {"index": 7, "answer": "A", "options": options, "category": "x"},
        {"index": 8, "answer": "B", "options": options, "category": "y"},
        {"index": 9, "answer": "A", "options": two, "category": "y"},
        {"index": 1_000_007, "answer": "C", "options": turned, "category": "x"},
        {"index": 2_000_008, "answer": "A", "options": turned, "category": "y"},
    ]
    scores = _score("mmbench", truths, ["A", "banana", "A", "C.", "A"])
    # lmms-eval finds the missing D's text "nan" in "banana"; the two rules alone do not.
    assert scores.metrics["circular_accuracy"] == pytest.approx(200 / 3)
    assert scores.metrics["official_circular_accuracy"] == 100
    assert scores.metrics["plain_accuracy"] == pytest.approx(200 / 3)
    assert scores.metrics["category/x"] == 100
    assert scores.metrics["category/y"] == 50
    assert scores.chance == pytest.approx(100 * (1 / 9 + 1 / 9 + 1 / 2) / 3)
    wrong_turn = _metrics("mmbench", truths, ["A", "B", "A", "B", ""])
    assert (wrong_turn["circular_accuracy"], wrong_turn["plain_accuracy"]) == (33.333333, 100)


def test_letters_words_and_chance():
    seed = [{"answer": "B", "question_type_id": kind} for kind in (1, 1, 9, 9, 9)]
    metrics = _metrics("seedbench", seed, ["B", " b. dog", "Banana", "(B)", ""])
    assert (metrics["seed_image"], metrics["official_accuracy"]) == (60, 20)
    assert metrics["question_type/Text Understanding"] == 33.333333

    science = [
        {"answer": 1, "choices": 2, "subject": "natural science", "grade": "grade6"},
        {"answer": 1, "choices": 4, "subject": "", "grade": "grade7"},
    ]
    scores = _score("scienceqa", science, ["b", "The answer is B."])
    assert scores.chance == 37.5
    assert scores.metrics == {
        "exact_match": 50,
        "official_accuracy": 50,
        "subject/natural science": 100,
        "grade/G1-6": 100,
        "grade/G7-12": 0,
    }

    gqa = [
        {"answer": "cat", "structural": "query"},
        {"answer": "cat", "structural": "query"},
        {"answer": "yes", "structural": "verify"},
        {"answer": "t-shirt"},
    ]
    scores = _score("gqa", gqa, ["Cat.", "cat .", "Yes!", "T shirt"])
    # "cat ." keeps a blank; "t-shirt" becomes "tshirt".
    assert scores.metrics["exact_match"] == 50
    assert scores.metrics["official_accuracy"] == 25
    assert (scores.metrics["kind/open"], scores.metrics["kind/binary"]) == (50, 100)
    assert scores.chance == 50

    text = [{"answers": ["red"] * 2 + ["Blue"] * 8}, {"answers": ["The red"] * 10}]
    scores = _score("textvqa", text, ["red", "a red."])
    # Two of ten: 8/10 of the time 2/3, 2/10 of the time 1/3.
    assert scores.metrics["vqa_accuracy"] == pytest.approx(50 * (0.8 * 2 / 3 + 0.2 / 3 + 1))
    assert scores.metrics["exact_match_any"] == 100
    assert scores.chance == pytest.approx(50 * (0.6 + 1))


def test_scoring_refuses_what_does_not_fit():
    with pytest.raises(QuotaError, match="gqa: no questions to score"):
        TASKS["gqa"].score([], [])
    with pytest.raises(QuotaError, match="gqa: 1 questions, 2 answers"):
        TASKS["gqa"].score(_instances({"answer": "cat"}), ["a", "b"])


# lmms-eval itself, where it is installed


def _utils(name: str):
    pytest.importorskip("lmms_eval", reason="lmms-eval 0.7.3 is not installed")
    return importlib.import_module(UTILS + name)


def _given(rng: random.Random, count: int) -> list[str]:
    """Answers of every shape: the tables above, and sentences put together at random."""
    table = [row[0] for rows in (YES_NO, LETTER, SCIENCE, VQA) for row in rows]
    parts = [*"ABCDEabx", "A.", "(B)", "C)", ":D", "(A).", "is", "The answer is", "my choice is"]
    parts += ["cat", "banana", "Red", "yes", "No", "nan", "two", "dog.", "\n", "!", "정답은 B"]
    made = [rng.choice(["", " "]).join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(99)]
    return [rng.choice(table + made * 2) for _ in range(count)]


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_lmms_eval():
    pope, mme, seed = _utils("pope.utils"), _utils("mme.utils"), _utils("seedbench.utils")
    science, textvqa = _utils("scienceqa.utils"), _utils("textvqa.utils")
    mmbench = _utils("mmbench.en_utils")
    metrics = importlib.import_module("lmms_eval.api.metrics")
    rng = random.Random(3)
    count = 600
    # lmms-eval strips every answer before a task sees it.
    given = [answer.strip() for answer in _given(rng, count)]

    truths = [{"split": "random", "answer": rng.choice(["yes", "no"])} for _ in given]
    ours = _metrics("pope", truths, given)
    rows = [
        pope.pope_process_results({"answer": t["answer"], "question_id": 0}, [a])["pope_accuracy"]
        for t, a in zip(truths, given, strict=True)
    ]
    for own, theirs in (
        ("accuracy", pope.pope_aggregate_accuracy),
        ("precision", pope.pope_aggregate_precision),
        ("recall", pope.pope_aggregate_recall),
        ("f1", pope.pope_aggregate_f1_score),
        ("truth_yes_ratio", pope.pope_aggregate_yes_ratio),
    ):
        assert ours[own] == pytest.approx(100 * theirs(rows), abs=1e-5), own

    truths, found = [], {"mme_perception_score": [], "mme_cognition_score": []}
    for place, answer in enumerate(given):
        category = ["color", "OCR", "code_reasoning"][place // 2 % 3]
        truth = {
            "category": category,
            "image": str(place // 2),
            "answer": rng.choice(["yes", "no"]),
        }
        truths.append(truth)
        doc = {"answer": truth["answer"], "question_id": truth["image"], "category": category}
        for key, value in mme.mme_process_results(doc, [answer]).items():
            found[key].append(value)
    ours = _metrics("mme", truths, given)
    for own, theirs in (
        ("perception", "mme_perception_score"),
        ("cognition", "mme_cognition_score"),
    ):
        assert ours[own] == pytest.approx(mme.mme_aggregate_results(found[theirs]), abs=1e-5)

    truths = [{"answer": rng.choice("ABCD"), "question_type_id": 1} for _ in given]
    rows = [
        seed.seed_process_result({**t, "data_type": "image", "question_id": 0}, [a])["seed_image"]
        for t, a in zip(truths, given, strict=True)
    ]
    theirs = 100 * seed.seed_aggregation_result(rows)
    assert _metrics("seedbench", truths, given)["seed_image"] == pytest.approx(theirs, abs=1e-5)

    truths = [{"answer": rng.randrange(3), "choices": 3, "subject": "", "grade": ""} for _ in given]
    theirs = [
        science.sqa_process_results({"answer": t["answer"], "choices": ["x"] * 3}, [a])
        for t, a in zip(truths, given, strict=True)
    ]
    units = _score("scienceqa", truths, given).units.values()
    assert [100 * each["exact_match"] for each in theirs] == list(units)

    truths = [{"answer": rng.choice(["cat", "a dog", "t-shirt", "yes"])} for _ in given]
    gqa = [
        rng.choice([answer, truth["answer"], f"{truth['answer'].upper()} .", "t shirt"])
        for truth, answer in zip(truths, given, strict=True)
    ]
    theirs = [
        metrics.exact_match_hf_evaluate(
            references=[t["answer"]], predictions=[a], ignore_case=True, ignore_punctuation=True
        )["exact_match"]
        for t, a in zip(truths, gqa, strict=True)
    ]
    assert [100 * each for each in theirs] == list(_score("gqa", truths, gqa).units.values())

    truths = [{"answers": rng.choices([*given[:3], a, a.upper()], k=10)} for a in given]
    theirs = [
        # It normalizes the document's own list in place.
        textvqa.textvqa_process_results({"answers": [*t["answers"]], "question_id": 0}, [a])
        for t, a in zip(truths, given, strict=True)
    ]
    theirs = [100 * each["exact_match"] for each in theirs]
    units = list(_score("textvqa", truths, given).units.values())
    assert units == pytest.approx(theirs, abs=1e-9)

    texts = ["cat", "banana", "Red", "a dog", "nan bread"]
    truths, rows = [], []
    for place in range(count):
        group, turn = divmod(place, 3)
        options = dict(zip("ABCD", rng.sample(texts, rng.choice([2, 3, 4])), strict=False))
        truth = rng.choice(list(options))
        if rng.random() < 0.7:
            given[place] = rng.choice([truth, f"({truth})", f"{truth}.", options[truth]])
        index = group + turn * 1_000_000
        truths.append({"index": index, "answer": truth, "options": options, "category": "c"})
        doc = {"index": index, "question": "?", "answer": truth, "hint": "nan", "category": "c"}
        doc |= {"source": "s", "split": "dev", "L2-category": "l"}
        doc |= {letter: options.get(letter, "nan") for letter in "ABCD"}
        rows.append(mmbench.mmbench_process_results(doc, [given[place]])["gpt_eval_score"])
    theirs = mmbench.mmbench_evaluator.eval_result(rows, eval_method="static")[0]
    ours = _metrics("mmbench", truths, given)["circular_accuracy"]
    assert ours == pytest.approx(100 * theirs, abs=1e-5)
    assert 5 < ours < 95
    for truth, row in zip(truths, rows, strict=True):
        judged = mmbench.mmbench_evaluator.eval_sub_data(
            importlib.import_module("pandas").DataFrame([row]),
            {truth["index"]: truth["answer"]},
            static_only=True,
        )
        single = [{**truth, "index": 0}]
        assert 100 * judged == _metrics("mmbench", single, [row["prediction"]])["plain_accuracy"]


def test_settings_equal_those_of_lmms_eval():
    yaml = pytest.importorskip("yaml")
    package = pytest.importorskip("lmms_eval", reason="lmms-eval 0.7.3 is not installed")
    folder = Path(package.__file__).parent / "tasks"
    files = {
        "pope": "pope/pope.yaml",
        "gqa": "gqa/gqa.yaml",
        "mme": "mme/mme.yaml",
        "mmbench": "mmbench/_default_template_mmbench_en_yaml",
        "seedbench": "seedbench/seedbench.yaml",
        "scienceqa": "scienceqa/scienceqa_img.yaml",
        "textvqa": "textvqa/_default_template_textvqa_yaml",
    }
    for name, file in files.items():
        lines = (folder / file).read_text().splitlines()
        text = "\n".join(line for line in lines if "!function" not in line)
        kwargs = yaml.safe_load(text.split("metric_list")[0])["generation_kwargs"]
        settings = TASKS[name].settings
        assert kwargs.get("max_new_tokens", settings.max_new_tokens) == settings.max_new_tokens
        assert tuple(kwargs.get("until", ())) == settings.until, name
