"""The HTML report: self-contained, safe with hostile text, and useful when the run folder is not complete."""

import html.parser
import json
import re

import numpy as np
import pytest

from pe_rlhf_jax.report import charts, headline, samples
from pe_rlhf_jax.report import html as report
from pe_rlhf_jax.report.metrics import MetricsLog

SUMMARY = {
    "name": "run",
    "versions": {"jax": "0.10.2"},
    "device": {"kind": "cpu"},
    "model": {"source": "package:tiny==1", "parameters": 1_000_000, "trainable_parameters": 36_300},
    "sft": {"loss_before": 3.9, "loss_after": 3.4},
    "reward_model": {
        "accuracy": 0.719,
        "ci": [0.68, 0.757],
        "pairs": 512,
        "calibration": [{"predicted": 0.6, "observed": 0.64, "count": 100}, {"predicted": 0.9, "observed": 1.0, "count": 20}],
        "by_margin": [{"low": 0.5, "high": 1, "accuracy": 0.6, "count": 90}, {"low": 1, "high": 8, "accuracy": 1.0, "count": 30}],
    },
    "rl": {"gain_in_std": 0.85, "ci": [0.62, 1.07], "reward_before": -0.31, "reward_after": 0.52, "kl_per_token": 0.0712},
    "judge": {"name": "vader", "before": 0.3, "after": 0.28, "delta": -0.02, "ci": [-0.06, 0.02]},
    "time": {"sft_s": 60, "rl_s": 180, "total_s": 240, "rl_rollout_s": 50, "rl_score_s": 25, "rl_learn_s": 25},
    "peak_memory_gib": 2.71,
}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"' {{ 7 * 7 }} [red] \x1b[31m \u202e \ud800 &amp;"


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text = [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def charts(self):
        return [attrs["aria-label"] for tag, attrs in self.tags if tag == "svg"]


def fill(folder, sample=None):
    log = MetricsLog(folder, tensorboard=False)
    for step in range(1, 21):
        log.write("sft", step, {"loss": 4 - step / 40, **({"eval/loss": 3.5} if step % 10 == 0 else {})})
        log.write("reward", step, {"loss": 0.69, "accuracy": 0.5 + step / 100, "skipped": 0})
    for step in range(1, 21):
        names = ["objective/scores", "objective/rlhf_reward", "objective/kl", "objective/length", "objective/ended", "policy/entropy_avg"]
        names += ["loss/policy_avg", "loss/value_avg", "time/rollout", "time/score", "time/learn", "perf/peak_memory_gib"]
        row = dict.fromkeys(names, step / 20) | {"val/sampler_kl": 0.0 if step == 3 else 1e-7 * step, "skipped": step // 10}
        log.write("rl", step, row | {"objective/scores": float("nan") if step == 5 else step / 10})
    log.close()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("rl:\n  steps: 20  # <b>bold</b>\n")
    samples.write(folder / "samples" / "evaluate.jsonl", [sample or {"prompt": "p", "reference": "r", "policy": "q", "reward_policy": 1}])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    folder.mkdir()
    row = {
        "prompt": HOSTILE,
        "reference": HOSTILE,
        "policy": HOSTILE,
        "reward_reference": 0.1,
        "reward_policy": None,
        "judge_policy": HOSTILE,
    }
    fill(folder, row)
    path = report.build(folder)
    assert path == folder / "report.html"
    return Page(path)


def test_nothing_is_loaded_and_nothing_runs(page):
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "base", "image"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"https?:|@import|url\((?!#)", page.source)
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"},
    ) in page.tags


def test_pictures_are_in_the_page_and_nothing_else_is_fetched(tmp_path):
    """A file of samples may come from anywhere."""
    good = "data:image/webp;base64,UklGRg=="
    bad = ["https://example.org/x.png", "data:image/svg+xml;base64,PHN2Zz4=", f'{good}" onerror="alert(1)', f"{good}\n", 3, None]
    fill(tmp_path, {"prompt": "p", "reference": "r", "policy": "q", "images": [good, *bad, good]})
    found = [attributes for tag, attributes in Page(report.build(tmp_path)).tags if tag == "img"]
    assert [attributes["src"] for attributes in found] == [good, good]
    assert [attributes["alt"] for attributes in found] == ["picture 1 of the prompt", "picture 2 of the prompt"]
    fill(tmp_path, {"prompt": "p", "reference": "r", "policy": "q", "images": good})
    assert "img" not in {tag for tag, _ in Page(report.build(tmp_path)).tags}


def test_hostile_text_is_shown_as_text(page):
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>") == 3
    assert "{{ 7 * 7 }}" in page.text and "&amp;" in page.text
    assert page.text.count("<U+001B>[31m <U+202E> <U+D800>") == 3
    assert "# <b>bold</b>" in page.text


def test_every_part_is_there(page):
    for title in (
        "Reward", "KL to the reference", "Response length", "Policy entropy", "Value loss", "Policy loss", "Reward model loss",
        "Reward model accuracy", "Accuracy by margin", "Calibration", "SFT loss", "Time of a step", "Peak memory",
        "Sampler against learner",
    ):  # fmt: skip
        assert title in page.charts()
    for text in (
        "+0.85 std",
        "95% interval +0.62 to +1.07",
        "71.9%",
        "2.71 GiB",
        "4:00",
        "50% rollout",
        "0.0712",
        "package:tiny==1",
        "0.10.2",
    ):
        assert text in page.text
    assert "This report is partial" not in page.text
    assert "Updates skipped because the loss, a gradient or a score was not finite: 2." in page.text
    ids = re.findall(r'\bid="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page.source)
    assert used and set(used) <= set(ids)
    assert len(page.source) < 700_000


@pytest.mark.parametrize(
    ("keep", "said", "shown"),
    [
        ((), ["config.yaml is missing", "metrics.jsonl is missing", "summary.json is missing", "samples/ has no samples"], []),
        (("metrics.jsonl",), ["summary.json is missing: the run has not ended"], ["training batches", "during training"]),
        (("summary.json",), ["metrics.jsonl is missing"], ["+0.85 std", "71.9%"]),
    ],
)
def test_a_partial_folder_gives_a_partial_report_that_says_so(tmp_path, keep, said, shown):
    folder = tmp_path / "run"
    folder.mkdir()
    if "summary.json" in keep:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    if "metrics.jsonl" in keep:
        log = MetricsLog(folder, tensorboard=False)
        log.write("reward", 1, {"loss": 0.7, "eval/accuracy": 0.6})
        for step in (1, 2):
            log.write("rl", step, {"objective/scores": step / 2})
        log.close()
    page = Page(report.build(folder))
    assert "This report is partial" in page.text
    for text in said + shown:
        assert text in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    (tmp_path / "summary.json").write_text('{"rl": {')
    (tmp_path / "metrics.jsonl").write_text("nonsense\n{}\n")
    (tmp_path / "config.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.jsonl").write_text("{\n")
    samples.write(tmp_path / "samples" / "b.jsonl", [{"prompt": "still here"}])
    text = Page(report.build(tmp_path)).text
    for part in ("summary.json cannot be read", "metrics.jsonl, line 1", "a.jsonl, line 1", "still here", "(missing)", "caf\ufffd"):
        assert part in text


def test_odd_summaries_do_not_break_the_report(tmp_path):
    odd = {"rl": None, "reward_model": {"accuracy": None, "calibration": None, "by_margin": [None]}, "judge": {"delta": "much", "ci": [1]}}
    (tmp_path / "summary.json").write_text(json.dumps(odd | {"model": "tiny", "versions": None, "time": {"total_s": 5}}))
    page = Page(report.build(tmp_path))
    assert "Total time" in page.text and "tiny" in page.text
    assert page.charts() == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        report.build(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("interval", "tone", "reading"),
    [([0.1, 0.5], "good", "excludes zero"), ([-0.1, 0.7], "", "may be chance"), ([-0.7, -0.1], "bad", "excludes zero")],
)
def test_tiles_claim_no_more_than_their_interval(interval, tone, reading):
    middle = sum(interval) / 2
    found = headline.tiles({"rl": {"gain_in_std": middle, "ci": interval}, "judge": {"delta": middle, "ci": interval}}, {})
    assert [tile.tone for tile in found] == [tone, tone]
    assert all(reading in tile.reading for tile in found)


def test_an_accuracy_that_may_be_guessing_is_called_so():
    (tile,) = headline.tiles({"reward_model": {"accuracy": 0.53, "ci": [0.49, 0.57]}}, {})
    assert tile.tone == "bad" and "not clearly better than guessing" in tile.reading


def test_a_reward_model_that_was_not_evaluated_has_the_figure_of_its_checkpoint():
    rows = {"reward": [{"step": step, "eval/accuracy": accuracy} for step, accuracy in ((100, 0.74), (200, 0.61))]}
    (tile,) = headline.tiles({}, rows)
    assert tile.value == "61.0%" and "still to come" in tile.reading
    (tile,) = headline.tiles({"reward_model": {"best_step": 100}}, rows)
    assert tile.value == "74.0%" and "that was kept" in tile.reading


def test_models_of_labels_are_judged_by_their_area_and_beside_the_more_common_label():
    rows = {"reward": [{"step": 10, "eval/accuracy": 0.85, "eval/auc": 0.612}]}
    (tile,) = headline.tiles({}, rows)
    assert (tile.label, tile.value) == ("Reward model AUC", "0.612")
    measured = {"accuracy": 0.86, "auc": 0.7, "rows": 512, "guessing": {"loss": 0.41, "accuracy": 0.855}}
    (tile,) = headline.tiles({"reward_model": measured}, rows)
    assert "86.0% of the rows are on the right side of 0; always the more common label would be right in 85.5%." in tile.reading


@pytest.mark.parametrize(
    ("measured", "texts"),
    [
        ({"pairs": 4, "accuracy": 0.7}, ("Bradley-Terry loss on pairs.", "tokens by which the preferred", "observed preference")),
        ({"rows": 4, "auc": 0.7}, ("Logistic loss on labels.", "tokens", "observed share of good rows")),
        (
            {"rows": 8, "auc": 0.7, "pairwise_accuracy": 0.9},
            ("Logistic loss", "tokens by which the preferred", "observed share of good rows"),
        ),
    ],
)
def test_charts_of_reward_models_say_what_they_learn_from(tmp_path, measured, texts):
    """And where guessing is, once it was measured; a summary of an older version has lengths of the longer side."""
    log = MetricsLog(tmp_path, tensorboard=False)
    area = {"eval/auc": 0.7} if "auc" in measured else {}
    log.write("reward", 1, {"loss": 0.69, "accuracy": 0.5, "eval/loss": 0.69, "eval/accuracy": 0.5, **area})
    bins = {
        "by_length": [{"low": 1, "high": 2, "accuracy": 0.9, "count": 9}],
        "calibration": [{"predicted": 0.6, "observed": 1.0, "count": 9}],
    }
    (tmp_path / "summary.json").write_text(json.dumps({"reward_model": measured | bins}))
    text = Page(report.build(tmp_path)).text
    assert "tokens by which" not in text and "at best" not in text
    (tmp_path / "summary.json").write_text(json.dumps({"reward_model": measured | bins | {"guessing": {"loss": 0.414, "accuracy": 0.855}}}))
    text = Page(report.build(tmp_path)).text
    assert all(part in text for part in texts) and "has 0.41 at best" in text
    assert ("tokens by which" in text) == any("by which" in part for part in texts)


def test_the_line_of_guessing_stands_where_guessing_is():
    bins = [{"low": 1, "high": 2, "accuracy": 0.9, "count": 9}]
    middle, high, low = (charts.accuracy_by("Accuracy", bins, "tokens", guess) for guess in (None, 0.855, 0.5))
    assert middle == low != high


def test_whiskers_do_not_vanish_where_all_came_true():
    below, above = charts._wilson(np.array([1.0, 0.0, 0.5]), np.array([10.0, 10.0, 100.0]))
    assert [below[0], above[1]] == pytest.approx([0.2775, 0.2775], abs=1e-3)
    assert [above[0], below[1]] == pytest.approx([0, 0], abs=1e-4)
    assert below[2] == pytest.approx(above[2]) == pytest.approx(0.0962, abs=1e-3)


def test_a_run_without_rl_is_not_partial(tmp_path):
    """What the configuration does not ask for is not missing."""
    stages = "run: {stages: [reward, evaluate]}\nmodel: {source: x}\ndata: {preference: {train: [a]}}\n"
    MetricsLog(tmp_path, tensorboard=False).write("reward", 1, {"loss": 0.69, "accuracy": 0.5})
    (tmp_path / "summary.json").write_text(json.dumps({"reward_model": SUMMARY["reward_model"]}))
    (tmp_path / "config.yaml").write_text(stages)
    assert "partial" not in Page(report.build(tmp_path)).text
    fill(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"reward_model": SUMMARY["reward_model"]}))
    for path in (tmp_path / "samples").glob("*"):
        path.unlink()
    (tmp_path / "config.yaml").write_text(stages.replace("[reward, evaluate]", "[reward, rl, evaluate]"))
    text = Page(report.build(tmp_path)).text
    assert "no figures of sft, rl:" in text and "no samples" in text
    (tmp_path / "config.yaml").write_text(stages.replace("[reward, evaluate]", "[export]"))
    assert Page(report.build(tmp_path)).text.count("no samples") == 1  # what has trained is not forgotten


def test_rows_that_chose_the_checkpoint_are_said():
    for figures, rows in (({"accuracy": 0.8, "pairs": 512}, "pairs"), ({"accuracy": 0.8, "auc": 0.9, "rows": 512}, "rows")):
        (tile,) = headline.tiles({"reward_model": {**figures, "selected_on": 128}}, {})
        assert f"On 512 held-out {rows} (128 of them also chose the checkpoint)" in tile.reading
        (tile,) = headline.tiles({"reward_model": {**figures, "selected_on": 0}}, {})
        assert "checkpoint" not in tile.reading


def test_smoothing_keeps_constants_and_does_not_lag():
    np.testing.assert_allclose(charts.smoothed(np.full(50, 2.5)), 2.5)
    line = np.arange(200.0)
    np.testing.assert_allclose(charts.smoothed(line)[50:150], line[50:150])
    assert charts.smoothed(np.array([3.0])).tolist() == [3.0]


def test_long_runs_give_small_charts():
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 20_001)]
    svg = charts.curves("Loss", rows, {"loss": "training"}, "loss")
    assert svg is not None and len(svg) < 60_000
    assert charts.curves("Loss", rows, {"absent": "x"}, "loss") is None


def test_charts_leave_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.curves("Loss", [{"step": 1, "loss": 0.001}, {"step": 2, "loss": 0.00125}], {"loss": "training"}, "loss")
    assert dict(matplotlib.rcParams) == before


def test_rounding_coordinates_leaves_labels_exact():
    svg = charts.curves("Loss", [{"step": i, "loss": -0.005 * i} for i in range(1, 6)], {"loss": "training"}, "loss")
    assert ">\N{MINUS SIGN}0.0075<" in svg and ">\N{MINUS SIGN}0.0225<" in svg


def test_every_line_is_drawn_and_no_two_look_alike():
    names = [f"reward/{i}" for i in range(7)]
    rows = [{"step": step} | {name: step + i for i, name in enumerate(names)} for step in range(1, 6)]
    svg = charts.curves("Rewards", rows, {name: name for name in names}, "reward")
    assert all(f">{name}</text>" in svg for name in names)
    lines = re.findall(r'style="(fill: none; [^"]*stroke: var\(--c\d\)[^"]*)"', svg)
    assert len(set(lines)) == 7


def test_bins_of_long_texts_have_whole_bounds():
    bins = [{"low": a, "high": b, "accuracy": 0.7, "count": 50} for a, b in ((20.0, 128.0), (128.0, 257.0), (257.0, 1024.0))]
    svg = charts.accuracy_by("Accuracy by length", bins, "tokens")
    assert all(f">{label}<" in svg for label in ("20 to 128", "128 to 257", "257 to 1024"))
